"""Transport: against a slow loop in float64, finite differences, exact assignment and its own limits."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.autograd import gradcheck

from oracles import cosine_cost_by_loops, sinkhorn_by_loop
from otcxr import ot
from otcxr.ot import Transport, backends, cosine_cost, entropy

torch.set_num_threads(1)
fixed = settings(
    derandomize=True, database=None, deadline=None, max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
CHOSEN = {"backend": None}


@pytest.fixture(autouse=True, params=backends())
def backend(request, monkeypatch):
    """Every test of this file runs once with every back end."""
    monkeypatch.setitem(CHOSEN, "backend", request.param)


def sinkhorn(*arguments, **options):
    return ot.sinkhorn(*arguments, **CHOSEN, **options)


TIGHT = {"tolerance": 1e-12, "max_iterations": 20_000}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def masses(*shape, seed=0, zeros=(), dtype=torch.float64):
    """Random masses; the listed positions of the last dimension have none."""
    out = torch.rand(shape, generator=generator(seed), dtype=torch.float64) + 0.1
    out[..., list(zeros)] = 0
    return (out / out.sum(-1, keepdim=True)).to(dtype)


def problem(*batch, n=5, m=7, seed=0, zeros_a=(), zeros_b=(), dtype=torch.float64):
    """Costs in [0, 2] and masses of problems with n sources and m targets."""
    cost = 2 * torch.rand((*batch, n, m), generator=generator(seed), dtype=torch.float64)
    a, b = masses(*batch, n, seed=seed + 1, zeros=zeros_a), masses(*batch, m, seed=seed + 2, zeros=zeros_b)
    return cost.to(dtype), a.to(dtype), b.to(dtype)


def solve_with_gradients(cost, a, b, **options):
    """Transport and the gradients of the sum of its values in cost, a and b."""
    leaves = [x.detach().clone().requires_grad_() for x in (cost, a, b)]
    out = sinkhorn(*leaves, **options)
    return out, torch.autograd.grad(out.value.sum(), leaves)


def close(got, expected, atol=1e-8, rtol=0.0):
    got, expected = (
        x.detach() if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64) for x in (got, expected)
    )
    torch.testing.assert_close(got.double(), expected.double(), atol=atol, rtol=rtol)


# --- against independent solutions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.02, 0.05, 0.5, 10.0])
@pytest.mark.parametrize(("n", "m"), [(5, 7), (12, 3), (1, 6), (8, 8)])
def test_solution_and_gradients_equal_the_slow_loop(epsilon, n, m):
    cost, a, b = problem(n=n, m=m, seed=n)
    out, (d_cost, d_a, d_b) = solve_with_gradients(cost, a, b, epsilon=epsilon, **TIGHT)
    slow = sinkhorn_by_loop(cost, a, b, epsilon)
    assert slow.residual <= 1e-12, "the oracle itself must have converged"
    assert out.converged
    close(out.value, slow.value)
    for got, expected in [(out.plan, slow.plan), (out.f, slow.f), (out.g, slow.g)]:
        close(got, expected)
    for got, expected in [(d_cost, slow.plan), (d_a, slow.f), (d_b, slow.g)]:
        close(got, expected)


def test_plan_follows_from_the_potentials_and_the_value_from_the_plan():
    cost, a, b = problem(2, 3, seed=3)
    out = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT)
    product = a.unsqueeze(-1) * b.unsqueeze(-2)
    close(out.plan, product * ((out.f.unsqueeze(-1) + out.g.unsqueeze(-2) - cost) / 0.1).exp(), atol=1e-14)
    kl = (out.plan * (out.plan / product).log() - out.plan + product).sum((-1, -2))
    close(out.value, (out.plan * cost).sum((-1, -2)) + 0.1 * kl, atol=1e-11)
    close((a * out.f).sum(-1), (b * out.g).sum(-1), atol=1e-14)


def test_float32_meets_the_stated_accuracy():
    for seed in range(3):
        cost, a, b = problem(n=49, m=49, seed=seed)
        slow = sinkhorn_by_loop(cost, a, b, 0.05, tolerance=1e-10, limit=5000)
        out, (d_cost, d_a, d_b) = solve_with_gradients(
            cost.float(), a.float(), b.float(), epsilon=0.05, tolerance=1e-5, max_iterations=5000
        )
        assert out.converged
        assert out.value.dtype == torch.float32
        close(out.value, slow.value, atol=1e-5)
        assert np.abs(d_cost.double().numpy() - slow.plan).sum() <= 2e-4
        for got, expected in [(d_a, slow.f), (d_b, slow.g)]:
            assert np.linalg.norm(got.numpy() - expected) <= 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 5.0])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_equal_finite_differences(epsilon, batch):
    cost, a, b = problem(*batch, n=4, m=3, seed=7)

    def value(cost, logits_a, logits_b):
        return sinkhorn(cost, logits_a.softmax(-1), logits_b.softmax(-1), epsilon=epsilon, **TIGHT).value

    leaves = [x.clone().requires_grad_() for x in (cost, a.log(), b.log())]
    assert gradcheck(value, leaves, eps=1e-5, atol=1e-7, rtol=1e-6)


def test_gradients_equal_finite_differences_with_absent_positions():
    cost, a, b = problem(n=4, m=5, zeros_a=[1], zeros_b=[0, 4], seed=8)

    def value(cost, scale_a, scale_b):
        p, q = a * scale_a.exp(), b * scale_b.exp()
        return sinkhorn(cost, p / p.sum(), q / q.sum(), epsilon=0.1, **TIGHT).value

    leaves = [cost.requires_grad_(), *(torch.zeros(k, dtype=torch.float64, requires_grad=True) for k in (4, 5))]
    assert gradcheck(value, leaves, eps=1e-5, atol=1e-7, rtol=1e-6)


def test_tiny_epsilon_gives_the_optimal_assignment():
    for seed in range(4):
        cost = torch.rand(7, 7, generator=generator(seed), dtype=torch.float64)
        out = sinkhorn(cost, epsilon=2e-3, tolerance=1e-3, max_iterations=10_000)
        assert out.converged
        rows, columns = linear_sum_assignment(cost.numpy())
        best = cost.numpy()[rows, columns].sum() / 7
        assert (out.plan.argmax(-1).numpy() == columns).all()
        close((out.plan * cost).sum(), best, atol=2e-3 * np.log(7) + 2e-3)


def test_small_best_costs_agree_with_every_permutation():
    cost = torch.rand(4, 4, generator=generator(5), dtype=torch.float64)
    best = min(float(sum(cost[i, p[i]] for i in range(4))) / 4 for p in itertools.permutations(range(4)))
    out = sinkhorn(cost, epsilon=1e-3, tolerance=1e-3, max_iterations=10_000)
    assert out.converged
    close((out.plan * cost).sum(), best, atol=2e-3)


@pytest.mark.parametrize("epsilon", [0.02, 0.01, 0.005])
def test_small_epsilon_converges_in_single_precision(epsilon):
    """Far beyond what exp(-C / epsilon) can hold: C / epsilon goes up to 400, and float32 ends near exp(-100)."""
    x, y = (torch.randn(4, 49, 3, generator=generator(s)) for s in (1, 2))
    a, b = masses(4, 49, dtype=torch.float32), masses(4, 49, seed=1, dtype=torch.float32)
    cost = cosine_cost(x, y)
    assert cost.max() - cost.min() > 1.9
    out = sinkhorn(cost, a, b, epsilon=epsilon, tolerance=1e-3, max_iterations=5000)
    assert all(part.isfinite().all() for part in out)
    assert out.converged.all()
    for i in range(4):
        slow = sinkhorn_by_loop(cost[i], a[i], b[i], epsilon, tolerance=1e-4, limit=1000)
        close(out.value[i], slow.value, atol=1e-3)


def test_large_epsilon_gives_the_independent_coupling():
    cost, a, b = problem(3, seed=9)
    out = sinkhorn(cost, a, b, epsilon=1e4, **TIGHT)
    product = a.unsqueeze(-1) * b.unsqueeze(-2)
    close(out.plan, product, atol=1e-5)
    close(out.value, (product * cost).sum((-1, -2)), atol=1e-4)
    close(entropy(out.plan, dims=2), entropy(a) + entropy(b), atol=1e-4)


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("limit", [1, 3, 17, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_is_that_of_the_returned_plan(epsilon, limit, dtype):
    cost, a, b = problem(6, n=9, m=6, dtype=dtype, zeros_a=[2], seed=11)
    out = sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=limit, tolerance=1e-4)
    worst = torch.maximum((out.plan.sum(-1) - a).abs().sum(-1), (out.plan.sum(-2) - b).abs().sum(-1))
    close(out.residual, worst, atol=1e-6)
    assert (out.converged == (out.residual <= 1e-4)).all()
    assert (out.iterations <= limit).all()
    assert (out.iterations >= 1).all()
    assert (out.plan >= 0).all()
    assert all(part.isfinite().all() for part in out)


def test_problems_stop_one_by_one():
    cost, a, b = problem(40, n=16, m=16, seed=12)
    out = sinkhorn(cost, a, b, epsilon=0.03, tolerance=1e-6, max_iterations=5000)
    assert out.converged.all()
    assert out.iterations.unique().numel() > 3
    assert out.iterations.dtype == torch.int64


def test_not_converging_is_flagged_not_hidden():
    cost, a, b = problem(4, n=12, m=12, seed=13)
    out, gradients = solve_with_gradients(cost.float(), a.float(), b.float(), epsilon=0.01, max_iterations=2)
    assert not out.converged.any()
    assert (out.residual > 1e-4).all()
    assert (out.iterations == 2).all()
    assert all(x.isfinite().all() for x in (*out, *gradients))


@pytest.mark.parametrize("objective", ["value", "sharp"])
@pytest.mark.parametrize("of", ["value", "plan"])
def test_value_and_plan_carry_gradients_and_only_once(objective, of):
    cost, a, b = (x.requires_grad_() for x in problem())
    out = sinkhorn(cost, a, b, epsilon=0.2, objective=objective)
    assert {name for name in Transport._fields if getattr(out, name).requires_grad} == {"plan", "value"}
    gradients = torch.autograd.grad(getattr(out, of).square().sum(), (cost, a, b), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="sinkhorn can be differentiated once"):
            (gradient.square().sum() + cost.square().sum()).backward(retain_graph=True)


def test_a_weighted_sum_of_values_weighs_the_gradients():
    cost, a, b = problem(3, seed=14)
    leaves = [x.requires_grad_() for x in (cost, a, b)]
    weights = torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64)
    out = sinkhorn(*leaves, epsilon=0.1, **TIGHT)
    got = torch.autograd.grad((weights * out.value).sum(), leaves)
    for gradient, part in zip(got, (out.plan, out.f, out.g), strict=True):
        close(gradient, weights.reshape(-1, *[1] * (part.dim() - 1)) * part, atol=1e-15)


def test_without_masses_they_are_uniform():
    cost, _, _ = problem(2, n=4, m=6)
    a, b = torch.full((2, 4), 1 / 4, dtype=torch.float64), torch.full((2, 6), 1 / 6, dtype=torch.float64)
    for left, right in [(None, None), (a, None), (None, b)]:
        out, expected = sinkhorn(cost, left, right), sinkhorn(cost, a, b)
        for name in ("plan", "value", "f", "g"):
            close(getattr(out, name), getattr(expected, name), atol=1e-12)


# --- absent positions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absent_positions_are_as_if_they_were_not_there(dtype):
    zeros_a, zeros_b = [0, 3], [2, 5, 6]
    cost, a, b = problem(2, n=6, m=8, zeros_a=zeros_a, zeros_b=zeros_b, dtype=dtype, seed=15)
    keep_a, keep_b = [1, 2, 4, 5], [0, 1, 3, 4, 7]
    options = TIGHT if dtype == torch.float64 else {"tolerance": 1e-5, "max_iterations": 5000}
    out, (d_cost, d_a, d_b) = solve_with_gradients(cost, a, b, epsilon=0.05, **options)
    small, (s_cost, s_a, s_b) = solve_with_gradients(
        cost[:, keep_a][:, :, keep_b], a[:, keep_a], b[:, keep_b], epsilon=0.05, **options
    )
    atol = 1e-9 if dtype == torch.float64 else 1e-4
    close(out.value, small.value, atol)
    close(out.plan[:, keep_a][:, :, keep_b], small.plan, atol)
    close(d_cost[:, keep_a][:, :, keep_b], s_cost, atol)
    close(d_a[:, keep_a], s_a, atol)
    close(d_b[:, keep_b], s_b, atol)
    for nothing in (out.plan[:, zeros_a], out.plan[:, :, zeros_b], out.f[:, zeros_a], out.g[:, zeros_b]):
        assert (nothing == 0).all()
    for nothing in (d_cost[:, zeros_a], d_cost[:, :, zeros_b], d_a[:, zeros_a], d_b[:, zeros_b]):
        assert (nothing == 0).all()


@pytest.mark.parametrize("filling", [0.0, 1e6, -1e6])
def test_what_stands_at_absent_positions_does_not_matter(filling):
    cost, a, b = problem(n=6, m=5, zeros_a=[1], zeros_b=[4], seed=16)
    changed = cost.clone()
    changed[1], changed[:, 4] = filling, filling
    out = sinkhorn(changed, a, b, epsilon=0.1, **TIGHT)
    expected = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT)
    assert out.converged
    for name in ("plan", "value", "f", "g"):
        close(getattr(out, name), getattr(expected, name), atol=1e-9)


def test_all_mass_on_one_position():
    cost, _, b = problem(n=4, m=5, seed=17)
    out = sinkhorn(cost, torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64), b, epsilon=0.05, **TIGHT)
    close(out.plan[1], b, atol=1e-12)
    close(out.value, (b * cost[1]).sum(), atol=1e-12)  # one source leaves no choice: KL(P | a b^T) = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tiny", [1e-20, 1e-30, 1e-37])
def test_vanishing_masses_keep_their_potential(tiny, dtype):
    """A softmax of sharp scores gives such masses; their gradient is the potential, which has a limit."""
    cost, a, b = problem(n=5, m=6, seed=18)
    a[0], b[3] = tiny, tiny
    a, b = a / a.sum(), b / b.sum()
    slow = sinkhorn_by_loop(cost, a, b, 0.05)
    out = sinkhorn(cost.to(dtype), a.to(dtype), b.to(dtype), epsilon=0.05, tolerance=1e-5, max_iterations=5000)
    assert out.converged
    close(out.f, slow.f, atol=2e-3)
    close(out.g, slow.g, atol=2e-3)
    close(out.value, slow.value, atol=1e-4)


# --- shapes and types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (2, 1, 2), (0,), (2, 0)])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (5, 1), (4, 6)])
def test_any_leading_dimensions(batch, n, m):
    cost, a, b = problem(*batch, n=n, m=m)
    out, gradients = solve_with_gradients(cost, a, b, epsilon=0.1)
    shapes = {"plan": (*batch, n, m), "f": (*batch, n), "g": (*batch, m)}
    for name in Transport._fields:
        assert getattr(out, name).shape == shapes.get(name, batch), name
    assert [x.shape for x in gradients] == [cost.shape, a.shape, b.shape]
    assert out.converged.all()


def test_one_point_each():
    out, gradients = solve_with_gradients(*(torch.full(s, v) for s, v in [((1, 1), 1.7), ((1,), 1.0), ((1,), 1.0)]))
    close(out.plan, [[1.0]], atol=1e-6)
    close(out.value, 1.7, atol=1e-6)
    close(gradients[1] + gradients[2], [1.7], atol=1e-6)


def test_a_batch_equals_a_loop():
    cost, a, b = problem(2, 4, n=6, m=9, seed=20)
    cost[0, 1] *= 30  # one problem needs annealing, the others do not
    out, gradients = solve_with_gradients(cost, a, b, epsilon=0.1, **TIGHT)
    for i, j in itertools.product(range(2), range(4)):
        alone, own = solve_with_gradients(cost[i, j], a[i, j], b[i, j], epsilon=0.1, **TIGHT)
        for name in ("plan", "value", "f", "g"):
            close(getattr(out, name)[i, j], getattr(alone, name), atol=1e-9)
        for whole, part in zip(gradients, own, strict=True):
            close(whole[i, j], part, atol=1e-9)


def test_order_of_positions_does_not_matter():
    cost, a, b = problem(n=6, m=8, seed=21)
    rows, columns = torch.randperm(6, generator=generator(1)), torch.randperm(8, generator=generator(2))
    out = sinkhorn(cost, a, b, epsilon=0.05, **TIGHT)
    moved = sinkhorn(cost[rows][:, columns], a[rows], b[columns], epsilon=0.05, **TIGHT)
    close(moved.value, out.value, atol=1e-10)
    close(moved.plan, out.plan[rows][:, columns], atol=1e-10)
    close(moved.f, out.f[rows], atol=1e-10)


def test_source_and_target_can_be_swapped():
    cost, a, b = problem(2, seed=22)
    out, back = sinkhorn(cost, a, b, epsilon=0.05, **TIGHT), sinkhorn(cost.mT, b, a, epsilon=0.05, **TIGHT)
    close(back.value, out.value, atol=1e-10)
    close(back.plan.mT, out.plan, atol=1e-10)
    close(back.f, out.g, atol=1e-10)
    close(back.g, out.f, atol=1e-10)


@pytest.mark.parametrize("shift", [-5.0, 0.3, 100.0])
def test_a_constant_added_to_the_cost_is_added_to_the_value(shift):
    cost, a, b = problem(2, seed=23)
    out, moved = sinkhorn(cost, a, b, epsilon=0.1, **TIGHT), sinkhorn(cost + shift, a, b, epsilon=0.1, **TIGHT)
    close(moved.value, out.value + shift, atol=1e-9)
    close(moved.plan, out.plan, atol=1e-9)


def test_cost_and_epsilon_may_be_scaled_together():
    cost, a, b = problem(seed=24)
    out, scaled = sinkhorn(cost, a, b, epsilon=0.05, **TIGHT), sinkhorn(7 * cost, a, b, epsilon=0.35, **TIGHT)
    close(scaled.value, 7 * out.value, atol=1e-9)
    close(scaled.plan, out.plan, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(dtype):
    cost, a, b = problem(2, n=9, m=9, dtype=dtype)
    out, gradients = solve_with_gradients(cost, a, b, epsilon=0.1)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in (out.plan, out.value, out.f, out.g, out.residual)} == {expected}
    assert {x.dtype for x in gradients} == {dtype}
    assert out.converged.all()
    a, b = (x.double() / x.double().sum(-1, keepdim=True) for x in (a, b))
    same, _ = solve_with_gradients(cost.to(expected), a.to(expected), b.to(expected), epsilon=0.1)
    close(out.value, same.value, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_uniform_masses_are_accepted(dtype):
    for n in range(1, 200):
        mass = torch.full((n,), 1 / n).to(dtype)
        assert sinkhorn(torch.zeros(n, 1), mass).converged, n


def test_whole_numbers_are_costs_too():
    cost = torch.tensor([[0, 3], [3, 0]])
    out = sinkhorn(cost, epsilon=0.1)
    assert out.value.dtype == torch.float32
    close(out.plan, [[0.5, 0], [0, 0.5]], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype):
    x, y = (torch.randn(3, 10, 16, generator=generator(s), dtype=dtype) for s in (1, 2))
    a, b = masses(3, 10, dtype=dtype), masses(3, 10, seed=1, dtype=dtype)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, y, a, b)]
        out = sinkhorn(cosine_cost(*leaves[:2]), *leaves[2:], epsilon=0.1)
        return out, leaves

    out, leaves = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_leaves = run()
    assert all(torch.equal(p, q) for p, q in zip(out, cast, strict=True))
    out.value.sum().backward()
    cast.value.sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(leaves, cast_leaves, strict=True))


@pytest.mark.parametrize("objective", ["value", "sharp"])
def test_backward_and_map_under_autocast_stay_in_float32(objective):
    cost, a, b = problem(3, n=10, m=12, dtype=torch.float32)
    y = torch.randn(3, 12, 4, generator=generator(1))

    def run():
        leaves = [t.clone().requires_grad_() for t in (cost, a, b)]
        out = sinkhorn(*leaves, epsilon=0.1, objective=objective)
        assert out.map(y).dtype == torch.float32
        return out.map(y), *torch.autograd.grad(out.value.sum() + out.plan.square().sum(), leaves)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_permutation_do_not_underflow():
    """The off-diagonal plan is 4e-25; its square is no float32, but what the potentials differ by hangs on it."""
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    gradients = []
    for dtype in (torch.float32, torch.float64):
        mass = torch.tensor([0.5, 0.5], dtype=dtype, requires_grad=True)
        out = sinkhorn(cost.to(dtype), mass, epsilon=0.018)
        (gradient,) = torch.autograd.grad((out.plan * torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=dtype)).sum(), mass)
        gradients.append(gradient[0] - gradient[1])
    assert abs(float(gradients[1])) == pytest.approx(0.5, rel=1e-6)
    assert float(gradients[0]) == pytest.approx(float(gradients[1]), rel=1e-4)


def test_map_of_a_vanishing_mass_has_finite_gradients():
    leaves = [x.requires_grad_() for x in (torch.rand(2, 3), torch.tensor([1e-42, 1 - 1e-42]), torch.full((3,), 1 / 3))]
    out = sinkhorn(*leaves, epsilon=0.1)
    gradients = torch.autograd.grad(out.map(torch.rand(3, 2)).sum(), leaves)
    assert all(x.isfinite().all() for x in gradients)


def test_huge_costs_at_absent_positions_leave_sharp_gradients_alone():
    cost, a, b = problem(2, n=6, m=8, zeros_a=[0], zeros_b=[2], dtype=torch.float32, seed=3)
    far = cost.clone()
    far[:, 0], far[:, :, 2] = 1e6, -1e6
    results = []
    for costs in (cost, far):
        leaves = [x.clone().requires_grad_() for x in (costs, a, b)]
        results.append(torch.autograd.grad(sinkhorn(*leaves, objective="sharp").value.sum(), leaves))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_masses_in_any_memory_order():
    cost, a, b = problem(4, n=6, m=6, dtype=torch.float32)
    turned = [x.T.contiguous().T for x in (a, b)]
    assert not turned[0].is_contiguous()
    expected, got = sinkhorn(cost, a, b), sinkhorn(cost, *turned)
    for name in ("plan", "value", "f", "g"):
        close(getattr(got, name), getattr(expected, name), atol=1e-6)


def test_strided_tensors():
    cost, a, b = problem(4, n=6, m=6, seed=25)
    wide = torch.empty(6, 12, 8, dtype=torch.float64)[:, ::2, ::2].permute(2, 0, 1)
    wide.copy_(cost)
    spread_a = torch.stack((a, b), -1)[..., 0]
    spread_b = torch.stack((a, b), -1)[..., 1]
    assert not wide.is_contiguous()
    assert not spread_a.is_contiguous()
    expected = solve_with_gradients(cost, a, b, epsilon=0.1, **TIGHT)
    got = sinkhorn(wide, spread_a, spread_b, epsilon=0.1, **TIGHT)
    for name in ("plan", "value", "f", "g", "residual"):
        close(getattr(got, name), getattr(expected[0], name), atol=1e-9)
    broadcast = sinkhorn(cost[:1].expand(4, 6, 6), a[:1].expand(4, 6), b[:1].expand(4, 6), epsilon=0.1, **TIGHT)
    close(broadcast.value, expected[0].value[:1].expand(4), atol=1e-9)


def test_inputs_are_left_alone():
    inputs = problem(3)
    before = [x.clone() for x in inputs]
    solve_with_gradients(*inputs, epsilon=0.05)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@st.composite
def random_problem(draw):
    n, m = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    epsilon = draw(st.floats(0.02, 10.0))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cost = rng.random((n, m)) * draw(st.sampled_from([0.0, 0.1, 2.0]))
    points = []
    for size in (n, m):
        mass = rng.random(size) ** draw(st.sampled_from([0, 1, 6])) * (rng.random(size) > draw(st.floats(0, 0.8)))
        mass[rng.integers(size)] += 0.2
        points.append(mass / mass.sum())
    return cost, *points, epsilon


@fixed
@given(random_problem())
def test_any_small_problem(drawn):
    cost, a, b, epsilon = drawn
    out, gradients = solve_with_gradients(*map(torch.tensor, (cost, a, b)), epsilon=epsilon, tolerance=1e-9,
                                          max_iterations=20_000)  # fmt: skip
    assert all(x.isfinite().all() for x in (*out, *gradients))
    assert out.converged
    assert out.iterations <= 20_000
    slow = sinkhorn_by_loop(cost, a, b, epsilon, tolerance=1e-10, limit=3000)
    if slow.residual <= 1e-10:  # the slow loop may need more steps than we have time for
        close(out.value, slow.value, atol=1e-7)
        close(out.plan, slow.plan, atol=1e-6)
    close(out.plan.sum(-1), a, atol=1e-8)
    close(out.plan.sum(-2), b, atol=1e-8)
    assert (out.plan.detach().numpy()[a == 0] == 0).all()
    single = sinkhorn(*(torch.tensor(x, dtype=torch.float32) for x in (cost, a, b)), epsilon=epsilon)
    assert all(x.isfinite().all() for x in single)
    if single.converged:
        close(single.value, out.value.detach(), atol=1e-3)


# --- refusals --------------------------------------------------------------------------------------------------------

COST, HALF = torch.zeros(4, 3, 2), torch.full((4, 2), 0.5)


def with_entry(tensor, place, value):
    out = tensor.clone()
    out[place] = value
    return out


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((COST[0, 0],), {}, r"cost has shape \(2,\); expected \(\.\.\., n, m\)"),
        ((COST[:, :0],), {}, r"cost has shape \(4, 0, 2\); expected .* n, m >= 1"),
        ((COST[..., :0],), {}, r"cost has shape \(4, 3, 0\); expected"),
        ((COST, HALF), {}, r"a has shape \(4, 2\) but cost \(4, 3, 2\) needs \(4, 3\)"),
        ((COST, None, HALF[:3]), {}, r"b has shape \(3, 2\) but cost \(4, 3, 2\) needs \(4, 2\)"),
        ((COST, None, HALF[0]), {}, r"b has shape \(2,\) but cost \(4, 3, 2\) needs \(4, 2\)"),
        ((COST,), {"epsilon": 0.0}, r"epsilon must be .*> 0.*received 0\.0"),
        ((COST,), {"epsilon": -1.0}, r"epsilon must be .*> 0.*received -1\.0"),
        ((COST,), {"epsilon": float("nan")}, r"epsilon must be .*> 0.*received nan"),
        ((COST,), {"epsilon": float("inf")}, r"epsilon must be .*finite.*received inf"),
        ((COST,), {"tolerance": 0.0}, r"tolerance must be > 0 .*received 0\.0"),
        ((COST,), {"max_iterations": 0}, r"max_iterations >= 1, received .* 0"),
        ((with_entry(COST, (2, 0, 1), float("nan")),), {}, r"cost must be finite; sample 2 "),
        ((with_entry(COST, (1, 2, 1), float("inf")),), {}, r"cost must be finite; sample 1 "),
        ((COST, None, with_entry(HALF, (3, 0), 0.7)), {}, r"b must .*sum to 1.*sample 3 .*sum 1\.2"),
        ((COST, None, HALF * 0), {}, r"b must .*sum to 1.*sample 0 .*sum 0"),
        ((COST, None, with_entry(HALF, 1, torch.tensor([1.5, -0.5]))), {}, r"non-negative.*sample 1 has minimum -0\.5"),
        ((COST, None, with_entry(HALF, (2, 1), float("nan"))), {}, r"b must .*sample 2 .*nan"),
        ((COST,), {"objective": "plan"}, r"objective must be 'value' or 'sharp', received 'plan'"),
        ((COST,), {"reach": 0.0}, r"reach must be > 0, or None for exact marginals; received 0\.0"),
        ((COST,), {"reach": float("nan")}, r"reach must be > 0.*received nan"),
        ((with_entry(COST, (2, 0, 1), -0.6),), {"reach": 0.5}, r"at least -reach = -0\.5 .*sample 2 holds -0\.6"),
        ((COST, None, HALF * 0), {"reach": 0.5}, r"b must .*positive, finite sum.*sample 0 .*sum 0"),
        ((COST,), {"backend": "fast"}, r"backend must be one of portable, native, triton or None, received 'fast'"),
    ],
)
def test_mistakes_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ot.sinkhorn(*arguments, **CHOSEN | options)


# --- cosine cost and entropy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_cosine_cost_equals_the_loop(batch):
    x, y = (torch.randn(*batch, k, 5, generator=generator(k), dtype=torch.float64) for k in (4, 6))
    got = cosine_cost(x, y).reshape(-1, 4, 6)
    for cost, u, v in zip(got, x.reshape(-1, 4, 5), y.reshape(-1, 6, 5), strict=True):
        close(cost, cosine_cost_by_loops(u, v), atol=1e-14)


def test_cosine_cost_has_the_sign_of_a_cost():
    x = torch.eye(3)
    close(cosine_cost(x, 5 * x), 1 - np.eye(3), atol=1e-7)
    close(cosine_cost(x, -x), 1 + np.eye(3), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cosine_cost_stays_in_range_exactly(dtype):
    x = torch.randn(200, 7, generator=generator(3), dtype=torch.float64).to(dtype)
    x = torch.cat((x, x * 0.1, -x))
    cost = cosine_cost(x, x)
    assert cost.min() >= 0
    assert cost.max() <= 2
    assert cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert cost.diagonal().abs().max() < 1e-6


def test_cosine_cost_gradient():
    x, y = (torch.randn(2, k, 4, generator=generator(k), dtype=torch.float64, requires_grad=True) for k in (3, 5))
    assert gradcheck(cosine_cost, (x, y), atol=1e-8)


def test_cosine_cost_gradient_is_not_cut_at_the_ends_of_the_range():
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    rotated = torch.stack((torch.tensor(1e-4, dtype=torch.float64).cos(), torch.tensor(1e-4).double().sin()))[None]
    (gradient,) = torch.autograd.grad(cosine_cost(x, rotated).sum(), x)
    assert gradient[0, 1] == pytest.approx(-1e-4, rel=1e-6)
    assert torch.autograd.grad(cosine_cost(x, y).sum(), x)[0].abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_vectors_cost_one_and_get_no_gradient(dtype):
    x = torch.randn(4, 6, generator=generator(5), dtype=torch.float64).to(dtype)
    x[1] = 0
    x.requires_grad_()
    y = torch.randn(3, 6, generator=generator(6), dtype=torch.float64).to(dtype).requires_grad_()
    cost = cosine_cost(x, y)
    assert (cost[1] == 1).all()
    cost.sum().backward()
    assert (x.grad[1] == 0).all()
    assert x.grad.isfinite().all()
    assert x.grad[0].abs().max() > 0
    assert y.grad.isfinite().all()
    (both,) = torch.autograd.grad(cosine_cost(z := torch.zeros(2, 3, requires_grad=True), z).sum(), z)
    assert (both == 0).all()


@pytest.mark.parametrize(("x", "y"), [((4,), (4,)), ((3, 4), (5, 3)), ((2, 3, 4), (3, 3, 4)), ((2, 3, 4), (3, 4))])
def test_cosine_cost_names_shapes_that_do_not_fit(x, y):
    with pytest.raises(ValueError, match=r"x has shape .* and y .*; cosine_cost needs"):
        cosine_cost(torch.ones(x), torch.ones(y))


def test_entropy():
    assert float(entropy(torch.full((8,), 1 / 8))) == pytest.approx(np.log(8), rel=1e-6)
    assert float(entropy(torch.tensor([0.0, 1.0, 0.0]))) == 0
    plan = masses(2, 12).reshape(2, 3, 4)
    close(entropy(plan, dims=2), -(plan * plan.log()).sum((-1, -2)), atol=1e-14)
    assert entropy(plan).shape == (2, 3)


def test_entropy_gradient_is_finite_where_there_is_no_mass():
    mass = torch.tensor([0.0, 1e-42, 0.3, 0.7], requires_grad=True)
    entropy(mass).backward()
    assert mass.grad.isfinite().all()
    close(mass.grad[2:], -np.log([0.3, 0.7]) - 1, atol=1e-6)
    assert mass.grad[0] > 80  # the slope at 0 is infinite: it must still pull mass there
    assert gradcheck(entropy, masses(2, 5).requires_grad_(), atol=1e-8)
    assert entropy(torch.full((9,), 1 / 9, dtype=torch.bfloat16)).dtype == torch.float32


def test_ot_needs_nothing_else_of_otcxr():
    code = "import sys, otcxr.ot; print(*sorted(m for m in sys.modules if m.startswith('otcxr')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if not name.startswith("otcxr.ot")} <= {"otcxr", "otcxr.version"}
    assert not {"otcxr.ot.kernels", "otcxr.ot.gpu"} & set(loaded), "compilers are loaded when they are needed"
