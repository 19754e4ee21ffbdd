"""What a decode is, apart from any model: canvases, states, references, and a state's one successor."""
