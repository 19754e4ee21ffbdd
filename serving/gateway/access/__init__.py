"""Who may ask, for what and how much: keys, their limits and budgets, and what was used of them."""
