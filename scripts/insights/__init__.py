"""Pruning in pictures: scores and pruned shares layer by layer, and benchmarks against what is pruned."""
