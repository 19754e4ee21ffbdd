"""Traffic that meets the prefix cache, and what is reported about it."""
