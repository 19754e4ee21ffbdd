"""The dense student of a mixture of experts, and its distillation."""
