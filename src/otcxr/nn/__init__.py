"""Networks without training logic."""
