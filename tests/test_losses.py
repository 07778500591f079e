"""Losses: against double loops and hand values, at chance, in every precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from oracles import covariance_by_loops, nt_xent_by_loops, variance_by_loops
from otcxr.losses import (
    covariance,
    masked_mean,
    nt_xent,
    nt_xent_chance,
    variance,
    variance_at_positions,
    variance_within,
)

torch.set_num_threads(1)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_valid(batch, n, seed=0, share=0.6):
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) < share


# --- NT-Xent ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0, 10.0])
@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_nt_xent_equals_the_double_loop(pairs, temperature):
    first, second = normal(pairs, 4, seed=1), 3 * normal(pairs, 4, seed=2)
    got = float(nt_xent(first, second, temperature))
    assert got == pytest.approx(nt_xent_by_loops(first, second, temperature), rel=1e-12, abs=1e-12)


def test_nt_xent_by_hand():
    """Two pairs on two axes: every point sees its positive at cosine 1 and two others at cosine 0."""
    first = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    assert float(nt_xent(first, 7 * first, 0.5)) == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-6)
    # the positives opposite, the others alike: the loss is large and right
    swapped = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert float(nt_xent(first, swapped, 0.5)) == pytest.approx(math.log(2 + math.exp(2)), rel=1e-6)


def test_nt_xent_at_chance():
    assert nt_xent_chance(256) == pytest.approx(6.236, abs=1e-3)  # the number that is known from practice
    first, second = normal(64, 4096, seed=3), normal(64, 4096, seed=4)
    assert float(nt_xent(first, second, 1.0)) == pytest.approx(math.log(127), abs=0.01)
    assert float(nt_xent(torch.ones(8, 3), torch.ones(8, 3), 0.1)) == pytest.approx(nt_xent_chance(8), rel=1e-5)


def test_nt_xent_tells_good_pairs_from_bad_ones_the_more_so_when_cold():
    x = normal(16, 32, seed=5)
    near, far = x + 0.1 * normal(16, 32, seed=6), normal(16, 32, seed=7)
    for temperature in (0.1, 0.5):
        assert nt_xent(x, near, temperature) < nt_xent(x, far, temperature)
    assert nt_xent(x, near, 0.1) < nt_xent(x, near, 0.5)
    assert nt_xent(x, far, 0.1) > nt_xent_chance(16)


def test_nt_xent_does_not_know_which_view_came_first_nor_the_order_of_images():
    first, second = normal(6, 5, seed=8), normal(6, 5, seed=9)
    order = [3, 1, 5, 0, 4, 2]
    value = float(nt_xent(first, second, 0.2))
    assert float(nt_xent(second, first, 0.2)) == pytest.approx(value, rel=1e-12)
    assert float(nt_xent(first[order], second[order], 0.2)) == pytest.approx(value, rel=1e-12)
    assert float(nt_xent(first[order], second, 0.2)) != pytest.approx(value, rel=1e-3)


# --- variance and covariance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 5), (9, 4), (20, 7)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_variance_and_covariance_equal_the_loops(n, d, scale):
    rows = scale * normal(n, d, seed=n) + 5
    assert float(variance(rows)) == pytest.approx(variance_by_loops(rows), rel=1e-10, abs=1e-12)
    assert float(variance(rows, 2.5)) == pytest.approx(variance_by_loops(rows, 2.5), rel=1e-10, abs=1e-12)
    assert float(covariance(rows)) == pytest.approx(covariance_by_loops(rows), rel=1e-9, abs=1e-12)


def test_variance_by_hand():
    rows = torch.tensor([[0.0, 0.0], [0.2, 10.0]])  # unbiased variances 0.02 and 50
    assert float(variance(rows)) == pytest.approx((1 - math.sqrt(0.02 + 1e-4)) / 2, rel=1e-6)
    assert float(variance(torch.ones(4, 3))) == pytest.approx(1 - 0.01, rel=1e-6)


def test_covariance_by_hand():
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])  # covariance matrix [[2, 4], [4, 8]]
    assert float(covariance(x)) == pytest.approx((16 + 16) / 2, rel=1e-6)
    assert float(covariance(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]))) == 0


@pytest.mark.parametrize("seed", range(4))
def test_grouped_variances_equal_loops_over_groups(seed):
    tokens, valid = normal(5, 6, 3, seed=seed), some_valid(5, 6, seed)
    valid[0], valid[1], valid[:, 2] = False, False, False
    valid[1, 3], valid[4, 2] = True, True  # an image and a position with one row, and ones with none
    within = [variance_by_loops(x[v], 0.8) for x, v in zip(tokens, valid, strict=True) if v.sum() >= 2]
    at = [variance_by_loops(tokens[valid[:, j], j], 0.8) for j in range(6) if valid[:, j].sum() >= 2]
    assert 1 <= len(within) <= 3
    assert 1 <= len(at) <= 5
    assert float(variance_within(tokens, valid, 0.8)) == pytest.approx(np.mean(within), rel=1e-10)
    assert float(variance_at_positions(tokens, valid, 0.8)) == pytest.approx(np.mean(at), rel=1e-10)


def test_grouped_variances_with_everything_valid():
    tokens, valid = normal(4, 5, 3, seed=1), torch.ones(4, 5, dtype=torch.bool)
    assert float(variance_within(tokens, valid)) == pytest.approx(np.mean([variance_by_loops(x) for x in tokens]))
    by_position = [variance_by_loops(tokens[:, j]) for j in range(5)]
    assert float(variance_at_positions(tokens, valid)) == pytest.approx(np.mean(by_position))


@pytest.mark.parametrize("loss", [variance_within, variance_at_positions])
def test_without_a_group_of_two_there_is_no_variance_to_ask_for(loss):
    tokens = normal(3, 3, 2).requires_grad_()
    value = loss(tokens, torch.eye(3, dtype=torch.bool))
    assert value.item() == 0
    value.backward()
    assert (tokens.grad == 0).all()


@pytest.mark.parametrize("loss", [variance_within, variance_at_positions, masked_mean])
def test_rows_that_are_not_valid_do_not_matter(loss):
    tokens, valid = normal(4, 6, 3, seed=2), some_valid(4, 6, 2)
    changed = torch.where(valid.unsqueeze(-1), tokens, 1e3 * normal(4, 6, 3, seed=3)).requires_grad_()
    got = loss(changed, valid)
    torch.testing.assert_close(got, loss(tokens, valid), atol=1e-13, rtol=0)
    got.sum().backward()
    assert (changed.grad[~valid] == 0).all()
    assert changed.grad[valid].abs().max() > 0


def test_masked_mean():
    tokens, valid = normal(4, 6, 3, seed=4), some_valid(4, 6, 4)
    valid[2], valid[3] = False, True
    got = masked_mean(tokens, valid)
    for i in (0, 1, 3):
        np.testing.assert_allclose(got[i].numpy(), tokens[i][valid[i]].numpy().mean(0), rtol=1e-12)
    assert (got[2] == 0).all()


# --- gradients and precision -----------------------------------------------------------------------------------------

VALID = torch.tensor([[True, True, False, True], [True, False, True, True], [False, True, True, True]])
LOSSES = {
    "nt_xent": (lambda x: nt_xent(x[:, :2].flatten(1), x[:, 2:].flatten(1), 0.3), 1e-3),
    "variance": (lambda x: variance(x.flatten(0, 1), 150.0), 1e-4),
    "covariance": (lambda x: covariance(x.flatten(0, 1)), 1e-3),
    "variance_at_positions": (lambda x: variance_at_positions(x, VALID, 150.0), 1e-4),
    "variance_within": (lambda x: variance_within(x, VALID, 150.0), 1e-4),
    "masked_mean": (lambda x: masked_mean(x, VALID), 1e-2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    assert gradcheck(LOSSES[name][0], normal(3, 4, 5, seed=5).requires_grad_(), atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_rows_give_finite_gradients(name, value, dtype):
    x = torch.full((3, 4, 5), value, dtype=dtype, requires_grad=True)
    out = LOSSES[name][0](x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("deviation", [1.0, 12.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_agrees_with_single(name, deviation, dtype, autocast):
    """The same rounded numbers in both; only the arithmetic may differ."""
    loss, tolerance = LOSSES[name]
    x = (deviation * normal(3, 4, 600, seed=6)).to(dtype)
    expected = loss(x.float())
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        got = loss(x)
    assert got.isfinite().all()
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance * deviation)
    assert got.dtype == (dtype if name == "masked_mean" else torch.float32)


def test_sums_of_many_half_precision_tokens_do_not_overflow():
    tokens, valid = torch.full((1, 1000, 2), 100.0, dtype=torch.float16), torch.ones(1, 1000, dtype=torch.bool)
    assert (masked_mean(tokens, valid) == 100).all()
    assert float(variance_within(tokens, valid)) == pytest.approx(0.99, rel=1e-5)


def test_float64_stays():
    x, valid = normal(3, 4, 5), VALID
    for name, (loss, _) in LOSSES.items():
        assert loss(x).dtype == torch.float64, name
    assert variance_within(x, valid).dtype == torch.float64
