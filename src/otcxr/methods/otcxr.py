"""OTCXR: align the dense maps of two views by optimal transport, with masses from cross-view attention.

    z_s, z_t      tokens of the last map of two views of one radiograph               (B, n, C), (B, m, C)
    R_s, R_t      CV-SIM: R_s = MHA(query z_s, key and value z_t), and the other way  (B, n, C), (B, m, C)
    mu, nu        masses on the valid tokens, from R or from the attention            (B, n), (B, m)
    q             token projector on z, or on z + R with ``infuse``                   (B, n, d), (B, m, d)
    C             1 - cos(q_s, q_t)                                                   (B, n, m), in [0, 2]
    P             argmin <P, C> + epsilon KL(P | mu nu^T),  P 1 = mu, P^T 1 = nu      (B, n, m)
    L_OT          mean over the batch of the entropic value (``objective = "value"``, envelope gradient) or of <P, C>
                  (``"sharp"``, implicit gradient); with ``reach`` the marginals are soft, see ``otcxr.ot.sinkhorn``

    L = alpha L_OT + beta sum_rows [v(q_s) + v(q_t)] / 2 + eta [c(q_s) + c(q_t)]
        + global_weight (alpha |g_s - g_t|^2 / d + beta [v(g_s) + v(g_t)] / 2 + eta [c(g_s) + c(g_t)])
        + mass_weight mean max(0, ln(mass_area n_valid) - H(mu)) + overlap_weight mean KL(o | mu)

with o uniform over the positions that the other view shows, too, by the geometry of the views, 0 elsewhere; an image
whose views show nothing in common counts 0.

With ``place`` the plan is solved with C + place (1 - exp(-r^2 / (2 place_radius^2))), r the distance in cells between
what two positions really show: a prior from the geometry of the views, which the features may overrule.

With ``global_pool = "aside"`` L gains global_weight times the three global terms on sum_i mu_i z_i with z without
gradient: they train the masses alone.

With ``pairing`` other than "transport" L_OT is replaced by the same cost over other pairs (controls of the claim that
transport helps), masses as weights:

    A = mean over the batch of <P, C>,   P = (P_s + P_t) / 2,   P_s[i, c(i)] = mu_i / sum of mu over known i

with c(i) the partner of position i in the other view and P_t the same from there: the cell at the same place of the
view ("same-cell"), the valid cell of least cost ("nearest"), or the cell where it truly lies ("geometry", from the
geometry of the views; positions that the other view does not show have no partner). An image without partners counts 0.

With local views (multi-crop) L is the mean over the pairs (s, t), (s, l) and (t, l) for every local view l; the pairs'
problems are rectangular. The health panel and ``match`` show the pair (s, t).

With ``target_momentum`` a slow copy of encoder and projectors gives every term of agreement its other side: L_OT is the
mean of transport with the costs 1 - cos(q_s, q'_t) and 1 - cos(q'_s, q_t), |g_s - g_t|^2 the mean of |g_s - g'_t|^2 and
|g'_s - g_t|^2, primes for the copies, which no gradient reaches. Masses, v and c are of the trained network alone.
After the step the copies follow, with a momentum that rises from its setting to 1 along half a cosine (nn.momentum).

v and c are VICReg's variance and covariance terms on the unnormalised q; which rows they see is ``variance_rows``.
g is a projection of the mean of z over valid tokens, or with ``global_pool = "mass"`` of sum_i mu_i z_i, which trains
the masses to gather what tells images apart and both views agree on. Padding and rotation corners get no mass, are no
keys and no rows.

Source: Gorade, Singh, Mishra, WACV 2025, arXiv:2404.11868. The source states the forward pass, the cosine discrepancy,
masses from cross-view attention, <P, C> and the form of the loss without the last line. Ours: the sign of the cost (a
similarity as cost would pair the least similar), the entropic value, the rows of the variance (over all tokens the map
becomes constant within each image), the centred cost (the variance terms do not see a common offset of all q, but the
cosine does: with one, every cost is nearly 0 and the plan is the independent coupling), the global term, the control of
the masses' spread, all numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from otcxr.data.geometry import ViewBatch, correspondence, squared_distance, token_centres, token_valid
from otcxr.distributed import mean_of_rows
from otcxr.errors import ConfigError
from otcxr.losses import (
    covariance,
    masked_mean,
    squared_difference,
    variance,
    variance_at_positions,
    variance_within,
    weighted_sum,
)
from otcxr.methods.base import (
    Match,
    Observed,
    SSLMethod,
    StepOutput,
    check_at_least,
    check_momentum,
    check_positive,
    encode_views,
    one_way_plan,
    refuse_empty,
    tokens_of,
    valid_tokens,
)
from otcxr.nn.attention import CrossViewAttention
from otcxr.nn.encoder import Encoder, pool
from otcxr.nn.heads import ProjectionHead, TokenProjector
from otcxr.nn.momentum import follow, momentum_copy, rising_momentum
from otcxr.ot import Transport, at_least_float32, cosine_cost, entropy, sinkhorn

__all__ = ["OTCXR", "OTCXRSettings"]

_ROWS = ("pooled", "tokens", "position", "within-image")
_MASSES = ("score", "attention", "contrast", "overlap", "uniform")
_LEARNED = ("score", "attention")
_POOLS = ("uniform", "mass", "aside")
_PAIRINGS = ("transport", "same-cell", "nearest", "geometry")


@dataclass(frozen=True)
class OTCXRSettings:
    """Settings of OTCXR and of its controls.

    Attributes:
        mass: Where the masses come from: "score" (a head on R, softmax), "attention" (what a token receives from the
            other view, mean over heads and queries), "contrast" (softmax of how much the best match in the other view
            is cheaper than the mean one, over ``temperature``, from the cost without gradient: positions that are in
            both views and unlike others; no CV-SIM), "overlap" (o of the module's text, from the geometry; no CV-SIM)
            or "uniform".
        mass_gradient: Let the transport term train the masses: they were seen to gather on tokens that are all alike,
            where every match is cheap (docs/methods/otcxr.md). Without it a score head has to be trained by
            ``overlap_weight`` or ``global_pool``; "attention" that nothing trains is fixed and random, and its masses
            are nearly uniform.
        temperature: Of the softmax of the scores.
        floor: kappa in mu <- (1 - kappa) mu + kappa / n_valid; without one all mass can fall on one cell.
        mass_area: Share of the valid tokens that the masses should at least spread over, as exp(H) / n_valid.
        mass_weight: Weight of max(0, ln(mass_area n_valid) - H), mean over both views; 0 switches it off.
        overlap_weight: Weight of KL(o | mu), mean over both views: learned masses are taught where the views overlap.
            With "uniform" the masses of a score head are taught and not used: what teaching does without them.
        infuse: Add R to z before the projector.
        pairing: Which positions are aligned: by "transport", or, as controls, "same-cell", "nearest" or "geometry".
        heads: Heads of the cross-view attention.
        hidden: Hidden width of the token projector.
        outputs: d, dimensions of q.
        epsilon: Blur of the transport, in units of the cost.
        tolerance: L1 error of the marginals at which a problem is done.
        max_iterations: Limit of Sinkhorn's iterations; the residual is logged.
        objective: "value" (entropic value, envelope gradient) or "sharp" (<P, C>, implicit gradient).
        reach: Softness of the marginals in units of the cost (unbalanced transport): mass for which every match costs
            more than about 2 * reach stays unmatched. null: exact marginals.
        centred_cost: Subtract the mean of all valid q of the batch before the cosine.
        place: Weight of a prior of place in the cost of the plan, from the known geometry of the views; 0: none. What
            is stored and judged as the method's pairs is always without it.
        place_radius: Distance in cells at which the prior has reached 39 % of its height.
        alpha: Weight of the transport term.
        beta: Weight of the variance term, for each kind of row.
        eta: Weight of the covariance term.
        global_weight: Weight of the global invariance: VICReg's three terms, with the same alpha, beta and eta, on a
            projection of the pooled tokens. 0 leaves it out.
        global_hidden: Hidden width of the projector of pooled tokens.
        global_outputs: Dimensions of their projection; wide, as in VICReg.
        global_pool: How the tokens of the global term are pooled: "uniform"; "mass", by the masses, which it then
            trains, whatever ``mass_gradient`` says of the transport term; or "aside": uniform, and a second global
            term, pooled by the masses from features without gradient, trains the masses and nothing else.
        variance_rows: What counts as a row of v: "pooled" (one per image), "tokens" (all), "position" (over the batch
            at each cell), "within-image" (over the tokens of each image); any combination.
        within_target: Standard deviation that "within-image" asks for; the other rows ask for 1.
        target_momentum: Momentum at the start of the slow copies that the trained network is aligned with; 0: there are
            none, and both views are encoded by the trained network.
    """

    mass: str = "score"
    mass_gradient: bool = False
    temperature: float = 1.0
    floor: float = 0.1
    mass_area: float = 0.5
    mass_weight: float = 25.0
    overlap_weight: float = 400.0
    infuse: bool = False
    pairing: str = "transport"
    heads: int = 8
    hidden: int = 512
    outputs: int = 128
    epsilon: float = 0.1
    tolerance: float = 1e-3
    max_iterations: int = 200
    objective: str = "value"
    reach: float | None = None
    centred_cost: bool = True
    place: float = 0.5
    place_radius: float = 2.0
    alpha: float = 25.0
    beta: float = 25.0
    eta: float = 1.0
    global_weight: float = 1.0
    global_hidden: int = 1024
    global_outputs: int = 1024
    global_pool: str = "uniform"
    variance_rows: tuple[str, ...] = ("within-image", "position")
    within_target: float = 1.0
    target_momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.mass not in _MASSES:
            raise ConfigError(f"method.mass must be one of {', '.join(_MASSES)}, received '{self.mass}'")
        if self.pairing not in _PAIRINGS:
            raise ConfigError(f"method.pairing must be one of {', '.join(_PAIRINGS)}, received '{self.pairing}'")
        unknown = [rows for rows in self.variance_rows if rows not in _ROWS]
        if unknown:
            raise ConfigError(f"method.variance_rows may hold {', '.join(_ROWS)}; received '{unknown[0]}'")
        if self.global_pool not in _POOLS:
            raise ConfigError(f"method.global_pool must be one of {', '.join(_POOLS)}, received '{self.global_pool}'")
        if self.mass == "score" and not self.trains_masses:
            raise ConfigError(
                "method.mass = score needs method.mass_gradient = true, a method.overlap_weight above 0, or "
                "method.global_pool = mass or aside with a method.global_weight above 0: a score head without gradient "
                "never learns"
            )
        if self.overlap_weight > 0 and self.mass not in (*_LEARNED, "uniform"):
            raise ConfigError(f"method.overlap_weight teaches masses that are learned; with method.mass = {self.mass} "
                              f"there is nothing to teach: set mass to {', '.join(_LEARNED)} or uniform")  # fmt: skip
        if self.overlap_weight > 0 and self.floor == 0:
            raise ConfigError("method.overlap_weight needs a method.floor above 0: KL(o | mu) has no bound without one")
        if not 0 <= self.floor < 1 or not 0 < self.mass_area <= 1:
            raise ConfigError(f"method.floor must be in [0, 1) and method.mass_area in (0, 1], received {self.floor} "
                              f"and {self.mass_area}")  # fmt: skip
        sizes = ("heads", "hidden", "outputs", "global_hidden", "global_outputs")
        weights = ("alpha", "beta", "eta", "global_weight", "mass_weight", "overlap_weight",
                   "within_target", "place")  # fmt: skip
        check_at_least(1, **{name: getattr(self, name) for name in (*sizes, "max_iterations")})
        check_at_least(0, **{name: getattr(self, name) for name in weights})
        check_positive(temperature=self.temperature, epsilon=self.epsilon, tolerance=self.tolerance,
                       place_radius=self.place_radius)  # fmt: skip
        if self.objective not in ("value", "sharp"):
            raise ConfigError(f"method.objective must be 'value' or 'sharp', received '{self.objective}'")
        check_momentum(self.target_momentum, "target_momentum")
        if self.target_momentum > 0 and self.infuse:
            raise ConfigError("method.target_momentum goes with method.infuse = false: what is infused would mix the "
                              "trained network into its own targets")  # fmt: skip
        if self.reach is not None and not self.reach > 0:
            raise ConfigError(f"method.reach must be > 0, or null for exact marginals; received {self.reach}")

    @property
    def trains_masses(self) -> bool:
        """Whether any term of the loss has a gradient in the masses."""
        pooled = self.global_pool != "uniform" and self.global_weight > 0
        return self.overlap_weight > 0 or (self.mass in _LEARNED and (self.mass_gradient or pooled))

    @property
    def has_score(self) -> bool:
        """Whether there is a score head, for the masses or only to be taught."""
        return self.mass == "score" or (self.mass == "uniform" and self.overlap_weight > 0)


class _Pair(NamedTuple):
    """Everything about one pair of views: tokens z, those of the slow copy (None without one), masses, projections q,
    their cost, what is aligned (kB, n, m: that cost, or both costs against the slow copy) with the plan of its first B
    and its value (kB,), how it was solved (None where nothing was), attention of s on t, o of both views and the masses
    that are taught it (None where none are)."""

    tokens: tuple[Tensor, Tensor]
    slow: tuple[Tensor, Tensor] | None
    valid: tuple[Tensor, Tensor]
    masses: tuple[Tensor, Tensor]
    projections: tuple[Tensor, Tensor]
    cost: Tensor
    aligned: Tensor
    plan: Tensor
    value: Tensor
    solved: Transport | None
    attention: Tensor | None
    lesson: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None


class OTCXR(SSLMethod):
    """See the module's text. With ``mass="uniform"`` and ``infuse=False`` there is no CV-SIM at all."""

    def __init__(self, encoder: Encoder, settings: OTCXRSettings) -> None:
        super().__init__(encoder, settings)
        dim = encoder.channels[-1]
        self.projector = TokenProjector(dim, settings.hidden, settings.outputs)
        needs_cross_view = settings.infuse or settings.mass in _LEARNED or settings.has_score
        self.cross_view = CrossViewAttention(dim, settings.heads) if needs_cross_view else None
        if self.cross_view is not None and not settings.infuse and not settings.trains_masses:
            self.cross_view.requires_grad_(False)  # nothing would train it: then it is a fixed random attention
        if self.cross_view is not None and not settings.infuse and settings.mass == "attention":
            self.cross_view.out.requires_grad_(False)  # R is not used, and DDP waits for every trainable parameter
        self.pooled_projector = (
            ProjectionHead(dim, settings.global_hidden, settings.global_outputs, final_norm=False)
            if settings.global_weight > 0
            else None
        )
        self.aside_projector = (
            ProjectionHead(dim, settings.global_hidden, settings.global_outputs, final_norm=False)
            if settings.global_weight > 0 and settings.global_pool == "aside" and settings.trains_masses
            else None
        )
        self.score = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 1)) if settings.has_score else None
        slow = settings.target_momentum > 0
        self.target_encoder = momentum_copy(encoder) if slow else None
        self.target_projector = momentum_copy(self.projector) if slow else None
        self.target_pooled = momentum_copy(self.pooled_projector) if slow and self.pooled_projector else None

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        maps = encode_views(self.encoder, batch.views)
        chosen = [(0, 1), *((g, v) for g in (0, 1) for v in range(2, len(maps)))]
        slow = None
        if self.target_encoder is not None:
            with torch.no_grad():
                slow = [tokens_of(m[-1]) for m in encode_views(self.target_encoder, batch.views)]
        pairs = [self._pair(maps, batch, views, place=self.settings.place, slow=slow) for views in chosen]
        judged = [self._judge(pair) for pair in pairs]
        loss = torch.stack([one for one, _ in judged]).mean()
        terms = {name: torch.stack([torch.as_tensor(t[name]).detach() for _, t in judged]) for name in judged[0][1]}
        observed = None
        if observe:
            pooled = torch.cat((pool(maps[0]), pool(maps[1]))).detach()
            # pairs that are fixed beforehand say nothing of the features, so there is nothing to judge in them
            shown = self._shown(pairs[0]) if self.settings.pairing in ("transport", "nearest") else None
            observed = Observed(pooled, pairs[0].tokens[0].detach(), shown)
        return StepOutput(loss, {n: t.max() if n == "residual" else t.mean() for n, t in terms.items()}, observed)

    def after_step(self, progress: float) -> None:
        momentum = rising_momentum(self.settings.target_momentum, progress)
        pairs: tuple[tuple[nn.Module | None, nn.Module | None], ...] = (
            (self.target_encoder, self.encoder),
            (self.target_projector, self.projector),
            (self.target_pooled, self.pooled_projector),
        )
        for slow, fast in pairs:
            if slow is not None and fast is not None:
                follow(slow, fast, momentum)

    @torch.no_grad()
    def match(self, batch: ViewBatch) -> Match:
        return _match(self._pair(encode_views(self.encoder, batch.views[:2]), batch, (0, 1)))

    def _judge(self, pair: _Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and terms of one pair of views."""
        s = self.settings
        aligned = pair.value.mean()
        means = [masked_mean(q, valid) for q, valid in zip(pair.projections, pair.valid, strict=True)]
        rows = list(zip(pair.projections, pair.valid, means, strict=True))
        spread = torch.stack([self._variance(*view) for view in rows]).sum() / 2
        correlation = torch.stack([self._covariance(*view) for view in rows]).sum()
        loss = s.alpha * aligned + s.beta * spread + s.eta * correlation
        name = "transport" if s.pairing == "transport" else "alignment"
        terms = {name: aligned, "variance": spread, "covariance": correlation}
        if self.pooled_projector is not None:
            terms |= self._global(pair)
            loss = loss + s.global_weight * (
                s.alpha * terms["global"] + s.beta * terms["global_variance"] + s.eta * terms["global_covariance"]
            )
        if self.aside_projector is not None:
            pooled = [weighted_sum(z.detach(), mass) for z, mass in zip(pair.tokens, pair.masses, strict=True)]
            aside = _invariance(self.aside_projector, pooled)
            terms["aside"] = s.alpha * aside[0] + s.beta * aside[1] + s.eta * aside[2]
            loss = loss + s.global_weight * terms["aside"]
        if s.mass_weight > 0 and s.trains_masses and s.mass in _LEARNED:
            terms["mass"] = sum(map(self._concentration, pair.masses, pair.valid), loss.new_zeros(())) / 2
            loss = loss + s.mass_weight * terms["mass"]
        if s.overlap_weight > 0:
            assert pair.lesson is not None
            terms["overlap"] = sum(map(_divergence, *pair.lesson), loss.new_zeros(())) / 2
            loss = loss + s.overlap_weight * terms["overlap"]
        with torch.no_grad():  # what it costs when nothing is matched: P = mu nu^T
            mu, nu = (mass.repeat(len(pair.aligned) // len(mass), 1) for mass in pair.masses)
            terms[f"{name}_chance"] = (mu.unsqueeze(-1) * pair.aligned * nu.unsqueeze(-2)).sum((-1, -2)).mean()
        if pair.solved is not None:
            terms["residual"] = pair.solved.residual.max()
            terms["iterations"] = pair.solved.iterations.to(loss.dtype).mean()
        return loss, terms

    def _pair(
        self, maps: list[tuple[Tensor, ...]], batch: ViewBatch, views: tuple[int, int], *, place: float = 0.0,
        slow: list[Tensor] | None = None,
    ) -> _Pair:  # fmt: skip
        s = self.settings
        map_s, map_t = (maps[v][-1] for v in views)
        valid_s, valid_t = (
            valid_tokens(batch, v, maps[v][-1]) if v < 2 else _local_tokens(batch.valid[v], maps[v][-1], v - 1)
            for v in views
        )
        z_s, z_t = tokens_of(map_s), tokens_of(map_t)
        r_s = r_t = weights_s = weights_t = None
        if self.cross_view is not None:
            # aside: the masses learn from the features, the features nothing from the masses
            x_s, x_t = (z_s.detach(), z_t.detach()) if s.global_pool == "aside" and not s.infuse else (z_s, z_t)
            r_s, weights_s = self.cross_view(x_s, x_t, valid_t)
            r_t, weights_t = self.cross_view(x_t, x_s, valid_s)
        if s.infuse and r_s is not None and r_t is not None:
            q_s, q_t = self.projector(z_s + r_s), self.projector(z_t + r_t)
        else:
            q_s, q_t = self.projector(z_s), self.projector(z_t)
        cost = aligned = self._cost((q_s, q_t), (valid_s, valid_t))
        slow_tokens = None
        if slow is not None and self.target_projector is not None:
            slow_tokens = slow[views[0]], slow[views[1]]
            with torch.no_grad():
                copy_s, copy_t = (self.target_projector(z) for z in slow_tokens)
            aligned = torch.cat((self._cost((q_s, copy_t), (valid_s, valid_t)),
                                 self._cost((copy_s, q_t), (valid_s, valid_t))))  # fmt: skip
        overlap = None
        if s.mass == "overlap" or s.overlap_weight > 0:
            overlap = self._overlap(batch, views, (map_s, map_t), (valid_s, valid_t), cost.dtype)
        if s.mass == "overlap":
            assert overlap is not None
            mu, nu = (self._floored(o, valid) for o, valid in zip(overlap, (valid_s, valid_t), strict=True))
        elif s.mass == "contrast":
            mu = self._contrast(cost.detach(), valid_s, valid_t)
            nu = self._contrast(cost.detach().mT, valid_t, valid_s)
        else:
            mu = self._mass(s.mass, r_s, weights_t, valid_s, valid_t)
            nu = self._mass(s.mass, r_t, weights_s, valid_t, valid_s)
        taught = None
        if s.overlap_weight > 0:
            taught = mu, nu
            if s.mass == "uniform":
                taught = (self._mass("score", r_s, None, valid_s, valid_t),
                          self._mass("score", r_t, None, valid_t, valid_s))  # fmt: skip
        ways = len(aligned) // len(cost)
        sent, received = (mu, nu) if s.mass_gradient else (mu.detach(), nu.detach())
        solved = None
        if s.pairing == "transport":
            priced = aligned
            if place > 0:
                priced = aligned + place * self._elsewhere(batch, views, map_s, map_t).to(cost.dtype).repeat(ways, 1, 1)
            solved = sinkhorn(
                priced, sent.repeat(ways, 1), received.repeat(ways, 1), epsilon=s.epsilon, tolerance=s.tolerance,
                max_iterations=s.max_iterations, objective=s.objective, reach=s.reach,
            )  # fmt: skip
            plan, value = solved.plan[: len(cost)], solved.value
        else:
            grids = (map_s.shape[-2], map_s.shape[-1]), (map_t.shape[-2], map_t.shape[-1])
            plan = self._paired(cost, (sent, received), (valid_s, valid_t), grids, batch.geometry[list(views)])
            value = (plan.repeat(ways, 1, 1) * aligned).sum((-1, -2))
        return _Pair(
            (z_s, z_t), slow_tokens, (valid_s, valid_t), (mu, nu), (q_s, q_t), cost, aligned, plan, value, solved,
            weights_s, None if overlap is None or taught is None else (overlap, taught),
        )  # fmt: skip

    def _cost(self, q: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]) -> Tensor:
        """C of the module's text (B, n, m), at least float32; with a centred cost the mean of all valid q is 0."""
        with torch.autocast(q[0].device.type, enabled=False):
            wide = [at_least_float32(one) for one in q]
            rows = [one[there] for one, there in zip(wide, valid, strict=True)]
            centre = mean_of_rows(torch.cat(rows))[0] if self.settings.centred_cost else 0.0
            return cosine_cost(wide[0] - centre, wide[1] - centre)

    @torch.no_grad()
    def _overlap(
        self, batch: ViewBatch, views: tuple[int, int], maps: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """o of the module's text for both views, (B, n) and (B, m); all 0 where nothing is in common."""
        grids = [(int(last.shape[-2]), int(last.shape[-1])) for last in maps]
        found = []
        for v, w in ((0, 1), (1, 0)):
            known = correspondence(
                batch.geometry[views[v]], batch.geometry[views[w]], valid[v], valid[w], grids[v], grids[w],
                self.encoder.first_centre,
            ).known.to(dtype)  # fmt: skip
            found.append(known / known.sum(-1, keepdim=True).clamp_min(1))
        return found[0], found[1]

    def _floored(self, mass: Tensor, valid: Tensor) -> Tensor:
        """(1 - kappa) mass + kappa / n_valid; uniform where the masses are all 0."""
        uniform = valid.to(mass.dtype) / valid.sum(-1, keepdim=True)
        floored = (1 - self.settings.floor) * mass + self.settings.floor * uniform
        return torch.where((mass.sum(-1, keepdim=True) > 0), floored, uniform)

    def _elsewhere(self, batch: ViewBatch, views: tuple[int, int], map_s: Tensor, map_t: Tensor) -> Tensor:
        """1 - exp(-r^2 / (2 place_radius^2)) of the distance in cells between what tokens show: (B, n, m) in [0, 1]."""
        grid_s, grid_t = (map_s.shape[-2], map_s.shape[-1]), (map_t.shape[-2], map_t.shape[-1])
        geometry = batch.geometry[list(views)]
        away = squared_distance(geometry[0], geometry[1], grid_s, grid_t, self.encoder.first_centre)
        return 1 - torch.exp(away / (-2 * self.settings.place_radius**2))

    @torch.no_grad()
    def _shown(self, pair: _Pair) -> Match:
        """What the method pairs by its features: the plan without a prior of place and without slow copies."""
        s = self.settings
        if (s.place > 0 or s.target_momentum > 0) and s.pairing == "transport":
            mu, nu = pair.masses
            solved = sinkhorn(pair.cost, mu, nu, epsilon=s.epsilon, tolerance=s.tolerance,
                              max_iterations=s.max_iterations, reach=s.reach)  # fmt: skip
            pair = pair._replace(plan=solved.plan)
        return _match(pair)

    def _paired(
        self,
        cost: Tensor,
        masses: tuple[Tensor, Tensor],
        valid: tuple[Tensor, Tensor],
        grids: tuple[tuple[int, int], tuple[int, int]],
        geometry: Tensor,
    ) -> Tensor:
        """The plan (B, n, m) of a pairing that is no transport: half from each view to the other."""
        plans = []
        for v, costs in ((0, cost), (1, cost.mT)):
            w = 1 - v
            if self.settings.pairing == "same-cell":
                partner = _same_place(grids[v], grids[w], cost.device).expand(len(cost), -1)
                known = valid[v] & valid[w].gather(1, partner)
            elif self.settings.pairing == "nearest":
                partner = costs.detach().masked_fill(~valid[w].unsqueeze(1), float("inf")).argmin(-1)
                known = valid[v]
            else:
                true = correspondence(
                    geometry[v], geometry[w], valid[v], valid[w], grids[v], grids[w],
                    self.encoder.first_centre,
                )  # fmt: skip
                partner, known = true.cell.clamp_min(0), true.known
            weight = masses[v] * known
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
            plans.append(one_way_plan(partner, weight, costs.shape[-1]))
        return (plans[0] + plans[1].mT) / 2

    def _mass(
        self, kind: str, infused: Tensor | None, received: Tensor | None, valid: Tensor, other_valid: Tensor
    ) -> Tensor:
        """Masses of one view (B, n), at least float32.

        Args:
            kind: "score", "attention" or "uniform".
            infused: R of this view.
            received: Attention of the other view's tokens on this view's, (B, heads, m, n).
            valid: (B, n) bool of this view; other_valid: (B, m) of the other one, whose tokens are the queries.
        """
        s = self.settings
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        if kind == "uniform":
            return valid.to(dtype) / valid.sum(-1, keepdim=True).to(dtype)
        with torch.autocast(valid.device.type, enabled=False):
            if kind == "score":
                assert infused is not None
                assert self.score is not None
                score = self.score(infused.to(dtype)).squeeze(-1) / s.temperature
                mass = score.masked_fill(~valid, float("-inf")).softmax(-1)
            else:
                assert received is not None
                queries = other_valid[:, None, :, None].to(dtype)
                mass = (received.to(dtype) * queries).sum(2).mean(1) / queries.sum(2).mean(1)
            return self._floored(mass, valid)

    def _contrast(self, cost: Tensor, valid: Tensor, other_valid: Tensor) -> Tensor:
        """Masses (B, n) of one view: softmax of (mean_j C_ij - min_j C_ij) / temperature over valid i and j."""
        there = other_valid.unsqueeze(1)
        count = other_valid.sum(-1, keepdim=True).clamp_min(1).to(cost.dtype)
        gap = (cost * there).sum(-1) / count - cost.masked_fill(~there, float("inf")).amin(-1)
        mass = (gap / self.settings.temperature).masked_fill(~valid, float("-inf")).softmax(-1)
        return self._floored(mass, valid)

    def _variance(self, q: Tensor, valid: Tensor, mean: Tensor) -> Tensor:
        """Sum of the variance hinges over the kinds of rows that are asked for."""
        rows = self.settings.variance_rows
        total = q.new_zeros((), dtype=torch.promote_types(q.dtype, torch.float32))
        if "pooled" in rows:
            total = total + variance(mean)
        if "tokens" in rows:
            total = total + variance(q[valid])
        if "position" in rows:
            total = total + variance_at_positions(q, valid)
        if "within-image" in rows:
            total = total + variance_within(q, valid, self.settings.within_target)
        return total

    def _global(self, pair: _Pair) -> dict[str, Tensor]:
        """Invariance, variance and covariance of the projections of pooled tokens."""
        assert self.pooled_projector is not None

        def pooled(tokens: tuple[Tensor, Tensor]) -> list[Tensor]:
            if self.settings.global_pool == "mass":
                return [weighted_sum(z, mass) for z, mass in zip(tokens, pair.masses, strict=True)]
            return [masked_mean(z, valid) for z, valid in zip(tokens, pair.valid, strict=True)]

        targets = None
        if pair.slow is not None and self.target_pooled is not None:
            with torch.no_grad():
                targets = self.target_pooled(torch.cat(pooled(pair.slow)))
        names = ("global", "global_variance", "global_covariance")
        return dict(zip(names, _invariance(self.pooled_projector, pooled(pair.tokens), targets), strict=True))

    def _covariance(self, q: Tensor, valid: Tensor, mean: Tensor) -> Tensor:
        """Covariance penalty on pooled rows if the variance sees only those, else on all valid tokens."""
        return covariance(mean) if self.settings.variance_rows == ("pooled",) else covariance(q[valid])

    def _concentration(self, mass: Tensor, valid: Tensor) -> Tensor:
        """How far the masses fall short of the wanted spread: mean of max(0, ln(mass_area n_valid) - H)."""
        wanted = valid.sum(-1).to(mass.dtype).log() + math.log(self.settings.mass_area)
        # an absent position counts as p = 1 (entropy 0): at p = 0 the slope of the entropy is infinite
        return (wanted - entropy(torch.where(valid, mass, 1.0))).clamp_min(0).mean()


def _invariance(
    projector: nn.Module, pooled: list[Tensor], targets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance of the projections of two views; targets are the other side of the first."""
    g_s, g_t = projector(torch.cat(pooled)).chunk(2)
    if targets is None:
        agreement = squared_difference(g_s, g_t)
    else:
        slow_s, slow_t = targets.chunk(2)
        agreement = (squared_difference(g_s, slow_t) + squared_difference(slow_s, g_t)) / 2
    return agreement, (variance(g_s) + variance(g_t)) / 2, covariance(g_s) + covariance(g_t)


def _divergence(taught: Tensor, mass: Tensor) -> Tensor:
    """Mean over the batch of KL(taught | mass), 0 for a row of taught that is all 0; (B, n) both."""
    there = taught > 0
    ratio = torch.where(there, taught, 1.0).log() - torch.where(there, mass, 1.0).log()
    return (taught * ratio).sum(-1).mean()


def _local_tokens(valid: Tensor, last: Tensor, number: int) -> Tensor:
    """Valid tokens (B, n) of a local view; of one that shows little, at least the most valid one.

    Raises: DataError: an image shows nothing at all in it.
    """
    height, width = last.shape[-2:]
    tokens = token_valid(valid, height, width)
    covered = nn.functional.adaptive_avg_pool2d(valid.to(last.dtype), (height, width)).flatten(1)
    best = nn.functional.one_hot(covered.argmax(1), covered.shape[1]).bool() & (covered > 0)
    tokens = torch.where(tokens.any(1, keepdim=True), tokens, best)
    refuse_empty(tokens, f"local ({number}.)")
    return tokens


def _same_place(grid: tuple[int, int], other: tuple[int, int], device: torch.device) -> Tensor:
    """For each cell of a grid the cell of another one that holds its middle, both spread over the same square: (n,)."""
    place = token_centres(*grid, device)
    column, row = ((place[:, k] * other[1 - k]).floor().long().clamp_max(other[1 - k] - 1) for k in (0, 1))
    return row * other[1] + column


def _match(pair: _Pair) -> Match:
    attention = None if pair.attention is None else pair.attention.detach()
    mu, nu = pair.masses
    return Match(pair.cost.detach(), mu.detach(), nu.detach(), pair.plan.detach(), attention)
