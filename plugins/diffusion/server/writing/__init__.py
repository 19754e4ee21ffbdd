"""What is answered: its objects, their log-probabilities, whole and as events."""
