"""What decides a dense student's quality, on the toy family: where it starts, K, and what it is distilled on."""
