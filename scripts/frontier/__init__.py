"""Which score prunes best: held-out loss against bytes."""
