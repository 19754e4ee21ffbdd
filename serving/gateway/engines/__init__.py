"""The engines behind a gateway: which one takes a request, whether it is well, what it serves, which weights it has."""
