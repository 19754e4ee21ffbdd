"""What a router's policy does to prefix caches and to load, simulated for many replicas."""
