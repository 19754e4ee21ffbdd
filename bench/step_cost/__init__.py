"""What a decoding step costs with a drafter and without, and which part of it."""
