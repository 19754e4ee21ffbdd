"""Distillation by a teacher's text into a student with another tokenizer, as DANTE-Mosaic's page describes it."""
