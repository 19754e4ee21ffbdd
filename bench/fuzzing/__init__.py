"""Requests at random for a running engine, and the smallest one that goes wrong."""
