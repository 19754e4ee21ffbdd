"""Scoring layer by layer: weights from the shards, activations and gradients on disk, one layer in memory."""
