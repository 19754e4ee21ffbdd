"""Text to train, score and measure on."""
