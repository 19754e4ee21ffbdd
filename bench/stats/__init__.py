"""Intervals and tests: of ratios, proportions, two samples, and of texts that should be equal."""
