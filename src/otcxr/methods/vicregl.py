"""VICRegL: VICReg of whole radiographs, and of positions that match by what they say or by where they lie.

    g = expander(mean of the last map)                              every view
    L_global = 25 mean_pairs |g_i - g_j|^2 / d + 25 mean_views v(g) + 1 mean_views c(g)

    q = projector(token), at valid positions                        every view
    for a pair of views, both ways:
      by feature     every position with the nearest q of the other view
      by location    the share ``matches`` of positions that have the nearest neighbour in the image, with it
    each kind gives rows x_k, y_k, ordered by position k:
      inv = |x - y|^2 / d,   var = [v(x) + v(y)] / 2,   cov = [c(x) + c(y)] / 2     v, c over the batch at each k
    L_local = mean_pairs of (by feature + by location) of 25 inv + 25 var + 1 cov, the mean of both ways

    L = w L_global + (1 - w) L_local

Pairs are (i, j) with i one of the two global views and j any other one. Where positions lie in the image follows from
the exact geometry of the views, rotation and flips included, in units of the image's sides.

Source: Bardes, Ponce and LeCun, NeurIPS 2022, arXiv:2210.01571, equations 1 to 5; averages and halves are those of
the authors' code, whose covariance counts half of VICReg's. What differs: the location of flipped and rotated views
(their default ignores flips); positions that are not valid are no rows of the local loss; the number of matches by
location is a share of the grid (theirs: 20 of 49 one way, 4 the other); narrower heads; radiograph views; AdamW
unless set. The published numbers: ``configs/published/vicregl.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from otcxr.data.geometry import ViewBatch, apply_affine, token_centres, token_valid
from otcxr.distributed import all_sum
from otcxr.errors import ConfigError
from otcxr.losses import covariance, covariance_at_positions, squared_difference, variance, variance_at_positions
from otcxr.methods.base import (
    Match,
    Observed,
    SSLMethod,
    StepOutput,
    check_at_least,
    check_share,
    encode_views,
    one_way_plan,
    tokens_of,
    valid_tokens,
)
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead
from otcxr.ot import at_least_float32

__all__ = ["VICRegL", "VICRegLSettings"]


@dataclass(frozen=True)
class VICRegLSettings:
    """Settings of VICRegL.

    Attributes:
        hidden: Width of the expander's two hidden layers.
        outputs: Dimensions of the global embedding; wide.
        local_hidden: Width of the two hidden layers of the projector of positions.
        local_outputs: Dimensions of the projected positions.
        global_weight: w, share of the global loss, in [0, 1].
        matches: Share of the positions of a view that are matched by location, in (0, 1].
        invariance: Weight of the mean squared difference.
        variance: Weight of the hinge on the standard deviation.
        covariance: Weight of the penalty on correlated dimensions.
    """

    hidden: int = 1024
    outputs: int = 1024
    local_hidden: int = 256
    local_outputs: int = 128
    global_weight: float = 0.75
    matches: float = 0.4
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(
            1, hidden=self.hidden, outputs=self.outputs, local_hidden=self.local_hidden,
            local_outputs=self.local_outputs,
        )  # fmt: skip
        check_at_least(0, invariance=self.invariance, variance=self.variance, covariance=self.covariance)
        check_share(global_weight=self.global_weight)
        if not 0 < self.matches <= 1:
            raise ConfigError(f"method.matches is a share in (0, 1], received {self.matches}")


class _Local(NamedTuple):
    """The positions of one view: projections (B, n, d), where they lie in the image (B, n, 2), which are valid."""

    projected: Tensor
    place: Tensor
    valid: Tensor


class _Terms(NamedTuple):
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


class VICRegL(SSLMethod):
    """See the module's text."""

    def __init__(self, encoder: Encoder, settings: VICRegLSettings) -> None:
        super().__init__(encoder, settings)
        width = encoder.channels[-1]
        self.expander = ProjectionHead(width, settings.hidden, settings.outputs, final_norm=False, bias=False, depth=3)
        self.projector = ProjectionHead(
            width, settings.local_hidden, settings.local_outputs, final_norm=False, bias=False, depth=3
        )

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        s = self.settings
        maps = encode_views(self.encoder, batch.views)
        pooled = [pool(m) for m in maps]
        whole = self._global(self.expander(torch.cat(pooled)).chunk(len(pooled)))
        views = self._local_views(maps, batch)
        kinds = [self._local(views[i], views[j]) for i, j in _pairs(len(views))]
        local = _Terms(*(torch.stack(terms).mean() for terms in zip(*kinds, strict=True)))
        loss = s.global_weight * self._weighted(whole) + (1 - s.global_weight) * self._weighted(local)
        terms = {**whole._asdict(), **{f"local_{name}": term for name, term in local._asdict().items()}}
        observed = None
        if observe:
            both = torch.cat(pooled[:2]).detach()
            observed = Observed(both, tokens_of(maps[0][-1]).detach(), _match(views[0], views[1]))
        return StepOutput(loss, {name: term.detach().clone() for name, term in terms.items()}, observed)

    @torch.no_grad()
    def match(self, batch: ViewBatch) -> Match:
        """Return what the first two views' features pair, half from each view to the other; the cost is a distance."""
        views = self._local_views(encode_views(self.encoder, batch.views[:2]), batch)
        return _match(views[0], views[1])

    def _weighted(self, terms: _Terms) -> Tensor:
        s = self.settings
        out: Tensor = s.invariance * terms.invariance + s.variance * terms.variance + s.covariance * terms.covariance
        return out

    def _global(self, embedded: tuple[Tensor, ...]) -> _Terms:
        apart = [squared_difference(embedded[i], embedded[j]) for i, j in _pairs(len(embedded))]
        return _Terms(
            torch.stack(apart).mean(),
            torch.stack([variance(g) for g in embedded]).mean(),
            torch.stack([covariance(g) for g in embedded]).mean(),
        )

    def _local_views(self, maps: list[tuple[Tensor, ...]], batch: ViewBatch) -> list[_Local]:
        """Project the valid positions of all views together, so they share BatchNorm's statistic."""
        tokens, valid, places = [], [], []
        for v, view_maps in enumerate(maps):
            height, width = view_maps[-1].shape[-2:]
            tokens.append(tokens_of(view_maps[-1]))
            # a local view that shows nothing has no partners; a global one must not be without any
            last = view_maps[-1]
            valid.append(valid_tokens(batch, v, last) if v < 2 else token_valid(batch.valid[v], height, width))
            centres = token_centres(height, width, tokens[-1].device, self.encoder.first_centre)
            geometry = batch.geometry[v]
            places.append(apply_affine(geometry, centres.to(geometry.dtype).expand(len(geometry), -1, -1)))
        rows = self.projector(torch.cat([t[ok] for t, ok in zip(tokens, valid, strict=True)]))
        rows = torch.split(at_least_float32(rows), [int(ok.sum()) for ok in valid])
        out = []
        for t, ok, place, own in zip(tokens, valid, places, rows, strict=True):
            projected = own.new_zeros((*t.shape[:2], own.shape[-1]))
            projected[ok] = own
            out.append(_Local(projected, place, ok))
        return out

    def _local(self, first: _Local, second: _Local) -> _Terms:
        """Both kinds of matches, both ways: by feature plus by location, each the mean of both ways."""
        found = []
        for here, there in ((first, second), (second, first)):
            by_feature = _nearest(here.projected.detach(), there.projected.detach(), here.valid, there.valid)
            partners = _take(there.projected, by_feature[0])
            found.append(self._terms(here.projected, partners, by_feature[1].isfinite()))
            position, partner, known = self._by_location(here, there)
            found.append(self._terms(_take(here.projected, position), _take(there.projected, partner), known))
        return _Terms(*(torch.stack(terms).sum() / 2 for terms in zip(*found, strict=True)))

    def _by_location(self, here: _Local, there: _Local) -> tuple[Tensor, Tensor, Tensor]:
        """The positions (B, k) of one view that lie nearest to one of the other, in order, those, and which exist."""
        partner, distance = _nearest(here.place, there.place, here.valid, there.valid)
        count = max(1, round(self.settings.matches * distance.shape[1]))
        position = distance.topk(count, dim=1, largest=False).indices
        absent = ~distance.gather(1, position).isfinite()  # behind the others, or they would shift the rows
        position = position.gather(1, (position + absent * distance.shape[1]).argsort(dim=1))
        return position, partner.gather(1, position), distance.gather(1, position).isfinite()

    @staticmethod
    def _terms(x: Tensor, y: Tensor, known: Tensor) -> _Terms:
        """VICReg's terms of rows (B, k, d), where (B, k) says; the covariance is the mean of both sides."""
        with torch.autocast(x.device.type, enabled=False):
            weight = known.unsqueeze(-1).to(x.dtype)
            apart = all_sum(((x - y).square() * weight).sum()) / (all_sum(weight.sum()).clamp_min(1) * x.shape[-1])
        spread = (variance_at_positions(x, known) + variance_at_positions(y, known)) / 2
        correlated = (covariance_at_positions(x, known) + covariance_at_positions(y, known)) / 2
        return _Terms(apart, spread, correlated)


def _pairs(views: int) -> list[tuple[int, int]]:
    """Each of the two global views with every other view."""
    return [(i, j) for i in range(2) for j in range(views) if j != i]


def _nearest(x: Tensor, y: Tensor, valid_x: Tensor, valid_y: Tensor) -> tuple[Tensor, Tensor]:
    """For each of x (B, n, d) the nearest valid one of y (B, m, d): its index and distance, inf where there is none."""
    distance = _distance(x, y).masked_fill(~(valid_x.unsqueeze(-1) & valid_y.unsqueeze(1)), float("inf"))
    least = distance.min(-1)
    return least.indices, least.values


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (B, n, m), exact also between points that are nearly equal."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, n, d), index (B, k) -> (B, k, d)."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def _match(first: _Local, second: _Local) -> Match:
    x, y = first.projected.detach(), second.projected.detach()
    cost = _distance(x, y)
    a, b = (view.valid.to(cost.dtype) / view.valid.sum(-1, keepdim=True) for view in (first, second))
    there = _nearest(x, y, first.valid, second.valid)[0]
    back = _nearest(y, x, second.valid, first.valid)[0]
    plan = (one_way_plan(there, a, b.shape[1]) + one_way_plan(back, b, a.shape[1]).mT) / 2
    return Match(cost, a, b, plan, None)
