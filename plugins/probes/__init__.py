"""Questions that only a process with torch or vLLM can answer, each asked with `python -m`."""
