"""What it costs to change models in a gateway with room for one of them."""
