"""Chat: what a release's template can do, and the flags of vLLM with which its vendor serves it."""
