"""Health: each number on cases whose value is known, and a verdict that names what is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from otcxr.data.geometry import Correspondence, ViewBatch
from otcxr.health import correspondence_score, effective_rank, observe, spatial_diversity, verdict
from otcxr.methods.base import Match, Observed
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
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
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


@pytest.mark.parametrize("value", [0.0, 0.7, 1e4])
@pytest.mark.parametrize("images", [1, 2, 6])
def test_numbers_are_finite_when_nothing_varies(value, images):
    seen = Observed(torch.full((2 * images, 8), value), torch.full((images, 16, 8), value), None)
    assert all(math.isfinite(x) for x in observe(seen, batch_of(images)).values())


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
    assert verdict(GOOD) == (True, "no collapse seen: effective rank 12.0 of 31, 60% of token variance within images")
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
