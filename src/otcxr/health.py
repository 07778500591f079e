"""Is the training healthy? Numbers that tell learning from collapse, and one line that says which it is.

The numbers are 0-dimensional tensors until ``observe`` moves all of them to the host at once: one wait for the device
a look, beside those that the eigenvalue solver itself needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from otcxr.data.geometry import Correspondence, ViewBatch, correspondence, token_valid
from otcxr.methods.base import Match, Observed
from otcxr.ot import at_least_float32, entropy

__all__ = ["Verdict", "Watch", "correspondence_score", "effective_rank", "observe", "spatial_diversity", "verdict"]

_TOKEN_ROWS = 512  # of a batch, whose effective rank is computed
_SCORES = (
    "hits",
    "exact",
    "hits_by_mass",
    "hits_nearest_neighbour",
    "hits_chance",
    "same_cell",
    "same_cell_true",
    "hits_same_cell",
)


class Verdict(NamedTuple):
    """``healthy`` and the line to show: what is wrong, or the numbers that say nothing is.

    ``notes`` repeats from the line of a healthy run what is not as good as it should become.
    """

    healthy: bool
    text: str
    notes: tuple[str, ...] = ()


class Watch:
    """Turn a series of verdicts into what to do about them.

    It holds plain numbers only, so that a checkpoint can keep them: ``state`` and ``load``.

    Args:
        patience: Looks in a row that must be unhealthy before "stop"; 0 never stops.
        after_step: Looks at steps up to this one (the warm-up) do not count towards ``patience``; they do warn.
    Raises: ValueError: a negative number.
    """

    def __init__(self, patience: int, after_step: int) -> None:
        if patience < 0 or after_step < 0:
            raise ValueError(f"patience and after_step must be >= 0, received {patience} and {after_step}")
        self.patience, self.after_step = patience, after_step
        self._unhealthy = False
        self._looks = 0  # unhealthy ones in a row, after the warm-up

    def see(self, step: int, verdict: Verdict) -> Literal["", "warn", "recovered", "stop"]:
        """Take in the verdict of a step.

        Returns: "stop": unhealthy for ``patience`` looks in a row, and again at every unhealthy look after that.
            "warn": the verdict has turned unhealthy. "recovered": it has turned healthy again. "": nothing new.
        """
        before, self._unhealthy = self._unhealthy, not verdict.healthy
        if verdict.healthy:
            self._looks = 0
            return "recovered" if before else ""
        self._looks += step > self.after_step
        if self.patience and self._looks >= self.patience:
            return "stop"
        return "" if before else "warn"

    def state(self) -> dict[str, int]:
        """What has been seen, for a checkpoint; the settings are not in it."""
        return {"unhealthy": int(self._unhealthy), "looks": self._looks}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``."""
        self._unhealthy, self._looks = bool(state["unhealthy"]), int(state["looks"])


# --- ranks and diversity ---------------------------------------------------------------------------------------------


def effective_rank(rows: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of centred rows (N, d); 1 to min(N - 1, d).

        s_k = sqrt(eigenvalue k of X X^T or X^T X, the smaller one, in float64),   p = s / sum s,   exp(-sum p ln p)

    Values that rounding alone would give count as zero: those of a random matrix with the relative error of the rows'
    dtype, and those below sqrt(k eps) = 3e-7 of the largest (k = 512), which the square cannot tell from zero. Beside
    a singular value decomposition this changes the rank by less than 1e-6 of it for spectra over four orders of
    magnitude, by at most 1 % where many values lie at that limit.

    Args:
        rows: (N, d), any real dtype.
    Returns: 1 for rows that are all the same, and for a single one; nan for rows that are not finite.
    Cost: N d min(N, d) for the product and min(N, d)^3 for its eigenvalues; on the device of the rows.
    Source: Roy and Vetterli, EUSIPCO 2007.
    """
    return float(_effective_rank(rows))


def _effective_rank(rows: Tensor, present: Tensor | None = None) -> Tensor:
    """``effective_rank`` of the rows that are ``present`` (N,); the others count for nothing."""
    resolution = _resolution(rows)
    x = rows.double()
    weight = x.new_ones(len(x)) if present is None else present.to(x.dtype)
    count = weight.sum().clamp_min(1)
    size = (weight @ x.square().sum(1)).sqrt()
    x = (x - (weight @ x) / count) * weight.unsqueeze(1)
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    finite = gram.isfinite().all()
    squares = torch.linalg.eigvalsh(gram.where(finite, 0.0)).clamp_min(0)  # the solver refuses nan
    # a matrix of independent errors r: largest singular value near (sqrt(N) + sqrt(d)) r; a rounded value is off by
    # 0.3 units of resolution
    rounding = 0.3 * resolution * size * (count.rsqrt() + x.shape[1] ** -0.5)
    unresolved = (len(gram) * torch.finfo(torch.float64).eps * squares.amax()).sqrt()
    values = squares.sqrt()
    values = values.where(values > torch.maximum(rounding, unresolved), 0.0)
    total = values.sum()
    rank = entropy(values / total.where(total > 0, 1.0)).exp()
    return rank.where(finite, math.nan)


def _resolution(x: Tensor) -> float:
    """Relative distance between neighbouring numbers of a dtype."""
    return float(torch.finfo(x.dtype).eps) if x.is_floating_point() else 0.0


def _sample(tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """At most ``_TOKEN_ROWS`` tokens, evenly over images and positions and always the same ones: rows and validity.

    Row i is token (i * step) mod (B n) for a step near the golden section of B n and without a common factor with it:
    no token comes twice, every position is as frequent as any other, and every stretch of images as any of its length.
    A plain stride that shares a factor with the width of the grid would see some of its columns only.
    """
    images, n = tokens.shape[:2]
    total = images * n
    if total <= _TOKEN_ROWS:
        return tokens.flatten(0, 1), valid.flatten()
    step = round(total * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, total) > 1:
        step += 1
    at = torch.arange(_TOKEN_ROWS, device=tokens.device) * step % total
    image, position = at // n, at % n
    return tokens[image, position], valid[image, position]


def spatial_diversity(tokens: Tensor) -> float:
    """Share of the variance of tokens (B, n, d) that lies within images; 0 for maps that are constant per image."""
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return float(_spatial_diversity(tokens, valid))


def _spatial_diversity(tokens: Tensor, valid: Tensor) -> Tensor:
    """``spatial_diversity`` of the valid tokens (B, n)."""
    x = at_least_float32(tokens)
    present = valid.sum(1, keepdim=True).double()  # (B, 1)
    means = (x * valid.unsqueeze(-1)).sum(1) / present.clamp_min(1).to(x.dtype)  # (B, d)
    deviation = (x - means.unsqueeze(1)).square_().sum(-1, dtype=torch.float64)
    within = (deviation * valid).sum()
    centre = (present * means).sum(0) / present.sum().clamp_min(1)
    between = (present * (means - centre).square()).sum()
    total = within + between
    size = (present * means.double().square()).sum() + within
    # what varies by less than the rounding of the numbers does not vary
    varies = (total > _resolution(tokens) ** 2 * size) | total.isnan()
    return (within / total.where(varies, 1.0)).where(varies, 0.0)


# --- correspondence --------------------------------------------------------------------------------------------------


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
    return _to_host(_correspondence_score(match, true, grid))


def _correspondence_score(match: Match, true: Correspondence, grid: tuple[int, int]) -> dict[str, Tensor]:
    """``correspondence_score`` on the device; shares are nan where no true position is known."""
    known = true.known
    count = known.sum()
    height, width = grid
    column, row = true.cell % width, true.cell // width

    def near(cell: Tensor) -> Tensor:
        return ((cell % width - column).abs() <= 1) & ((cell // width - row).abs() <= 1)

    def share(value: Tensor) -> Tensor:
        return (value * known).sum(dtype=torch.float64) / count  # 0 / 0 = nan

    paired = match.plan.argmax(-1)
    by_plan = near(paired)
    absent = match.b <= 0
    by_cost = near(match.cost.masked_fill(absent.unsqueeze(1), float("inf")).argmin(-1))
    cells = torch.arange(height * width, device=known.device)
    around = ((cells % width - column.unsqueeze(-1)).abs() <= 1) & ((cells // width - row.unsqueeze(-1)).abs() <= 1)
    chance = (around & ~absent.unsqueeze(1)).sum(-1) / (~absent).sum(-1, keepdim=True).clamp_min(1)
    mass = torch.where(known, match.a, 0.0)
    by_mass = (mass * by_plan).sum() / mass.sum().clamp_min(torch.finfo(mass.dtype).tiny)
    return {
        "hits": share(by_plan),
        "exact": share(paired == true.cell),
        "hits_by_mass": by_mass,
        "hits_nearest_neighbour": share(by_cost),
        "hits_chance": share(chance),
        **_same_cell(paired, match.plan.shape[-1], true, near, share),
    }


def _same_cell(
    paired: Tensor, m: int, true: Correspondence, near: Callable[[Tensor], Tensor], share: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Share of plan arg-max at the same grid position, how often that is right, and how near it is."""
    n = paired.shape[-1]
    if n != m:  # views of different size have no equal positions
        return {}
    own = torch.arange(n, device=paired.device).expand(paired.shape)
    return {
        "same_cell": share(paired == own),
        "same_cell_true": share(true.cell == own),
        "hits_same_cell": share(near(own)),
    }


# --- the look at one step --------------------------------------------------------------------------------------------


def observe(observed: Observed, batch: ViewBatch, first_centre: float = 0.5) -> dict[str, float]:
    """Measure what the panel shows; every value is finite where the features are.

    Of the embeddings, one view of each image is looked at (two would count each image twice); of the tokens, those of
    the first view that are valid.

        effective_rank                of the pooled embeddings; at most effective_rank_limit = min(images - 1, C)
        effective_rank_tokens         of at most 512 tokens, evenly over images and positions; so it is at most
                                      effective_rank_tokens_limit = min(sampled - 1, C) <= 511 however wide the
                                      encoder: compare it between looks and runs of one batch size and one encoder
        embedding_std                 mean over dimensions of the deviation of normalised embeddings;
                                      embedding_std_reference = 1 / sqrt(C) if their directions spread evenly
        embedding_length_std          deviation of the embeddings' lengths, as a share of their mean
        correlation                   mean absolute off-diagonal correlation of the dimensions that vary;
                                      correlation_chance if they were independent (normal): it falls with the batch
        spatial_diversity             share of the token variance within images; absent for maps of a single token
        entropy_mu, entropy_nu        of the masses; entropy_uniform and entropy_uniform_nu if they were uniform
        entropy_plan                  of what is moved, between entropy_one_to_one and entropy_independent
        mass_moved                    less than 1 with soft marginals
        hits and others               see ``correspondence_score``; absent where no true position is known

    Args:
        observed: What the method showed.
        batch: The views it saw.
        first_centre: ``Encoder.first_centre``.
    """
    with torch.no_grad(), torch.autocast(observed.pooled.device.type, enabled=False):
        return _to_host(
            _observe_embeddings(observed.pooled[: len(observed.pooled) // 2])
            | _observe_tokens(observed.tokens, batch)
            | ({} if observed.match is None else _observe_match(observed.match, batch, first_centre))
        )


def _observe_embeddings(pooled: Tensor) -> dict[str, Tensor | float]:
    images, dim = pooled.shape
    x = pooled.double()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / length.clamp_min(1e-12)
    freedom = max(1, images - 1)
    centred = x - x.mean(0)
    deviation = (centred.square().sum(0) / freedom).sqrt()
    varies = deviation > _resolution(pooled) * x.abs().amax(0)
    standard = torch.where(varies, centred / deviation.where(varies, 1.0), 0.0).float()
    cor = standard.T @ standard / freedom
    count = varies.sum()
    off = cor.abs().sum(dtype=torch.float64) - cor.diagonal().abs().sum(dtype=torch.float64)
    spread = (unit - unit.mean(0)).square().sum(0) / freedom
    length_spread = ((length - length.mean()).square().sum() / freedom).sqrt()
    return {
        "effective_rank": _effective_rank(pooled),
        "effective_rank_limit": min(images - 1, dim),
        "embedding_std": spread.sqrt().mean(),
        "embedding_std_reference": dim**-0.5,
        "embedding_length_std": length_spread / length.mean().clamp_min(1e-12),
        "correlation": off / (count * (count - 1)).clamp_min(1),
        "correlation_chance": _correlation_chance(images),
    }


def _correlation_chance(images: int) -> float:
    """Expected absolute correlation of two independent normal variables over N samples.

    E|r| = Gamma((N - 1) / 2) / (sqrt(pi) Gamma(N / 2)), near sqrt(2 / (pi N)): r^2 is Beta(1/2, (N - 2) / 2).
    """
    images = max(2, images)
    return math.exp(math.lgamma((images - 1) / 2) - math.lgamma(images / 2)) / math.sqrt(math.pi)


def _observe_tokens(tokens: Tensor, batch: ViewBatch) -> dict[str, Tensor | float]:
    n, dim = tokens.shape[1:]
    valid = token_valid(batch.valid[0], *_grid(n, batch.views[0]))
    rows, present = _sample(tokens, valid)
    out: dict[str, Tensor | float] = {
        "effective_rank_tokens": _effective_rank(rows, present),
        "effective_rank_tokens_limit": (present.sum() - 1).clamp(0, dim),
    }
    if n > 1:
        out["spatial_diversity"] = _spatial_diversity(tokens, valid)
    return out


def _observe_match(match: Match, batch: ViewBatch, first_centre: float) -> dict[str, Tensor | float]:
    n, m = match.plan.shape[-2:]
    grid_s, grid_t = _grid(n, batch.views[0]), _grid(m, batch.views[1])
    valid_s, valid_t = token_valid(batch.valid[0], *grid_s), token_valid(batch.valid[1], *grid_t)
    true = correspondence(batch.geometry[0], batch.geometry[1], valid_s, valid_t, grid_s, grid_t, first_centre)
    # with soft marginals (``reach``) some mass stays where it is: what is moved is judged by its own marginals
    moved = match.plan.sum((-1, -2), keepdim=True)
    plan = match.plan / moved.clamp_min(torch.finfo(match.plan.dtype).tiny)
    h_rows, h_columns = entropy(plan.sum(-1)), entropy(plan.sum(-2))
    return {
        "entropy_mu": entropy(match.a).mean(),
        "entropy_nu": entropy(match.b).mean(),
        "entropy_plan": entropy(plan, dims=2).mean(),
        "entropy_independent": (h_rows + h_columns).mean(),
        "entropy_one_to_one": torch.maximum(h_rows, h_columns).mean(),
        "mass_moved": moved.mean(),
        "entropy_uniform": valid_s.sum(-1).clamp_min(1).double().log().mean(),
        "entropy_uniform_nu": valid_t.sum(-1).clamp_min(1).double().log().mean(),
        **_correspondence_score(match, true, grid_t),
    }


def _to_host(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Plain numbers, moved at once; without the scores of a correspondence that is not known."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers: list[float] = torch.stack([value.double() for value in tensors.values()]).tolist()
    moved = dict(zip(tensors, numbers, strict=True))
    found = {name: float(moved.get(name, value)) for name, value in values.items()}
    absent = _SCORES if math.isnan(found.get("hits", 0.0)) else ()
    return {name: value for name, value in found.items() if name not in absent}


def _grid(tokens: int, view: Tensor) -> tuple[int, int]:
    """Height and width of the token grid of a view: of all grids with so many tokens, that of the nearest shape."""
    square = tokens * view.shape[-2] / view.shape[-1]
    heights = (h for h in range(1, tokens + 1) if tokens % h == 0)
    height = min(heights, key=lambda h: abs(math.log(h * h / square)))
    return height, tokens // height


# --- the verdict -----------------------------------------------------------------------------------------------------

# Embeddings whose normalised spread is below this share of 1 / sqrt(C) are nearly the same. Random networks of all
# sizes have 0.2 to 0.4 on radiographs, 0.04 to 0.13 if their norms are not calibrated; a collapse ends far below.
_SAME = 0.02


def _least_rank(limit: float) -> float:
    """Effective rank below which the embeddings count as dimensionally collapsed.

    3 % of what the batch can show, but no more than 8: the rank of radiographs does not grow with the batch for ever.
    For a handful of images, between a line (1) and what they can show; 2 images always lie on a line: not judged.
    """
    return min(8.0, max(1 + min(0.5, (limit - 1) / 4), 0.03 * limit))


def verdict(now: Mapping[str, float], terms: Mapping[str, float] | None = None) -> Verdict:
    """Judge the health numbers of one step, as ``observe`` gives them.

    Args:
        now: The numbers.
        terms: The terms of the loss. One that has a term ``NAME_chance`` beside it and is within 0.5 % of that is
            noted: nothing has been learned from it, or, late in a training, no longer.

    A collapse to one embedding is named alone: what else the embeddings then show is noise. A single image, and the
    rank of two, are not judged.
    """
    problems = [f"{name} is {value}" for name, value in now.items() if not math.isfinite(value)]
    rank, limit = now["effective_rank"], now["effective_rank_limit"]
    one_direction = limit >= 1 and now["embedding_std"] < _SAME * now["embedding_std_reference"]
    same = one_direction and not now.get("embedding_length_std", 0.0) > 0.05
    if one_direction and not same:
        problems.append(
            f"dimensional collapse: embeddings differ in length only, effective rank {rank:.1f} of {limit:.0f}"
        )
    elif same:
        problems.append("collapse: all images have nearly the same embedding")
    elif rank < _least_rank(limit):
        problems.append(f"dimensional collapse: effective rank {rank:.1f} of {limit:.0f}")
    diversity = now.get("spatial_diversity")
    if diversity is not None and diversity < 0.05 and not same:
        problems.append(f"spatial collapse: only {diversity:.1%} of the token variance is within images")
    if "entropy_plan" in now:
        problems += _transport_problems(now)
    if now.get("same_cell", 0.0) > 0.8 and now["same_cell"] > now["same_cell_true"] + 0.3:
        problems.append(f"position shortcut: {now['same_cell']:.0%} of positions are paired with the same place in the "
                        f"other view, where {now['same_cell_true']:.0%} belong")  # fmt: skip
    if problems:
        return Verdict(False, "; ".join(problems))
    notes = _at_chance(terms or {})
    text = f"no collapse seen: effective rank {rank:.1f} of {limit:.0f}"
    if diversity is not None:
        text += f", {diversity:.0%} of token variance within images"
    if "hits" in now:
        text += f", correspondence {now['hits']:.2f} (nearest neighbour {now['hits_nearest_neighbour']:.2f}, "
        text += f"chance {now['hits_chance']:.2f}"
        text += f", same place {now['hits_same_cell']:.2f})" if "hits_same_cell" in now else ")"
        if now["hits"] <= now.get("hits_same_cell", now["hits_chance"]):
            notes.append("the plan does not yet pair better than equal places would")
    return Verdict(True, "; ".join((text, *notes)), tuple(notes))


def _at_chance(terms: Mapping[str, float]) -> list[str]:
    """Notes on terms of the loss that say no more than chance does."""
    notes = []
    for name, chance in terms.items():
        value = terms.get(name.removesuffix("_chance"))
        if name.endswith("_chance") and value is not None and abs(value - chance) <= 0.005 * (abs(chance) or 1.0):
            notes.append(f"{name.removesuffix('_chance').replace('_', ' ')} is at its chance level, {chance:.2f}")
    return notes


def _transport_problems(now: Mapping[str, float]) -> list[str]:
    problems = []
    room = now["entropy_independent"] - now["entropy_one_to_one"]  # none if all mass lies on one token
    if now.get("mass_moved", 1.0) < 0.05:
        problems.append(f"no transport: only {now['mass_moved']:.1%} of the mass is moved")
    elif room > 0.05 and now["entropy_independent"] - now["entropy_plan"] < 0.05 * room:
        problems.append("transport in name only: the plan is the independent coupling of the masses")
    for name, uniform in (("entropy_mu", "entropy_uniform"), ("entropy_nu", "entropy_uniform_nu")):
        full = now.get(uniform, now["entropy_uniform"])
        tokens, mass = math.exp(full), math.exp(now[name])
        # of few tokens, one alone is a large share (and a floor under the masses keeps the others above 0)
        if mass < max(0.15 * tokens, min(2.0, 0.5 * tokens)):
            problems.append(f"mass collapse: the mass sits on {mass:.1f} of {tokens:.0f} tokens")
            break
    return problems
