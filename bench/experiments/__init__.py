"""The campaign: what is to be run on a GPU, in order of worth, and what came of it."""
