"""How the processes of an engine come about: vLLM's API server, and the engine core that it starts."""
