"""Whether proposals leave every token of masked diffusion as it is, under any reference."""
