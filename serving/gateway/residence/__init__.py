"""Engines that the gateway owns: which are in memory, who waits for them, and how they start and end."""
