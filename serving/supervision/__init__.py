"""The process between us and vLLM, after which nothing of vLLM is left, and the log that it writes."""
