"""Is speculative decoding lossless here: passes, controls, float32 rescoring, and the verdict."""
