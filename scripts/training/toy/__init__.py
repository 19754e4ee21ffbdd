"""The toy family: tokenizer, teacher and drafters."""
