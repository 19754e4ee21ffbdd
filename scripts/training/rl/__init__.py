"""GRPO against a served model."""
