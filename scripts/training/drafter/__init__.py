"""Drafters that are trained on what their target says."""
