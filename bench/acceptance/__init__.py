"""A drafter's acceptance by γ and position, as it is published for a model."""
