"""Checkpoints made of checkpoints: what `laguna compact`, `unpad`, `pad` and `drafter` do."""
