"""`laguna compact`: what of the routed experts goes, and what is stored of the rest."""
