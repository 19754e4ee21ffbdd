"""Rollouts for reinforcement learning: sampled groups, weight updates, and where speculation breaks even."""
