"""Health: each number on cases whose value is known, and a verdict that names what is wrong."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from otcxr.data.geometry import Correspondence, ViewBatch
from otcxr.data.sources import open_collection
from otcxr.data.views import ViewsConfig, collate_views, make_views, view_generator
from otcxr.health import (
    Verdict,
    Watch,
    _sample,
    correspondence_score,
    effective_rank,
    observe,
    spatial_diversity,
    verdict,
)
from otcxr.methods import METHODS
from otcxr.methods.base import Match, Observed
from otcxr.nn.encoder import Encoder, build_encoder
from otcxr.ot import sinkhorn

torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- ranks and diversity ---------------------------------------------------------------------------------------------


def rows_with(singular_values, n=20, d=9, offset=3.0):
    """Rows around ``offset`` whose centred matrix has these singular values."""
    k = len(singular_values)
    left = torch.linalg.qr(normal(n, k) - normal(n, k).mean(0)).Q
    right = torch.linalg.qr(normal(d, k, seed=1)).Q
    return left @ torch.diag(torch.tensor(singular_values, dtype=torch.float64)) @ right.T + offset


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([1.0], 1.0),
        ([2.0, 2.0], 2.0),
        ([0.01] * 7, 7.0),
        ([3.0, 1.0], math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
        ([1.0, 1e-9], 1.0),
    ],
)
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_effective_rank_of_known_spectra(values, rank, offset):
    rows = rows_with(values, offset=offset)
    assert effective_rank(rows) == pytest.approx(rank, rel=1e-6)
    assert effective_rank(1e3 * rows) == pytest.approx(rank, rel=1e-6)
    assert effective_rank(rows.float()) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("rows", [torch.zeros(5, 3), torch.full((5, 3), 0.1), torch.ones(1, 4)])
def test_effective_rank_of_nothing_is_one(rows):
    assert effective_rank(rows) == 1.0


def rank_by_svd(rows):
    """The definition, slowly: numpy's singular values of the centred rows."""
    x = rows.double().numpy()
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


SPECTRA = {
    "flat": lambda k: np.ones(k),
    "linear": lambda k: np.linspace(1, 0.01, k),
    "power law": lambda k: 1 / np.arange(1.0, k + 1),
    "four orders of magnitude": lambda k: np.geomspace(1, 1e-4, k),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("n", "d"), [(2, 5), (5, 50), (50, 5), (40, 40), (300, 40), (64, 700), (600, 64)])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_effective_rank_is_that_of_the_singular_values(spectrum, n, d, offset):
    rows = rows_with(SPECTRA[spectrum](min(n - 1, d)).tolist(), n, d, offset)
    assert effective_rank(rows) == pytest.approx(rank_by_svd(rows), rel=1e-6)
    assert effective_rank(rows.float()) == pytest.approx(rank_by_svd(rows.float()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_effective_rank_of_half_precision(dtype):
    rows = (normal(64, 128) + 0.5).to(dtype)
    assert effective_rank(rows) == pytest.approx(rank_by_svd(rows), rel=1e-6)


def test_effective_rank_at_the_resolution_of_the_squares():
    """What the eigenvalues cannot tell from zero costs less than a hundredth."""
    for least in (1e-6, 3e-7, 1e-7, 1e-8):
        rows = rows_with([1.0] + [least] * 400, n=500, d=450, offset=0.0)
        assert effective_rank(rows) == pytest.approx(rank_by_svd(rows), rel=1e-2)


def test_values_that_are_zero_stay_so():
    assert effective_rank(rows_with([1.0], n=500, d=450, offset=0.0)) == pytest.approx(1, abs=1e-9)
    assert effective_rank(rows_with([1.0, 1.0], n=500, d=450)) == pytest.approx(2, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(16, 8), (64, 512), (256, 2048)])
def test_rounding_does_not_add_to_the_rank(dtype, n, d):
    line = (1 + normal(n, 1)) * normal(1, d, seed=1)
    assert effective_rank(line.to(dtype)) < 1.3
    assert effective_rank((line + 2 * normal(1, d, seed=2)).to(dtype)) < 1.3
    assert effective_rank(normal(1, d).expand(n, d).to(dtype)) == 1


def test_effective_rank_of_few_rows_and_dead_columns():
    assert effective_rank(normal(1, 6)) == 1
    assert effective_rank(normal(2, 6)) == pytest.approx(1)
    rows = normal(20, 6)
    dead = torch.cat((rows, torch.zeros(20, 30), torch.full((20, 5), 4.0)), 1)
    assert effective_rank(dead) == pytest.approx(effective_rank(rows), rel=1e-6)
    assert effective_rank(rows.round().long()) == pytest.approx(rank_by_svd(rows.round()), rel=1e-6)
    assert math.isnan(effective_rank(rows / 0))


@pytest.mark.parametrize(
    ("images", "n"), [(64, 36), (64, 64), (16, 49), (256, 49), (11, 49), (1024, 49), (600, 1), (1, 3136)]
)
def test_the_sample_of_tokens_is_even(images, n):
    tokens = torch.arange(images * n).reshape(images, n, 1)
    rows, present = _sample(tokens, tokens.squeeze(-1) % 5 > 0)
    taken = rows.flatten()
    assert torch.equal(present, taken % 5 > 0)
    assert len(taken) == len(taken.unique()) == min(512, images * n)
    positions = torch.bincount(taken % n, minlength=n)
    assert positions.max() - positions.min() <= 1
    if n == 36:  # 6 x 6: no row or column of the grid is left out
        assert (positions > 0).all()
    for parts in (2, 4, 8):
        share = torch.bincount(taken * parts // (images * n), minlength=parts) / len(taken)
        assert (share - 1 / parts).abs().max() < 0.01
    assert torch.equal(_sample(tokens, tokens.squeeze(-1) > 0)[0], rows)


def test_the_eigenvalue_problems_are_small(monkeypatch):
    """A wide encoder and a large batch: what a look costs is decided by the size of these."""
    sizes, solve = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: (sizes.append(tuple(x.shape)), solve(x))[1])
    observe(Observed(torch.rand(60, 900), torch.rand(30, 49, 900), None), batch_of(30, 224))
    observe(Observed(torch.rand(180, 24), torch.rand(90, 36, 24), None), batch_of(90, 96))
    assert sizes == [(30, 30), (512, 512), (24, 24), (24, 24)]


def test_the_rank_of_tokens_is_that_of_a_sample_of_the_valid_ones():
    seen, batch = observed(images=6), batch_of(6)
    assert observe(seen, batch)["effective_rank_tokens_limit"] == 8
    assert observe(observed(images=6, d=200), batch)["effective_rank_tokens_limit"] == 95
    wide = Observed(normal(120, 900), normal(60, 16, 900), None)
    numbers = observe(wide, batch_of(60))
    assert numbers["effective_rank_tokens_limit"] == 511
    assert 400 < numbers["effective_rank_tokens"] < 511
    batch.valid[0][:, :, :16] = False  # the first row of tokens
    expected = effective_rank(seen.tokens[:, 4:].flatten(0, 1))
    for content in (0.0, 50.0):
        seen.tokens[:, :4] = content * normal(6, 4, 8, seed=9)
        numbers = observe(seen, batch)
        assert numbers["effective_rank_tokens"] == pytest.approx(expected, rel=1e-6)
        assert numbers["spatial_diversity"] == pytest.approx(spatial_diversity(seen.tokens[:, 4:]))
    assert observe(observed(images=2, d=99), batch_of(2))["effective_rank_tokens_limit"] == 31


def test_effective_rank_stays_below_its_limit():
    assert 3.5 < effective_rank(normal(5, 50)) <= 4  # five points span four directions
    assert 2.9 < effective_rank(normal(5000, 3)) <= 3


def test_spatial_diversity():
    per_image, grid = normal(6, 1, 4), normal(1, 9, 4, seed=1)
    assert spatial_diversity(per_image.expand(6, 9, 4)) == pytest.approx(0, abs=1e-12)
    assert spatial_diversity(grid.expand(6, 9, 4)) == pytest.approx(1)
    assert spatial_diversity(torch.full((6, 9, 4), 0.3)) == 0
    tokens = (2 * per_image + grid).float()
    x = tokens.double().numpy()
    within = sum(((image - image.mean(0)) ** 2).sum() for image in x)
    total = ((x.reshape(-1, 4) - x.reshape(-1, 4).mean(0)) ** 2).sum()
    assert 0.05 < within / total < 0.6
    assert spatial_diversity(tokens) == pytest.approx(within / total)
    assert spatial_diversity(50 * tokens + 7) == pytest.approx(within / total, rel=1e-5)
    assert spatial_diversity(tokens.bfloat16()) == pytest.approx(within / total, rel=1e-2)
    assert spatial_diversity(per_image.bfloat16().expand(6, 9, 4)) == pytest.approx(0, abs=1e-6)


def test_spatial_diversity_leaves_out_what_is_not_valid():
    """Images with different numbers of valid tokens; one with none."""
    tokens, valid = normal(5, 16, 3), torch.rand(5, 16, generator=torch.Generator().manual_seed(0)) < 0.6
    valid[2] = False
    pixels = valid.reshape(5, 1, 4, 4).repeat_interleave(16, -1).repeat_interleave(16, -2)
    batch = batch_of(5)._replace(valid=(pixels, pixels))
    kept = [t[v].numpy() for t, v in zip(tokens, valid, strict=True)]
    total = np.concatenate(kept)
    within = sum(((x - x.mean(0)) ** 2).sum() for x in kept if len(x))
    numbers = observe(Observed(normal(10, 3), tokens, None), batch)
    assert numbers["spatial_diversity"] == pytest.approx(within / ((total - total.mean(0)) ** 2).sum())
    pixels[:] = False
    assert all(math.isfinite(x) for x in observe(Observed(normal(10, 3), tokens, None), batch).values())


def test_one_token_has_no_spatial_diversity():
    numbers = observe(Observed(normal(20, 6), normal(10, 1, 6), None), batch_of(10, 32))
    assert "spatial_diversity" not in numbers
    assert verdict(numbers).text == "no collapse seen: effective rank " + f"{numbers['effective_rank']:.1f} of 6"


# --- correspondence --------------------------------------------------------------------------------------------------

SIDE = 5
CELLS = SIDE * SIDE


def pairing(target, cost=None, a=None, b=None):
    """A match of one image on a SIDE x SIDE grid that sends cell i to target[i]."""
    a = torch.full((CELLS,), 1 / CELLS, dtype=torch.float64) if a is None else a
    b = torch.full((CELLS,), 1 / CELLS, dtype=torch.float64) if b is None else b
    plan = torch.zeros(CELLS, CELLS, dtype=torch.float64)
    plan[torch.arange(CELLS), torch.tensor(target)] = a
    return Match(1 - plan[None] if cost is None else cost[None], a[None], b[None], plan[None], None)


def truth(cell, known=None):
    cell = torch.tensor(cell)[None]
    known = cell >= 0 if known is None else torch.tensor(known)[None]
    return Correspondence(torch.zeros(1, CELLS, 2), cell, known)


def moved(columns, rows=0):
    """Cells shifted inwards, so that every target is on the grid and exactly so far away."""
    out = []
    for i in range(CELLS):
        row, column = divmod(i, SIDE)
        row += rows if row + rows < SIDE else -rows
        column += columns if column + columns < SIDE else -columns
        out.append(row * SIDE + column)
    return out


HERE = list(range(CELLS))


@pytest.mark.parametrize(
    ("target", "hits", "exact"),
    [
        (HERE, 1, 1),
        (moved(1), 1, 0),
        (moved(0, 1), 1, 0),
        (moved(1, 1), 1, 0),
        (moved(2), 0, 0),
        (moved(0, 2), 0, 0),
        (moved(1, 2), 0, 0),
        ([i if i % 2 else moved(2)[i] for i in HERE], 12 / 25, 12 / 25),
    ],
)
def test_shifted_plans_score_as_they_should(target, hits, exact):
    score = correspondence_score(pairing(target), truth(HERE), (SIDE, SIDE))
    assert score["hits"] == pytest.approx(hits)
    assert score["exact"] == pytest.approx(exact)
    assert score["hits_by_mass"] == pytest.approx(hits)
    assert score["hits_nearest_neighbour"] == pytest.approx(hits)


def test_a_row_does_not_run_on_into_the_next():
    """The last cell of a row and the first of the next are neighbours in memory only."""
    ends = [i for i in HERE if i % SIDE == SIDE - 1 and i + 1 < CELLS]
    target = [i + 1 if i in ends else i for i in HERE]
    known = [i in ends for i in HERE]
    assert correspondence_score(pairing(target), truth(HERE, known), (SIDE, SIDE))["hits"] == 0


def test_only_known_positions_count_and_mass_weighs_them():
    target = [i if i < 10 else moved(2)[i] for i in HERE]
    cell = [i if i < 15 else -1 for i in HERE]
    a = torch.arange(1.0, CELLS + 1, dtype=torch.float64)
    a = a / a.sum()
    score = correspondence_score(pairing(target, a=a), truth(cell), (SIDE, SIDE))
    assert score["hits"] == pytest.approx(10 / 15)
    assert score["hits_by_mass"] == pytest.approx(float(a[:10].sum() / a[:15].sum()))
    assert correspondence_score(pairing(target), truth([-1] * CELLS), (SIDE, SIDE)) == {}


def test_known_positions_without_mass_give_numbers():
    a = torch.zeros(CELLS, dtype=torch.float64)
    a[24] = 1
    score = correspondence_score(pairing(HERE, a=a), truth(HERE, [i < 9 for i in HERE]), (SIDE, SIDE))
    assert all(math.isfinite(x) for x in score.values())


def test_chance_is_the_expectation_over_random_tokens():
    generator = np.random.default_rng(0)
    absent = generator.random(CELLS) < 0.3
    b = torch.tensor(np.where(absent, 0.0, 1 / (~absent).sum()))
    cell = generator.integers(-1, CELLS, CELLS).tolist()
    chances = []
    for true in cell:
        if true < 0:
            continue
        near = [max(abs(true // SIDE - j // SIDE), abs(true % SIDE - j % SIDE)) <= 1 for j in HERE]
        chances.append(np.mean([near[j] for j in HERE if not absent[j]]))
    score = correspondence_score(pairing(HERE, b=b), truth(cell), (SIDE, SIDE))
    assert score["hits_chance"] == pytest.approx(np.mean(chances), rel=1e-6)
    full = correspondence_score(pairing(HERE), truth(HERE), (SIDE, SIDE))
    assert full["hits_chance"] == pytest.approx((3 * SIDE - 2) ** 2 / SIDE**4, rel=1e-6)


def test_nearest_neighbour_ignores_absent_tokens():
    cost = torch.ones(CELLS, CELLS, dtype=torch.float64)
    cost[torch.arange(CELLS), torch.tensor(HERE)] = 0.5
    cost[:, 0] = 0.1  # nearest to all, but it is not there
    b = torch.full((CELLS,), 1 / (CELLS - 1), dtype=torch.float64)
    score = correspondence_score(pairing(HERE, cost=cost), truth(HERE), (SIDE, SIDE))
    assert score["hits_nearest_neighbour"] == pytest.approx(4 / 25)  # only the corner's own neighbours
    b[0] = 0
    known = [i > 0 for i in HERE]
    score = correspondence_score(pairing(HERE, cost=cost, b=b), truth(HERE, known), (SIDE, SIDE))
    assert score["hits_nearest_neighbour"] == 1


def test_rectangular_grids():
    """Four by four tokens into two rows of three: the width of the *second* grid counts."""
    cell, plan = torch.arange(16)[None] % 6, torch.zeros(1, 16, 6)
    plan[0, torch.arange(16), cell[0]] = 1 / 16
    match = Match(1 - plan, plan.sum(-1), plan.sum(-2), plan, None)
    true = Correspondence(torch.zeros(1, 16, 2), cell, torch.ones(1, 16, dtype=torch.bool))
    score = correspondence_score(match, true, (2, 3))
    assert score["exact"] == score["hits"] == 1
    near = [[abs(i // 3 - j // 3) <= 1 and abs(i % 3 - j % 3) <= 1 for j in range(6)] for i in cell[0].tolist()]
    assert score["hits_chance"] == pytest.approx(np.mean(near), rel=1e-6)


# --- what is observed ------------------------------------------------------------------------------------------------


def batch_of(images, size=64, flip=False, other=None):
    """Two views of one geometry; the second mirrored on request."""
    geometry = torch.eye(3)[:2].expand(2, images, 2, 3).clone()
    if flip:
        geometry[1, :, 0, 0], geometry[1, :, 0, 2] = -1, 1
    shapes = [(images, 1, size, size), (images, 1, other or size, other or size)]
    return ViewBatch(tuple(torch.zeros(s) for s in shapes), geometry, tuple(torch.ones(s) > 0 for s in shapes))


def observed(images=6, tokens=16, d=8, match=None, seed=0):
    return Observed(normal(2 * images, d, seed=seed) + 1, normal(images, tokens, d, seed=seed + 1), match)


def test_numbers_of_the_embedding():
    seen = observed(images=10)
    numbers = observe(seen, batch_of(10))
    pooled = seen.pooled.numpy().astype(np.float32)
    first = pooled[:10].astype(np.float64)
    correlation = np.corrcoef(first.T)
    assert numbers["correlation"] == pytest.approx(np.abs(correlation[~np.eye(8, dtype=bool)]).mean(), rel=1e-4)
    lengths = np.linalg.norm(first, axis=1, keepdims=True)
    unit = first / lengths
    assert numbers["embedding_length_std"] == pytest.approx(lengths.std(ddof=1) / lengths.mean(), rel=1e-4)
    assert numbers["embedding_std"] == pytest.approx(unit.std(0, ddof=1).mean(), rel=1e-4)
    assert numbers["embedding_std_reference"] == pytest.approx(8**-0.5)
    assert numbers["effective_rank"] == pytest.approx(effective_rank(seen.pooled[:10]), rel=1e-4)
    assert numbers["effective_rank_limit"] == 8
    assert observe(observed(images=6, d=12), batch_of(6))["effective_rank_limit"] == 5
    assert numbers["effective_rank_tokens"] == pytest.approx(effective_rank(seen.tokens.reshape(-1, 8)), rel=1e-4)
    assert numbers["spatial_diversity"] == pytest.approx(spatial_diversity(seen.tokens))
    assert "hits" not in numbers
    assert "entropy_plan" not in numbers


def permutation_match(images, target, n=16):
    plan = torch.zeros(images, n, n)
    plan[:, torch.arange(n), torch.tensor(target)] = 1 / n
    return Match(1 - plan * n, plan.sum(-1), plan.sum(-2), plan, None)


@pytest.mark.parametrize("flip", [False, True])
def test_a_perfect_plan_scores_one_whatever_the_geometry(flip):
    mirrored = [4 * (i // 4) + 3 - i % 4 for i in range(16)]
    for target, right in [(mirrored, flip), (list(range(16)), not flip)]:
        numbers = observe(observed(match=permutation_match(6, target)), batch_of(6, flip=flip))
        assert (numbers["exact"] == 1) == right
        assert (numbers["hits"] == 1) == right
    assert numbers["entropy_plan"] == pytest.approx(math.log(16), rel=1e-5)
    assert numbers["entropy_mu"] == numbers["entropy_nu"] == pytest.approx(math.log(16), rel=1e-5)
    assert numbers["entropy_independent"] == pytest.approx(2 * math.log(16), rel=1e-5)
    assert numbers["entropy_uniform"] == pytest.approx(math.log(16), rel=1e-5)


def test_entropies_count_valid_tokens_only():
    batch = batch_of(6)
    for valid in batch.valid:
        valid[:, :, :16] = False  # the first row of tokens
    a = torch.zeros(6, 16)
    a[:, 4:] = 1 / 12
    plan = a.unsqueeze(-1) * a.unsqueeze(1)
    numbers = observe(observed(match=Match(torch.ones(6, 16, 16), a, a, plan, None)), batch)
    assert numbers["entropy_uniform"] == pytest.approx(math.log(12), rel=1e-5)
    assert numbers["entropy_plan"] == pytest.approx(numbers["entropy_independent"], rel=1e-5)
    assert all(math.isfinite(x) for x in numbers.values())


@pytest.mark.parametrize("moved", [1.0, 0.5, 0.0])
def test_a_plan_that_moves_only_some_mass_is_judged_by_what_it_moves(moved):
    """Half of the positions one to one, nothing else: with soft marginals that is no collapse."""
    batch = batch_of(6)
    a = torch.full((6, 16), 1 / 16)
    plan = torch.diag_embed(torch.cat((torch.full((6, 8), moved / 8), torch.zeros(6, 8)), -1))
    numbers = observe(observed(match=Match(torch.ones(6, 16, 16), a, a, plan, None)), batch)
    assert all(math.isfinite(x) for x in numbers.values())
    assert numbers["mass_moved"] == pytest.approx(moved, abs=1e-6)
    if moved:
        assert numbers["entropy_plan"] == pytest.approx(math.log(8), rel=1e-5)
        assert numbers["entropy_one_to_one"] == pytest.approx(math.log(8), rel=1e-5)
        assert numbers["entropy_independent"] == pytest.approx(2 * math.log(8), rel=1e-5)


def test_views_of_two_sizes():
    a, b = torch.full((6, 16), 1 / 16), torch.full((6, 36), 1 / 36)
    match = Match(torch.ones(6, 16, 36), a, b, a.unsqueeze(-1) * b.unsqueeze(1), None)
    numbers = observe(observed(match=match), batch_of(6, 64, other=96))
    assert all(math.isfinite(x) for x in numbers.values())
    assert numbers["entropy_nu"] == pytest.approx(math.log(36), rel=1e-5)


@pytest.mark.parametrize(("height", "width", "stride"), [(97, 64, 32), (64, 97, 32), (70, 65, 32), (224, 96, 16)])
def test_grids_of_oblong_views(height, width, stride):
    h, w = math.ceil(height / stride), math.ceil(width / stride)
    plan = torch.full((2, h * w, h * w), (h * w) ** -2.0)
    match = Match(plan, plan.sum(-1), plan.sum(-2), plan, None)
    view, valid = torch.zeros(2, 1, height, width), torch.ones(2, 1, height, width, dtype=torch.bool)
    batch = ViewBatch((view, view), torch.eye(3)[:2].expand(2, 2, 2, 3), (valid, valid))
    near_rows, near_columns = ((3 * k - 2) / k**2 for k in (h, w))  # share of pairs of cells at most one apart
    numbers = observe(observed(images=2, tokens=h * w, match=match), batch)
    assert numbers["hits_chance"] == pytest.approx(near_rows * near_columns, rel=1e-5)


def test_correlation_leaves_out_dimensions_that_do_not_vary():
    pooled = normal(40, 6)
    dead = torch.cat((pooled, torch.full((40, 3), 0.1), torch.zeros(40, 2)), 1)
    noise = 0.1 * (1 + 1e-8 * normal(40, 9))  # below what float32 can tell apart
    rounded = torch.cat((dead, noise), 1).float()
    numbers = [observe(Observed(x, normal(20, 16, 4), None), batch_of(20)) for x in (pooled, dead, rounded)]
    for other in numbers[1:]:
        assert other["correlation"] == pytest.approx(numbers[0]["correlation"], rel=1e-4)


@pytest.mark.parametrize("images", [2, 3, 8, 200])
def test_correlation_of_independent_dimensions_is_its_chance(images):
    found = [
        observe(Observed(normal(2 * images, 60, seed=seed), normal(images, 16, 2), None), batch_of(images))
        for seed in range(6)
    ]
    chance = found[0]["correlation_chance"]
    assert np.mean([numbers["correlation"] for numbers in found]) == pytest.approx(chance, rel=0.05)
    assert images < 200 or chance == pytest.approx((2 / math.pi / images) ** 0.5, rel=0.01)


@pytest.mark.parametrize("value", [0.0, 0.7, 1e4])
@pytest.mark.parametrize("images", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_are_finite_when_nothing_varies(value, images, dtype):
    pooled, tokens = torch.full((2 * images, 8), value), torch.full((images, 16, 8), value)
    numbers = observe(Observed(pooled.to(dtype), tokens.to(dtype), None), batch_of(images))
    assert all(math.isfinite(x) for x in numbers.values())
    assert numbers["effective_rank"] == numbers["effective_rank_tokens"] == 1
    assert numbers["embedding_std"] < 1e-7
    assert numbers["spatial_diversity"] == numbers["correlation"] == 0


def test_half_precision_gives_the_same_numbers():
    seen = observed(images=10, match=permutation_match(10, list(range(16))))
    half = Observed(seen.pooled.bfloat16(), seen.tokens.bfloat16(), seen.match)
    wide, narrow = observe(seen, batch_of(10)), observe(half, batch_of(10))
    assert wide.keys() == narrow.keys()
    for name, value in wide.items():
        assert narrow[name] == pytest.approx(value, rel=0.02, abs=1e-6), name


def test_what_is_not_finite_is_named_and_stops_nothing():
    for fill in (float("nan"), float("inf")):
        pooled, tokens = normal(12, 8), normal(6, 16, 8)
        pooled[0, 0] = tokens[0, 0, 0] = fill
        judged = verdict(observe(Observed(pooled, tokens, None), batch_of(6)))
        assert not judged.healthy
        assert "effective_rank is nan; " in judged.text
        assert "spatial_diversity is nan" in judged.text


def test_views_that_share_nothing_have_no_correspondence():
    batch = batch_of(6)
    batch.geometry[1, :, 0, 2] = 5
    numbers = observe(observed(match=permutation_match(6, list(range(16)))), batch)
    assert numbers["entropy_plan"] == pytest.approx(math.log(16), rel=1e-5)
    assert not any("hits" in name or name in ("exact", "same_cell", "same_cell_true") for name in numbers)
    assert all(math.isfinite(x) for x in numbers.values())


# --- the verdict -----------------------------------------------------------------------------------------------------

GOOD = {
    "effective_rank": 12.0, "effective_rank_limit": 31.0, "effective_rank_tokens": 20.0, "embedding_std": 0.11,
    "embedding_std_reference": 0.125, "correlation": 0.2, "spatial_diversity": 0.6,
}  # fmt: skip
GOOD_MATCH = {
    **GOOD, "entropy_mu": 3.4, "entropy_nu": 3.5, "entropy_plan": 4.2, "entropy_independent": 6.9,
    "entropy_one_to_one": 3.5, "mass_moved": 1.0, "entropy_uniform": 3.58, "hits": 0.7, "exact": 0.4,
    "hits_by_mass": 0.75, "hits_nearest_neighbour": 0.65,
    "hits_chance": 0.2,
}  # fmt: skip


def test_good_numbers_are_healthy():
    text = "no collapse seen: effective rank 12.0 of 31, 60% of token variance within images"
    assert verdict(GOOD) == (True, text, ())
    judged = verdict(GOOD_MATCH)
    assert judged.healthy
    assert judged.text.endswith("correspondence 0.70 (nearest neighbour 0.65, chance 0.20)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_std": 0.001, "effective_rank": 1.0}, "collapse: all images have nearly the same embedding"),
        ({"effective_rank": 1.2}, "dimensional collapse: effective rank 1.2 of 31"),
        ({"effective_rank": 5.0, "effective_rank_limit": 255.0}, "dimensional collapse: effective rank 5.0 of 255"),
        ({"spatial_diversity": 0.01}, "spatial collapse: only 1.0% of the token variance is within images"),
        ({"entropy_plan": 6.89}, "transport in name only: the plan is the independent coupling of the masses"),
        ({"entropy_mu": math.log(4), "entropy_independent": math.log(4) + 3.5, "entropy_plan": 3.6},
         "mass collapse: the mass sits on 4.0 of 36 tokens"),
        ({"entropy_nu": math.log(4)}, "mass collapse: the mass sits on 4.0 of 36 tokens"),
        ({"mass_moved": 0.01}, "no transport: only 1.0% of the mass is moved"),
        ({"effective_rank": float("nan")}, "effective_rank is nan"),
        ({"entropy_plan": float("inf")}, "entropy_plan is inf"),
    ],
)  # fmt: skip
def test_each_illness_is_named_alone(changes, message):
    judged = verdict(GOOD_MATCH | changes)
    assert not judged.healthy
    assert judged.text.split("; ")[0] == message
    if math.isfinite(next(iter(changes.values()))):
        assert judged.text == message


@pytest.mark.parametrize(
    ("rank", "limit", "healthy"),
    [
        (1.0, 0, True),  # a single image: nothing can be said
        (1.0, 1, True),  # two images lie on a line
        (1.0, 2, False),
        (1.2, 2, False),
        (1.4, 2, True),
        (1.4, 3, False),
        (1.6, 3, True),
        (1.6, 31, True),
        (5.0, 255, False),
        (8.5, 255, True),
        (9.0, 2047, True),  # what radiographs differ in does not grow with the batch
        (6.0, 2047, False),
    ],
)
def test_ranks_are_judged_by_what_a_batch_can_show(rank, limit, healthy):
    assert verdict(GOOD | {"effective_rank": rank, "effective_rank_limit": float(limit)}).healthy == healthy


def test_one_image_is_not_judged_by_its_spread():
    """Its two views may well be the same."""
    assert verdict(GOOD | {"embedding_std": 0.0, "effective_rank": 1.0, "effective_rank_limit": 0.0}).healthy


def test_the_same_embedding_differs_from_the_same_direction():
    pooled, tokens = normal(1, 8).expand(40, 8), normal(20, 16, 8)
    lengths = 1 + torch.rand(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = verdict(observe(Observed(pooled, tokens, None), batch_of(20)))
    assert same.text == "collapse: all images have nearly the same embedding"
    stretched = verdict(observe(Observed(lengths * pooled, tokens, None), batch_of(20)))
    assert stretched.text == "dimensional collapse: embeddings differ in length only, effective rank 1.0 of 8"
    line = verdict(observe(Observed((lengths - 1.5) * pooled, tokens, None), batch_of(20)))
    assert line.text == "dimensional collapse: effective rank 1.0 of 8"


@pytest.mark.parametrize(("tokens", "mass", "healthy"), [
    (1, 1.0, True), (2, 1.1, True), (4, 1.5, False), (9, 1.7, False), (9, 2.5, True), (36, 5.0, False), (36, 6.0, True),
    (196, 28.0, False), (196, 31.0, True),
])  # fmt: skip
def test_masses_are_judged_by_what_a_grid_can_show(tokens, mass, healthy):
    full, narrow = math.log(tokens), math.log(mass)
    changes = {"entropy_mu": narrow, "entropy_nu": narrow, "entropy_uniform": full, "entropy_uniform_nu": full,
               "entropy_independent": 2 * narrow, "entropy_one_to_one": narrow,
               "entropy_plan": narrow + 1e-7}  # fmt: skip
    judged = verdict(GOOD_MATCH | changes)
    assert judged.healthy == healthy, judged.text


def test_views_of_different_size_are_judged_by_their_own_tokens():
    nine = {"entropy_nu": math.log(8), "entropy_uniform_nu": math.log(9), "entropy_uniform": math.log(196),
            "entropy_mu": math.log(150), "entropy_independent": math.log(1200), "entropy_one_to_one": math.log(150),
            "entropy_plan": math.log(300)}  # fmt: skip
    assert verdict(GOOD_MATCH | nine).healthy


def test_two_illnesses_are_both_named():
    text = verdict(GOOD_MATCH | {"spatial_diversity": 0.0, "entropy_plan": 6.9}).text
    assert "spatial collapse" in text
    assert "transport in name only" in text


def solved(cost, a):
    out = sinkhorn(cost, a, a, epsilon=0.05)
    return Match(cost, a, a, out.plan, None)


def test_from_transport_to_verdict():
    """The three faces of a plan: a matching, the independent coupling of a flat cost, and all mass on one cell."""
    batch, flat = batch_of(6), torch.full((6, 16), 1 / 16)
    matching = (1 - torch.eye(16)).expand(6, 16, 16)
    good = verdict(observe(observed(match=solved(matching, flat)), batch))
    assert good.healthy
    assert "correspondence 1.00" in good.text
    nothing = verdict(observe(observed(match=solved(1e-3 * matching, flat)), batch))
    assert nothing.text == "transport in name only: the plan is the independent coupling of the masses"
    peak = torch.full((6, 16), 1e-3)
    peak[:, 5] = 1 - 15e-3
    narrow = verdict(observe(observed(match=solved(matching, peak)), batch))
    assert narrow.text.startswith("mass collapse: the mass sits on 1.1 of 16 tokens")


def test_a_position_code_is_called_what_it_is():
    """A plan that pairs equal places, though the views show different ones, scores well and has seen nothing."""
    shift = 1  # every true position is one column to the right: within one cell of the same place
    true_cells = [i + shift if i % SIDE + shift < SIDE else -1 for i in range(CELLS)]
    scores = correspondence_score(pairing(list(range(CELLS))), truth(true_cells), (SIDE, SIDE))
    assert scores["hits"] == scores["hits_same_cell"] == scores["same_cell"] == 1.0
    assert scores["same_cell_true"] == 0.0
    now = {
        "embedding_std": 0.1, "embedding_std_reference": 0.1, "effective_rank": 20.0, "effective_rank_limit": 63.0,
        "spatial_diversity": 0.5, **scores,
    }  # fmt: skip
    judged = verdict(now)
    assert not judged.healthy
    assert "position shortcut" in judged.text
    right = correspondence_score(pairing([max(c, 0) for c in true_cells]), truth(true_cells), (SIDE, SIDE))
    assert right["same_cell"] < 0.2
    assert verdict({**now, **right}).healthy


# --- every method on encoders whose illness is known -----------------------------------------------------------------


class Changed(Encoder):
    """An encoder whose maps are changed by a function."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change
        self.architecture, self.channels, self.strides = inner.architecture, inner.channels, inner.strides

    def forward(self, images):
        return tuple(self.change(m) for m in self.inner(images))


def direction(m):
    """A fixed unit vector over the channels."""
    v = normal(m.shape[1], seed=m.shape[1]).to(m.dtype).reshape(1, -1, 1, 1)
    return v / v.norm()


def constant(m):
    return 0 * m + direction(m)


def constant_but_for_rounding(m):
    return direction(m) * (1 + 1e-7 * torch.tanh(m))


def constant_per_image(m):
    return m.mean((-2, -1), keepdim=True).expand_as(m) + 0 * m


def scaled_by_the_image(m):
    """One map for all images, times a positive number of each."""
    size = m.square().mean((1, 2, 3), keepdim=True)
    number = 1 + 0.3 * torch.tanh((size - size.mean()) / (size.std() + 1e-6))
    return number * normal(*m.shape[1:]).to(m.dtype)


def on_one_line(m):
    """Every token on one line through the origin."""
    return (m * direction(m)).sum(1, keepdim=True) * direction(m)


def normalised(m):
    return nn.functional.batch_norm(m, None, None, training=True)


SAME, SPATIAL, LINE = "all images have nearly the same embedding", "spatial collapse", "dimensional collapse"
ILL = {
    constant: SAME,
    constant_but_for_rounding: SAME,
    constant_per_image: SPATIAL,
    scaled_by_the_image: LINE,
    on_one_line: LINE,
}
each_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def views():
    records = open_collection("phantom:16,size=96").records
    config = ViewsConfig(size=96)
    samples = [make_views(r.image.radiograph(), config, view_generator(0, 0, i)) for i, r in enumerate(records)]
    batch = collate_views(samples)
    return batch._replace(clean=batch.clean or batch.views)


def small(name, change=lambda m: m):
    """A method with small heads on a narrow encoder."""
    settings = METHODS[name].settings
    widths = ("hidden", "outputs", "global_hidden", "global_outputs")
    given = {f.name: min(64, getattr(settings, f.name)) for f in fields(settings) if f.name in widths}
    encoder = build_encoder("resnet18", width=8, stride=16, padding="replicate", seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return METHODS[name].build(Changed(encoder, change), replace(settings, **given)).train()


def judge(method, batch):
    numbers = observe(method(batch, observe=True).observed, batch, method.encoder.first_centre)
    assert all(math.isfinite(x) for x in numbers.values())
    assert all(type(x) is float for x in numbers.values())
    return verdict(numbers)


@each_method
@pytest.mark.parametrize("change", ILL, ids=lambda change: change.__name__)
@pytest.mark.parametrize("images", [4, 16])
def test_a_collapsed_encoder_is_called_what_it_is(name, change, images, views):
    batch = ViewBatch(*(x[:, :images] if isinstance(x, torch.Tensor) else tuple(v[:images] for v in x) for x in views))
    judged = judge(small(name, change), batch)
    assert not judged.healthy
    for illness in (SAME, SPATIAL, LINE):
        assert (illness in judged.text) == (illness == ILL[change]), judged.text


@each_method
@pytest.mark.parametrize("images", [2, 4, 16])
def test_random_features_are_no_collapse(name, images, views):
    batch = ViewBatch(*(x[:, :images] if isinstance(x, torch.Tensor) else tuple(v[:images] for v in x) for x in views))
    for change in (lambda m: m, normalised):
        judged = judge(small(name, change), batch)
        assert judged.healthy, judged.text


@each_method
def test_a_short_training_is_no_collapse(name, views):
    method = small(name)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    for step in range(8):
        loss = method(views).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step((step + 1) / 8)
    judged = judge(method, views)
    assert judged.healthy, judged.text


# --- what to do about it ---------------------------------------------------------------------------------------------

WELL, ILLNESS = Verdict(True, "well"), Verdict(False, "ill")


def answers(watch, looks, every=50):
    """Answers to a text of looks: '+' is healthy, '-' is not."""
    return [watch.see(1 + i * every, WELL if look == "+" else ILLNESS) for i, look in enumerate(looks)]


@pytest.mark.parametrize(
    ("patience", "after_step", "looks", "expected"),
    [
        (3, 0, "+++", ["", "", ""]),
        (3, 0, "+-+", ["", "warn", "recovered"]),
        (3, 0, "---", ["warn", "", "stop"]),
        (3, 0, "--+--", ["warn", "", "recovered", "warn", ""]),
        (3, 0, "+----", ["", "warn", "", "stop", "stop"]),
        (1, 0, "+-+-", ["", "stop", "recovered", "stop"]),
        (0, 0, "----+", ["warn", "", "", "", "recovered"]),
        (2, 100, "------", ["warn", "", "", "stop", "stop", "stop"]),  # steps 1, 51, 101, 151: the third counts first
        (2, 101, "------", ["warn", "", "", "", "stop", "stop"]),
        (1, 10**6, "----", ["warn", "", "", ""]),
    ],
)
def test_a_watch_warns_and_stops(patience, after_step, looks, expected):
    assert answers(Watch(patience, after_step), looks) == expected


@pytest.mark.parametrize("cut", range(9))
def test_a_watch_goes_on_from_its_state(cut):
    looks = "+--+---+-"
    whole = answers(Watch(3, 60), looks)
    first, second = Watch(3, 60), Watch(3, 60)
    before = [first.see(1 + 50 * i, WELL if looks[i] == "+" else ILLNESS) for i in range(cut)]
    second.load(json.loads(json.dumps(first.state())))
    after = [second.see(1 + 50 * i, WELL if looks[i] == "+" else ILLNESS) for i in range(cut, len(looks))]
    assert before + after == whole
    assert "stop" in whole


@pytest.mark.parametrize(("patience", "after_step"), [(-1, 0), (1, -1)])
def test_a_watch_refuses_negative_numbers(patience, after_step):
    with pytest.raises(ValueError, match=f"received {patience} and {after_step}"):
        Watch(patience, after_step)


@pytest.mark.parametrize(
    ("terms", "notes"),
    [
        ({"distillation": 6.93, "distillation_chance": 6.931}, ["distillation is at its chance level, 6.93"]),
        ({"distillation": 6.8, "distillation_chance": 6.931}, []),
        ({"a_b": 0.004, "a_b_chance": 0.0, "loss": 6.9}, ["a b is at its chance level, 0.00"]),
        ({"prediction": -0.4, "prediction_chance": 0.0}, []),
        ({"prediction_chance": 1.0}, []),
    ],
)
def test_a_loss_at_its_chance_level_is_noted(terms, notes):
    said = verdict(GOOD, terms)
    assert said.healthy
    assert list(said.notes) == notes
    assert all(note in said.text for note in notes)
