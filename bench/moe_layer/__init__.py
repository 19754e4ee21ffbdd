"""Layers of a mixture for timing one kernel against another, and the figure."""
