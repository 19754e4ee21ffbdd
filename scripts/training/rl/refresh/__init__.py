"""A drafter that learns beside a policy: replay, refresh, gate, and the way back."""
