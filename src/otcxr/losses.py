"""Losses as pure functions on tensors. All of them compute in at least float32, with autocast off.

Where several processes train together, what couples the images of a batch (negatives, variance, covariance) is taken
over all of them, with gradient: see ``otcxr.distributed``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otcxr.distributed import all_sum, first_row, gather_rows, mean_of_rows, processes

__all__ = [
    "covariance",
    "covariance_at_positions",
    "cross_correlation",
    "distillation",
    "info_nce",
    "masked_mean",
    "negative_cosine",
    "nt_xent",
    "nt_xent_chance",
    "squared_difference",
    "variance",
    "variance_at_positions",
    "variance_within",
    "weighted_sum",
]

_EPSILON = 1e-4  # inside the square root: keeps the gradient of a standard deviation finite at 0 (VICReg)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy of 2N embeddings, each pair being the other's positive.

        l_i = -ln( exp(z_i.z_p(i) / t) / sum_{k != i} exp(z_i.z_k / t) ),   L = mean_i l_i,   z = x / |x|

    Args:
        first, second: Embeddings (B, d) of the two views; row i of one is the positive of row i of the other.
        temperature: t > 0.
    Returns: A scalar, the mean over the own rows, against the N pairs of all processes; ln(2N - 1) when the embeddings
        say nothing (``nt_xent_chance``).
    Source: Chen et al., ICML 2020 (SimCLR), equation 1.
    """
    with torch.autocast(first.device.type, enabled=False):
        z = torch.nn.functional.normalize(torch.cat((_wide(first), _wide(second))), dim=-1)
        own, pairs = len(first), len(first) * processes()
        every = z if processes() == 1 else torch.cat([gather_rows(part) for part in z.chunk(2)])
        # where the own rows lie among all of them: views of this process in the first, then in the second half
        place = first_row(own) + torch.arange(own, device=z.device)
        place = torch.cat((place, pairs + place))
        logits = z @ every.T / temperature
        logits = logits.scatter(1, place.unsqueeze(1), float("-inf"))
        return torch.nn.functional.cross_entropy(logits, (place + pairs) % (2 * pairs))


def nt_xent_chance(pairs: int) -> float:
    """The value of ``nt_xent`` for embeddings without information: ln(2N - 1)."""
    return math.log(2 * pairs - 1)


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Cross entropy of recognising a query's key among earlier keys.

        l = -ln( exp(q.k / t) / (exp(q.k / t) + sum_j exp(q.n_j / t)) ),   q, k, n of length 1

    Args:
        query: (..., d), need not have length 1.
        key: (..., d), likewise; no gradient reaches it.
        queue: (K, d), likewise; the negatives n_j.
        temperature: t > 0.
    Returns: (...,) losses; about ln(K + 1) where the embeddings say nothing.
    Source: He et al., CVPR 2020 (MoCo), arXiv:1911.05722, equation 1.
    """
    with torch.autocast(query.device.type, enabled=False):
        q, k, n = (torch.nn.functional.normalize(_wide(x), dim=-1) for x in (query, key.detach(), queue.detach()))
        positive = (q * k).sum(-1, keepdim=True)
        logits = torch.cat((positive, q @ n.T), dim=-1) / temperature
        return logits.logsumexp(-1) - logits[..., 0]


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-cos(p, sg z), the mean over rows (N, d); in [-1, 1], about 0 where they have nothing to do with each other.

    No gradient reaches ``target``. Source: Chen and He, CVPR 2021 (SimSiam), arXiv:2011.10566, equation 1; BYOL's
    squared distance of vectors of length 1 is 2 + 2 of it.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        return -torch.nn.functional.cosine_similarity(_wide(prediction), _wide(target.detach()), dim=-1).mean()


def cross_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of the dimensions of two views over the images of all processes.

        C_ij = sum_b x_bi y_bj / N,   x and y standardised over the batch: mean 0, biased variance 1 (plus 1e-5)

    Args:
        first, second: (B, d) embeddings of the two views.
    Returns: (d, d), of mean square about 1 / N where they have nothing to do with each other.
    Source: Zbontar et al., ICML 2021 (Barlow Twins), arXiv:2103.03230, equation 2.
    """
    with torch.autocast(first.device.type, enabled=False):
        x, y = (_standardised(rows) for rows in (first, second))
        total: Tensor = all_sum(x.T @ y) / (len(x) * processes())
        return total


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy of a student's scores with a teacher's probabilities, the mean over rows.

        H = -sum_k p_k ln softmax(s)_k

    Args:
        student: (N, K) scores, already divided by the temperature.
        teacher: (N, K) probabilities; no gradient reaches them.
    Returns: A scalar; ln K where the student says nothing.
    Source: Caron et al., ICCV 2021 (DINO), arXiv:2104.14294, equation 2.
    """
    with torch.autocast(student.device.type, enabled=False):
        return -(_wide(teacher.detach()) * _wide(student).log_softmax(-1)).sum(-1).mean()


def squared_difference(first: Tensor, second: Tensor) -> Tensor:
    """Mean over rows and dimensions of (first - second)^2, both (N, d). Source: VICReg, equation 5."""
    with torch.autocast(first.device.type, enabled=False):
        return (_wide(first) - _wide(second)).square().mean()


def variance(rows: Tensor, target: float = 1.0) -> Tensor:
    """Hinge that keeps the standard deviation of every dimension over the rows at ``target`` or above.

        v = mean_d max(0, target - sqrt(Var_d + 1e-4)),   Var unbiased

    Args:
        rows: (N, d), N >= 2 over all processes.
    Source: Bardes et al., ICLR 2022 (VICReg), equations 1 and 2.
    """
    with torch.autocast(rows.device.type, enabled=False):
        if processes() == 1:
            spread = _wide(rows).var(dim=0)
        else:
            centred, count = _centred(rows)
            spread = all_sum(centred.square().sum(0)) / (count - 1)
        return (target - (spread + _EPSILON).sqrt()).clamp_min(0).mean()


def covariance(rows: Tensor) -> Tensor:
    """Penalty on correlated dimensions.

        c = sum_{i != j} Cov_ij^2 / d,   Cov = X^T X / (N - 1), X centred

    Args:
        rows: (N, d), N >= 2 over all processes.
    Source: Bardes et al., ICLR 2022 (VICReg), equations 3 and 4.
    """
    with torch.autocast(rows.device.type, enabled=False):
        centred, count = _centred(rows)
        cov = all_sum(centred.T @ centred) / (count - 1)
        return (cov.square().sum() - cov.diagonal().square().sum()) / rows.shape[1]


def variance_at_positions(tokens: Tensor, valid: Tensor, target: float = 1.0) -> Tensor:
    """``variance`` over the batch at each position, averaged over positions that at least two images fill.

    Args:
        tokens: (B, n, d).
        valid: (B, n) bool; other tokens are no rows.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        hinge, enough = _masked_hinge(tokens, valid, target, over_images=True)
        return (hinge * enough).sum() / enough.sum().clamp_min(1)


def covariance_at_positions(tokens: Tensor, valid: Tensor) -> Tensor:
    """``covariance`` over the batch at each position, averaged over positions that at least two images fill.

    Args:
        tokens: (B, n, d).
        valid: (B, n) bool; other tokens are no rows.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        x = _wide(tokens).transpose(0, 1)  # (n, B, d)
        weight = valid.T.unsqueeze(-1).to(x.dtype)
        count = all_sum(weight.sum(1))  # (n, 1)
        centred = (x - (all_sum((x * weight).sum(1)) / count.clamp_min(1)).unsqueeze(1)) * weight
        cov = all_sum(centred.mT @ centred) / (count - 1).clamp_min(1).unsqueeze(-1)
        off = cov.square().sum((-1, -2)) - cov.diagonal(dim1=-2, dim2=-1).square().sum(-1)
        enough = (count.squeeze(-1) >= 2).to(off.dtype)
        return (off * enough).sum() / enough.sum().clamp_min(1) / tokens.shape[-1]


def variance_within(tokens: Tensor, valid: Tensor, target: float = 1.0) -> Tensor:
    """``variance`` over the tokens of each image, averaged over images with at least two valid tokens.

    It forbids a map that is constant within each image, the cheapest way to make transport free of cost.

    Args:
        tokens: (B, n, d).
        valid: (B, n) bool; other tokens are no rows.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        hinge, enough = _masked_hinge(tokens, valid, target, over_images=False)
        return all_sum((hinge * enough).sum()) / all_sum(enough.sum()).clamp_min(1)


def _masked_hinge(tokens: Tensor, valid: Tensor, target: float, *, over_images: bool) -> tuple[Tensor, Tensor]:
    """Hinge on the deviation of (B, n, d) over images, at each position (n,), or over positions, in each image (B,).

    Returns: The hinge, and 1 where two valid rows or more took part, else 0.
    """
    dim, total = (0, all_sum) if over_images else (1, _same)
    x = _wide(tokens)
    weight = valid.unsqueeze(-1).to(x.dtype)
    count = total(weight.sum(dim))
    mean = total((x * weight).sum(dim)) / count.clamp_min(1)
    spread = total(((x - mean.unsqueeze(dim)).square() * weight).sum(dim)) / (count - 1).clamp_min(1)
    hinge = (target - (spread + _EPSILON).sqrt()).clamp_min(0).mean(-1)
    return hinge, (count.squeeze(-1) >= 2).to(hinge.dtype)


def _same(x: Tensor) -> Tensor:
    return x


def _standardised(rows: Tensor) -> Tensor:
    """Rows with mean 0 and biased variance 1 over all processes; a constant dimension becomes 0."""
    centred, count = _centred(rows)
    spread = all_sum(centred.square().sum(0)) / count
    return centred * (spread + 1e-5).rsqrt()


def _centred(rows: Tensor) -> tuple[Tensor, Tensor | int]:
    """Rows (N_w, d) minus the mean of the rows of all processes, and the number of all rows."""
    x = _wide(rows)
    mean, count = mean_of_rows(x)
    return x - mean, count


def masked_mean(tokens: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid tokens of each image: (B, n, d), (B, n) bool -> (B, d), in the type of the tokens."""
    with torch.autocast(tokens.device.type, enabled=False):
        x = _wide(tokens)
        weight = valid.unsqueeze(-1).to(x.dtype)
        return ((x * weight).sum(1) / weight.sum(1).clamp_min(1)).to(tokens.dtype)


def weighted_sum(tokens: Tensor, mass: Tensor) -> Tensor:
    """sum_i mass_i tokens_i of each image: (B, n, d), (B, n) -> (B, d), in the type of the tokens."""
    with torch.autocast(tokens.device.type, enabled=False):
        x = _wide(tokens)
        return torch.einsum("bn,bnd->bd", mass.to(x.dtype), x).to(tokens.dtype)
