"""Several processes that are one gateway: they take connections of one port, and share limits, metrics and status."""
