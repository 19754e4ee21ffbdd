"""How weights are stored: which format a config.json describes, and the arithmetic of FP8 with scales."""
