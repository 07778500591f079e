"""Methods: the contract of every row of the table, and every term of OTCXR against its formula."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from oracles import (
    cosine_cost_by_loops,
    covariance_by_loops,
    nt_xent_by_loops,
    sharp_value,
    sinkhorn_by_newton,
    variance_by_loops,
)
from otcxr.data.geometry import ViewBatch
from otcxr.errors import ConfigError, DataError
from otcxr.health import observe, verdict
from otcxr.methods import METHODS, Match
from otcxr.methods.barlow import Barlow
from otcxr.methods.base import encode_views, tokens_of
from otcxr.methods.byol import BYOL
from otcxr.methods.contrastive_ot import ContrastiveOT, ContrastiveOTSettings
from otcxr.methods.densecl import DenseCL
from otcxr.methods.dino import DINO
from otcxr.methods.moco import MoCo
from otcxr.methods.otcxr import OTCXR, OTCXRSettings
from otcxr.methods.pcrlv2 import PCRLv2
from otcxr.methods.simclr import SimCLR, SimCLRSettings
from otcxr.methods.simsiam import SimSiam
from otcxr.methods.vicreg import VICReg, VICRegSettings
from otcxr.methods.vicregl import VICRegL
from otcxr.nn.encoder import Architecture, Encoder, build_encoder
from otcxr.ot import sinkhorn

torch.set_num_threads(1)

# Everything is said here, so no test depends on a default.
EXPLICIT = OTCXRSettings(
    mass="score", mass_gradient=True, temperature=0.5, floor=0.1, mass_area=0.95, mass_weight=0.7, infuse=False,
    overlap_weight=0.0, place=0.0,
    heads=4, hidden=16, outputs=8, epsilon=0.1, tolerance=1e-5, max_iterations=3000, objective="value", reach=None,
    centred_cost=False, alpha=3.0, beta=2.0, eta=0.5, global_weight=0.0, variance_rows=("within-image",),
    within_target=1.3, global_hidden=16, global_outputs=8,
)  # fmt: skip
VARIANTS = {
    "score": EXPLICIT,
    "score-infused": replace(EXPLICIT, infuse=True, centred_cost=True),
    "attention": replace(EXPLICIT, mass="attention", mass_area=1.0, variance_rows=("tokens",)),
    "attention-fixed": replace(EXPLICIT, mass="attention", mass_gradient=False, global_weight=0.6),
    "attention-fixed-infused": replace(EXPLICIT, mass="attention", mass_gradient=False, infuse=True),
    "uniform": replace(EXPLICIT, mass="uniform", variance_rows=("position",), centred_cost=True),
    "uniform-infused": replace(EXPLICIT, mass="uniform", infuse=True, variance_rows=("pooled",)),
    "pooled": replace(EXPLICIT, variance_rows=("pooled",), global_weight=1.5, mass_weight=0.0),
    "all-rows": replace(EXPLICIT, variance_rows=("pooled", "tokens", "position", "within-image"), floor=0.5),
    "no-rows": replace(EXPLICIT, variance_rows=(), centred_cost=True, global_weight=0.25),
    "sharp": replace(EXPLICIT, objective="sharp"),
    "soft-marginals": replace(EXPLICIT, reach=0.5, centred_cost=True),
    "sharp-soft-marginals": replace(EXPLICIT, objective="sharp", reach=0.3),
    "same-cell": replace(EXPLICIT, pairing="same-cell"),
    "nearest": replace(EXPLICIT, pairing="nearest", mass="attention", mass_gradient=False, centred_cost=True),
    "geometry": replace(EXPLICIT, pairing="geometry", infuse=True),
    "literal": replace(EXPLICIT, infuse=True, objective="sharp", mass_weight=0.0, variance_rows=("tokens",)),
    "geometry-uniform": replace(EXPLICIT, pairing="geometry", mass="uniform"),
}
CASES = {
    **{name: (method.build, method.settings) for name, method in METHODS.items()},
    **{f"otcxr:{name}": (OTCXR, settings) for name, settings in VARIANTS.items()},
    "otcxr:momentum": (OTCXR, replace(EXPLICIT, global_weight=0.6, centred_cost=True, target_momentum=0.9)),
    "otcxr:momentum-nearest": (OTCXR, replace(EXPLICIT, pairing="nearest", target_momentum=0.9)),
    "simclr:cold": (SimCLR, SimCLRSettings(hidden=16, outputs=8, temperature=0.1)),
    "vicreg:narrow": (VICReg, VICRegSettings(hidden=16, outputs=8, invariance=3.0, variance=2.0, covariance=0.5)),
}
POOLED = (SimCLR, VICReg, ContrastiveOT, MoCo, BYOL, SimSiam, Barlow, PCRLv2, DINO)  # methods that pair no positions
ONE_SIDED = (MoCo, DenseCL)  # only the momentum copy sees the second view
each_case = pytest.mark.parametrize("case", CASES)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def of_transport(settings):
    return getattr(settings, "pairing", "") == "transport"


def of_fixed_pairs(settings):
    """Pairs that no encoder decides."""
    return getattr(settings, "pairing", "") in ("same-cell", "geometry")


def pairs_of(method, batch, out):
    """What was paired in this pass; where the health panel is not shown it, in another one."""
    return out.observed.match or method.match(batch)


class Stub(Encoder):
    """Gives the maps it was made with: what the encoder says is then known and can be changed by hand."""

    def __init__(self, *maps):
        super().__init__()
        self.maps = nn.ParameterList([m.clone() for m in maps])  # one for each size of view, all views of it together
        self.channels, self.strides = (maps[0].shape[1],), (16,)
        self.architecture = Architecture("stub", 1, 4, 16)
        self.calls = 0

    def forward(self, images):
        given = self.maps[self.calls % len(self.maps)]
        self.calls += 1
        assert len(images) in (len(given), len(given) // 2)  # both views, or the first alone
        return (given[: len(images)],)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def token_holes(batch, height, width, seed=0):
    """Tokens that are there: about three quarters, at least two, other ones in every image."""
    keep = torch.rand(batch, height * width, generator=torch.Generator().manual_seed(seed)) < 0.75
    keep[:, :2] = True
    return keep.reshape(batch, 1, height, width)


def views(batch=4, sizes=(64, 64), stride=16, seed=0, holes=True):
    """Random views whose absent tokens are exact blocks of ``stride`` pixels."""
    pixels, valid = [], []
    for v, size in enumerate(sizes):
        pixels.append(torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(seed + v)))
        grid = token_holes(batch, size // stride, size // stride, seed + 10 + v)
        whole = grid.repeat_interleave(stride, -1).repeat_interleave(stride, -2)
        valid.append(whole if holes else torch.ones_like(whole))
    geometry = torch.eye(3)[:2].expand(len(sizes), batch, 2, 3).clone()
    return ViewBatch(tuple(pixels), geometry, tuple(valid), tuple(p.square() for p in pixels))


def valid_tokens(batch, stride=16):
    return [v[:, 0, ::stride, ::stride].flatten(1) for v in batch.valid]


def one_image(batch, i):
    part = slice(i, i + 1)
    return ViewBatch(tuple(v[part] for v in batch.views), batch.geometry[:, part], tuple(v[part] for v in batch.valid))


def build(case, seed=0, width=8):
    method, settings = CASES[case]
    return seeded(lambda: method(build_encoder("resnet18", width=width, stride=16, seed=seed), settings), seed)


def stubbed(settings, maps=None, seed=0, double=True, images=4):
    """OTCXR on given maps (2B, 12, 4, 4), in double precision."""
    maps = normal(2 * images, 12, 4, 4, seed=seed) if maps is None else maps
    method = seeded(lambda: OTCXR(Stub(*([maps] if isinstance(maps, torch.Tensor) else maps)), settings), seed)
    with torch.no_grad():  # a sharper attention and scores that differ: nothing may be nearly uniform by chance
        if method.cross_view is not None:
            method.cross_view.query.weight.mul_(6)
        if method.score is not None:
            method.score[1].weight.mul_(4)
    return method.double() if double else method.float()


def close(got, expected, atol=1e-9, rtol=1e-7):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=atol, rtol=rtol)


def gradients(method, loss):
    method.zero_grad()
    loss.backward()
    return {k: p.grad for k, p in method.named_parameters()}


def alive(gradient):
    return gradient is not None and bool((gradient != 0).any())


# --- the contract of every method ------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("holes", [False, True])
def test_loss_is_a_finite_scalar_and_reaches_every_weight_of_the_encoder(case, holes):
    method = build(case).train()
    out = method(views(holes=holes))
    assert out.loss.shape == ()
    assert out.loss.isfinite()
    assert out.observed is None
    for name, term in out.terms.items():
        assert term.shape == (), name
        assert term.isfinite(), name
        assert not term.requires_grad, name
    grads = gradients(method.encoder, out.loss)
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert [name for name, g in grads.items() if not alive(g)] == []


@each_case
def test_one_seed_one_loss(case):
    losses = [float(build(case, seed=s).train()(views()).loss.detach()) for s in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@each_case
def test_the_global_random_state_is_left_alone(case):
    method = build(case).train()
    before = torch.get_rng_state()
    method(views(), observe=True).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@each_case
@torch.no_grad()
def test_state_goes_round(case):
    method, other = build(case, seed=1).eval(), build(case, seed=2).eval()
    batch = views()
    assert method(batch).loss != other(batch).loss
    other.load_state_dict(method.state_dict())
    assert method(batch).loss == other(batch).loss


@each_case
def test_looking_does_not_change_the_loss(case):
    first, second = build(case).train(), build(case).train()
    batch = views()
    plain, seen = first(batch), second(batch, observe=True)
    assert torch.equal(plain.loss, seen.loss)
    assert plain.observed is None
    observed = seen.observed
    assert observed.pooled.shape == (8, 64)
    assert observed.tokens.shape == (4, 16, 64)
    method = CASES[case][0]
    with torch.no_grad():
        parts = batch.views if method in ONE_SIDED else [torch.cat(batch.views)]
        last = torch.cat([build(case).train().encoder(part)[-1] for part in parts])
    torch.testing.assert_close(observed.pooled, last.mean((-2, -1)))
    torch.testing.assert_close(observed.tokens, last[:4].flatten(2).mT)
    parts = [observed.pooled, observed.tokens, *(observed.match or ())]
    assert not any(part.requires_grad for part in parts if part is not None)
    assert (observed.match is None) == (CASES[case][0] in POOLED or of_fixed_pairs(CASES[case][1]))


@each_case
def test_match_in_evaluation_is_what_the_loss_used(case):
    method = build(case).eval()
    batch = views()
    match = method.match(batch)
    if CASES[case][0] in POOLED:
        assert match is None
        return
    assert isinstance(match, Match)
    assert not any(part.requires_grad for part in match if part is not None)
    out = method(batch, observe=True)
    for got, expected in zip(match, out.observed.match or (), strict=not of_fixed_pairs(CASES[case][1])):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)
    if "alignment" in out.terms:
        paid = (match.plan * match.cost).sum((-1, -2)).mean()
        assert out.terms["alignment"].item() == pytest.approx(paid.item(), rel=1e-5)
    assert match.plan.shape == match.cost.shape == (4, 16, 16)
    assert (match.cost >= 0).all()
    assert (match.cost <= 2).all() or CASES[case][0] is VICRegL  # a distance, the others are cosines
    assert all(torch.equal(p, q) for p, q in zip(method.state_dict().values(), build(case).state_dict().values(),
                                                 strict=True))  # fmt: skip


@each_case
@pytest.mark.parametrize("scale", [1.0, 12.0, 100.0])
@torch.no_grad()
def test_half_precision_gives_nearly_the_same_loss(case, scale):
    maps = scale * normal(12, 64, 4, 4, seed=3, dtype=torch.float32) + scale
    method, settings = CASES[case]
    module = seeded(lambda: method(Stub(maps), settings)).train()
    batch = views(batch=6)
    exact = module(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(batch)
    assert rough.loss.dtype == torch.float32
    assert rough.loss.isfinite()
    torch.testing.assert_close(rough.loss, exact.loss, rtol=0.02, atol=0.02)


class SinglePrecision:
    """A layer's ``forward`` with autocast off."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, *given):
        with torch.autocast("cpu", enabled=False):
            return self.forward(*given)


def turned(batch, seed=0):
    """The same views, each somewhere else in its image: crops, turned, some mirrored."""
    angle, scale, left, top = torch.rand(4, *batch.geometry.shape[:2], generator=torch.Generator().manual_seed(seed))
    angle, scale = (angle - 0.5) * 0.35, 0.55 + 0.45 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    mirrored = torch.where(left > 0.7, -1.0, 1.0)
    x = (1 - scale) * left + torch.where(mirrored < 0, scale, 0.0)
    rows = torch.stack((cos * mirrored, -sin, x, sin * mirrored, cos, (1 - scale) * top), dim=-1)
    return batch._replace(geometry=rows.unflatten(-1, (2, 3)))


@each_case
@pytest.mark.parametrize("local", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_but_layers_computes_in_half_precision(case, local, dtype):
    """With the layers in single precision autocast must change no bit of loss and gradient.

    So similarities, softmax, transport, geometry, variance and covariance are outside of its reach.
    """
    method = build(case).train()
    batch = turned(views(batch=6, sizes=(64, 64) + (48,) * local))
    found = []
    for module in method.modules():
        if not list(module.children()):
            module.forward = SinglePrecision(module.forward)
    for enabled in (False, True):
        state = {name: value.clone() for name, value in method.state_dict().items()}
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out = method(batch, observe=True)
        found.append((out, gradients(method, out.loss)))
        method.load_state_dict(state)
    (exact, exact_gradients), (rough, rough_gradients) = found
    assert torch.equal(rough.loss, exact.loss)
    for name, term in exact.terms.items():
        assert torch.equal(rough.terms[name], term), name
    for name, gradient in exact_gradients.items():
        assert gradient is None or torch.equal(rough_gradients[name], gradient), name
    for name, part in (exact.observed.match or Match(*(None,) * 5))._asdict().items():
        assert part is None or torch.equal(getattr(rough.observed.match, name), part), name


@each_case
@pytest.mark.parametrize("value", [0.0, 1.0, -0.37])
def test_an_encoder_that_always_says_the_same_is_called_collapsed(case, value):
    """T10: whatever the method's loss says."""
    method, settings = CASES[case]
    module = seeded(lambda: method(Stub(torch.full((8, 64, 4, 4), value)), settings)).train()
    batch = views()
    out = module(batch, observe=True)
    assert out.loss.isfinite()
    numbers = observe(out.observed, batch)
    assert all(math.isfinite(x) for x in numbers.values())
    judged = verdict(numbers)
    assert not judged.healthy
    assert judged.text.startswith("collapse: all images have nearly the same embedding")
    assert numbers["effective_rank"] == pytest.approx(1)
    assert all(g is None or g.isfinite().all() for g in gradients(module, out.loss).values())


@pytest.mark.parametrize("case", ["otcxr", "otcxr-geometry", "densecl", "vicregl"])
@pytest.mark.parametrize("view", [0, 1])
def test_a_view_without_a_valid_token_is_refused_where_positions_are_paired(case, view):
    method, batch = build(case).train(), views()
    batch.valid[view][2] = False
    name = ("first", "second")[view]
    with pytest.raises(DataError, match=f"the {name} view of sample 2 of the batch has no valid token"):
        method(batch)


def test_views_of_one_size_are_encoded_together():
    """So BatchNorm sees both; views of another size go on their own, and the order of views is kept."""
    encoder = build_encoder("resnet18", width=4, stride=16, seed=0).train()
    batch = views(sizes=(64, 96, 64))
    maps = encode_views(encoder, batch.views)
    together = encoder(torch.cat((batch.views[0], batch.views[2])))
    for got, expected in zip(maps[0], together, strict=True):
        torch.testing.assert_close(got, expected[:4])
    for got, expected in zip(maps[2], together, strict=True):
        torch.testing.assert_close(got, expected[4:])
    torch.testing.assert_close(maps[1][-1], encoder(batch.views[1])[-1])
    assert maps[1][-1].shape[-2:] == (6, 6)


def test_tokens_go_row_by_row():
    x = torch.arange(2 * 3 * 2 * 5).reshape(2, 3, 2, 5)
    tokens = tokens_of(x)
    assert tokens.shape == (2, 10, 3)
    assert torch.equal(tokens[1, 7], x[1, :, 1, 2])


# --- SimCLR ----------------------------------------------------------------------------------------------------------


def test_simclr_is_its_formula():
    maps = normal(12, 10, 4, 4, seed=5)
    method = seeded(lambda: SimCLR(Stub(maps), SimCLRSettings(hidden=16, outputs=8, temperature=0.3))).double()
    with torch.no_grad():
        out = method(views(batch=6))
        embedded = method.head(maps.mean((-2, -1)))
    assert out.loss.item() == pytest.approx(nt_xent_by_loops(embedded[:6], embedded[6:], 0.3), rel=1e-10)
    assert out.terms["contrastive"] == out.loss
    assert out.terms["contrastive_chance"].item() == pytest.approx(math.log(11))


@pytest.mark.parametrize("temperature", [0.0, -0.1])
def test_simclr_settings(temperature):
    with pytest.raises(ConfigError, match=f"method.temperature must be > 0, received {temperature}"):
        SimCLRSettings(hidden=16, outputs=8, temperature=temperature)


# --- VICReg ----------------------------------------------------------------------------------------------------------


def test_vicreg_is_its_formula():
    maps = normal(12, 10, 4, 4, seed=5)
    settings = VICRegSettings(hidden=16, outputs=8, invariance=3.0, variance=2.0, covariance=0.5)
    method = seeded(lambda: VICReg(Stub(maps), settings)).double()
    with torch.no_grad():
        out = method(views(batch=6))
        first, second = method.expander(maps.mean((-2, -1))).numpy().reshape(2, 6, 8)
    invariance = np.mean([(x - y) ** 2 for x, y in zip(first, second, strict=True)])
    hinge = (variance_by_loops(first) + variance_by_loops(second)) / 2
    correlation = covariance_by_loops(first) + covariance_by_loops(second)
    assert min(invariance, hinge, correlation) > 1e-3
    assert out.terms["invariance"].item() == pytest.approx(invariance)
    assert out.terms["variance"].item() == pytest.approx(hinge)
    assert out.terms["covariance"].item() == pytest.approx(correlation)
    assert out.loss.item() == pytest.approx(3.0 * invariance + 2.0 * hinge + 0.5 * correlation)


def test_vicreg_of_a_constant_embedding_is_the_hinge_alone():
    """By hand: no difference, no correlation, a hinge of 1 - sqrt(1e-4) = 0.99 for each view, weight 25."""
    method = seeded(lambda: VICReg(Stub(torch.full((8, 10, 4, 4), 0.7)), VICRegSettings(hidden=16, outputs=8))).eval()
    out = method(views())
    assert out.loss.item() == pytest.approx(25 * 0.99, rel=1e-4)


def test_the_expander_is_three_maps_deep_and_ends_bare():
    method = seeded(lambda: VICReg(Stub(normal(8, 10, 4, 4)), VICRegSettings(hidden=16, outputs=8)))
    kinds = [type(layer).__name__ for layer in method.expander]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert method.expander[-1].bias is None


@pytest.mark.parametrize("changes", [{"hidden": 0}, {"outputs": 0}, {"variance": -1.0}])
def test_vicreg_settings(changes):
    with pytest.raises(ConfigError, match="received"):
        VICRegSettings(**changes)


# --- contrastive-ot --------------------------------------------------------------------------------------------------

NAIVE = ContrastiveOTSettings(hidden=16, outputs=8, temperature=0.3, epsilon=0.1, tolerance=1e-9, max_iterations=3000)


def test_contrastive_ot_is_its_formula():
    maps = normal(12, 10, 4, 4, seed=5)
    method = seeded(lambda: ContrastiveOT(Stub(maps), NAIVE)).double().train()
    batch = views(batch=6)
    with torch.no_grad():
        out = method(batch)
        logits = method.head(maps.mean((-2, -1))).numpy().reshape(2, 6, 8)
    probits = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    cost = cosine_cost_by_loops(*probits)
    uniform = np.full(6, 1 / 6)
    value = sinkhorn_by_newton(cost, uniform, uniform, 0.1, None).value
    contrastive = nt_xent_by_loops(torch.tensor(logits[0]), torch.tensor(logits[1]), 0.3)
    assert out.terms["transport"].item() == pytest.approx(value, rel=1e-6)
    assert out.terms["transport_chance"].item() == pytest.approx(cost.mean(), rel=1e-6)
    assert out.terms["contrastive"].item() == pytest.approx(contrastive, rel=1e-8)
    assert out.terms["weight"].item() == pytest.approx(contrastive / value, rel=1e-6)
    assert out.loss.item() == pytest.approx(2 * contrastive, rel=1e-6)  # both terms start equal


def test_contrastive_ot_fixes_its_weight_in_the_first_step_of_a_training():
    method = build("contrastive-ot").eval()
    assert float(method(views()).terms["weight"]) == 0.0  # looked at before it is trained
    method.train()
    first = float(method(views()).terms["weight"])
    assert first > 0
    with torch.no_grad():
        method.head[0].weight.mul_(-3)
    assert float(method(views(seed=5)).terms["weight"]) == first
    other = build("contrastive-ot", seed=4).train()
    other.load_state_dict(method.state_dict())
    assert float(other(views()).terms["weight"]) == first


def test_contrastive_ot_trains_through_both_terms():
    method = build("contrastive-ot").train()
    method(views())
    out = method(views(seed=3))
    whole = {name: g.clone() for name, g in gradients(method, out.loss).items()}
    with torch.no_grad():
        method.weight.fill_(1e-12)
    alone = gradients(method, method(views(seed=3)).loss)
    assert any((whole[name] - g).abs().max() > 1e-4 * g.abs().max() for name, g in alone.items())


@pytest.mark.parametrize("changes", [{"outputs": 1}, {"temperature": 0.0}, {"epsilon": -1.0}, {"max_iterations": 0}])
def test_contrastive_ot_settings(changes):
    with pytest.raises(ConfigError, match="received"):
        ContrastiveOTSettings(**changes)


# --- controls: other pairs at the same cost ------------------------------------------------------------------------


def test_true_pairs_follow_flips_turns_and_crops():
    """T5: the geometry control pairs what the other view really shows, and nothing that it does not show."""
    settings = replace(VARIANTS["geometry-uniform"], outputs=8)
    method = stubbed(settings).train()
    batch = views(holes=True)
    angle = math.radians(12)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    middle = torch.tensor([0.5, 0.5])
    geometry = batch.geometry.clone()
    geometry[0, 0] = torch.tensor([[-1.0, 0, 1], [0, 1, 0]])  # a mirror image
    geometry[1, 1] = torch.tensor([[0.5, 0, 0.4], [0, 0.6, 0.1]])  # a crop
    geometry[0, 2] = torch.cat((0.8 * turn, (middle - 0.8 * turn @ middle)[:, None]), dim=1)
    geometry[0, 3] = torch.tensor([[0.3, 0, 0.0], [0, 0.3, 0.0]])  # no common place at all
    geometry[1, 3] = torch.tensor([[0.3, 0, 0.7], [0, 0.3, 0.7]])
    batch = batch._replace(geometry=geometry)
    with torch.no_grad():
        match = method.match(batch)
    _, _, plans, terms = slow_otcxr_with_empty(method, batch)
    close(match.plan, plans, atol=1e-9)
    assert match.plan[3].sum() == 0
    assert match.plan[:3].sum((-1, -2)).tolist() == pytest.approx([1.0, 1.0, 1.0])
    mirrored = match.plan[0].nonzero()
    assert len(mirrored)
    assert all(i // 4 == j // 4 and i % 4 + j % 4 == 3 for i, j in mirrored.tolist())
    with torch.no_grad():
        out = method(batch)
    assert out.terms["alignment"].item() == pytest.approx(terms["alignment"])


def slow_otcxr_with_empty(method, batch):
    with np.errstate(invalid="ignore"):
        return slow_otcxr(method, batch)


def test_the_same_place_in_grids_of_different_size():
    from otcxr.methods.otcxr import _same_place

    assert _same_place((2, 2), (4, 4), None).tolist() == [5, 7, 13, 15]
    assert _same_place((4, 4), (2, 2), None).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert _same_place((3, 2), (3, 2), None).tolist() == list(range(6))


@pytest.mark.parametrize("pairing", ["same-cell", "nearest", "geometry"])
def test_views_of_different_size_have_pairs(pairing):
    settings = replace(EXPLICIT, pairing=pairing)
    maps = normal(4, 12, 4, 4, seed=1), normal(4, 12, 3, 3, seed=2)
    method = stubbed(settings, maps).train()
    batch = views(sizes=(64, 48))
    out = method(batch, observe=True)
    assert out.loss.isfinite()
    assert pairs_of(method, batch, out).plan.shape == (4, 16, 9)
    out.loss.backward()


@pytest.mark.parametrize("pairing", ["same-cell", "nearest", "geometry"])
def test_controls_train_the_masses_too(pairing):
    method = stubbed(replace(EXPLICIT, pairing=pairing, mass_weight=0.0, beta=0.0, eta=0.0, global_weight=0.0)).train()
    grads = gradients(method, method(views()).loss)
    assert alive(grads["score.1.weight"])


def test_an_unknown_pairing_is_refused():
    with pytest.raises(ConfigError, match="must be one of transport, same-cell, nearest, geometry, received 'pixel'"):
        replace(EXPLICIT, pairing="pixel")


# --- OTCXR against its formulas --------------------------------------------------------------------------------------


def pairs_by_loops(method, batch, i, cost, a, b, valid):
    """The plan of a control for image i, position by position; grids are 4 x 4."""
    plan = np.zeros_like(cost)
    for v, masses in ((0, a), (1, b)):
        found = {}
        for here in range(len(masses)):
            if not valid[v][i, here]:
                continue
            costs = cost[here] if v == 0 else cost[:, here]
            if method.settings.pairing == "same-cell":
                there = here
            elif method.settings.pairing == "nearest":
                there = min((j for j in range(len(costs)) if valid[1 - v][i, j]), key=lambda j: costs[j])
            else:
                row, column = divmod(here, 4)
                first = method.encoder.first_centre
                middle = np.array([(column + first) / 4, (row + first) / 4])
                maps = batch.geometry[:, i].double().numpy()
                place = np.linalg.solve(maps[1 - v][:, :2], maps[v][:, :2] @ middle + maps[v][:, 2] - maps[1 - v][:, 2])
                if not ((place >= 0) & (place < 1)).all():
                    continue
                nearest = np.clip(np.floor(place * 4 + 0.5 - first), 0, 3)
                there = int(nearest[1] * 4 + nearest[0])
            if valid[1 - v][i, there]:
                found[here] = there
        total = sum(masses[here] for here in found)
        for here, there in found.items():
            at = (here, there) if v == 0 else (there, here)
            plan[at] += masses[here] / total / 2
    return plan


@torch.no_grad()
def slow_otcxr(method, batch):
    """Masses, costs and terms of OTCXR image by image, from the docstring of the module and the slow oracles."""
    s = method.settings
    z = [tokens_of(m) for m in method.encoder.maps[0].chunk(2)]
    valid = valid_tokens(batch)
    r, attention = [None, None], [None, None]
    if method.cross_view is not None:
        for v in (0, 1):
            r[v], attention[v] = method.cross_view(z[v], z[1 - v], valid[1 - v])
    q = [method.projector(z[v] + r[v] if s.infuse else z[v]).numpy() for v in (0, 1)]
    valid = [v.numpy() for v in valid]
    masses = [np.zeros(v.shape) for v in valid]
    for v in (0, 1):
        for i, here in enumerate(valid[v]):
            if s.mass == "uniform":
                masses[v][i, here] = 1 / here.sum()
                continue
            if s.mass == "score":
                scores = method.score(r[v][i])[here, 0].numpy() / s.temperature
                weight = np.exp(scores) / np.exp(scores).sum()
            else:  # what each token receives from the valid queries of the other view, over all heads
                received = attention[1 - v][i].numpy()[:, valid[1 - v][i]][:, :, here]
                weight = received.mean((0, 1))
            masses[v][i, here] = (1 - s.floor) * weight + s.floor / here.sum()
    rows = [np.concatenate([x[keep] for x, keep in zip(q[v], valid[v], strict=True)]) for v in (0, 1)]
    centre = np.concatenate(rows).mean(0) if s.centred_cost else 0.0
    costs = [cosine_cost_by_loops(x - centre, y - centre) for x, y in zip(*q, strict=True)]
    problems = list(zip(costs, *masses, strict=True))
    if s.pairing == "transport":
        solved = [sinkhorn_by_newton(c, a, b, s.epsilon, s.reach) for c, a, b in problems]
        plans = [x.plan for x in solved]
        values = [
            x.value if s.objective == "value" else sharp_value(x, c, a, b, s.reach)
            for x, (c, a, b) in zip(solved, problems, strict=True)
        ]
    else:
        plans = [pairs_by_loops(method, batch, i, *problem, valid) for i, problem in enumerate(problems)]
        values = [(plan * c).sum() for plan, (c, _, _) in zip(plans, problems, strict=True)]
    terms = {
        "transport" if s.pairing == "transport" else "alignment": np.mean(values),
        "variance": 0.0,
        "covariance": 0.0,
    }
    for v in (0, 1):
        means = np.stack([x[keep].mean(0) for x, keep in zip(q[v], valid[v], strict=True)])
        at = [q[v][valid[v][:, j], j] for j in range(q[v].shape[1])]
        kinds = {
            "pooled": lambda means=means: variance_by_loops(means),
            "tokens": lambda v=v: variance_by_loops(rows[v]),
            "position": lambda at=at: np.mean([variance_by_loops(x) for x in at if len(x) >= 2]),
            "within-image": lambda v=v: np.mean(
                [variance_by_loops(x[k], s.within_target) for x, k in zip(q[v], valid[v], strict=True) if k.sum() > 1]
            ),
        }
        terms["variance"] += sum(kinds[kind]() for kind in s.variance_rows) / 2
        terms["covariance"] += covariance_by_loops(means if s.variance_rows == ("pooled",) else rows[v])
    if s.global_weight:
        pooled = np.concatenate(
            [[x[keep].mean(0) for x, keep in zip(z[v].numpy(), valid[v], strict=True)] for v in (0, 1)]
        )
        g = method.pooled_projector(torch.tensor(pooled)).numpy()
        half = len(g) // 2
        terms["global"] = np.mean([((x - y) ** 2).sum() / len(x) for x, y in zip(g[:half], g[half:], strict=True)])
        terms["global_variance"] = (variance_by_loops(g[:half]) + variance_by_loops(g[half:])) / 2
        terms["global_covariance"] = covariance_by_loops(g[:half]) + covariance_by_loops(g[half:])
    if s.mass_weight and s.mass_gradient and s.mass != "uniform":
        short = [
            max(0.0, math.log(s.mass_area * keep.sum()) + sum(p * math.log(p) for p in mass[keep]))
            for v in (0, 1)
            for mass, keep in zip(masses[v], valid[v], strict=True)
        ]
        terms["mass"] = np.mean(short)
    return masses, costs, plans, terms


@each_variant
@pytest.mark.parametrize("holes", [False, True])
def test_every_term_is_its_formula(variant, holes):
    settings = VARIANTS[variant]
    method = stubbed(replace(settings, tolerance=1e-9)).train()
    batch = views(holes=holes)
    with torch.no_grad():
        out = method(batch, observe=True)
    masses, costs, plans, terms = slow_otcxr(method, batch)
    match = pairs_of(method, batch, out)
    for got, expected in [(match.a, masses[0]), (match.b, masses[1]), (match.cost, costs), (match.plan, plans)]:
        close(got, expected, atol=1e-7)
    name = "transport" if settings.pairing == "transport" else "alignment"
    of_solver = {"residual", "iterations"} if settings.pairing == "transport" else set()
    assert set(out.terms) == {*terms, *of_solver, f"{name}_chance"}
    # nothing matched: the mean cost under the product of the masses
    chance = np.mean([a @ c @ b for a, b, c in zip(*masses, costs, strict=True)])
    assert out.terms[f"{name}_chance"].item() == pytest.approx(chance, rel=1e-6)
    if of_solver:
        assert 1 <= out.terms["iterations"].item() <= settings.max_iterations
    for term, expected in terms.items():
        assert out.terms[term].item() == pytest.approx(expected, rel=1e-6, abs=1e-9), term
    s = settings
    loss = s.alpha * terms[name] + s.beta * terms["variance"] + s.eta * terms["covariance"]
    if s.global_weight:
        loss += s.global_weight * (
            s.alpha * terms["global"] + s.beta * terms["global_variance"] + s.eta * terms["global_covariance"]
        )
    loss += s.mass_weight * terms.get("mass", 0.0)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    if "mass" in terms:
        assert terms["mass"] > 1e-3, "the term must be active, or it is not tested"


@each_variant
def test_terms_add_up_to_the_loss(variant):
    """With a real encoder in training, from the terms that are logged."""
    s = VARIANTS[variant]
    out = build(f"otcxr:{variant}").train()(views())
    t = {name: float(term) for name, term in out.terms.items()}
    aligned = t["transport" if s.pairing == "transport" else "alignment"]
    loss = s.alpha * aligned + s.beta * t["variance"] + s.eta * t["covariance"]
    if s.global_weight:
        loss += s.global_weight * (s.alpha * t["global"] + s.beta * t["global_variance"]
                                   + s.eta * t["global_covariance"])  # fmt: skip
    assert out.loss.item() == pytest.approx(loss + s.mass_weight * t.get("mass", 0.0), rel=1e-5)


@pytest.mark.parametrize("case", [name for name, (_, settings) in CASES.items() if of_transport(settings)])
def test_transport_term_is_the_mean_of_values_solved_again(case):
    method = build(case).train()
    if hasattr(method.settings, "place"):  # what is shown as the method's pairs is without the prior of place
        method.settings = replace(method.settings, place=0.0)
    out = method(views(), observe=True)
    match, s = out.observed.match, method.settings
    again = sinkhorn(
        match.cost, match.a, match.b, epsilon=s.epsilon, tolerance=s.tolerance, max_iterations=s.max_iterations,
        objective=s.objective, reach=s.reach,
    )  # fmt: skip
    assert out.terms["transport"].item() == pytest.approx(again.value.mean().item(), rel=1e-5)
    torch.testing.assert_close(match.plan, again.plan, atol=1e-6, rtol=1e-4)
    left, right = (1.0 if s.reach is None else (-x / s.reach).exp() for x in (again.f, again.g))
    rows, columns = match.plan.sum(-1) - match.a * left, match.plan.sum(-2) - match.b * right
    worst = rows.abs().sum(-1).maximum(columns.abs().sum(-1))
    assert out.terms["residual"].item() == pytest.approx(worst.max().item(), abs=1e-6)


@each_variant
def test_masses_are_masses(variant):
    s = VARIANTS[variant]
    batch = views(sizes=(96, 64))
    maps = [normal(4, 12, 6, 6, seed=1), normal(4, 12, 4, 4, seed=2)]
    match = stubbed(s, maps).match(batch)
    for mass, valid in zip((match.a, match.b), valid_tokens(batch), strict=True):
        close(mass.sum(-1), np.ones(4), atol=1e-12)
        assert (mass[~valid] == 0).all()
        count = valid.sum(-1, keepdim=True).double()
        least = (1.0 if s.mass == "uniform" else s.floor) / count
        assert (mass >= least * valid - 1e-12).all()
        if s.mass != "uniform":
            assert ((mass - valid / count).abs().amax(-1) > 1e-4).all(), "masses must depend on what is seen"


def test_attention_masses_are_the_attention_received():
    """From what ``Match`` hands out: the second view's masses from the first view's attention."""
    batch = views()
    match = stubbed(replace(EXPLICIT, mass="attention", floor=0.0)).match(batch)
    queries = valid_tokens(batch)[0]
    for i in range(4):
        heads = [match.attention[i, h][queries[i]].mean(0) for h in range(4)]
        close(match.b[i], sum(heads) / 4, atol=1e-12)


def test_without_masses_and_infusion_there_is_no_cross_view():
    method = build("otcxr:uniform")
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"encoder", "projector"}
    assert method.match(views()).attention is None
    assert build("otcxr:uniform-infused").match(views()).attention.shape == (4, 4, 16, 16)


# --- gradients -------------------------------------------------------------------------------------------------------

TRANSPORT_ONLY = {"beta": 0.0, "eta": 0.0, "mass_weight": 0.0, "global_weight": 0.0}


@pytest.mark.parametrize("infuse", [False, True])
def test_transport_trains_the_score_head(infuse):
    method = stubbed(replace(EXPLICIT, **TRANSPORT_ONLY, infuse=infuse))
    grads = gradients(method, method(views()).loss)
    for name in ("score.1.weight", "score.0.weight", "cross_view.query.weight", "cross_view.out.weight"):
        assert alive(grads[name]), name
    assert grads["score.1.bias"].abs().max() < 1e-10  # a softmax does not see a constant


def test_the_mass_term_spreads_the_masses():
    method = stubbed(replace(EXPLICIT, alpha=0.0, beta=0.0, eta=0.0, mass_weight=1.0, mass_area=1.0))
    batch = views()
    losses = []
    optimizer = torch.optim.SGD(method.score.parameters(), lr=0.5)
    for _ in range(20):
        out = method(batch)
        gradients(method, out.loss)
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.8 * losses[0]


ASIDE = {"mass": "score", "mass_gradient": False, "infuse": False}


@pytest.mark.parametrize("mass", ["score", "attention"])
def test_pooling_by_mass_trains_masses_and_encoder(mass):
    settings = replace(EXPLICIT, **ASIDE | {"mass": mass}, beta=0.0, eta=0.0, mass_weight=0.0, alpha=1.0,
                       global_weight=1.0, global_pool="mass")  # fmt: skip
    method = stubbed(settings)
    grads = gradients(method, method(views()).loss)
    assert alive(grads["cross_view.query.weight"])
    assert alive(grads["encoder.maps.0"])
    if mass == "score":
        assert alive(grads["score.1.weight"])


def test_pooling_by_mass_is_the_weighted_sum():
    plain = stubbed(replace(EXPLICIT, mass="uniform", infuse=False, global_weight=1.0))
    pooled = stubbed(replace(EXPLICIT, mass="uniform", infuse=False, global_weight=1.0, global_pool="mass"))
    a, b = plain(views()), pooled(views())  # uniform masses: the same mean
    assert torch.allclose(a.loss, b.loss)
    seen = stubbed(replace(EXPLICIT, **ASIDE, global_weight=1.0, global_pool="mass"))
    pair = seen._pair(encode_views(seen.encoder, views().views), views(), (0, 1))
    expected = [sum(m * z for m, z in zip(mass[0], tokens[0], strict=True))
                for mass, tokens in zip(pair.masses, pair.tokens, strict=True)]  # fmt: skip
    found = []
    seen.pooled_projector.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    seen(views())
    assert torch.allclose(found[0][0], expected[0])
    assert torch.allclose(found[0][len(found[0]) // 2], expected[1])


def test_masses_that_learn_aside_leave_the_encoder_alone():
    settings = replace(EXPLICIT, **ASIDE, global_weight=1.0, global_pool="aside", mass_weight=3.0)
    method = stubbed(settings)
    grads = gradients(method, method(views()).loss)
    assert alive(grads["score.1.weight"])
    assert alive(grads["cross_view.query.weight"])
    assert any(alive(grad) for name, grad in grads.items() if name.startswith("aside_projector."))
    assert alive(grads["encoder.maps.0"])  # by the other terms
    pair = method._pair(encode_views(method.encoder, views().views), views(), (0, 1))
    masses = torch.autograd.grad(pair.masses[0].square().sum(), list(method.encoder.parameters()), allow_unused=True)
    assert all(grad is None for grad in masses)


def test_contrast_masses_are_their_formula_and_learn_nothing():
    settings = replace(EXPLICIT, mass="contrast", mass_gradient=False, infuse=False, temperature=0.3, floor=0.2)
    method = stubbed(settings)
    assert method.cross_view is None
    batch = views()
    pair = method._pair(encode_views(method.encoder, batch.views), batch, (0, 1))
    assert not any(mass.requires_grad for mass in pair.masses)
    for i in range(len(pair.cost)):
        cost = pair.cost[i].double().numpy(force=True)
        valid = [v[i].numpy() for v in pair.valid]
        for v, c in ((0, cost), (1, cost.T)):
            there = [j for j in range(16) if valid[1 - v][j]]
            gap = {j: np.mean([c[j, k] for k in there]) - min(c[j, k] for k in there) for j in range(16) if valid[v][j]}
            total = sum(np.exp(g / 0.3) for g in gap.values())
            expected = [0.8 * np.exp(gap[j] / 0.3) / total + 0.2 / len(gap) if j in gap else 0.0 for j in range(16)]
            close(pair.masses[v][i].numpy(force=True), expected, atol=1e-7)


def shown_in_both(batch, valid, first):
    """For both views the positions (B, 16) whose true place is a valid cell of the other view, by a loop."""
    geometry = batch.geometry.double().numpy()
    found = np.zeros((2, geometry.shape[1], 16), bool)
    for v in (0, 1):
        for i in range(geometry.shape[1]):
            there = np.linalg.inv(np.vstack([geometry[1 - v, i], [0, 0, 1]])) @ np.vstack([geometry[v, i], [0, 0, 1]])
            for j in np.flatnonzero(valid[v][i].numpy()):
                x, y, _ = there @ np.array([(j % 4 + first) / 4, (j // 4 + first) / 4, 1])
                column, row = round(4 * x - first), round(4 * y - first)
                inside = 0 <= column < 4 and 0 <= row < 4
                found[v, i, j] = inside and bool(valid[1 - v][i][4 * row + column])
    return found


def test_masses_by_overlap_lie_where_both_views_look():
    settings = replace(EXPLICIT, mass="overlap", mass_gradient=False, infuse=False, floor=0.2)
    method = stubbed(settings)
    assert method.cross_view is None
    batch = views()
    pair = method._pair(encode_views(method.encoder, batch.views), batch, (0, 1))
    both = shown_in_both(batch, pair.valid, method.encoder.first_centre)
    assert 0 < both.mean() < 0.9
    for v in (0, 1):
        valid = pair.valid[v].double().numpy()
        expected = 0.8 * both[v] / both[v].sum(-1, keepdims=True) + 0.2 * valid / valid.sum(-1, keepdims=True)
        close(pair.masses[v].numpy(force=True), expected, atol=1e-7)
    # views that have nothing in common: every valid position counts the same
    far = batch.geometry.clone()
    far[1, :, :, 2] += 9.0
    apart = batch._replace(geometry=far)
    pair = method._pair(encode_views(method.encoder, apart.views), apart, (0, 1))
    for mass, valid in zip(pair.masses, pair.valid, strict=True):
        close(mass.numpy(force=True), (valid / valid.sum(-1, keepdim=True)).numpy(), atol=1e-7)


@pytest.mark.parametrize("mass", ["score", "attention"])
def test_masses_are_taught_where_the_views_overlap(mass):
    still = {"alpha": 0.0, "beta": 0.0, "eta": 0.0, "mass_weight": 0.0, "global_weight": 0.0}
    method = stubbed(replace(EXPLICIT, mass=mass, mass_gradient=False, **still, overlap_weight=1.5, floor=0.05))
    batch = views()
    out = method(batch)
    pair = method._pair(encode_views(method.encoder, batch.views), batch, (0, 1))
    both = shown_in_both(batch, pair.valid, method.encoder.first_centre)
    total = 0.0
    for v in (0, 1):
        for i, row in enumerate(pair.masses[v].double().numpy(force=True)):
            there = both[v, i]
            total += sum(math.log(1 / there.sum() / m) / there.sum() for m in row[there])
    assert out.loss.item() == pytest.approx(1.5 * total / (2 * len(batch.views[0])), rel=1e-5)
    grads = gradients(method, out.loss)
    assert alive(grads["cross_view.query.weight"])
    assert alive(grads["encoder.maps.0"])
    optimizer = torch.optim.Adam(
        [p for name, p in method.named_parameters() if "cross" in name or "score" in name], 0.02
    )
    losses = []
    for _ in range(60):
        losses.append(method(batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_teaching_without_use_leaves_the_plan_alone():
    plain = stubbed(replace(EXPLICIT, mass="uniform", mass_gradient=False))
    taught = stubbed(replace(plain.settings, overlap_weight=1.5))
    batch = views()
    a, b = (m._pair(encode_views(m.encoder, batch.views), batch, (0, 1)) for m in (plain, taught))
    assert torch.equal(a.masses[0], b.masses[0])
    assert torch.equal(a.plan, b.plan)
    out, without = taught(batch), plain(batch)
    assert out.loss.item() == pytest.approx(without.loss.item() + 1.5 * out.terms["overlap"].item(), rel=1e-6)
    assert out.terms["overlap"] > 0
    grads = gradients(taught, taught(batch).loss)
    assert alive(grads["score.1.weight"])
    assert alive(grads["cross_view.query.weight"])
    scored = stubbed(replace(taught.settings, mass="score"))
    assert out.terms["overlap"].item() == pytest.approx(scored(batch).terms["overlap"].item(), rel=1e-6)


def test_there_must_be_something_to_teach():
    for mass in ("contrast", "overlap"):
        with pytest.raises(ConfigError, match="there is nothing to teach: set mass to score, attention or uniform"):
            replace(EXPLICIT, mass=mass, mass_gradient=False, overlap_weight=1.0)
    with pytest.raises(ConfigError, match="needs a method.floor above 0"):
        replace(EXPLICIT, floor=0.0, overlap_weight=1.0)
    assert replace(EXPLICIT, **ASIDE, overlap_weight=1.0).trains_masses


def test_a_score_head_needs_something_to_learn_from():
    for wrong in ({"global_pool": "uniform"}, {"global_pool": "mass", "global_weight": 0.0}):
        with pytest.raises(ConfigError, match="never learns"):
            replace(EXPLICIT, **ASIDE, **wrong)
    with pytest.raises(ConfigError, match="one of uniform, mass, aside, received 'max'"):
        replace(EXPLICIT, global_pool="max")


FOLLOWED = replace(EXPLICIT, centred_cost=True, global_weight=0.6, tolerance=1e-9, target_momentum=0.9)


def test_agreement_with_slow_copies_is_their_formula():
    """Copies that say something else than the trained network, by the slow oracles."""
    method = stubbed(FOLLOWED).train()
    plain = stubbed(replace(FOLLOWED, target_momentum=0.0)).train()
    with torch.no_grad():
        method.target_encoder.maps[0].copy_(normal(8, 12, 4, 4, seed=5))
        for k, p in enumerate([*method.target_projector.parameters(), *method.target_pooled.parameters()]):
            p.add_(0.2 * normal(*p.shape, seed=k))
    batch = views()
    with torch.no_grad():
        out, without = method(batch), plain(batch)
    masses = slow_otcxr(method, batch)[0]
    valid = valid_tokens(batch)
    z = [tokens_of(m) for m in method.encoder.maps[0].chunk(2)]
    z_slow = [tokens_of(m) for m in method.target_encoder.maps[0].chunk(2)]

    def pooled(tokens, projector):
        rows = [x[keep].mean(0) for v in (0, 1) for x, keep in zip(tokens[v], valid[v], strict=True)]
        return projector(torch.stack(rows)).numpy(force=True).reshape(2, len(batch.views[0]), -1)

    values, chances = [], []
    for q in (
        (method.projector(z[0]), method.target_projector(z_slow[1])),
        (method.target_projector(z_slow[0]), method.projector(z[1])),
    ):
        rows = [one[keep].numpy(force=True) for one, keep in zip(q, valid, strict=True)]
        centre = np.concatenate(rows).mean(0)
        for x, y, a, b in zip(*(one.numpy(force=True) for one in q), *masses, strict=True):
            cost = cosine_cost_by_loops(x - centre, y - centre)
            values.append(sinkhorn_by_newton(cost, a, b, FOLLOWED.epsilon, None).value)
            chances.append(a @ cost @ b)
    assert out.terms["transport"].item() == pytest.approx(np.mean(values), rel=1e-6)
    assert out.terms["transport_chance"].item() == pytest.approx(np.mean(chances), rel=1e-6)
    g, slow = pooled(z, method.pooled_projector), pooled(z_slow, method.target_pooled)
    apart = [((g[v] - slow[1 - v]) ** 2).mean() for v in (0, 1)]
    assert out.terms["global"].item() == pytest.approx(np.mean(apart), rel=1e-6)
    for same in ("variance", "covariance", "global_variance", "global_covariance", "mass"):
        assert out.terms[same].item() == pytest.approx(without.terms[same].item(), rel=1e-9)
    assert out.terms["transport"].item() != pytest.approx(without.terms["transport"].item(), rel=1e-2)


def test_fresh_copies_change_no_loss_and_halve_the_gradient_of_agreement():
    alone = replace(FOLLOWED, beta=0.0, eta=0.0, mass_weight=0.0, mass="uniform")
    batch, found = views(), []
    for settings in (alone, replace(alone, target_momentum=0.0)):
        method = stubbed(settings).train()
        loss = method(batch).loss
        loss.backward()
        found.append((loss.item(), method.encoder.maps[0].grad))
        assert all(p.grad is None for name, p in method.named_parameters() if name.startswith("target"))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    torch.testing.assert_close(found[0][1], found[1][1] / 2, rtol=1e-6, atol=1e-9)


def test_copies_follow_after_the_step_and_are_not_what_is_handed_out():
    method = stubbed(FOLLOWED)
    before = [p.clone() for p in method.target_projector.parameters()]
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad:
                p.add_(1.0)
    method.after_step(0.0)
    for slow, first in zip(method.target_projector.parameters(), before, strict=True):
        torch.testing.assert_close(slow, first + 0.1)  # 0.9 of the old, 0.1 of what moved by 1
    torch.testing.assert_close(method.target_encoder.maps[0], method.encoder.maps[0] - 0.9)
    kept = [p.clone() for p in method.target_pooled.parameters()]
    method.after_step(1.0)  # at the end the momentum is 1
    for slow, first in zip(method.target_pooled.parameters(), kept, strict=True):
        assert torch.equal(slow, first)
    assert method.kept() is method.encoder
    assert not [name for name in stubbed(EXPLICIT).state_dict() if name.startswith("target")]


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_a_prior_of_place_is_added_to_the_cost_of_the_plan(radius):
    """Against a loop over positions and Newton's method; what is shown and judged is without it."""
    plain = stubbed(replace(EXPLICIT, mass="uniform", infuse=False, place=0.0, tolerance=1e-9, max_iterations=2000))
    prior = stubbed(replace(plain.settings, place=0.7, place_radius=radius))
    batch = views()
    maps = encode_views(plain.encoder, batch.views)
    without, with_it = plain._pair(maps, batch, (0, 1)), prior._pair(maps, batch, (0, 1), place=0.7)
    assert torch.equal(without.cost, with_it.cost)
    first = plain.encoder.first_centre
    geometry = batch.geometry.double().numpy()
    for i in range(len(without.cost)):
        to_t = np.linalg.inv(np.vstack([geometry[1, i], [0, 0, 1]])) @ np.vstack([geometry[0, i], [0, 0, 1]])
        cost = without.cost[i].double().numpy(force=True).copy()
        for j in range(16):
            x, y, _ = to_t @ np.array([(j % 4 + first) / 4, (j // 4 + first) / 4, 1])
            for k in range(16):
                away = (4 * x - k % 4 - first) ** 2 + (4 * y - k // 4 - first) ** 2
                cost[j, k] += 0.7 * (1 - np.exp(-away / (2 * radius**2)))
        a, b = (mass[i].double().numpy(force=True) for mass in with_it.masses)
        keep_a, keep_b = a > 0, b > 0
        expected = sinkhorn_by_newton(cost[np.ix_(keep_a, keep_b)], a[keep_a], b[keep_b], prior.settings.epsilon)[0]
        found = with_it.plan[i].double().numpy(force=True)[np.ix_(keep_a, keep_b)]
        assert np.abs(found - expected).max() < 1e-6
    shown, judged = prior._shown(with_it), prior.match(batch)
    assert torch.allclose(shown.plan, without.plan, atol=1e-7)
    assert torch.allclose(judged.plan, plain.match(batch).plan, atol=1e-7)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("infuse", [True, False])
def test_attention_learns_from_the_masses_only_where_that_is_asked_for(gradient, infuse):
    settings = replace(EXPLICIT, mass="attention", mass_gradient=gradient, infuse=infuse, **TRANSPORT_ONLY)
    method = stubbed(settings)
    grads = gradients(method, method(views()).loss)
    assert alive(grads["cross_view.query.weight"]) == (gradient or infuse)
    assert alive(grads["cross_view.out.weight"]) == infuse  # the values serve the infusion alone
    assert alive(grads["projector.layers.0.weight"])
    assert alive(grads["encoder.maps.0"])


def test_fixed_masses_change_gradients_not_the_loss():
    learned = stubbed(replace(EXPLICIT, mass="attention", **TRANSPORT_ONLY))
    fixed = stubbed(replace(EXPLICIT, mass="attention", mass_gradient=False, **TRANSPORT_ONLY))
    one, two = learned(views()), fixed(views())
    assert one.loss.item() == two.loss.item()
    maps = [gradients(m, out.loss)["encoder.maps.0"] for m, out in ((learned, one), (fixed, two))]
    assert not torch.allclose(*maps)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if VARIANTS[name].mass_gradient])
def test_the_whole_gradient_equals_finite_differences(variant):
    """In two random directions of all maps at once, in double precision.

    Masses without gradient move with the maps all the same, which finite differences see: those are tested above.
    """
    method = stubbed(replace(VARIANTS[variant], tolerance=1e-11, max_iterations=20_000, floor=0.3)).train()
    batch, maps = views(), method.encoder.maps[0]
    grad = gradients(method, method(batch).loss)["encoder.maps.0"].clone()
    for seed in (7, 8):
        direction, step, values = normal(*maps.shape, seed=seed), 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                maps.add_(sign * step * direction)
                values.append(method(batch).loss.item())
                maps.sub_(sign * step * direction)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx((grad * direction).sum().item(), rel=2e-4)


# --- what is not valid does not count --------------------------------------------------------------------------------


def with_other_absent(maps, valid, seed=9):
    """The same maps, other content where no token is valid."""
    keep = torch.cat(valid).reshape(len(maps), 1, *maps.shape[-2:])
    return torch.where(keep, maps, 5 * normal(*maps.shape, seed=seed))


@each_variant
def test_content_at_absent_positions_does_not_matter(variant):
    batch = views()
    valid = valid_tokens(batch)
    maps = normal(8, 12, 4, 4)
    one = stubbed(VARIANTS[variant], maps).train()
    two = stubbed(VARIANTS[variant], with_other_absent(maps, valid)).train()
    out, same = one(batch, observe=True), two(batch, observe=True)
    for name, term in out.terms.items():
        assert same.terms[name].item() == pytest.approx(term.item(), rel=1e-9, abs=1e-12), name
    assert same.loss.item() == pytest.approx(out.loss.item(), rel=1e-10)
    for name in ("a", "b", "plan"):
        close(getattr(pairs_of(two, batch, same), name), getattr(pairs_of(one, batch, out), name), atol=1e-10)
    pairs = valid[0].unsqueeze(-1) & valid[1].unsqueeze(1)
    close(pairs_of(two, batch, same).cost[pairs], pairs_of(one, batch, out).cost[pairs], atol=1e-10)
    plan = pairs_of(two, batch, same).plan
    assert (plan[~pairs] == 0).all()
    grad = gradients(two, same.loss)["encoder.maps.0"]
    absent = ~torch.cat(valid).reshape(8, 1, 4, 4).expand_as(grad)
    assert (grad[absent] == 0).all()


@each_variant
def test_a_batch_with_holes_equals_its_images_one_by_one(variant):
    settings = replace(VARIANTS[variant], centred_cost=False, global_weight=0.0, tolerance=1e-9)
    maps = [normal(4, 12, 6, 6, seed=1), normal(4, 12, 4, 4, seed=2)]
    batch = views(sizes=(96, 64))
    method = stubbed(settings, maps).eval()
    term = "transport" if of_transport(settings) else "alignment"
    whole, transport = method.match(batch), method(batch).terms[term]
    values = []
    for i in range(4):
        alone = stubbed(settings, [m[i : i + 1] for m in maps]).eval()
        alone.projector, alone.cross_view, alone.score = method.projector, method.cross_view, method.score
        part = alone.match(one_image(batch, i))
        for name in ("cost", "a", "b", "plan"):
            close(getattr(part, name)[0], getattr(whole, name)[i], atol=1e-9)
        again = sinkhorn(part.cost, part.a, part.b, epsilon=settings.epsilon, tolerance=1e-9,
                         objective=settings.objective, reach=settings.reach, max_iterations=3000)  # fmt: skip
        values.append((again.value if of_transport(settings) else (part.plan * part.cost).sum()).item())
    assert transport.item() == pytest.approx(np.mean(values), rel=1e-9)


@each_variant
def test_views_may_differ_in_size(variant):
    method = build(f"otcxr:{variant}").train()
    batch = views(sizes=(96, 64))
    out = method(batch, observe=True)
    assert out.loss.isfinite()
    match = pairs_of(method, batch, out)
    assert match.plan.shape == (4, 36, 16)
    assert match.a.shape == (4, 36)
    assert match.b.shape == (4, 16)
    assert match.attention is None or match.attention.shape == (4, 4, 36, 16)
    assert out.observed.tokens.shape == (4, 36, 64)
    assert [k for k, g in gradients(method.encoder, out.loss).items() if not alive(g)] == []
    assert all(math.isfinite(x) for x in observe(out.observed, batch).values())


@pytest.mark.parametrize(("view", "name"), [(0, "first"), (1, "second")])
@each_variant
def test_a_view_without_any_valid_token_is_an_error(variant, view, name):
    batch = views()
    batch.valid[view][2] = False
    with pytest.raises(DataError, match=f"the {name} view of sample 2 of the batch has no valid token"):
        stubbed(VARIANTS[variant])(batch)


@each_variant
def test_a_single_valid_token_takes_all_the_mass(variant):
    batch = views()
    for v in (0, 1):
        batch.valid[v][1] = False
        batch.valid[v][1, :, 16:32, 32:48] = True  # token 6
    method = stubbed(VARIANTS[variant])
    out = method(batch, observe=True)
    assert out.loss.isfinite()
    match, reach = pairs_of(method, batch, out), VARIANTS[variant].reach
    # one point on each side: f = g, P = exp(-f / reach) = exp((2 f - C) / epsilon)
    moved = 1.0 if reach is None else math.exp(-match.cost[1, 6, 6].item() / (2 * reach + 0.1))
    assert match.plan[1, 6, 6].item() == pytest.approx(moved, rel=1e-5)
    assert match.plan[1].sum().item() == pytest.approx(moved, rel=1e-5)


def test_masses_that_underflow_give_finite_gradients():
    settings = replace(EXPLICIT, floor=0.0, temperature=1e-3, mass_weight=1.0, mass_area=1.0)
    method = stubbed(settings, double=False, maps=normal(8, 12, 4, 4, dtype=torch.float32))
    out = method(views(), observe=True)
    assert (out.observed.match.a[valid_tokens(views())[0]] == 0).any(), "the case must be the one that is meant"
    assert all(g is None or g.isfinite().all() for g in gradients(method, out.loss).values())


@torch.no_grad()
def test_the_global_term_does_not_overflow_in_half_precision():
    method = seeded(lambda: OTCXR(Stub(normal(8, 12, 4, 4, dtype=torch.float32)),
                                  replace(EXPLICIT, global_weight=1.0)))  # fmt: skip
    method.pooled_projector[-1].weight.mul_(500)
    exact = method(views()).terms["global"]
    with torch.autocast("cpu", dtype=torch.float16):
        rough = method(views()).terms["global"]
    torch.testing.assert_close(rough.float(), exact, rtol=0.02, atol=0)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mass": "scores"},
            "method.mass must be one of score, attention, contrast, overlap, uniform, received 'scores'",
        ),
        ({"variance_rows": ("tokens", "image")}, "method.variance_rows may hold pooled, .*; received 'image'"),
        ({"mass_gradient": False}, "method.mass = score needs method.mass_gradient = true"),
        ({"floor": 1.0}, r"method.floor must be in \[0, 1\).* received 1.0"),
        ({"floor": -0.1}, "method.floor must be in .* received -0.1"),
        ({"mass_area": 0.0}, r"method.mass_area in \(0, 1\], received 0.1 and 0.0"),
        ({"mass_area": 1.5}, r"method.mass_area in \(0, 1\], received 0.1 and 1.5"),
        ({"temperature": 0.0}, "method.temperature must be > 0, received 0.0"),
        ({"epsilon": 0.0}, "method.epsilon must be > 0, received 0.0"),
        ({"epsilon": math.nan}, "method.epsilon must be > 0, received nan"),
        ({"tolerance": -1.0}, "method.tolerance must be > 0, received -1.0"),
        ({"alpha": math.nan}, "method.alpha must be at least 0, received nan"),
        ({"max_iterations": 0}, "method.max_iterations must be at least 1, received 0"),
        ({"objective": "plan"}, "method.objective must be 'value' or 'sharp', received 'plan'"),
        ({"target_momentum": 1.5}, r"method.target_momentum must be in \[0, 1\]"),
        (
            {"target_momentum": 0.9, "infuse": True},
            "method.target_momentum goes with method.infuse = false",
        ),
        ({"reach": 0.0}, "method.reach must be > 0, or null for exact marginals; received 0.0"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(EXPLICIT, **changes)


def test_heads_must_divide_the_channels():
    with pytest.raises(ConfigError, match=r"method\.heads = 5 does not divide the 12 channels"):
        stubbed(replace(EXPLICIT, heads=5))


def test_the_control_differs_in_its_masses_only():
    full, control = METHODS["otcxr"].settings, METHODS["otcxr-uniform"].settings
    assert control == replace(full, mass="uniform", mass_gradient=control.mass_gradient, overlap_weight=0.0)
