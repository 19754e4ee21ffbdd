"""How far trainer and engine are apart on a token, and what is done about it: replayed experts, weighed tokens."""
