"""How much each atom of an expert matters, and what pruning costs."""
