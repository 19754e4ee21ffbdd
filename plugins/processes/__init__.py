"""How the processes of an engine come about: vLLM's API server, the engine core that it starts, and its groups."""
