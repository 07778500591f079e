"""Entropic optimal transport for batches of small problems. Usable alone: needs torch and nothing else of otcxr."""

from otcxr.ot.costs import at_least_float32, cosine_cost
from otcxr.ot.sinkhorn import Transport, entropy, sinkhorn

__all__ = ["Transport", "at_least_float32", "cosine_cost", "entropy", "sinkhorn"]
