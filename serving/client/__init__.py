"""Asking an OpenAI-compatible endpoint: streams with their timing, log-probabilities, and vLLM's counters."""
