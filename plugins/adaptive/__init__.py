"""`--gamma adaptive` on a CPU: how many tokens are drafted is decided before every step, down to none."""
