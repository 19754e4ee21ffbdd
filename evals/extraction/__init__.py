"""From the text that a model wrote to a program."""
