"""Rollouts as they were: what a request saw and got, in tokens, kept in a file of bounded size."""
