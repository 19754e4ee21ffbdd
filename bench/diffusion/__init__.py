"""Exact speculation for masked diffusion models: which proposals pay."""
