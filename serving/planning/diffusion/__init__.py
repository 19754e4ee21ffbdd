"""What serving a masked diffusion model takes: its own engine (plugins/diffusion/server) in the place of vLLM."""
