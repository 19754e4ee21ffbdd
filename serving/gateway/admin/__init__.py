"""The admin port: what the gateway is doing, its models and keys, and the weights of its engines."""
