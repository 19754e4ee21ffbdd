"""The HTTP server over the engine: OpenAI's completions and chats, as vLLM answers them."""
