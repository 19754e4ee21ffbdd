"""Drafters: do they fit, how many tokens do they propose, and how many of those are accepted."""
