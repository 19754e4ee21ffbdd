"""The sweep over speculation depths: its points, the cost model behind the choice, ablations, mixed load."""
