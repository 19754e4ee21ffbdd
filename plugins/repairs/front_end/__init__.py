"""Repairs of what checks requests and answers them, on every device."""
