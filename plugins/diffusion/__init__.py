"""Masked diffusion language models (LLaDA): the model, its reference decodes, and exact speculation on them."""
