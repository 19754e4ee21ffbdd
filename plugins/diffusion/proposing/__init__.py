"""Which states share the target's pass: proposers, their calibration, and a budget over all requests."""
