"""Networks without training logic."""

__all__: list[str] = []
