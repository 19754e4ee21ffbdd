"""What a model on Ray Serve does under load, when replicas die, come and go, and when its weights change."""
