"""A request between its client and its engine."""
