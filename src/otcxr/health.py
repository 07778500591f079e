"""Is the training healthy? Numbers that tell learning from collapse, and one line that says which it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from otcxr.data.geometry import Correspondence, ViewBatch, correspondence, token_valid
from otcxr.methods.base import Match, Observed
from otcxr.ot import entropy

__all__ = ["Verdict", "correspondence_score", "effective_rank", "observe", "spatial_diversity", "verdict"]


class Verdict(NamedTuple):
    """``healthy`` and the line to show: what is wrong, or the numbers that say nothing is."""

    healthy: bool
    text: str


def effective_rank(rows: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of centred rows (N, d); 1 to min(N - 1, d).

    Source: Roy and Vetterli, EUSIPCO 2007.
    """
    values = torch.linalg.svdvals((rows - rows.mean(0)).double())
    total = float(values.sum())
    return float(entropy(values / total).exp()) if total > 1e-12 else 1.0


def spatial_diversity(tokens: Tensor) -> float:
    """Share of the variance of tokens (B, n, d) that lies within images; 0 for maps that are constant per image."""
    x = tokens.double()
    total = (x - x.mean((0, 1))).square().sum()
    within = (x - x.mean(1, keepdim=True)).square().sum()
    return float(within / total) if float(total) > 1e-12 else 0.0


def correspondence_score(match: Match, true: Correspondence, grid: tuple[int, int]) -> dict[str, float]:
    """Does the plan pair positions that show the same anatomy?

    Over tokens whose true position is known: share whose plan arg-max is at most one cell (in x and in y) from the true
    cell; share that is exactly it; the first weighted by mass; the first for the nearest neighbour by cost; what a
    random valid token would score on this grid; and what pairing equal grid positions would score. The last two tell
    seeing from knowing the place: a network that encodes the position in the view instead of what is there pairs equal
    positions, scores ``hits_same_cell`` and has seen nothing; ``same_cell`` is the share of the plan that does so.

    Args:
        match: The pairing of two views.
        true: From ``correspondence``.
        grid: (height, width) of the second view's tokens.
    Returns: Scores in [0, 1]; empty where no true position is known.
    """
    known = true.known
    if not bool(known.any()):
        return {}
    height, width = grid
    column, row = true.cell % width, true.cell // width

    def near(cell: Tensor) -> Tensor:
        return ((cell % width - column).abs() <= 1) & ((cell // width - row).abs() <= 1)

    by_plan = near(match.plan.argmax(-1))
    absent = match.b <= 0
    by_cost = near(match.cost.masked_fill(absent.unsqueeze(1), float("inf")).argmin(-1))
    cells = torch.arange(height * width, device=known.device)
    around = ((cells % width - column.unsqueeze(-1)).abs() <= 1) & ((cells // width - row.unsqueeze(-1)).abs() <= 1)
    chance = (around & ~absent.unsqueeze(1)).sum(-1) / (~absent).sum(-1, keepdim=True)
    mass = torch.where(known, match.a, 0.0)
    return {
        "hits": float(by_plan[known].double().mean()),
        "exact": float((match.plan.argmax(-1) == true.cell)[known].double().mean()),
        "hits_by_mass": float((mass * by_plan).sum() / mass.sum().clamp_min(torch.finfo(mass.dtype).tiny)),
        "hits_nearest_neighbour": float(by_cost[known].double().mean()),
        "hits_chance": float(chance[known].double().mean()),
        **_same_cell(match, true, near),
    }


def _same_cell(match: Match, true: Correspondence, near: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Share of plan arg-max at the same grid position, how often that is right, and how near it is."""
    n, m = match.plan.shape[-2:]
    if n != m:  # views of different size have no equal positions
        return {}
    own = torch.arange(n, device=match.plan.device).expand(match.plan.shape[:-1])
    known = true.known
    return {
        "same_cell": float((match.plan.argmax(-1) == own)[known].double().mean()),
        "same_cell_true": float((true.cell == own)[known].double().mean()),
        "hits_same_cell": float(near(own)[known].double().mean()),
    }


def observe(observed: Observed, batch: ViewBatch, first_centre: float = 0.5) -> dict[str, float]:
    """Measure what the panel shows; every value is finite.

    Args:
        observed: What the method showed.
        batch: The views it saw.
        first_centre: ``Encoder.first_centre``.
    """
    pooled = observed.pooled.float()
    half = pooled[: len(pooled) // 2]  # one view of each image: two views would count each image twice
    unit = torch.nn.functional.normalize(pooled, dim=-1)
    unit_half = half - half.mean(0)
    deviation = (unit_half.square().sum(0) / max(1, len(half) - 1)).sqrt()
    alive = deviation > 1e-8
    cor = (unit_half[:, alive] / deviation[alive]).T @ (unit_half[:, alive] / deviation[alive]) / max(1, len(half) - 1)
    off = cor - torch.diag(cor.diagonal())
    pairs = max(1, cor.shape[0] * (cor.shape[0] - 1))
    out = {
        "effective_rank": effective_rank(half),
        "effective_rank_limit": float(min(len(half) - 1, half.shape[1])),
        "effective_rank_tokens": effective_rank(observed.tokens.flatten(0, 1).float()),
        "embedding_std": float(unit.std(0).mean()),
        "embedding_std_reference": 1 / math.sqrt(pooled.shape[1]),
        "correlation": float(off.abs().sum() / pairs),
        "spatial_diversity": spatial_diversity(observed.tokens),
    }
    if observed.match is not None:
        out |= _observe_match(observed.match, batch, first_centre)
    return out


def _observe_match(match: Match, batch: ViewBatch, first_centre: float) -> dict[str, float]:
    n, m = match.plan.shape[-2:]
    grid_s, grid_t = _grid(n, batch.views[0]), _grid(m, batch.views[1])
    valid_s, valid_t = token_valid(batch.valid[0], *grid_s), token_valid(batch.valid[1], *grid_t)
    true = correspondence(batch.geometry[0], batch.geometry[1], valid_s, valid_t, grid_s, grid_t, first_centre)
    # with soft marginals (``reach``) some mass stays where it is: what is moved is judged by its own marginals
    moved = match.plan.sum((-1, -2), keepdim=True)
    plan = match.plan / moved.clamp_min(torch.finfo(match.plan.dtype).tiny)
    h_rows, h_columns = entropy(plan.sum(-1)), entropy(plan.sum(-2))
    return {
        "entropy_mu": float(entropy(match.a).mean()),
        "entropy_nu": float(entropy(match.b).mean()),
        "entropy_plan": float(entropy(plan, dims=2).mean()),
        "entropy_independent": float((h_rows + h_columns).mean()),
        "entropy_one_to_one": float(torch.maximum(h_rows, h_columns).mean()),
        "mass_moved": float(moved.mean()),
        "entropy_uniform": float(valid_s.sum(-1).double().log().mean()),
        **correspondence_score(match, true, grid_t),
    }


def _grid(tokens: int, view: Tensor) -> tuple[int, int]:
    """Height and width of the token grid of a view: of all grids with so many tokens, that of the nearest shape."""
    square = tokens * view.shape[-2] / view.shape[-1]
    heights = (h for h in range(1, tokens + 1) if tokens % h == 0)
    height = min(heights, key=lambda h: abs(math.log(h * h / square)))
    return height, tokens // height


def verdict(now: Mapping[str, float]) -> Verdict:
    """Judge the health numbers of one step, as ``observe`` gives them."""
    problems = [f"{name} is {value}" for name, value in now.items() if not math.isfinite(value)]
    if now["embedding_std"] < 0.05 * now["embedding_std_reference"]:
        problems.append("collapse: all images have nearly the same embedding")
    elif now["effective_rank"] < max(1.5, 0.03 * now["effective_rank_limit"]):
        problems.append(f"dimensional collapse: effective rank {now['effective_rank']:.1f} of "
                        f"{now['effective_rank_limit']:.0f}")  # fmt: skip
    if now["spatial_diversity"] < 0.05:
        problems.append(f"spatial collapse: only {now['spatial_diversity']:.1%} of the token variance is within images")
    if "entropy_plan" in now:
        least = now["entropy_one_to_one"]
        shared = (now["entropy_independent"] - now["entropy_plan"]) / max(1e-9, now["entropy_independent"] - least)
        if shared < 0.05:
            problems.append("transport in name only: the plan is the independent coupling of the masses")
        if math.exp(now["entropy_mu"] - now["entropy_uniform"]) < 0.15:
            problems.append(f"mass collapse: the mass sits on {math.exp(now['entropy_mu']):.1f} of "
                            f"{math.exp(now['entropy_uniform']):.0f} tokens")  # fmt: skip
    if now.get("same_cell", 0.0) > 0.8 and now["same_cell"] > now["same_cell_true"] + 0.3:
        problems.append(f"position shortcut: {now['same_cell']:.0%} of positions are paired with the same place in the "
                        f"other view, where {now['same_cell_true']:.0%} belong")  # fmt: skip
    if problems:
        return Verdict(False, "; ".join(problems))
    text = f"no collapse seen: effective rank {now['effective_rank']:.1f} of {now['effective_rank_limit']:.0f}, "
    text += f"{now['spatial_diversity']:.0%} of token variance within images"
    if "hits" in now:
        text += f", correspondence {now['hits']:.2f} (nearest neighbour {now['hits_nearest_neighbour']:.2f}, "
        text += f"chance {now['hits_chance']:.2f}"
        text += f", same place {now['hits_same_cell']:.2f})" if "hits_same_cell" in now else ")"
        if now["hits"] <= now.get("hits_same_cell", now["hits_chance"]):
            text += "; the plan does not yet pair better than equal places would"
    return Verdict(True, text)
