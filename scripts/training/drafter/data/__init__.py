"""What a drafter learns from: answers of its target, and the hidden states of them."""
