"""Losses as pure functions on tensors. All of them compute in at least float32, with autocast off."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "covariance",
    "masked_mean",
    "nt_xent",
    "nt_xent_chance",
    "squared_difference",
    "variance",
    "variance_at_positions",
    "variance_within",
]

_EPSILON = 1e-4  # inside the square root: keeps the gradient of a standard deviation finite at 0 (VICReg)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy of 2N embeddings, each pair being the other's positive.

        l_i = -ln( exp(z_i.z_p(i) / t) / sum_{k != i} exp(z_i.z_k / t) ),   L = mean_i l_i,   z = x / |x|

    Args:
        first, second: Embeddings (N, d) of the two views; row i of one is the positive of row i of the other.
        temperature: t > 0.
    Returns: A scalar; ln(2N - 1) when the embeddings say nothing (``nt_xent_chance``).
    Source: Chen et al., ICML 2020 (SimCLR), equation 1.
    """
    with torch.autocast(first.device.type, enabled=False):
        z = torch.nn.functional.normalize(torch.cat((_wide(first), _wide(second))), dim=-1)
        logits = z @ z.T / temperature
        logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
        positive = torch.arange(len(z), device=z.device).roll(len(first))
        return torch.nn.functional.cross_entropy(logits, positive)


def nt_xent_chance(pairs: int) -> float:
    """The value of ``nt_xent`` for embeddings without information: ln(2N - 1)."""
    return math.log(2 * pairs - 1)


def squared_difference(first: Tensor, second: Tensor) -> Tensor:
    """Mean over rows and dimensions of (first - second)^2, both (N, d). Source: VICReg, equation 5."""
    with torch.autocast(first.device.type, enabled=False):
        return (_wide(first) - _wide(second)).square().mean()


def variance(rows: Tensor, target: float = 1.0) -> Tensor:
    """Hinge that keeps the standard deviation of every dimension over the rows at ``target`` or above.

        v = mean_d max(0, target - sqrt(Var_d + 1e-4)),   Var unbiased

    Args:
        rows: (N, d), N >= 2.
    Source: Bardes et al., ICLR 2022 (VICReg), equations 1 and 2.
    """
    with torch.autocast(rows.device.type, enabled=False):
        deviation = (_wide(rows).var(dim=0) + _EPSILON).sqrt()
        return (target - deviation).clamp_min(0).mean()


def covariance(rows: Tensor) -> Tensor:
    """Penalty on correlated dimensions.

        c = sum_{i != j} Cov_ij^2 / d,   Cov = X^T X / (N - 1), X centred

    Args:
        rows: (N, d), N >= 2.
    Source: Bardes et al., ICLR 2022 (VICReg), equations 3 and 4.
    """
    with torch.autocast(rows.device.type, enabled=False):
        centred = _wide(rows) - _wide(rows).mean(dim=0)
        cov = centred.T @ centred / (len(rows) - 1)
        return (cov.square().sum() - cov.diagonal().square().sum()) / rows.shape[1]


def variance_at_positions(tokens: Tensor, valid: Tensor, target: float = 1.0) -> Tensor:
    """``variance`` over the batch at each position, averaged over positions that at least two images fill.

    Args:
        tokens: (B, n, d).
        valid: (B, n) bool; other tokens are no rows.
    """
    return _masked_variance(tokens.transpose(0, 1), valid.transpose(0, 1), target)


def variance_within(tokens: Tensor, valid: Tensor, target: float = 1.0) -> Tensor:
    """``variance`` over the tokens of each image, averaged over images with at least two valid tokens.

    It forbids a map that is constant within each image, the cheapest way to make transport free of cost.

    Args:
        tokens: (B, n, d).
        valid: (B, n) bool; other tokens are no rows.
    """
    return _masked_variance(tokens, valid, target)


def _masked_variance(tokens: Tensor, valid: Tensor, target: float) -> Tensor:
    """Hinge on the deviation over the second dimension of (G, N, d), mean over groups with two valid rows or more."""
    with torch.autocast(tokens.device.type, enabled=False):
        x = _wide(tokens)
        weight = valid.unsqueeze(-1).to(x.dtype)
        count = weight.sum(1)  # (G, 1)
        mean = (x * weight).sum(1) / count.clamp_min(1)
        spread = ((x - mean.unsqueeze(1)).square() * weight).sum(1) / (count - 1).clamp_min(1)
        hinge = (target - (spread + _EPSILON).sqrt()).clamp_min(0).mean(-1)
        enough = (count.squeeze(-1) >= 2).to(hinge.dtype)
        return (hinge * enough).sum() / enough.sum().clamp_min(1)


def masked_mean(tokens: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid tokens of each image: (B, n, d), (B, n) bool -> (B, d), in the type of the tokens."""
    with torch.autocast(tokens.device.type, enabled=False):
        x = _wide(tokens)
        weight = valid.unsqueeze(-1).to(x.dtype)
        return ((x * weight).sum(1) / weight.sum(1).clamp_min(1)).to(tokens.dtype)
