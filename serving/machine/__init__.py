"""The machine: which vLLM and which device it has, and how its memory is used."""
