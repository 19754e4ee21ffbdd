"""The teacher's top-K logits on disk: their format, and who writes them."""
