"""What every command stands on, once each: exit statuses, signals, progress, files, journals, environment, figures.

Imports nothing of the project above it (tests/test_layout.py).
"""
