"""Models on Ray Serve: replicas on many machines, each with one engine of its own."""
