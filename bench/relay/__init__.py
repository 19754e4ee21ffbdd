"""Load and mock engines for measuring a relay: what the gateway adds."""
