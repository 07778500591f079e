"""MoCo, DenseCL, BYOL, SimSiam, Barlow Twins and DINO against slow formulas, and what is known to go wrong in them."""

from __future__ import annotations

import copy
import math
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from oracles import (
    barlow_by_loops,
    byol_by_loops,
    cosine,
    covariance_by_loops,
    cross_correlation_by_loops,
    densecl_dense_by_loops,
    dino_by_loops,
    distillation_by_loops,
    head_by_loops,
    info_nce_by_loops,
    partners_by_loops,
    simsiam_by_loops,
)
from otcxr.data.geometry import ViewBatch, correspondence, token_centres
from otcxr.errors import ConfigError
from otcxr.losses import covariance_at_positions, cross_correlation, distillation, info_nce, negative_cosine
from otcxr.methods.barlow import Barlow, BarlowSettings
from otcxr.methods.byol import BYOL, BYOLSettings
from otcxr.methods.densecl import DenseCL, DenseCLSettings
from otcxr.methods.dino import DINO, DINOSettings, PrototypeHead
from otcxr.methods.moco import MoCo, MoCoSettings
from otcxr.methods.simsiam import SimSiam, SimSiamSettings
from otcxr.nn.encoder import Architecture, Encoder, build_encoder
from otcxr.nn.queue import KeyQueue, queue_length

torch.set_num_threads(1)

CHANNELS = 6
IMAGES = 5
METHODS = {"moco": MoCo, "densecl": DenseCL, "byol": BYOL, "simsiam": SimSiam, "barlow": Barlow, "dino": DINO}
# Everything is said here, so no test depends on a default.
SETTINGS = {
    "moco": MoCoSettings(hidden=16, outputs=8, temperature=0.3, queue=20, momentum=0.8),
    "densecl": DenseCLSettings(hidden=16, outputs=8, temperature=0.3, queue=20, momentum=0.8, dense_weight=0.3),
    "byol": BYOLSettings(hidden=16, outputs=8, momentum=0.8),
    "simsiam": SimSiamSettings(hidden=16, outputs=8, bottleneck=4),
    "barlow": BarlowSettings(hidden=16, outputs=8, redundancy=0.05),
    "dino": DINOSettings(
        hidden=16, bottleneck=6, prototypes=10, student_temperature=0.5, teacher_temperature=0.2, momentum=0.8,
        centre_momentum=0.9, frozen=0.25,
    ),
}  # fmt: skip
COPIES = {
    "moco": {"key_encoder": "encoder", "key_head": "head"},
    "densecl": {"key_encoder": "encoder", "key_head": "head", "key_dense_head": "dense_head"},
    "byol": {"target_encoder": "encoder", "target_projector": "projector"},
    "dino": {"teacher": "encoder", "teacher_head": "head"},
}
PAIRS = [(name, slow, fast) for name, pairs in COPIES.items() for slow, fast in pairs.items()]
ALIKE, DIFFERENT = ((3, 3), (3, 3)), ((4, 4), (3, 5))
LOCALS = ((3, 3), (3, 3), (2, 2), (1, 2), (2, 2))
each_method = pytest.mark.parametrize("name", METHODS)


class Told(Encoder):
    """Says of every image what a table holds for it; images carry their view and number in their pixels.

    So what is said depends neither on the order of calls nor on what goes through together, and a momentum copy has
    tables of its own.
    """

    def __init__(self, *maps):
        super().__init__()
        self.maps = nn.ParameterList([m.clone() for m in maps])  # for each view (B, C, h, w)
        self.channels, self.strides = (maps[0].shape[1],), (16,)
        self.architecture = Architecture("told", 1, 4, 16)
        self.seen = []

    def forward(self, images):
        codes = [divmod(int(code), 1000) for code in images[:, 0, 0, 0]]
        self.seen += codes
        return (torch.stack([self.maps[view][image] for view, image in codes]),)


def coded_batch(grids, images=IMAGES, valid=None, geometry=None):
    """Views that ``Told`` knows; ``valid`` holds for each view (B, n) tokens that are there."""
    pixels, masks = [], []
    for v, (height, width) in enumerate(grids):
        code = 1000.0 * v + torch.arange(images)
        pixels.append(code.reshape(-1, 1, 1, 1).expand(-1, 1, 16 * height, 16 * width))
        mask = torch.ones(images, height * width, dtype=torch.bool) if valid is None else valid[v]
        mask = mask.reshape(images, 1, height, width)
        masks.append(mask.repeat_interleave(16, -1).repeat_interleave(16, -2))
    if geometry is None:
        geometry = torch.eye(3)[:2].expand(len(grids), images, 2, 3)
    return ViewBatch(tuple(pixels), geometry, tuple(masks))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@torch.no_grad()
def nudge(module, seed=0, size=0.3):
    """Change every parameter, so that nothing is as it was built: no scale is 1, no bias 0, no copy an equal one."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def made(name, grids=ALIKE, settings=None, seed=0, images=IMAGES, nudged=True):
    """A method on known maps, in double precision and in training, whose copies differ from what they follow."""
    maps = [normal(images, CHANNELS, *grid, seed=seed + v) for v, grid in enumerate(grids)]
    method = seeded(lambda: METHODS[name](Told(*maps), settings or SETTINGS[name]), seed).double().train()
    if nudged:
        nudge(method, seed + 50)
    if name == "dino":
        method.centre.copy_(0.1 * normal(len(method.centre), seed=seed + 60))
    return method


def with_maps(name, settings, *maps, **bare):
    """A method on given maps (B, C) of one position, or (B, C, h, w), with other heads: ``None`` is the identity."""
    maps = [torch.as_tensor(m, dtype=torch.float64) for m in maps]
    maps = [m if m.dim() == 4 else m[..., None, None] for m in maps]
    method = seeded(lambda: METHODS[name](Told(*maps), settings)).double().train()
    for head, module in bare.items():
        setattr(method, head, Bare() if module is None else module)
    return method, coded_batch([m.shape[-2:] for m in maps], images=len(maps[0]))


class Bare(nn.Module):
    """A head that gives back what it gets."""

    def forward(self, features, frozen=False):
        return features


def token_holes(grids, images=IMAGES, seed=0):
    """Tokens that are there: about half, at least one, other numbers of them in every image."""
    out = []
    for v, (height, width) in enumerate(grids):
        keep = torch.rand(images, height * width, generator=torch.Generator().manual_seed(seed + v)) < 0.5
        keep[:, v % keep.shape[1]] = True
        out.append(keep)
    return out


def steps_of(head):
    """Layers of a head, for the oracle."""
    kinds = {nn.Linear: "linear", nn.BatchNorm1d: "norm", nn.ReLU: "relu", nn.GELU: "gelu"}
    weights = [[getattr(layer, x, None) for x in ("weight", "bias")] for layer in head]
    return [
        (kinds[type(layer)], *(None if w is None else w.detach().numpy() for w in pair))
        if isinstance(layer, nn.Linear | nn.BatchNorm1d) else (kinds[type(layer)],)
        for layer, pair in zip(head, weights, strict=True)
    ]  # fmt: skip


def said(encoder, view):
    """What an encoder says of a view: tokens (B, n, C), row by row."""
    maps = encoder.maps[view].detach().numpy()
    return np.array([[m[:, r, c] for r in range(m.shape[1]) for c in range(m.shape[2])] for m in maps])


def pooled(encoder, *views):
    """Means over all positions, view after view: (V * B, C)."""
    return np.concatenate([said(encoder, view).mean(1) for view in views])


def through(head, rows):
    return head_by_loops(rows, steps_of(head))


# --- the whole loss by loops -----------------------------------------------------------------------------------------


def slow_contrast(method, query, key):
    negatives = method.queue.vectors.numpy()
    losses = [info_nce_by_loops(q, k, negatives, method.settings.temperature) for q, k in zip(query, key, strict=True)]
    return sum(losses) / len(losses)


def slow_moco(method, valid):
    return slow_contrast(
        method,
        through(method.head, pooled(method.encoder, 0)),
        through(method.key_head, pooled(method.key_encoder, 1)),
    )


def slow_densecl(method, valid):
    s = method.settings
    whole = slow_moco(method, valid)
    tokens, key_tokens = said(method.encoder, 0), said(method.key_encoder, 1)
    projected = [through(method.dense_head, image) for image in tokens]
    key_projected = [through(method.key_dense_head, image) for image in key_tokens]
    negatives = method.dense_queue.vectors.numpy()
    dense = densecl_dense_by_loops(
        tokens, key_tokens, projected, key_projected, valid[0].numpy(), valid[1].numpy(), negatives, s.temperature
    )
    return (1 - s.dense_weight) * whole + s.dense_weight * dense


def slow_byol(method, valid):
    predictions = through(method.predictor, through(method.projector, pooled(method.encoder, 0, 1)))
    targets = through(method.target_projector, pooled(method.target_encoder, 0, 1))
    return byol_by_loops(np.split(predictions, 2), np.split(targets, 2))


def slow_simsiam(method, valid):
    embedded = through(method.projector, pooled(method.encoder, 0, 1))
    return simsiam_by_loops(np.split(through(method.predictor, embedded), 2), np.split(embedded, 2))


def slow_barlow(method, valid):
    first, second = np.split(through(method.projector, pooled(method.encoder, 0, 1)), 2)
    return barlow_by_loops(first, second, method.settings.redundancy)


def scores_by_loops(head, rows):
    prototypes = head.prototypes.detach().numpy()
    return np.array([[cosine(row, prototype) for prototype in prototypes] for row in through(head.layers, rows)])


def slow_dino(method, valid):
    s = method.settings
    students = [scores_by_loops(method.head, pooled(method.encoder, v)) for v in range(len(method.encoder.maps))]
    teachers = [scores_by_loops(method.teacher_head, pooled(method.teacher, u)) for u in (0, 1)]
    return dino_by_loops(students, teachers, method.centre.numpy(), s.student_temperature, s.teacher_temperature)


SLOW = {"moco": slow_moco, "densecl": slow_densecl, "byol": slow_byol, "simsiam": slow_simsiam, "barlow": slow_barlow,
        "dino": slow_dino}  # fmt: skip
PROBLEMS = [(name, grids) for name in METHODS for grids in ((ALIKE, LOCALS) if name == "dino" else (ALIKE, DIFFERENT))]
each_problem = pytest.mark.parametrize(("name", "grids"), PROBLEMS)


@each_problem
@pytest.mark.parametrize("holes", [False, True])
def test_the_loss_is_its_formula(name, grids, holes):
    """T1; and again after a step, with the copies, queues and centre that the step left."""
    method = made(name, grids)
    valid = token_holes(grids) if holes else [torch.ones(IMAGES, h * w, dtype=torch.bool) for h, w in grids]
    batch = coded_batch(grids, valid=valid)
    before = SLOW[name](method, valid)
    assert method(batch).loss.item() == pytest.approx(before, rel=1e-9, abs=1e-10)
    method.after_step(0.4)
    nudge(method.encoder, 7)
    after = SLOW[name](method, valid)
    assert method(batch).loss.item() == pytest.approx(after, rel=1e-9, abs=1e-10)
    assert after != pytest.approx(before, rel=1e-4)


@each_problem
def test_nothing_but_a_step_changes_the_loss(name, grids):
    """What a pass leaves behind, keys and scores of the teacher, counts from the step on only."""
    method, batch = made(name, grids), coded_batch(grids)
    losses = [method(batch).loss.item() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(("name", "grids"), [problem for problem in PROBLEMS if problem[0] != "simsiam"])
def test_the_whole_gradient_equals_finite_differences(name, grids):
    """In two random directions of everything that is trained at once. Targets are copies, which do not move with it."""
    method, batch = made(name, grids), coded_batch(grids, valid=token_holes(grids))
    if name == "dino":
        method.progress.fill_(0.5)
    method(batch).loss.backward()
    trained = [p for p in method.parameters() if p.grad is not None]
    assert len(trained) > 4
    for seed in (100, 200):
        directions = [normal(*p.shape, seed=seed + i) for i, p in enumerate(trained)]
        expected = sum((p.grad * d).sum().item() for p, d in zip(trained, directions, strict=True))
        values, step = [], 1e-6
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(trained, directions, strict=True):
                    p.add_(sign * step * d)
                values.append(method(batch).loss.item())
                for p, d in zip(trained, directions, strict=True):
                    p.sub_(sign * step * d)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_simsiam_stops_the_gradient_at_the_targets():
    """Written again with the targets as constants; the gradient with moving targets is another one."""
    method, batch = made("simsiam"), coded_batch(ALIKE)
    method(batch).loss.backward()
    got = [p.grad.clone() for p in method.parameters()]
    for stop, same in ((True, True), (False, False)):
        method.zero_grad()
        z = method.projector(torch.cat([m.mean((-2, -1)) for m in method.encoder.maps]))
        p = method.predictor(z)
        targets = z.detach() if stop else z
        pairs = [(p[:IMAGES], targets[IMAGES:]), (p[IMAGES:], targets[:IMAGES])]
        (-sum(torch.cosine_similarity(x, y).mean() for x, y in pairs) / 2).backward()
        again = [q.grad for q in method.parameters()]
        assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(got, again, strict=True)) == same


@pytest.mark.parametrize("name", ["simsiam", "barlow", "byol"])
def test_both_views_are_trained(name):
    method = made(name)
    method(coded_batch(ALIKE)).loss.backward()
    assert all((m.grad != 0).any() for m in method.encoder.maps)


def test_all_views_are_trained_by_dino_and_only_the_first_by_moco_and_densecl():
    method = made("dino", LOCALS)
    method(coded_batch(LOCALS)).loss.backward()
    assert all((m.grad != 0).any() for m in method.encoder.maps)
    for name in ("moco", "densecl"):
        method = made(name)
        method(coded_batch(ALIKE)).loss.backward()
        assert (method.encoder.maps[0].grad != 0).any()
        assert method.encoder.maps[1].grad is None


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_moco_by_hand():
    """The key at cosine 0.6, negatives at 0 and -1, temperature 0.5."""
    settings = MoCoSettings(outputs=2, temperature=0.5, queue=2)
    method, batch = with_maps("moco", settings, [[2.0, 0.0]], [[3.0, 4.0]], head=None, key_head=None)
    method.queue.vectors.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    out = method(batch)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-1.2) + math.exp(-3.2)), rel=1e-12)
    assert out.terms["contrastive_chance"].item() == pytest.approx(math.log(3))


def hand_dense(dense_weight):
    first = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 5.0]]]).mT.reshape(2, 2, 1, 2)
    second = torch.tensor([[[1.6, 1.2], [-1.0, 0.0]], [[1.0, 0.0], [0.6, -0.8]]]).mT.reshape(2, 2, 1, 2)
    settings = DenseCLSettings(outputs=2, temperature=1.0, queue=1, dense_weight=dense_weight)
    heads = dict.fromkeys(("head", "key_head", "dense_head", "key_dense_head"))
    method = with_maps("densecl", settings, first, second, **heads)[0]
    method.queue.vectors.copy_(torch.tensor([[1.0, 0.0]]))
    method.dense_queue.vectors.copy_(torch.tensor([[0.0, 1.0]]))
    valid = [torch.tensor([[True, True], [True, False]]), torch.tensor([[True, True], [False, True]])]
    return method, coded_batch([(1, 2), (1, 2)], images=2, valid=valid)


def test_densecl_by_hand():
    """Two positions of the first image pair with one key, at cosines 0.8 and 0.6, the only one of the second at 0.6.

    The negative is at cosine 0, 1 and 0. Of the second image the key at cosine 1 is not valid.
    """
    method, batch = hand_dense(1.0)
    losses = [math.log(1 + math.exp(x)) for x in (0 - 0.8, 1 - 0.6, 0 - 0.6)]
    expected = ((losses[0] + losses[1]) / 2 + losses[2]) / 2
    assert method(batch).loss.item() == pytest.approx(expected, rel=1e-7)  # the maps are of single precision
    assert expected != pytest.approx(sum(losses) / 3, rel=1e-2)
    match = method.match(batch)
    assert match.plan.tolist() == [[[0.5, 0.0], [0.5, 0.0]], [[0.0, 1.0], [0.0, 0.0]]]
    # after the step: the mean of what is valid, of both images, of which the last one fits
    method.after_step(0.0)
    torch.testing.assert_close(method.dense_queue.vectors, torch.tensor([[0.6, -0.8]], dtype=torch.float64))


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_densecl_weighs_whole_and_dense(weight):
    terms = [hand_dense(w)[0](hand_dense(w)[1]).loss.item() for w in (0.0, 1.0, weight)]
    assert terms[2] == pytest.approx((1 - weight) * terms[0] + weight * terms[1])
    assert terms[0] != pytest.approx(terms[1], rel=0.01)


@pytest.mark.parametrize(
    ("second", "byol", "simsiam"),
    [((2.0, 0.0), 0.0, -1.0), ((-3.0, 0.0), 8.0, 1.0), ((0.0, 1.0), 4.0, 0.0), ((1.0, math.sqrt(3)), 2.0, -0.5)],
)
def test_byol_and_simsiam_by_hand(second, byol, simsiam):
    """One image whose two views are at cosine 1, -1, 0 and 0.5."""
    heads = {"projector": None, "predictor": None}
    method, batch = with_maps("byol", SETTINGS["byol"], [[1.0, 0.0]], [second], target_projector=None, **heads)
    assert method(batch).loss.item() == pytest.approx(byol, abs=1e-12)
    method, batch = with_maps("simsiam", SETTINGS["simsiam"], [[1.0, 0.0]], [second], **heads)
    assert method(batch).loss.item() == pytest.approx(simsiam, abs=1e-12)


def test_barlow_by_hand():
    """Correlations (1, -1; 1, -1): the first dimension agrees, the second contradicts itself, both are one."""
    settings = BarlowSettings(outputs=2, redundancy=0.25)
    views = [[1.0, 1.0], [-1.0, -1.0]], [[1.0, -1.0], [-1.0, 1.0]]
    method, batch = with_maps("barlow", settings, *views, projector=None)
    out = method(batch)
    assert out.terms["invariance"].item() == pytest.approx(4, rel=1e-4)
    assert out.terms["redundancy"].item() == pytest.approx(2, rel=1e-4)
    assert out.loss.item() == pytest.approx(4 + 0.25 * 2, rel=1e-4)


def hand_dino(**changes):
    settings = DINOSettings(
        prototypes=2, student_temperature=0.5, teacher_temperature=0.25, centre_momentum=0.9, **changes
    )
    scores = [[0.5 * math.log(3), 0.0]]
    method, batch = with_maps("dino", settings, scores, scores, head=Bare(), teacher_head=Bare())
    with torch.no_grad():
        for m in method.teacher.maps:
            m.copy_(torch.tensor([0.25 * math.log(4) + 0.1, 0.3]).reshape(1, 2, 1, 1))
        method.centre.copy_(torch.tensor([0.1, 0.3]))
    return method, batch


def test_dino_by_hand():
    """The student says 3/4 and 1/4; the teacher, once its centre is taken off, 4/5 and 1/5."""
    method, batch = hand_dino()
    out = method(batch)
    assert out.loss.item() == pytest.approx(-0.8 * math.log(0.75) - 0.2 * math.log(0.25), rel=1e-6)
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert out.terms["teacher_entropy"].item() == pytest.approx(entropy, rel=1e-6)
    method.after_step(0.0)
    first = 0.9 * 0.1 + 0.1 * (0.25 * math.log(4) + 0.1)
    assert method.centre.tolist() == pytest.approx([first, 0.3], rel=1e-6)


# --- at chance -------------------------------------------------------------------------------------------------------


def unrelated(name, settings, width, images, **bare):
    """Views that have nothing to do with each other, and heads that change nothing."""
    return with_maps(name, settings, normal(images, width, seed=1), normal(images, width, seed=2), **bare)


@torch.no_grad()
def test_moco_and_densecl_at_chance():
    """A low temperature raises what is expected by its square, 1 / (2 d t^2); hence t = 1."""
    heads = {"head": None, "key_head": None}
    settings = MoCoSettings(outputs=128, temperature=1.0, queue=4096)
    method, batch = unrelated("moco", settings, 128, 64, **heads)
    out = method(batch)
    assert out.loss.item() == pytest.approx(8.318, abs=0.04)  # the number that is known from practice
    assert out.terms["contrastive_chance"].item() == pytest.approx(math.log(4097))
    settings = DenseCLSettings(outputs=128, temperature=1.0, queue=4096, dense_weight=0.5)
    method, batch = unrelated("densecl", settings, 128, 64, dense_head=None, key_dense_head=None, **heads)
    out = method(batch)
    for term in ("contrastive", "dense"):
        assert out.terms[term].item() == pytest.approx(8.318, abs=0.04)
        assert out.terms[f"{term}_chance"].item() == pytest.approx(math.log(4097))


@torch.no_grad()
def test_embeddings_that_are_all_the_same_are_at_chance_exactly():
    settings = MoCoSettings(outputs=3, temperature=0.1, queue=31)
    method, batch = with_maps("moco", settings, torch.ones(4, 3), torch.ones(4, 3), head=None, key_head=None)
    method.queue.vectors.fill_(1.0)
    assert method(batch).loss.item() == pytest.approx(math.log(32), rel=1e-12)


@torch.no_grad()
def test_byol_simsiam_and_barlow_at_chance():
    heads = {"projector": None, "predictor": None}
    method, batch = unrelated("byol", SETTINGS["byol"], 256, 64, target_projector=None, **heads)
    out = method(batch)
    assert out.loss.item() == pytest.approx(4, abs=0.1)
    assert out.terms["prediction_chance"] == 4
    method, batch = unrelated("simsiam", SETTINGS["simsiam"], 256, 64, **heads)
    out = method(batch)
    assert out.loss.item() == pytest.approx(0, abs=0.02)
    assert out.terms["prediction_chance"] == 0
    method, batch = unrelated("barlow", BarlowSettings(redundancy=1.0), 64, 512, projector=None)
    out = method(batch)
    assert out.terms["loss_chance"].item() == pytest.approx(64 + 64 / 512 + 64 * 63 / 512)
    assert out.terms["redundancy"].item() == pytest.approx(64 * 63 / 512, rel=0.06)
    assert out.loss.item() == pytest.approx(out.terms["loss_chance"].item(), rel=0.03)


@torch.no_grad()
def test_dino_is_at_chance_where_the_student_says_nothing():
    """Whatever the teacher says."""
    method = made("dino", LOCALS)
    method.head.prototypes.copy_(method.head.prototypes[:1].expand(10, -1))
    out = method(coded_batch(LOCALS))
    assert out.loss.item() == pytest.approx(math.log(10), rel=1e-12)
    assert out.terms["distillation_chance"].item() == pytest.approx(math.log(10))
    assert out.terms["teacher_entropy"] < 2.2


# --- loss functions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0, 10.0])
def test_info_nce_equals_the_loop(temperature):
    query, key, queue = 3 * normal(2, 4, 5, seed=1), normal(2, 4, 5, seed=2) / 7, 2 * normal(9, 5, seed=3)
    got = info_nce(query, key, queue, temperature)
    assert got.shape == (2, 4)
    for i, j in np.ndindex(2, 4):
        assert got[i, j].item() == pytest.approx(
            info_nce_by_loops(query[i, j], key[i, j], queue, temperature), rel=1e-9
        )


def test_info_nce_by_hand():
    queue = torch.tensor([[0.0, 9.0], [0.0, -2.0], [4.0, 0.0]])
    got = info_nce(torch.tensor([5.0, 0.0]), torch.tensor([0.1, 0.0]), queue, 0.5)  # cosines 1 and 0, 0, 1
    assert got.item() == pytest.approx(math.log(2 + 2 * math.exp(-2)), rel=1e-6)


def test_info_nce_that_is_cold_and_right_or_wrong_stays_finite():
    x = torch.tensor([[1.0, 0.0]])
    assert info_nce(x, x, -x, 1e-3).item() == 0
    assert info_nce(x, -x, x, 1e-3).item() == pytest.approx(2000, rel=1e-6)


def test_negative_cosine_is_the_mean_over_rows():
    p, z = 3 * normal(7, 5, seed=1), normal(7, 5, seed=2) / 5
    expected = -np.mean([cosine(x, y) for x, y in zip(p, z, strict=True)])
    assert negative_cosine(p, z).item() == pytest.approx(expected, rel=1e-12)
    assert negative_cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])).item() == pytest.approx(-0.6)


@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 5), (9, 4)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_cross_correlation_equals_the_loops(n, d, scale):
    first, second = scale * normal(n, d, seed=1) + 3, normal(n, d, seed=2) - 5
    got = cross_correlation(first, second)
    np.testing.assert_allclose(got.numpy(), cross_correlation_by_loops(first, second), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_a_view_correlates_with_itself_at_one_for_any_number_of_images(n):
    """The biased variance: with the unbiased one it would be (n - 1) / n."""
    x = normal(n, 4, seed=3)
    np.testing.assert_allclose(cross_correlation(x, 5 * x + 2).diagonal().numpy(), np.ones(4), atol=1e-2 / n)
    np.testing.assert_allclose(cross_correlation(x, -x).diagonal().numpy(), -np.ones(4), atol=1e-2 / n)


def test_cross_correlation_by_hand():
    """Rows are dimensions of the first view; a constant dimension correlates with nothing."""
    first = torch.tensor([[1.0, 7.0, 1.0], [-1.0, 7.0, 1.0], [1.0, 7.0, -1.0], [-1.0, 7.0, -1.0]])
    second = torch.tensor([[2.0, 0.0], [0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
    third = 1 / math.sqrt(3)  # (0, 0, 0, 4) has mean 1 and deviation sqrt(3)
    expected = [[1.0, -third], [0.0, 0.0], [0.0, -third]]
    torch.testing.assert_close(cross_correlation(first, second), torch.tensor(expected), atol=2e-5, rtol=0)


def test_distillation_equals_the_loop():
    student, teacher = 3 * normal(6, 7, seed=1), normal(6, 7, seed=2).softmax(-1)
    got = distillation(student, teacher).item()
    assert got == pytest.approx(distillation_by_loops(student, teacher), rel=1e-12)
    assert distillation(student + 50, teacher).item() == pytest.approx(got, rel=1e-12)
    assert distillation(torch.zeros(6, 7), teacher).item() == pytest.approx(math.log(7), rel=1e-6)


def test_distillation_by_hand():
    student = torch.tensor([[math.log(3), 0.0], [1000.0, 0.0]])
    teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    assert distillation(student, teacher).item() == pytest.approx((math.log(4) - math.log(3) / 2 + 100) / 2, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_covariance_at_positions_equals_loops_over_positions(seed):
    tokens = 2 * normal(5, 6, 3, seed=seed) + 4
    valid = torch.rand(5, 6, generator=torch.Generator().manual_seed(seed)) < 0.6
    valid[:, 2], valid[:2, 3] = False, True
    valid[4, 2] = True  # a position that one image fills
    groups = [tokens[valid[:, j], j] for j in range(6) if valid[:, j].sum() >= 2]
    assert 1 <= len(groups) <= 5
    expected = np.mean([covariance_by_loops(rows) for rows in groups])
    assert covariance_at_positions(tokens, valid).item() == pytest.approx(expected, rel=1e-9)
    changed = torch.where(valid.unsqueeze(-1), tokens, 1e3 * normal(5, 6, 3, seed=9)).requires_grad_()
    got = covariance_at_positions(changed, valid)
    assert got.item() == pytest.approx(expected, rel=1e-9)
    got.backward()
    assert (changed.grad[~valid] == 0).all()


def test_covariance_at_positions_by_hand():
    """Covariances (2, 4; 4, 8) at the first position, none at the second, which one image fills."""
    tokens = torch.tensor([[[1.0, 2.0], [5.0, 5.0]], [[-1.0, -2.0], [0.0, 3.0]]]).requires_grad_()
    both = torch.tensor([[True, True], [True, False]])
    assert covariance_at_positions(tokens, both).item() == pytest.approx(16, rel=1e-6)
    alone = covariance_at_positions(tokens, torch.eye(2, dtype=torch.bool))
    assert alone.item() == 0
    alone.backward()
    assert (tokens.grad == 0).all()


HELD = torch.tensor([[True, True, False, True], [True, False, True, True], [False, True, True, True]])
LOSSES = {  # each in one argument, of (3, 4, d); the others are constants
    "info_nce": lambda x: info_nce(x, x.detach().flip(0), x.detach().flatten(0, 1)[::2], 0.2),
    "negative_cosine": lambda x: negative_cosine(x.flatten(0, 1), x.detach().flip(0).flatten(0, 1)),
    "cross_correlation": lambda x: cross_correlation(x[:, :2].flatten(0, 1), x[:, 2:].flatten(0, 1)),
    "distillation": lambda x: distillation(x.flatten(0, 1), x.detach().float().flip(1).softmax(-1).flatten(0, 1)),
    "covariance_at_positions": lambda x: covariance_at_positions(x, HELD),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.mark.parametrize("name", ["info_nce", "negative_cosine", "cross_correlation", "distillation",
                                  "covariance_at_positions"])  # fmt: skip
def test_gradients_equal_finite_differences(name):
    other, many = normal(6, 5, seed=6), normal(7, 5, seed=7)
    functions = {
        "info_nce": lambda x: info_nce(x, other, many, 0.3),
        "negative_cosine": lambda x: negative_cosine(x, other),
        "cross_correlation": lambda x: cross_correlation(x, other),
        "distillation": lambda x: distillation(x, other.softmax(-1)),
        "covariance_at_positions": lambda x: covariance_at_positions(x.reshape(3, 2, 5), HELD[:, :2]),
    }
    assert gradcheck(functions[name], normal(6, 5, seed=5).requires_grad_(), atol=1e-7)
    if name == "cross_correlation":
        assert gradcheck(lambda x: cross_correlation(other, x), normal(6, 5, seed=5).requires_grad_(), atol=1e-7)


def test_keys_queues_targets_and_teachers_get_no_gradient():
    def leaf(seed):
        return normal(4, 5, seed=seed).requires_grad_()

    query, key, queue = leaf(1), leaf(2), leaf(3)
    info_nce(query, key, queue, 0.2).sum().backward()
    assert (query.grad != 0).any()
    assert key.grad is None
    assert queue.grad is None
    for loss in (negative_cosine, distillation):
        trained, target = leaf(4), leaf(5)
        loss(trained, target).backward()
        assert (trained.grad != 0).any()
        assert target.grad is None


@each_loss
@pytest.mark.parametrize("deviation", [1.0, 12.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_of_half_precision_compute_in_single(name, deviation, dtype, autocast):
    """The same rounded numbers in both; the arithmetic must not differ at all, so half precision would show."""
    x = (deviation * normal(3, 4, 600, seed=6)).to(dtype)
    expected = LOSSES[name](x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = LOSSES[name](x)
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@each_loss
@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constant_rows_give_finite_gradients(name, value, dtype):
    x = torch.full((3, 4, 5), value, dtype=dtype, requires_grad=True)
    out = LOSSES[name](x)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


def test_scores_against_prototypes_are_single_precision_cosines_under_autocast():
    head = seeded(lambda: PrototypeHead(CHANNELS, 8, 6, 40))
    x = 100 * normal(9, CHANNELS, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head(x)
        features = head.layers(x).float()
    assert features.abs().max() > 0
    assert got.dtype == torch.float32
    expected = torch.cosine_similarity(features.unsqueeze(1), head.prototypes.unsqueeze(0), dim=-1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


# --- momentum copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "slow", "fast"), PAIRS)
def test_copies_start_as_equals_and_get_no_gradient(name, slow, fast):
    method = made(name, nudged=False)
    first, second = getattr(method, slow).state_dict(), getattr(method, fast).state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert {p.data_ptr() for p in getattr(method, slow).parameters()}.isdisjoint(
        p.data_ptr() for p in getattr(method, fast).parameters()
    )
    method(coded_batch(ALIKE)).loss.backward()
    for p in getattr(method, slow).parameters():
        assert not p.requires_grad
        assert p.grad is None
    assert any((p.grad != 0).any() for p in getattr(method, fast).parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "part"), [(n, part) for n, slow, fast in PAIRS for part in (slow, fast)])
def test_a_change_of_one_network_alone_changes_the_loss(name, part):
    """T4: with keys from the trained network, the copies are updated in vain."""
    method, batch = made(name, nudged=False), coded_batch(ALIKE)
    before = method(batch)
    nudge(getattr(method, part), 3, size=1.0)
    after = method(batch)
    assert after.loss.item() != pytest.approx(before.loss.item(), rel=1e-3)
    if name == "densecl":  # each head has its own term
        changed = {t for t in ("contrastive", "dense") if abs(after.terms[t] - before.terms[t]) > 1e-9}
        assert changed == {"key_encoder": {"contrastive", "dense"}, "encoder": {"contrastive", "dense"},
                           "key_head": {"contrastive"}, "head": {"contrastive"},
                           "key_dense_head": {"dense"}, "dense_head": {"dense"}}[part]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "trained", "copied"),
    [("moco", {0}, {1}), ("densecl", {0}, {1}), ("byol", {0, 1}, {0, 1}), ("dino", {0, 1, 2, 3, 4}, {0, 1})],
)
def test_who_sees_which_view(name, trained, copied):
    """DINO's teacher sees the global views only; MoCo and DenseCL have queries of one view and keys of the other."""
    grids = LOCALS if name == "dino" else ALIKE
    method = made(name, grids)
    method(coded_batch(grids))
    slow = getattr(method, next(iter(COPIES[name])))
    for encoder, views in ((method.encoder, trained), (slow, copied)):
        assert sorted(encoder.seen) == [(v, i) for v in sorted(views) for i in range(IMAGES)]


def real(name, seed=0):
    """A method with a real encoder that has seen images, and whose copies are others than what they follow."""
    method = seeded(lambda: METHODS[name](build_encoder("resnet18", width=4, stride=16, seed=seed), SETTINGS[name]))
    nudge(method, 4, size=0.05)
    pixels = tuple(torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(v)) for v in range(2))
    valid = tuple(torch.ones_like(p, dtype=torch.bool) for p in pixels)
    return method.train(), ViewBatch(pixels, torch.eye(3)[:2].expand(2, 4, 2, 3), valid)


RATES = [(name, slow, fast, progress) for name, slow, fast in PAIRS for progress in (0.0, 0.3, 0.5, 1.0)]


@pytest.mark.parametrize(("name", "slow", "fast", "progress"), RATES)
def test_parameters_of_copies_follow_after_the_step_and_buffers_do_not(name, slow, fast, progress):
    method, batch = real(name)
    start = copy.deepcopy(method)
    method(batch)
    looked = copy.deepcopy(method)
    for p, q in zip(start.parameters(), method.parameters(), strict=True):
        assert torch.equal(p, q)  # nothing follows before the step
    method.after_step(progress)
    m = 0.8
    if name in ("byol", "dino"):
        m = {0.0: 0.8, 0.3: 0.8 + 0.1 - 0.1 * math.cos(0.3 * math.pi), 0.5: 0.9, 1.0: 1.0}[progress]
    pairs = [getattr(x, part) for x in (looked, method) for part in (slow, fast)]
    for p, q, got, same in zip(*(x.parameters() for x in pairs), strict=True):
        torch.testing.assert_close(got, m * p + (1 - m) * q, rtol=1e-5, atol=1e-7)
        assert torch.equal(same, q)
        assert m == 1 or not torch.equal(got, p)
    for before, after in ((pairs[0], pairs[2]), (pairs[1], pairs[3])):
        assert all(torch.equal(x, y) for x, y in zip(before.buffers(), after.buffers(), strict=True))


@pytest.mark.parametrize("name", COPIES)
def test_statistics_of_a_copy_come_from_what_passes_through_it(name):
    method, batch = real(name)
    slow = next(iter(COPIES[name]))
    alone = copy.deepcopy(getattr(method, slow))
    method(batch)
    alone(batch.views[1] if name in ("moco", "densecl") else torch.cat(batch.views))
    one, two = dict(getattr(method, slow).named_buffers()), dict(alone.named_buffers())
    for key in two:
        torch.testing.assert_close(one[key], two[key])
    trained = dict(method.encoder.named_buffers())
    assert not torch.allclose(one["bn1.running_mean"], trained["bn1.running_mean"], rtol=1e-3)


# --- queues ----------------------------------------------------------------------------------------------------------


def oldest_first(queue):
    return queue.vectors.roll(-int(queue.place), 0)


@pytest.mark.parametrize("length", [1, 2, 5, 16, 17])
def test_a_queue_is_first_in_first_out(length):
    """Against a plain one, through steps of any number of keys, some of them more than the queue is long."""
    rng = np.random.default_rng(length)
    queue = seeded(lambda: KeyQueue(length, 3)).double()
    plain = deque(queue.vectors.clone(), maxlen=length)
    for step in range(80):
        held = []
        for part in range(rng.integers(0, 4)):
            keys = 5 * normal(int(rng.integers(1, 2 * length + 2)), 3, seed=1000 * step + part)
            before = queue.vectors.clone(), queue.place.clone()
            queue.hold(keys)
            assert torch.equal(queue.vectors, before[0])
            assert torch.equal(queue.place, before[1])
            held += list(keys / keys.norm(dim=-1, keepdim=True))
        queue.advance()
        plain.extend(held)
        torch.testing.assert_close(oldest_first(queue), torch.stack(list(plain)), rtol=1e-6, atol=1e-6)
        assert queue.vectors.shape == (length, 3)


def test_a_queue_writes_what_was_held_once():
    queue = seeded(lambda: KeyQueue(7, 3))
    queue.hold(normal(3, 3, dtype=torch.float32))
    queue.advance()
    state = copy.deepcopy(queue.state_dict())
    queue.advance()
    assert all(torch.equal(state[key], value) for key, value in queue.state_dict().items())
    assert int(queue.place) == 3


def test_a_queue_keeps_nothing_in_evaluation():
    queue = seeded(lambda: KeyQueue(7, 3)).eval()
    before = queue.vectors.clone()
    queue.hold(normal(3, 3))
    queue.train().advance()
    assert torch.equal(queue.vectors, before)
    assert int(queue.place) == 0


def test_a_queue_holds_vectors_of_length_one_and_no_graph():
    queue = seeded(lambda: KeyQueue(50, 4))
    torch.testing.assert_close(queue.vectors.norm(dim=-1), torch.ones(50))
    assert len({tuple(row) for row in queue.vectors.tolist()}) == 50
    assert not queue.vectors.mean(0).abs().max() > 0.4  # random directions, to all sides
    keys = (100 * normal(20, 4, dtype=torch.float32)).to(torch.bfloat16).requires_grad_()
    queue.hold(2 * keys)
    queue.advance()
    assert queue.vectors.dtype == torch.float32
    assert not queue.vectors.requires_grad
    torch.testing.assert_close(queue.vectors.norm(dim=-1), torch.ones(50))


def test_held_keys_do_not_follow_what_happens_to_the_tensor_later():
    queue, keys = seeded(lambda: KeyQueue(2, 2)), torch.tensor([[1.0, 0.0]])
    queue.hold(keys)
    keys.copy_(torch.tensor([[0.0, 1.0]]))
    queue.advance()
    assert queue.vectors[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("way", ["deepcopy", "state_dict"])
def test_a_queue_goes_on_where_it_was(way):
    queue = seeded(lambda: KeyQueue(7, 3))
    queue.hold(normal(5, 3, dtype=torch.float32))
    queue.advance()
    other = copy.deepcopy(queue) if way == "deepcopy" else seeded(lambda: KeyQueue(7, 3), seed=9)
    if way == "state_dict":
        other.load_state_dict(queue.state_dict())
    more = normal(4, 3, seed=3, dtype=torch.float32)
    for each in (queue, other):
        each.hold(more)
        each.advance()
    assert torch.equal(queue.vectors, other.vectors)
    assert int(other.place) == 2
    other.hold(more)
    other.advance()
    assert not torch.equal(queue.vectors, other.vectors)  # they share nothing


@pytest.mark.parametrize(
    ("most", "images", "length"),
    [(4096, 10**6, 4096), (4096, 1024, 256), (4096, 1023, 128), (4096, 1000, 128), (4096, 64, 16), (4096, 63, 16),
     (4096, 0, 16), (8, 10**6, 8), (100, 10**6, 100), (100, 300, 64)],
)  # fmt: skip
def test_the_length_of_a_queue_suits_the_images(most, images, length):
    assert queue_length(most, images) == length
    for settings in (MoCoSettings(queue=most, hidden=7), DenseCLSettings(queue=most, hidden=7, dense_weight=0.1)):
        fitted = settings.for_images(images)
        assert fitted.queue == length
        assert {**vars(fitted), "queue": most} == vars(settings)


def test_a_queue_is_the_longest_power_of_two_of_at_most_a_quarter_of_the_images():
    for images in (*range(64, 1100), *range(1100, 90_000, 97)):
        length = queue_length(10**9, images)
        assert length & (length - 1) == 0, images
        assert length <= images / 4 < 2 * length, images


def unit(rows):
    return np.array([row / np.linalg.norm(row) for row in rows])


@pytest.mark.parametrize("name", ["moco", "densecl"])
def test_queues_get_one_key_of_every_image_after_the_step(name):
    """DenseCL's dense queue the mean of the dense keys at valid positions, not the keys of the positions."""
    method, valid = made(name, DIFFERENT), token_holes(DIFFERENT, seed=5)
    whole = unit(through(method.key_head, pooled(method.key_encoder, 1)))
    method(coded_batch(DIFFERENT, valid=valid))
    queues = {"queue": whole}
    if name == "densecl":
        tokens = said(method.key_encoder, 1)
        keys = [
            through(method.key_dense_head, image)[keep.numpy()] for image, keep in zip(tokens, valid[1], strict=True)
        ]
        queues["dense_queue"] = unit([rows.mean(0) for rows in keys])
    before = {part: getattr(method, part).vectors.clone() for part in queues}
    method.after_step(0.1)
    for part, expected in queues.items():
        now = getattr(method, part)
        np.testing.assert_allclose(now.vectors[:IMAGES].numpy(), expected, atol=1e-10)
        assert torch.equal(now.vectors[IMAGES:], before[part][IMAGES:])
        assert int(now.place) == IMAGES


@pytest.mark.parametrize("name", ["moco", "densecl"])
def test_a_step_in_parts_adds_the_keys_of_all_parts(name):
    method = made(name)
    for _ in range(2):
        method(coded_batch(ALIKE))
    method.eval()(coded_batch(ALIKE))  # looking on the side adds nothing
    method.train().after_step(0.1)
    assert int(method.queue.place) == 2 * IMAGES
    torch.testing.assert_close(method.queue.vectors[:IMAGES], method.queue.vectors[IMAGES : 2 * IMAGES])


# --- DenseCL's pairs -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_densecl_pairs_every_position_with_the_most_similar_valid_one():
    """By what the encoder and its copy say, not by projections; several positions may have one partner."""
    grids = (4, 4), (2, 3)
    method, valid = made("densecl", grids), token_holes(grids, seed=3)
    batch = coded_batch(grids, valid=valid)
    match = method.match(batch)
    tokens, others = said(method.encoder, 0), said(method.key_encoder, 1)
    assert match.plan.shape == match.cost.shape == (IMAGES, 16, 6)
    for i in range(IMAGES):
        here, there = valid[0][i].numpy(), valid[1][i].numpy()
        partner = partners_by_loops(tokens[i], others[i], there)
        expected = np.zeros((16, 6))
        for at in np.flatnonzero(here):
            expected[at, partner[at]] = 1 / here.sum()
        np.testing.assert_allclose(match.plan[i].numpy(), expected, atol=1e-12)
        assert len({partner[at] for at in np.flatnonzero(here)}) < here.sum()
        cost = [[1 - cosine(x, y) for y in others[i]] for x in tokens[i]]
        np.testing.assert_allclose(match.cost[i].numpy(), cost, atol=1e-10)
        np.testing.assert_allclose(match.a[i].numpy(), here / here.sum())
        np.testing.assert_allclose(match.b[i].numpy(), there / there.sum())
    before = match.plan.clone()
    for part in ("head", "dense_head", "key_head", "key_dense_head"):
        nudge(getattr(method, part), 8, size=3.0)
    assert torch.equal(method.match(batch).plan, before)


@pytest.mark.parametrize("change", [torch.zeros, lambda *shape: 1e3 * normal(*shape, seed=9)])
def test_densecl_does_not_see_dense_content_that_is_not_valid(change):
    """The global term does: its mean is over the whole map, as published."""
    valid = token_holes(DIFFERENT, seed=2)
    method, batch = made("densecl", DIFFERENT), coded_batch(DIFFERENT, valid=valid)
    before = method(batch)
    with torch.no_grad():
        for encoder, v in ((method.encoder, 0), (method.key_encoder, 1)):
            keep = valid[v].reshape(IMAGES, 1, *DIFFERENT[v])
            encoder.maps[v].copy_(torch.where(keep, encoder.maps[v], change(*encoder.maps[v].shape)))
    after = method(batch)
    assert after.terms["dense"].item() == pytest.approx(before.terms["dense"].item(), rel=1e-10)
    assert after.terms["contrastive"].item() != pytest.approx(before.terms["contrastive"].item(), rel=1e-4)


@torch.no_grad()
def test_densecl_finds_the_true_place_where_features_tell_it():
    """T5: features are a function of the place in the image; views are flips, shifts and turns by whole cells."""
    flip, upside = torch.tensor([[-1.0, 0, 1], [0, 1, 0]]), torch.tensor([[1.0, 0, 0], [0, -1, 1]])
    turn = torch.tensor([[0.0, -1, 1], [1, 0, 0]])
    left, right = (torch.tensor([[0.8, 0, x], [0, 1, 0]]) for x in (0.0, 0.2))
    geometry = torch.stack((torch.stack((torch.eye(3)[:2], upside, torch.eye(3)[:2], left)),
                            torch.stack((flip, flip, turn, right))))  # fmt: skip
    waves, shifts = 4 * normal(2, 32, seed=1), 6 * normal(32, seed=2)
    maps = []
    for maps_of_view in geometry.double():
        places = token_centres(4, 4).double() @ maps_of_view[..., :2].mT + maps_of_view[:, None, :, 2]
        maps.append((places @ waves + shifts).sin().mT.reshape(4, 32, 4, 4))
    method, batch = with_maps("densecl", SETTINGS["densecl"], *maps)
    batch = batch._replace(geometry=geometry)
    valid = torch.ones(4, 16, dtype=torch.bool)
    true = correspondence(geometry[0], geometry[1], valid, valid, (4, 4), (4, 4))
    assert true.known.sum(1).tolist() == [16, 16, 16, 12]
    assert true.cell[0].tolist() == [4 * (i // 4) + 3 - i % 4 for i in range(16)]
    assert true.cell[3][true.known[3]].tolist() == [4 * (i // 4) + i % 4 - 1 for i in range(16) if i % 4]
    partner = method.match(batch).plan.argmax(-1)
    assert torch.equal(partner[true.known], true.cell[true.known])


# --- DINO ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_centre_moves_after_the_step_and_only_then():
    method, batch = made("dino", LOCALS), coded_batch(LOCALS)
    start = method.centre.clone()
    scores = np.concatenate([scores_by_loops(method.teacher_head, pooled(method.teacher, u)) for u in (0, 1)])
    method(batch)
    assert torch.equal(method.centre, start)
    method.after_step(0.1)
    expected = 0.9 * start.numpy() + 0.1 * scores.mean(0)
    np.testing.assert_allclose(method.centre.numpy(), expected, atol=1e-12)
    method.after_step(0.2)  # without a pass there is nothing to follow
    np.testing.assert_allclose(method.centre.numpy(), expected, atol=1e-12)
    method.eval()(batch)
    method.train().after_step(0.2)  # nor after one in evaluation
    np.testing.assert_allclose(method.centre.numpy(), expected, atol=1e-12)


@torch.no_grad()
def test_the_centre_of_a_step_in_parts_follows_the_mean_of_the_parts():
    method = made("dino")
    start, means = method.centre.clone(), []
    for seed in (1, 2, 3):
        nudge(method.teacher, seed)
        method(coded_batch(ALIKE))
        scores = [scores_by_loops(method.teacher_head, pooled(method.teacher, u)) for u in (0, 1)]
        means.append(np.mean(scores, (0, 1)))
    method.after_step(0.1)
    np.testing.assert_allclose(method.centre.numpy(), 0.9 * start.numpy() + 0.1 * np.mean(means, 0), atol=1e-12)


@torch.no_grad()
def test_the_centre_is_taken_off_what_the_teacher_says():
    """So a prototype that always wins stops to win: the more of it is in the centre, the less it is asked for."""
    method, batch = hand_dino()
    losses = []
    for offset in (0.0, 0.5, 5.0):
        method.centre.copy_(torch.tensor([offset, 0.0]))
        losses.append(method(batch).loss.item())
    # the teacher ends up asking for the second prototype alone, to which the student gives a quarter
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] == pytest.approx(-math.log(0.25), rel=1e-4)


@pytest.mark.parametrize(("progress", "frozen"), [(0.0, True), (0.2, True), (0.25, False), (0.9, False)])
def test_prototypes_stay_as_they_are_for_the_stated_share_of_the_training(progress, frozen):
    """They owe a gradient, which is zero; everything else learns, and the loss is the same."""
    method, batch = made("dino"), coded_batch(ALIKE)
    if progress:
        centre = method.centre.clone()
        method.after_step(progress)
        assert torch.equal(method.centre, centre)
    loss = method(batch).loss
    loss.backward()
    grads = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    assert bool((grads.pop("head.prototypes") != 0).any()) != frozen
    assert method.head.prototypes.grad.isfinite().all()
    assert all((g != 0).any() for g in grads.values())
    assert loss.item() == pytest.approx(slow_dino(method, None), rel=1e-9)


def test_with_a_share_of_zero_prototypes_are_never_frozen():
    method = made("dino", settings=DINOSettings(hidden=16, bottleneck=6, prototypes=10, frozen=0.0))
    method(coded_batch(ALIKE)).loss.backward()
    assert (method.head.prototypes.grad != 0).any()


@torch.no_grad()
@pytest.mark.parametrize("part", ["head", "teacher_head"])
def test_the_length_of_prototypes_does_not_matter(part):
    method, batch = made("dino"), coded_batch(ALIKE)
    before = method(batch).loss.item()
    getattr(method, part).prototypes.mul_(torch.linspace(0.1, 20, 10).unsqueeze(1))
    assert method(batch).loss.item() == pytest.approx(before, rel=1e-10)
    last = getattr(method, part).layers[-1]
    last.weight.mul_(7)
    last.bias.mul_(7)
    assert method(batch).loss.item() == pytest.approx(before, rel=1e-10)


@torch.no_grad()
def test_every_local_view_counts_for_the_student_only():
    method, batch = made("dino", LOCALS), coded_batch(LOCALS)
    before = method(batch).loss.item()
    for v in range(2, 5):
        held = method.teacher.maps[v].clone()
        method.teacher.maps[v].add_(normal(*held.shape, seed=v))
        assert method(batch).loss.item() == before
        method.encoder.maps[v].add_(normal(*held.shape, seed=v))
        after = method(batch).loss.item()
        assert after != pytest.approx(before, rel=1e-6)
        before = after


@each_method
def test_only_dino_hands_out_its_copy(name):
    method = made(name)
    assert method.kept() is (method.teacher if name == "dino" else method.encoder)


# --- heads and rates -------------------------------------------------------------------------------------------------


@each_method
def test_only_simsiams_predictor_keeps_its_rate(name):
    method = made(name)
    expected = [id(p) for p in method.predictor.parameters()] if name == "simsiam" else []
    assert [id(p) for p in method.constant_rate()] == expected
    assert name != "simsiam" or expected


L, N, R = "Linear", "BatchNorm1d", "ReLU"


@pytest.mark.parametrize(
    ("name", "head", "kinds", "widths"),
    [
        ("moco", "head", [L, R, L], [6, 16, 8]),
        ("densecl", "head", [L, R, L], [6, 16, 8]),
        ("densecl", "dense_head", [L, R, L], [6, 16, 8]),
        ("byol", "projector", [L, N, R, L], [6, 16, 8]),
        ("byol", "predictor", [L, N, R, L], [8, 16, 8]),
        ("simsiam", "projector", [L, N, R, L, N, R, L, N], [6, 16, 16, 8]),
        ("simsiam", "predictor", [L, N, R, L], [8, 4, 8]),
        ("barlow", "projector", [L, N, R, L, N, R, L], [6, 16, 16, 8]),
        ("dino", "head.layers", [L, "GELU", L, "GELU", L], [6, 16, 16, 6]),
    ],
)
def test_heads_have_the_layers_of_their_sources(name, head, kinds, widths):
    layers = made(name).get_submodule(head)
    assert [type(layer).__name__ for layer in layers] == kinds
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == widths
    for before, after in zip(layers, list(layers)[1:], strict=False):
        if isinstance(after, nn.BatchNorm1d):
            assert before.bias is None
            last = after is layers[-1]
            assert after.affine == (not last)  # only SimSiam's last norm is without scale and shift
            assert after.eps == 1e-5
    assert (linear[-1].bias is None) == (head == "projector" and name in ("simsiam", "barlow"))


def test_dinos_head_starts_small():
    head = seeded(lambda: PrototypeHead(64, 128, 64, 256))
    for layer in head.layers:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert (layer.bias == 0).all()
    assert head.prototypes.std().item() == pytest.approx(0.02, rel=0.05)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        *[(kind, field, 0) for kind in (MoCoSettings, DenseCLSettings) for field in ("hidden", "outputs", "queue")],
        *[(kind, "temperature", x) for kind in (MoCoSettings, DenseCLSettings) for x in (0.0, -0.1)],
        *[(kind, "momentum", x) for kind in (MoCoSettings, DenseCLSettings, BYOLSettings, DINOSettings)
          for x in (-0.1, 1.5)],
        *[(DenseCLSettings, "dense_weight", x) for x in (-0.25, 1.25)],
        *[(kind, field, 0) for kind in (BYOLSettings, SimSiamSettings, BarlowSettings)
          for field in ("hidden", "outputs")],
        (SimSiamSettings, "bottleneck", 0), (BarlowSettings, "redundancy", -0.5),
        (DINOSettings, "hidden", 0), (DINOSettings, "bottleneck", 0), (DINOSettings, "prototypes", 1),
        *[(DINOSettings, field, x) for field in ("student_temperature", "teacher_temperature") for x in (0.0, -0.25)],
        *[(DINOSettings, field, x) for field in ("centre_momentum", "frozen") for x in (-0.5, 1.5)],
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_with_their_value(settings, field, value):
    with pytest.raises(ConfigError, match=f"^method.{field} .*received {value}$"):
        settings(**{field: value})


def test_settings_at_their_ends_are_taken():
    for momentum in (0, 1):
        for settings in (MoCoSettings, DenseCLSettings, BYOLSettings, DINOSettings):
            settings(momentum=momentum)
        DINOSettings(centre_momentum=momentum, frozen=momentum)
        DenseCLSettings(dense_weight=momentum)
    BarlowSettings(redundancy=0)
