"""Masked diffusion models: the toy pair, and a draft made of a larger model by pruning and distillation."""
