"""Entropic optimal transport for batches of small problems. Usable alone: needs torch and nothing else of otcxr."""

from otcxr.ot.costs import cosine_cost
from otcxr.ot.sinkhorn import Transport, entropy, sinkhorn

__all__ = ["Transport", "cosine_cost", "entropy", "sinkhorn"]
