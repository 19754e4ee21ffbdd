"""The same GRPO run with a frozen drafter, with one that learns, and with none."""
