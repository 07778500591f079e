"""Entropic optimal transport for batches of small problems. Usable alone: needs torch and nothing else of otcxr."""

from otcxr.ot.costs import at_least_float32, cosine_cost
from otcxr.ot.divergence import Divergence, sinkhorn_divergence
from otcxr.ot.ragged import pad_problems
from otcxr.ot.sinkhorn import backends, sinkhorn
from otcxr.ot.transport import Transport, entropy

__all__ = [
    "Divergence",
    "Transport",
    "at_least_float32",
    "backends",
    "cosine_cost",
    "entropy",
    "pad_problems",
    "sinkhorn",
    "sinkhorn_divergence",
]
