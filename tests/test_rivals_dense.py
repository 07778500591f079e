"""VICRegL, PCRLv2 and OTCXR on local views against slow formulas, and against radiographs whose geometry is known."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from oracles import covariance_by_loops, variance_by_loops
from otcxr.data.dataset import DataConfig
from otcxr.data.geometry import ViewBatch
from otcxr.data.views import ViewsConfig
from otcxr.errors import ConfigError, DataError
from otcxr.losses import covariance_at_positions
from otcxr.methods import METHODS
from otcxr.methods.otcxr import OTCXR, OTCXRSettings
from otcxr.methods.pcrlv2 import PCRLv2, PCRLv2Settings, Scales
from otcxr.methods.vicregl import VICRegL, VICRegLSettings
from otcxr.nn.encoder import Architecture, Encoder, build_encoder
from otcxr.nn.unet import Decoder
from otcxr.settings import PretrainConfig

torch.set_num_threads(1)

STRIDE = 16


class Patches(Encoder):
    """One linear map of each patch of pixels: a position depends on its own pixels alone, an image on no other."""

    def __init__(self, channels=6, stride=STRIDE, first_centre=0.5):
        super().__init__()
        self.patch = nn.Conv2d(1, channels, stride, stride)
        self.noise = False
        self.channels, self.strides = (4, channels), (2, stride)
        self.first_centre, self.mean, self.std = first_centre, 0.4, 0.2
        self.architecture = Architecture("patches", 1, 4, stride)

    def forward(self, images):
        height, width = images.shape[-2:]
        stride = self.strides[-1]
        whole = nn.functional.pad((images - self.mean) / self.std, (0, -width % stride, 0, -height % stride))
        early = torch.rand_like(images) if self.noise else images
        return early, self.patch(whole)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def made(method, settings, seed=0, **encoder):
    """A method on patches, in double precision and in training; norms that are not where they start."""
    out = seeded(lambda: method(Patches(**encoder), settings), seed).double().train()
    with torch.no_grad():
        out.encoder.patch.weight.copy_(normal(*out.encoder.patch.weight.shape, seed=seed) / STRIDE)
        for number, module in enumerate(out.modules()):
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.add_(0.3 * normal(len(module.weight), seed=number))
                module.bias.add_(0.3 * normal(len(module.bias), seed=number + 1))
    return out


def some_geometry(images, seed):
    """Crops, turned by up to 20 degrees, every second one flipped: no two positions lie equally far from a third."""
    u, out = uniform(images, 5, seed=seed), torch.zeros(images, 2, 3, dtype=torch.float64)
    for i, (size, stretch, x, y, turn) in enumerate(u.tolist()):
        size, stretch, turn = 0.4 + 0.4 * size, 0.8 + 0.4 * stretch, math.radians(40 * turn - 20)
        linear = size * torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        linear = linear * torch.tensor([stretch * (-1) ** (i + seed), 1 / stretch])
        middle = torch.tensor([0.3 + 0.4 * x, 0.3 + 0.4 * y])
        out[i] = torch.cat((linear, (middle - linear @ torch.tensor([0.5, 0.5]))[:, None]), dim=1)
    return out


def views(sizes, images=3, holes=False, seed=0, stride=STRIDE):
    """Views of random pixels; absent are whole positions, about a quarter of them, other ones in every view."""
    sizes = [(size, size) if isinstance(size, int) else size for size in sizes]
    pixels, valid = [], []
    for v, (height, width) in enumerate(sizes):
        pixels.append(uniform(images, 1, height, width, seed=seed + v))
        keep = uniform(images, 1, -(-height // stride), -(-width // stride), seed=seed + 50 + v) < 0.75
        keep[:, :, 0, 0] = keep[:, :, -1, -1] = True
        keep = keep.repeat_interleave(stride, -1).repeat_interleave(stride, -2)[:, :, :height, :width]
        valid.append(keep if holes else torch.ones_like(keep))
    geometry = torch.stack([some_geometry(images, seed + v) for v in range(len(sizes))])
    clean = tuple(uniform(*p.shape, seed=seed + 90 + v) for v, p in enumerate(pixels))
    return ViewBatch(tuple(pixels), geometry, tuple(valid), clean)


def only(batch, *which):
    """The same batch with these views alone."""
    clean = None if batch.clean is None else tuple(batch.clean[v] for v in which)
    return ViewBatch(
        tuple(batch.views[v] for v in which), batch.geometry[list(which)], tuple(batch.valid[v] for v in which), clean
    )


def one_image(batch, i):
    part = slice(i, i + 1)
    return ViewBatch(tuple(v[part] for v in batch.views), batch.geometry[:, part], tuple(v[part] for v in batch.valid))


def slope(method, batch, direction):
    """The slope of the loss along a direction of the encoder's weights, as its gradient says."""
    method.zero_grad()
    method(batch).loss.backward()
    return float((method.encoder.patch.weight.grad * direction).sum())


def difference(loss, weight, direction, step=1e-6):
    """The same by finite differences of a function without arguments."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            values.append(loss())
            weight.sub_(sign * step * direction)
    return (values[0] - values[1]) / (2 * step)


def head_by_rows(head, rows):
    """Linear maps, BatchNorm with the statistic of these rows, ReLU."""
    rows = np.asarray(rows, dtype=np.float64)
    for layer in head:
        own = {name: value.detach().numpy() for name, value in layer.named_parameters()}
        if isinstance(layer, nn.Linear):
            rows = np.stack([own["weight"] @ row + own.get("bias", 0.0) for row in rows])
        elif isinstance(layer, nn.BatchNorm1d):
            spread = ((rows - rows.mean(0)) ** 2).sum(0) / len(rows)
            rows = (rows - rows.mean(0)) / np.sqrt(spread + layer.eps) * own["weight"] + own["bias"]
        else:
            assert isinstance(layer, nn.ReLU)
            rows = np.where(rows > 0, rows, 0.0)
    return rows


# --- VICRegL ---------------------------------------------------------------------------------------------------------

NARROW = VICRegLSettings(
    hidden=10, outputs=7, local_hidden=9, local_outputs=5, global_weight=0.6, matches=0.4, invariance=3.0, variance=2.0,
    covariance=0.7,
)  # fmt: skip
TERMS = ("invariance", "variance", "covariance")


class Seen:
    """What one view shows: for each image the valid positions, what they say and where they lie."""

    def __init__(self, tokens, covered, geometry, first):
        self.height, self.width = tokens.shape[-2:]
        self.tokens = tokens.detach().numpy().transpose(0, 2, 3, 1).reshape(len(tokens), -1, tokens.shape[1])
        self.places, self.valid = [], []
        for image in range(len(tokens)):
            (a, b, c), (d, e, f) = geometry[image].tolist()
            places, valid = [], []
            for row in range(self.height):
                for column in range(self.width):
                    x, y = (column + first) / self.width, (row + first) / self.height
                    places.append((a * x + b * y + c, d * x + e * y + f))
                    block = covered[
                        image, 0, row * STRIDE : (row + 1) * STRIDE, column * STRIDE : (column + 1) * STRIDE
                    ]
                    if block.double().mean() >= 0.5:
                        valid.append(len(places) - 1)
            self.places.append(places)
            self.valid.append(valid)


def distance(p, q):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(p, q, strict=True)))


def nearest(i, points, others, allowed):
    """The least (distance, j) of the allowed others."""
    return min((distance(points[i], others[j]), j) for j in allowed)


def matched(here, there, image, share, by):
    """Slot -> (position, partner) of one image, one way."""
    mine, theirs = here.valid[image], there.valid[image]
    if not theirs:
        return {}
    if by == "feature":
        return {i: (i, nearest(i, here.said[image], there.said[image], theirs)[1]) for i in mine}
    count = max(1, round(share * here.height * here.width))
    found = sorted((*nearest(i, here.places[image], there.places[image], theirs), i) for i in mine)[:count]
    return dict(enumerate(sorted((i, j) for _, j, i in found)))


def vicreg_of_slots(x, y):
    """(inv, var, cov) of rows by slot: {slot: [(row of x, row of y) for every image that has it]}."""
    flat = [pair for pairs in x.values() for pair in pairs]
    apart = sum(((p - q) ** 2).sum() for p, q in flat) / max(1, len(flat)) / y
    spread, correlated = [], []
    for pairs in x.values():
        if len(pairs) >= 2:
            p, q = (np.stack([pair[side] for pair in pairs]) for side in (0, 1))
            spread.append((variance_by_loops(p) + variance_by_loops(q)) / 2)
            correlated.append((covariance_by_loops(p) + covariance_by_loops(q)) / 2)
    return np.array([apart, np.mean(spread) if spread else 0.0, np.mean(correlated) if correlated else 0.0])


@torch.no_grad()
def slow_vicregl(method, batch):
    """The loss, (inv, var, cov) of whole images, and of positions by each kind of matching; image by image."""
    s, count = method.settings, len(batch.views)
    maps = [method.encoder(view)[-1] for view in batch.views]
    seen = [
        Seen(m, covered, geometry, method.encoder.first_centre)
        for m, covered, geometry in zip(maps, batch.valid, batch.geometry, strict=True)
    ]
    images = len(maps[0])
    # heads see the rows of all views at once, whose statistic they share
    embedded = head_by_rows(method.expander, np.concatenate([v.tokens.mean(1) for v in seen])).reshape(
        count, images, -1
    )
    rows = [(v, image, i) for v in range(count) for image in range(images) for i in seen[v].valid[image]]
    said = head_by_rows(method.projector, [seen[v].tokens[image, i] for v, image, i in rows])
    for v in range(count):
        seen[v].said = [{} for _ in range(images)]
    for (v, image, i), row in zip(rows, said, strict=True):
        seen[v].said[image][i] = row

    pairs = [(i, j) for i in (0, 1) for j in range(count) if j != i]
    whole = np.array([
        np.mean([((embedded[i] - embedded[j]) ** 2).sum() / embedded[i].size for i, j in pairs]),
        np.mean([variance_by_loops(g) for g in embedded]),
        np.mean([covariance_by_loops(g) for g in embedded]),
    ])  # fmt: skip
    kinds = {"feature": np.zeros(3), "location": np.zeros(3)}
    for i, j in pairs:
        for by, total in kinds.items():
            for here, there in ((seen[i], seen[j]), (seen[j], seen[i])):
                slots = {}
                for image in range(images):
                    for slot, (p, q) in matched(here, there, image, s.matches, by).items():
                        slots.setdefault(slot, []).append((here.said[image][p], there.said[image][q]))
                total += vicreg_of_slots(slots, s.local_outputs) / 2 / len(pairs)
    weights = np.array([s.invariance, s.variance, s.covariance])
    loss = s.global_weight * weights @ whole + (1 - s.global_weight) * weights @ sum(kinds.values())
    return loss, whole, kinds


VICREGL_CASES = {
    "two views": ([64, 64], {}, {}),
    "absent positions": ([64, 64], {"holes": True}, {}),
    "different grids": ([64, (48, 80)], {}, {}),
    "different grids, absent positions": ([(64, 48), 80], {"holes": True, "seed": 3}, {}),
    "the authors' grids": ([112, 48], {"images": 2}, {}),
    "one local view": ([64, 64, 32], {}, {}),
    "three local views, absent positions": ([64, 64, 48, 48, (32, 48)], {"holes": True}, {}),
    "local views of the global views' size": ([48, 48, 48], {"holes": True}, {}),
    "all positions matched by location": ([64, 48], {}, {"matches": 1.0}),
    "one position matched by location": ([64, 64], {"holes": True}, {"matches": 0.01}),
    "global loss alone": ([64, 64, 32], {}, {"global_weight": 1.0}),
    "local loss alone": ([64, 64, 32], {"holes": True}, {"global_weight": 0.0}),
}


@pytest.mark.parametrize("case", VICREGL_CASES)
def test_vicregl_is_its_formula(case):
    sizes, how, changes = VICREGL_CASES[case]
    method = made(VICRegL, replace(NARROW, **changes), first_centre=0.3)
    batch = views(sizes, **how)
    loss, whole, kinds = slow_vicregl(method, batch)
    assert min(map(min, (whole, *kinds.values()))) > 1e-4, "every term must be active, or it is not tested"
    out = method(batch)
    for name, expected, local in zip(TERMS, whole, sum(kinds.values()), strict=True):
        assert out.terms[name].item() == pytest.approx(expected, rel=1e-9), name
        assert out.terms[f"local_{name}"].item() == pytest.approx(local, rel=1e-9), name
    assert out.loss.item() == pytest.approx(loss, rel=1e-8)


def test_vicregl_of_constant_maps_is_its_hinges():
    """By hand: no difference, no correlation, hinges of 1 - sqrt(1e-4): one globally, two locally (two matchings)."""
    method = made(VICRegL, VICRegLSettings(hidden=8, outputs=8, local_hidden=8, local_outputs=8, global_weight=0.75))
    with torch.no_grad():
        method.encoder.patch.weight.zero_()
        for head in (method.expander, method.projector):
            for layer in head:
                if isinstance(layer, nn.BatchNorm1d):
                    layer.bias.zero_()
    for sizes in ([64, 64], [64, 64, 32]):
        expected = 25 * 0.99 * (0.75 + 0.25 * 2)
        assert method(views(sizes)).loss.item() == pytest.approx(expected, rel=1e-6)


def test_vicregl_by_hand():
    """Two images, one position each, heads left out. Rows of view 1: (0, 0), (2, 2); of view 2: (0, 1), (2, 2).

    inv = 1 / 4. Unbiased variances 2, 2 and 2, 1/2: hinges 0 and (1 - sqrt(0.5001)) / 2. Cov_01 is 2 and 1, so c is
    2 * 4 / 2 = 4 and 2 * 1 / 2 = 1. Of two views the mean: the same globally as in each of the two local kinds.
    """
    method = made(VICRegL, VICRegLSettings(local_outputs=2, global_weight=0.75), channels=2)
    method.expander = method.projector = nn.Identity()
    with torch.no_grad():  # channel 0 reads the first pixel of a position, channel 1 the second
        method.encoder.patch.weight.zero_()
        method.encoder.patch.bias.zero_()
        method.encoder.patch.weight[0, 0, 0, 0] = method.encoder.patch.weight[1, 0, 0, 1] = 1.0
    method.encoder.mean, method.encoder.std = 0.0, 1.0
    batch = views([16, 16], images=2)
    for view, rows in zip(batch.views, ([(0, 0), (2, 2)], [(0, 1), (2, 2)]), strict=True):
        view[:, 0, 0, :2] = torch.tensor(rows, dtype=torch.float64)
    out = method(batch)
    each = 25 * 0.25 + 25 * (1 - math.sqrt(0.5001)) / 4 + 2.5
    assert out.terms["covariance"].item() == pytest.approx(2.5, rel=1e-9)
    assert out.terms["local_covariance"].item() == pytest.approx(5.0, rel=1e-9)
    assert out.loss.item() == pytest.approx(0.75 * each + 0.25 * 2 * each, rel=1e-9)


CELLS = uniform(2, 1, 8, 8, seed=77)  # two sources of 8 x 8 cells, each of one grey level


def shown(cells, left, top, width, height, how="plain"):
    """Pixels and map to the source of a view that shows some of the cells, one in each of its positions."""
    crop = cells[..., top : top + height, left : left + width]
    x, y, w, h = left / 8, top / 8, width / 8, height / 8
    turned, geometry = {
        "plain": (crop, [[w, 0, x], [0, h, y]]),
        "flipped": (crop.flip(-1), [[-w, 0, x + w], [0, h, y]]),
        "upside down": (crop.rot90(2, (-2, -1)), [[-w, 0, x + w], [0, -h, y + h]]),
        "on its side": (crop.rot90(1, (-2, -1)), [[0, -w, x + w], [h, 0, y]]),
    }[how]
    pixels = turned.repeat_interleave(STRIDE, -1).repeat_interleave(STRIDE, -2)
    return pixels, torch.tensor(geometry, dtype=torch.float64).expand(len(cells), 2, 3)


def known_pair(first, second):
    (one, g), (two, h) = shown(CELLS, *first), shown(CELLS, *second)
    return ViewBatch((one, two), torch.stack((g, h)), tuple(torch.ones_like(v, dtype=torch.bool) for v in (one, two)))


KNOWN = {  # (left, top, width, height, how) of both views, and the share of positions that both of them show
    "the same crop, flipped": ((2, 2, 4, 4), (2, 2, 4, 4, "flipped"), 1.0),
    "both flipped": ((2, 2, 4, 4, "flipped"), (2, 2, 4, 4, "flipped"), 1.0),
    "the same crop, upside down": ((1, 3, 4, 4), (1, 3, 4, 4, "upside down"), 1.0),
    "the same crop, on its side": ((1, 3, 4, 4), (1, 3, 4, 4, "on its side"), 1.0),
    "a long crop, on its side": ((0, 2, 6, 3), (0, 2, 6, 3, "on its side"), 1.0),
    "crops that overlap": ((0, 0, 5, 5), (2, 1, 5, 5), 12 / 25),
    "crops that overlap, one flipped": ((0, 0, 5, 5), (2, 1, 5, 5, "flipped"), 12 / 25),
    "a crop and a part of it, flipped": ((1, 1, 6, 6, "flipped"), (2, 3, 3, 3), 9 / 36),
}


@pytest.mark.parametrize("case", KNOWN)
def test_location_matching_finds_the_true_position_of_every_position(case):
    """T5. A position says what its true one says, so location adds to the invariance unless all matches are right."""
    first, second, overlap = KNOWN[case]
    method = made(VICRegL, replace(NARROW, matches=overlap))
    batch = known_pair(first, second)
    by_feature = slow_vicregl(method, batch)[2]["feature"][0]
    assert method(batch).terms["local_invariance"].item() == pytest.approx(by_feature, rel=1e-12, abs=1e-24)
    wrong = batch._replace(geometry=batch.geometry.clone())
    wrong.geometry[1, :, :, 2] += wrong.geometry[1, :, :, 0]
    wrong.geometry[1, :, :, 0] *= -1  # mirrored, against the truth
    assert method(wrong).terms["local_invariance"].item() > by_feature + 1e-3


def test_a_flipped_view_of_the_same_crop_pairs_mirrored_columns():
    """By feature, where all grey levels are different ones: the plan is one to one, and the mirror image."""
    match = made(VICRegL, NARROW).match(known_pair((2, 2, 4, 4), (2, 2, 4, 4, "flipped")))
    for plan in match.plan:
        found = plan.nonzero().tolist()
        assert sorted(found) == sorted([i, 4 * (i // 4) + 3 - i % 4] for i in range(16))
        assert plan[plan > 0].tolist() == pytest.approx([1 / 16] * 16)


def test_features_and_not_places_decide_by_feature():
    """The same cells in another order: by feature all are found again, by location hardly any."""
    batch = known_pair((0, 0, 4, 4), (0, 0, 4, 4, "upside down"))
    batch = batch._replace(geometry=batch.geometry[[0, 0]])
    method = made(VICRegL, replace(NARROW, matches=1.0))
    match = method.match(batch)
    assert [plan.nonzero().tolist() for plan in match.plan] == [[[i, 15 - i] for i in range(16)]] * 2
    assert method(batch).terms["local_invariance"].item() > 1e-2


@pytest.mark.parametrize("sizes", [[64, 64], [64, (48, 80)]])
def test_the_match_of_vicregl_is_half_of_each_way(sizes):
    method = made(VICRegL, NARROW)
    batch = views(sizes, holes=True)
    match = method.match(batch)
    maps = [method.encoder(view)[-1] for view in batch.views]
    seen = [Seen(m, v, g, 0.5) for m, v, g in zip(maps, batch.valid, batch.geometry, strict=True)]
    rows = [(v, b, i) for v in (0, 1) for b in range(3) for i in seen[v].valid[b]]
    said = head_by_rows(method.projector, [seen[v].tokens[b, i] for v, b, i in rows])
    said = dict(zip(rows, said, strict=True))
    for b in range(3):
        n, m = seen[0].valid[b], seen[1].valid[b]
        a, plan = np.zeros(match.a.shape[1]), np.zeros(match.plan.shape[1:])
        back = np.zeros(match.b.shape[1])
        a[n], back[m] = 1 / len(n), 1 / len(m)
        for i in n:
            plan[i, min(m, key=lambda j, i=i, b=b: distance(said[0, b, i], said[1, b, j]))] += 0.5 / len(n)
        for j in m:
            plan[min(n, key=lambda i, j=j, b=b: distance(said[0, b, i], said[1, b, j])), j] += 0.5 / len(m)
        np.testing.assert_allclose(match.a[b].numpy(), a, atol=1e-12)
        np.testing.assert_allclose(match.b[b].numpy(), back, atol=1e-12)
        np.testing.assert_allclose(match.plan[b].numpy(), plan, atol=1e-12)
        cost = [[distance(said[0, b, i], said[1, b, j]) for j in m] for i in n]
        np.testing.assert_allclose(match.cost[b].numpy()[np.ix_(n, m)], cost, rtol=1e-9, atol=1e-9)
    assert match.attention is None


def test_what_lies_at_absent_positions_changes_neither_the_local_loss_nor_the_match():
    """Pooled features are means of the whole map in every method, so the global loss is left out here."""
    method = made(VICRegL, replace(NARROW, global_weight=0.0))
    batch = views([64, 64, 48], holes=True, seed=1)
    assert all((~v).any() for v in batch.valid)
    changed = [torch.where(v, x, 9 * normal(*x.shape, seed=4)) for x, v in zip(batch.views, batch.valid, strict=True)]
    changed = [x.requires_grad_() for x in changed]
    other = batch._replace(views=tuple(changed))
    out = method(other)
    assert out.loss.item() == pytest.approx(method(batch).loss.item(), rel=1e-12)
    out.loss.backward()
    for x, v in zip(changed, batch.valid, strict=True):
        assert (x.grad[~v] == 0).all()
        assert (x.grad[v] != 0).any()
    one, two = method.match(batch), method.match(other)
    for name in ("a", "b", "plan"):
        assert torch.equal(getattr(one, name), getattr(two, name))


def test_where_absent_positions_lie_does_not_matter():
    """Absent positions of one image are moved, by geometry, onto the valid ones of the other view."""
    method = made(VICRegL, replace(NARROW, global_weight=0.0, matches=0.25))
    batch = known_pair((0, 0, 4, 4), (0, 4, 4, 4))  # one below the other
    for valid in batch.valid:
        valid[:, :, 32:, :] = False  # the lower half
    local = sum(slow_vicregl(method, batch)[2].values())
    assert method(batch).terms["local_invariance"].item() == pytest.approx(local[0], rel=1e-9)
    kept = known_pair((0, 0, 4, 2), (0, 4, 4, 2))
    assert method.match(kept).plan.sum().item() == pytest.approx(2.0)
    half = made(VICRegL, replace(NARROW, global_weight=0.0, matches=0.5))  # as many positions of half as large a grid
    assert half(kept).terms["local_invariance"].item() == pytest.approx(local[0], rel=1e-9)


def test_a_view_that_shows_nothing_is_no_partner():
    """A local view may keep a quarter of its pixels and yet no position that is half valid."""
    method = made(VICRegL, replace(NARROW, global_weight=0.0))
    batch = views([64, 64, 32], holes=True)
    batch.valid[2][1] = False
    loss, _, kinds = slow_vicregl(method, batch)
    out = method(batch)
    assert out.terms["local_invariance"].item() == pytest.approx(sum(kinds.values())[0], rel=1e-9)
    assert out.loss.item() == pytest.approx(loss, rel=1e-8)


def test_matches_of_a_nearly_empty_view_come_in_the_order_of_their_positions():
    """Three valid positions, six slots: they are rows 0, 1 and 2, whichever absent positions stand behind them."""
    method = made(VICRegL, replace(NARROW, global_weight=0.0))
    batch = views([64, 64], images=4, holes=False)
    for image, there in ((0, (3, 9, 14)), (1, (0, 7, 15)), (2, (11, 12, 13))):
        keep = torch.zeros(16, dtype=torch.bool)
        keep[list(there)] = True
        batch.valid[0][image] = keep.reshape(1, 4, 4).repeat_interleave(16, -1).repeat_interleave(16, -2)
    local = sum(slow_vicregl(method, batch)[2].values())
    out = method(batch)
    for name, expected in zip(TERMS, local, strict=True):
        assert out.terms[f"local_{name}"].item() == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("term", ["invariance", "variance", "covariance", "all"])
@pytest.mark.parametrize("global_weight", [0.0, 0.6, 1.0])
def test_the_gradient_of_vicregl_equals_finite_differences(term, global_weight):
    weights = {} if term == "all" else {"invariance": 0.0, "variance": 0.0, "covariance": 0.0, term: 1.0}
    method = made(VICRegL, replace(NARROW, global_weight=global_weight, **weights))
    batch, weight = views([64, 64, 48], holes=True), method.encoder.patch.weight
    direction = normal(*weight.shape, seed=8)
    expected = difference(lambda: method(batch).loss.item(), weight, direction)
    assert abs(expected) > 1e-6
    assert slope(method, batch, direction) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_covariance_at_positions_equals_a_loop(seed):
    """A penalty over the batch at each position, the mean over positions with two rows or more."""
    tokens, valid = normal(5, 6, 3, seed=seed), uniform(5, 6, seed=seed) < 0.7
    valid[:, 2], valid[:, 4] = False, False
    valid[3, 4] = True  # a position with no row, and one with one
    at = [covariance_by_loops(tokens[valid[:, j], j]) for j in range(6) if valid[:, j].sum() >= 2]
    assert 1 <= len(at) <= 4
    assert covariance_at_positions(tokens, valid).item() == pytest.approx(np.mean(at), rel=1e-10)
    changed = torch.where(valid.unsqueeze(-1), tokens, 1e3)
    assert covariance_at_positions(changed, valid).item() == pytest.approx(np.mean(at), rel=1e-10)


def test_heads_of_vicregl_are_three_maps_deep_and_end_bare():
    method = VICRegL(Patches(), NARROW)
    for head in (method.expander, method.projector):
        kinds = [type(layer).__name__ for layer in head]
        assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
        assert head[-1].bias is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matches": 0.0}, r"method.matches is a share in \(0, 1\], received 0.0"),
        ({"matches": 1.1}, r"method.matches is a share in \(0, 1\], received 1.1"),
        ({"global_weight": 1.5}, r"method.global_weight must be in \[0, 1\], received 1.5"),
        ({"local_outputs": 0}, "method.local_outputs must be at least 1, received 0"),
        ({"covariance": -1.0}, "method.covariance must be at least 0, received -1.0"),
    ],
)
def test_settings_of_vicregl_that_make_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(NARROW, **changes)


# --- PCRLv2 ----------------------------------------------------------------------------------------------------------

NARROW_DECODER = PCRLv2Settings(decoder_width=2)
FIVE = range(5)


def normed(x, layer):
    """BatchNorm with the statistic of these rows or pixels."""
    axes = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    mean = x.mean(axes, keepdim=True)
    spread = (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) / (spread + 1e-5).sqrt() * layer.weight.reshape(shape) + layer.bias.reshape(shape)


def bilinear(length, wanted):
    """Weights (wanted, length) of linear interpolation between the middles of pixels."""
    out = np.zeros((wanted, length))
    for place in range(wanted):
        at = max(0.0, (place + 0.5) * length / wanted - 0.5)
        low = min(int(at), length - 1)
        out[place, low] += 1 - (at - low)
        out[place, min(low + 1, length - 1)] += at - low
    return torch.tensor(out)


def cosine(u, v):
    dot = sum(float(x) * float(y) for x, y in zip(u, v, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in u) * sum(float(y) ** 2 for y in v))


@torch.no_grad()
def slow_pcrlv2(method, batch, scales, b, targets=None):
    """The terms of PCRLv2, the loss among them, and the embeddings that no gradient reaches.

    Args:
        scales: Which are drawn.
        b: Weight of the restoration at a scale.
        targets: Take these embeddings instead of those that are found, where the formula says sg.
    """
    doublings = method.encoder.strides[-1].bit_length() - 1
    count = len(batch.views)
    pairs = [(0, 1, scales.whole)]
    pairs += [(g, 2 + number, s) for g in (0, 1) for number, s in enumerate(scales.local[g])]
    deepest = [4] + [max(s for _, v, s in pairs if v == view) for view in range(1, count)]
    deepest[1] = max([scales.whole, *scales.local[1]])
    decoded = [[method.encoder(view)[-1]] for view in batch.views]
    for s in FIVE:
        sizes = {}
        for v in range(count):
            if s <= deepest[v]:
                sizes.setdefault(decoded[v][-1].shape[-2:], []).append(v)
        for members in sizes.values():  # those of one size share a statistic
            x = torch.cat([decoded[v][-1] for v in members])
            if s >= 5 - doublings:
                x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            conv_a, norm_a, _, conv_b, norm_b, _ = method.decoder.blocks[s].layers
            x = normed(nn.functional.conv2d(x, conv_a.weight, padding=1), norm_a).clamp_min(0)
            x = normed(nn.functional.conv2d(x, conv_b.weight, padding=1), norm_b).clamp_min(0)
            for v, part in zip(members, x.chunk(len(members)), strict=True):
                decoded[v].append(part)
    target = (batch.clean[0] - method.encoder.mean) / method.encoder.std

    def apart(restored):
        # to the decoder's own size, which goes on beyond a view that is no multiple of the stride
        rows, columns = (bilinear(restored.shape[k], decoded[0][5].shape[k])[: target.shape[k]] for k in (-2, -1))
        return float(((rows @ restored @ columns.T) - target).square().sum()) / target.numel()

    full = apart(nn.functional.conv2d(decoded[0][5], method.restore.weight, method.restore.bias, padding=1))
    conv, norm, _, last = method.scales[scales.whole].restore
    x = normed(nn.functional.conv2d(decoded[0][scales.whole + 1], conv.weight, padding=1), norm).clamp_min(0)
    coarse = apart(nn.functional.conv2d(x, last.weight, last.bias))

    found, said = {}, {}
    for s in FIVE:
        members = sorted({v for x, y, t in pairs if t == s for v in (x, y)})
        if not members:
            continue
        z = normed(torch.cat([decoded[v][s + 1].mean((-2, -1)) for v in members]), method.scales[s].norm)
        p = head_by_rows(method.scales[s].predictor, z.numpy())
        for place, v in enumerate(members):
            part = slice(place * len(target), (place + 1) * len(target))
            found[v, s], said[v, s] = z[part].numpy(), p[part]
    fixed = found if targets is None else targets
    agreement = []
    for x, y, s in pairs:
        there = [cosine(p, z) for p, z in zip(said[x, s], fixed[y, s], strict=True)]
        back = [cosine(p, z) for p, z in zip(said[y, s], fixed[x, s], strict=True)]
        agreement.append(-(sum(there) + sum(back)) / len(target) / 2)
    terms = {"restoration": full, "restoration_scale": coarse, "agreement": agreement[0]}
    loss = full + b * coarse + agreement[0]
    if count > 2:
        terms["agreement_local"] = sum(agreement[1:]) / (2 * (count - 2))
        loss += terms["agreement_local"]
    return {**terms, "loss": loss}, found


def pcrlv2(stride=STRIDE, seed=0, settings=NARROW_DECODER):
    return made(PCRLv2, settings, seed, stride=stride, channels=5)


@torch.no_grad()
def blank(method):
    """The same, but all of its restorations are 0."""
    for layer in (method.restore, *(scale.restore[-1] for scale in method.scales)):
        layer.weight.zero_()
        layer.bias.zero_()
    return method


def at_progress(method, progress):
    method.progress.fill_(progress)
    return method


PCRLV2_CASES = {
    "two views": ([64, 64], 16, Scales(2, ((), ()))),
    "the coarsest scale": ([64, 64], 16, Scales(0, ((), ()))),
    "the finest scale": ([64, 64], 16, Scales(4, ((), ()))),
    "views of different size": ([64, 48], 16, Scales(3, ((), ()))),
    "local views": ([64, 64, 32, 32, 32], 16, Scales(1, ((0, 4, 1), (3, 1, 2)))),
    "local views, all at one scale": ([64, 64, 32, 32], 16, Scales(2, ((2, 2), (2, 2)))),
    "local views of the global views' size": ([48, 48, 48], 16, Scales(0, ((3,), (4,)))),
    "stride 32": ([64, 64, 32, 32], 32, Scales(3, ((0, 1), (2, 3)))),
    "no multiple of the stride": ([100, 100, 40], 32, Scales(1, ((2,), (0,)))),
    "not square": ([(48, 80), (48, 80), (32, 20)], 16, Scales(4, ((1,), (4,)))),
}


@pytest.mark.parametrize("case", PCRLV2_CASES)
def test_pcrlv2_is_its_formula(case):
    sizes, stride, scales = PCRLV2_CASES[case]
    method = at_progress(pcrlv2(stride), 0.3)
    method.draw_scales = lambda local_views: scales
    batch = views(sizes, holes=True, images=4)  # all pixels count, also those that are not valid
    expected, _ = slow_pcrlv2(method, batch, scales, (1 + math.cos(0.3 * math.pi)) / 2)
    out = method(batch)
    for name in expected.keys() - {"loss"}:
        assert out.terms[name].item() == pytest.approx(expected[name], rel=1e-9, abs=1e-10), name
    assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    assert out.terms["scale"].item() == scales.whole
    assert out.terms["agreement_chance"].item() == 0
    assert ("agreement_local" in out.terms) == (len(sizes) > 2)


def test_the_scales_that_are_drawn_are_those_of_the_loss():
    """T11: one scale for the restoration and the global pair, another one for every local pair."""
    method = pcrlv2()
    batch = views([64, 64, 32, 32], images=4)
    drawn = []
    for _ in range(6):
        scales = method.draw_scales(2)
        expected, _ = slow_pcrlv2(method, batch, scales, (1 + math.cos(math.pi * float(method.progress))) / 2)
        out = method(batch)
        assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-9)
        assert out.terms["scale"].item() == scales.whole
        drawn.append(scales)
        method.after_step(len(drawn) / 6)
    assert len({scales.whole for scales in drawn}) > 1
    assert any(len({*scales.local[0], *scales.local[1]}) > 1 for scales in drawn)


def test_scales_depend_on_key_and_step_alone():
    method, other = pcrlv2(seed=1), pcrlv2(seed=2)
    other.key.copy_(method.key)
    before = torch.get_rng_state()
    for step in (0, 1, 7, 1000):
        method.step.fill_(step)
        other.step.fill_(step)
        torch.rand(step)  # what has been drawn elsewhere
        assert method.draw_scales(6) == method.draw_scales(6) == other.draw_scales(6)
        shape = method.draw_scales(6)
        assert [len(of_view) for of_view in shape.local] == [6, 6]
    torch.set_rng_state(before)
    for local_views in (0, 6):
        method.draw_scales(local_views)
    assert torch.equal(torch.get_rng_state(), before)
    assert method.draw_scales(0).local == ((), ())


def sequence(key, steps=40):
    method = pcrlv2()
    method.key.fill_(key)
    out = []
    for step in range(steps):
        method.step.fill_(step)
        out.append(method.draw_scales(3))
    return out


@pytest.mark.parametrize("bit", [0, 1, 7, 15, 23, 30])
def test_every_key_has_a_sequence_of_its_own(bit):
    """Whichever bit of it is another one. (torch's generator on a CPU reads only 32 bits of a seed.)"""
    same = [a == b for a, b in zip(sequence(12345), sequence(12345 ^ (1 << bit)), strict=True)]
    assert sum(same) < 5


def test_every_scale_occurs_equally_often_and_none_follows_another():
    """1000 steps: each scale of each pair about 200 times, each combination of two about 40 times."""
    method = pcrlv2()
    method.key.fill_(4242)
    drawn = []
    for step in range(1000):
        method.step.fill_(step)
        scales = method.draw_scales(2)
        drawn.append((scales.whole, *scales.local[0], *scales.local[1]))

    def departure(values, kinds):
        expected = len(values) / kinds
        counts = Counter(values)
        assert len(counts) == kinds
        return sum((n - expected) ** 2 / expected for n in counts.values())

    columns = list(zip(*drawn, strict=True))
    for i, column in enumerate(columns):
        assert departure(column, 5) < 23.5, i  # one in ten thousand by chance, 4 degrees of freedom
        assert departure(list(itertools.pairwise(column)), 25) < 60, i  # the next step's
        for j in range(i):
            assert departure(list(zip(column, columns[j], strict=True)), 25) < 60, (i, j)  # 24 degrees of freedom


def test_the_sequence_of_scales_goes_on_after_a_checkpoint():
    method = pcrlv2(seed=1)
    for step in range(5):
        method.after_step(step / 10)
    other = pcrlv2(seed=2)
    other.load_state_dict(method.state_dict())
    for _ in range(20):
        assert method.draw_scales(2) == other.draw_scales(2)
        method.after_step(0.5)
        other.after_step(0.5)
    assert int(other.step) == 25
    assert float(other.progress) == 0.5


def test_the_weight_of_the_scale_falls_from_one_to_zero_along_half_a_cosine():
    method, batch = pcrlv2(), views([64, 64], images=4)
    method.draw_scales = lambda local_views: Scales(1, ((), ()))
    for progress, b in ((None, 1.0), (0.25, 0.5 + math.sqrt(0.125)), (0.5, 0.5), (0.75, 0.5 - math.sqrt(0.125)),
                        (1.0, 0.0)):  # fmt: skip
        if progress is not None:
            method.after_step(progress)
        out = method(batch)
        rest = out.loss - out.terms["restoration"] - out.terms["agreement"]
        assert (rest / out.terms["restoration_scale"]).item() == pytest.approx(b, abs=1e-12)


@pytest.mark.parametrize("sizes", [[64, 64], [64, 64, 32, 32]])
def test_no_gradient_goes_through_the_targets(sizes):
    """Against finite differences of the slow formula in which the targets stand still, and are let loose.

    Restorations are blank: among so many pixels some cross the kink of a ReLU in any finite step.
    """
    method, batch = at_progress(blank(pcrlv2()), 0.4), views(sizes, images=4)
    scales = Scales(1, ((0, 2), (1, 1))) if len(sizes) > 2 else Scales(1, ((), ()))
    method.draw_scales = lambda local_views: scales
    b = (1 + math.cos(0.4 * math.pi)) / 2
    weight = method.encoder.patch.weight
    direction = normal(*weight.shape, seed=3)
    _, targets = slow_pcrlv2(method, batch, scales, b)
    fixed = difference(lambda: slow_pcrlv2(method, batch, scales, b, targets)[0]["loss"], weight, direction)
    loose = difference(lambda: slow_pcrlv2(method, batch, scales, b)[0]["loss"], weight, direction)
    assert abs(fixed - loose) > 1e-3 * abs(fixed), "the two must differ, or it is not tested"
    assert slope(method, batch, direction) == pytest.approx(fixed, rel=1e-5)


def test_scales_that_were_not_drawn_get_a_gradient_of_zero():
    method = pcrlv2()
    method.draw_scales = lambda local_views: Scales(1, ((3,), (1,)))
    method(views([64, 64, 32], images=4)).loss.backward()
    assert all(p.grad is not None for p in method.parameters())
    alive = {
        (s, part)
        for s in FIVE
        for part in ("predictor", "restore")
        if any((p.grad != 0).any() for p in getattr(method.scales[s], part).parameters())
    }
    assert alive == {(1, "predictor"), (1, "restore"), (3, "predictor")}
    assert all((p.grad != 0).any() for name, p in method.named_parameters() if name.startswith(("decoder", "encoder")))


def test_the_first_views_clean_pixels_are_the_target_and_nothing_else():
    method = pcrlv2().eval()  # no statistic of a batch: views have nothing to do with each other
    batch = views([64, 64, 32], images=4)
    out = method(batch, observe=True)

    def changed(part, v):
        parts = list(getattr(batch, part))
        parts[v] = uniform(*parts[v].shape, seed=123)
        return method(batch._replace(**{part: tuple(parts)}), observe=True)

    clean = changed("clean", 0)
    assert torch.equal(clean.observed.pooled, out.observed.pooled)
    assert torch.equal(clean.observed.tokens, out.observed.tokens)
    assert clean.terms["agreement"] == out.terms["agreement"]
    assert clean.terms["restoration"] != out.terms["restoration"]
    assert clean.terms["restoration_scale"] != out.terms["restoration_scale"]
    for v in (1, 2):  # the other views are not restored
        assert changed("clean", v).loss == out.loss
        other = changed("views", v)
        assert other.terms["restoration"] == out.terms["restoration"]
        assert other.terms["restoration_scale"] == out.terms["restoration_scale"]
        assert other.loss != out.loss
    first = changed("views", 0)
    assert not torch.equal(first.observed.tokens, out.observed.tokens)
    assert first.terms["restoration"] != out.terms["restoration"]


def test_restoration_is_by_hand_what_a_blank_restoration_misses():
    """A restoration of 0 misses the standardised clean view: a view of 0.8 is (0.8 - 0.4) / 0.2 = 2 away, squared 4."""
    method, batch = blank(pcrlv2()), views([64, 64], images=4)
    out = method(batch._replace(clean=(torch.full_like(batch.clean[0], 0.8), batch.clean[1])))
    assert out.terms["restoration"].item() == pytest.approx(4.0, rel=1e-12)
    assert out.terms["restoration_scale"].item() == pytest.approx(4.0, rel=1e-12)


def test_without_clean_views_there_is_nothing_to_restore():
    with pytest.raises(DataError, match="the batch has no such views; set views.clean true"):
        pcrlv2()(views([64, 64])._replace(clean=None))


def test_only_the_last_map_of_the_encoder_is_decoded():
    """No skips: the other maps are noise here, another one in every pass."""
    method, batch = pcrlv2(), views([64, 64, 32], images=4)
    quiet = method(batch).loss.item()
    method.encoder.noise = True
    assert method(batch).loss.item() == quiet


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("sizes", [(64, 64), (100, 100, 48, 48), (64, 64, 100)])
def test_pcrlv2_works_with_a_real_encoder_of_either_stride(stride, sizes):
    encoder = build_encoder("resnet18", width=4, stride=stride, seed=0)
    method = seeded(lambda: PCRLv2(encoder, PCRLv2Settings())).train()
    batch = views(sizes, images=2)
    batch = batch._replace(views=tuple(v.float() for v in batch.views), clean=tuple(v.float() for v in batch.clean))
    out = method(batch)
    assert out.loss.isfinite()
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert all((p.grad != 0).any() for p in encoder.parameters())


@pytest.mark.parametrize(
    ("stride", "sizes"), [(32, (6, 12, 24, 48, 96)), (16, (3, 6, 12, 24, 48)), (2, (3,) * 4 + (6,))]
)
def test_the_decoder_has_five_maps(stride, sizes):
    decoder = seeded(lambda: Decoder(7, stride, 3))
    wide, flat = decoder([torch.rand(2, 7, 3, 3), torch.rand(2, 7, 1, 2)], [4, 4])
    assert [tuple(m.shape) for m in wide] == [(2, 3 * c, s, s) for c, s in zip((16, 8, 4, 2, 1), sizes, strict=True)]
    assert [tuple(m.shape[-2:]) for m in flat] == [(s // 3, 2 * s // 3) for s in sizes]
    assert decoder.channels == (48, 24, 12, 6, 3)


def test_a_view_is_decoded_as_deep_as_it_is_asked_for():
    decoder = seeded(lambda: Decoder(4, 16, 1)).eval()
    last = [torch.rand(2, 4, 2, 2), torch.rand(2, 4, 3, 3), torch.rand(2, 4, 2, 2)]
    whole = decoder(last, [4, 4, 4])
    part = decoder(last, [2, 4, 0])
    assert [len(maps) for maps in part] == [3, 5, 1]
    for some, all_of_it in zip(part, whole, strict=True):
        for got, expected in zip(some, all_of_it, strict=False):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("stride", [0, 1, 3, 12, 33, 64])
def test_a_stride_that_cannot_be_doubled_back_is_refused(stride):
    with pytest.raises(ConfigError, match=f"stride 2, 4, 8, 16 or 32, received {stride}"):
        Decoder(8, stride, 2)


@pytest.mark.parametrize(("setting", "width"), [(0, 2), (3, 3)])
def test_the_decoder_is_as_wide_as_is_asked_for(setting, width):
    """0 keeps the published proportion: a quarter of the encoder's first map."""
    method = PCRLv2(build_encoder("resnet18", width=8, stride=16, seed=0), PCRLv2Settings(decoder_width=setting))
    assert method.decoder.channels == tuple(width * c for c in (16, 8, 4, 2, 1))


def test_a_negative_width_is_refused():
    with pytest.raises(ConfigError, match="method.decoder_width must be at least 0, received -1"):
        PCRLv2Settings(decoder_width=-1)


def test_only_pcrlv2_asks_for_clean_views():
    for name, row in METHODS.items():
        config = PretrainConfig(DataConfig(source="phantom:8"), method=name)
        assert row.build.needs_clean == config.views.clean == (name == "pcrlv2")
    asked = PretrainConfig(DataConfig(source="phantom:8"), method="pcrlv2", views=ViewsConfig(size=64, local_count=2))
    assert asked.views == ViewsConfig(size=64, local_count=2, clean=True)


# --- OTCXR on local views --------------------------------------------------------------------------------------------

EXPLICIT = OTCXRSettings(
    mass="score", mass_gradient=True, temperature=0.5, floor=0.1, mass_area=0.95, mass_weight=0.7, infuse=False,
    overlap_weight=0.0, place=0.0,
    heads=2, hidden=16, outputs=8, epsilon=0.1, tolerance=1e-10, max_iterations=5000, objective="value", reach=None,
    centred_cost=True, alpha=3.0, beta=2.0, eta=0.5, global_weight=0.6, variance_rows=("within-image", "position"),
    within_target=1.3, global_hidden=16, global_outputs=8,
)  # fmt: skip
LOCAL_VARIANTS = {
    "score": EXPLICIT,
    "score, infused": replace(EXPLICIT, infuse=True, global_weight=0.0),
    "attention": replace(EXPLICIT, mass="attention", mass_gradient=False, variance_rows=("tokens",)),
    "uniform": replace(EXPLICIT, mass="uniform", variance_rows=("pooled",)),
    "sharp, soft marginals": replace(EXPLICIT, mass="uniform", objective="sharp", reach=0.4),
    "geometry": replace(EXPLICIT, pairing="geometry"),
    "nearest": replace(EXPLICIT, pairing="nearest", mass="uniform"),
    "same-cell": replace(EXPLICIT, pairing="same-cell", mass="attention", infuse=True),
}
each_variant = pytest.mark.parametrize("variant", LOCAL_VARIANTS)


def pairs_with_local_views(count):
    return [(0, 1), *((g, v) for v in range(2, count) for g in (0, 1))]


@each_variant
@pytest.mark.parametrize("sizes", [[64, 64, 32], [64, (48, 80), (32, 48), 48, 48]], ids=str)
def test_otcxr_with_local_views_is_the_mean_over_its_pairs(variant, sizes):
    method = made(OTCXR, LOCAL_VARIANTS[variant])
    batch = views(sizes, images=4, holes=True, seed=2)
    out = method(batch)
    alone = [method(only(batch, *pair)) for pair in pairs_with_local_views(len(sizes))]
    assert len({round(part.loss.item(), 6) for part in alone}) == len(alone), "the pairs must differ"
    assert out.loss.item() == pytest.approx(np.mean([part.loss.item() for part in alone]), rel=1e-11)
    assert out.terms.keys() == alone[0].terms.keys()
    for name, term in out.terms.items():
        values = [part.terms[name].item() for part in alone]
        expected = max(values) if name == "residual" else np.mean(values)
        assert term.item() == pytest.approx(expected, rel=1e-9, abs=1e-12), name


@each_variant
def test_the_gradient_of_otcxr_with_local_views_is_the_mean_over_its_pairs(variant):
    method = made(OTCXR, LOCAL_VARIANTS[variant])
    batch = views([64, 64, 32, 48], images=4, holes=True, seed=2)
    direction = normal(*method.encoder.patch.weight.shape, seed=3)
    slopes = [slope(method, only(batch, *pair), direction) for pair in pairs_with_local_views(4)]
    assert slope(method, batch, direction) == pytest.approx(np.mean(slopes), rel=1e-9)


@each_variant
def test_the_match_of_otcxr_is_that_of_the_global_views(variant):
    method = made(OTCXR, LOCAL_VARIANTS[variant])
    batch = views([64, 48, 32, 32], images=4, holes=True, seed=2)
    two = only(batch, 0, 1)
    for got, expected in zip(method.match(batch), method.match(two), strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)
    assert method.match(batch).plan.shape == (4, 16, 9)
    many, one = method(batch, observe=True).observed, method(two, observe=True).observed
    assert torch.allclose(many.pooled, one.pooled)
    assert many.pooled.shape == (8, 6)
    assert torch.allclose(many.tokens, one.tokens)
    assert (many.match is None) == (one.match is None) == (variant in ("geometry", "same-cell"))
    if many.match is not None:
        torch.testing.assert_close(many.match.plan, one.match.plan)


def shapes_that_differ(batch):
    """Radiographs of other aspect ratios (bars of padding), corners of rotations and a hole, in one batch."""
    for v, valid in enumerate(batch.valid):
        height, width = valid.shape[-2:]
        valid[:] = True
        valid[0, :, : height // 3] = False  # wide: padded above
        valid[1, :, :, (2 * width) // 3 :] = False  # tall: padded at one side
        y = torch.arange(height).reshape(-1, 1) / height
        x = torch.arange(width).reshape(1, -1) / width
        valid[2, 0] = (x + y > 0.35) & (x + y < 1.65) & (x - y < 0.65 + 0.05 * v) & (y - x < 0.65)  # turned
        valid[3, :, height // 4 : height // 2, width // 4 : width // 2] = False  # cut out
    return batch


@pytest.mark.parametrize("variant", LOCAL_VARIANTS)
def test_a_batch_of_different_shapes_with_local_views_equals_its_images_one_by_one(variant):
    """Where the loss is a mean over images: alignment alone, not centred over the batch."""
    alone = {"beta": 0.0, "eta": 0.0, "global_weight": 0.0, "mass_weight": 0.0, "centred_cost": False}
    method = made(OTCXR, replace(LOCAL_VARIANTS[variant], **alone, variance_rows=()))
    batch = shapes_that_differ(views([96, (64, 96), 48, 48], images=4, seed=6))
    losses = [method(one_image(batch, i)).loss.item() for i in range(4)]
    assert len({round(loss, 6) for loss in losses}) == 4
    assert method(batch).loss.item() == pytest.approx(np.mean(losses), rel=1e-8)


@each_variant
def test_a_local_view_that_shows_little_keeps_its_most_valid_position(variant):
    method = made(OTCXR, LOCAL_VARIANTS[variant])
    batch = views([64, 64, 32], images=4, holes=True, seed=2)
    batch.valid[2][1] = False
    batch.valid[2][1, :, 0:5, 16:32] = True  # position 1: 80 of 256 pixels
    batch.valid[2][1, :, 16:20, 0:16] = True  # position 2: 64
    same = batch._replace(valid=tuple(v.clone() for v in batch.valid))
    same.valid[2][1] = False
    same.valid[2][1, :, 0:16, 16:32] = True
    assert method(batch).loss.item() == pytest.approx(method(same).loss.item(), rel=1e-11)


@each_variant
def test_a_local_view_that_shows_nothing_is_an_error(variant):
    batch = views([64, 64, 32, 32], images=4, seed=2)
    batch.valid[3][2] = False
    with pytest.raises(DataError, match=r"the local \(2.\) view of sample 2 of the batch has no valid token"):
        made(OTCXR, LOCAL_VARIANTS[variant])(batch)


def test_a_global_view_that_shows_little_is_still_an_error():
    batch = views([64, 64, 32], images=4, seed=2)
    batch.valid[1][3] = False
    batch.valid[1][3, :, 0:5, 0:16] = True
    with pytest.raises(DataError, match="the second view of sample 3 of the batch has no valid token"):
        made(OTCXR, EXPLICIT)(batch)
