"""What is seen of a gateway: metrics, logs, usage. Imports nothing of the relay."""
