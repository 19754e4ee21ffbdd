"""Sampled completions of two arms: drawing them, comparing their distributions, reports."""
