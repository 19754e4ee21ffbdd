"""DANTE's pipeline: cache of a teacher's answers, training, ablation, and the toy's proof."""
