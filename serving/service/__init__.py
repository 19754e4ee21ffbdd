"""`laguna serve` while it runs: an engine that is kept running, and the gateway in front of it."""
