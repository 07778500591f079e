"""Gradients of transport: against dense systems and Newton in float64, finite differences, and what must be refused."""

from __future__ import annotations

import gc
from functools import cache

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from oracles import (
    gaussian_entropic_value,
    plan_gradients_by_lstsq,
    sharp_gradients_by_lstsq,
    sharp_value,
    sinkhorn_by_loop,
    sinkhorn_by_newton,
    value_gradients,
)
from otcxr.ot import Transport, backends, cosine_cost, pad_problems, sinkhorn, sinkhorn_divergence

torch.set_num_threads(1)
TIGHT = {"tolerance": 1e-12, "max_iterations": 20_000}
REACHES = [None, 0.1, 1.0, 10.0]
on_every_backend = pytest.mark.parametrize("backend", backends())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(*batch, n=5, m=7, seed=0, zeros_a=(), zeros_b=(), reach=None):
    """Costs in [0, 2] and masses in float64; unbalanced, the sums of the masses are 0.8 and 1.7."""
    cost = 2 * torch.rand((*batch, n, m), generator=generator(seed), dtype=torch.float64)
    masses = []
    for size, zeros, total, offset in [(n, zeros_a, 0.8, 1), (m, zeros_b, 1.7, 2)]:
        mass = torch.rand((*batch, size), generator=generator(1000 * seed + offset), dtype=torch.float64) + 0.1
        mass[..., list(zeros)] = 0
        masses.append((1.0 if reach is None else total) * mass / mass.sum(-1, keepdim=True))
    return cost, *masses


def matching_problem(n=49, seed=0, noise=0.35, spread=0.3, exact=False):
    """Features and their shuffled, disturbed copies: the plan is nearly a permutation. Float64.

    The masses of partners differ a little, so that some mass must go elsewhere and ties all potentials to each other;
    ``exact``: partners have equal masses, and the potentials hang together by exp(-difference of costs / epsilon) only.
    """
    x = torch.randn(n, 16, generator=generator(seed), dtype=torch.float64)
    order = torch.randperm(n, generator=generator(seed + 1))
    y = (x + noise * torch.randn(n, 16, generator=generator(seed + 2), dtype=torch.float64))[order]
    scores = torch.randn(n, generator=generator(seed + 3), dtype=torch.float64)
    other = scores if exact else scores + spread * torch.randn(n, generator=generator(seed + 4), dtype=torch.float64)
    return cosine_cost(x, y), (0.5 * scores).softmax(-1), (0.5 * other).softmax(-1)[order], order.argsort()


def gradients(loss, inputs, **options):
    """Transport and the gradients of loss(transport) in the three inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = sinkhorn(*leaves, **options)
    return out, torch.autograd.grad(loss(out), leaves)


def close(got, expected, atol=1e-8, rtol=0.0):
    got, expected = (
        x.detach() if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64) for x in (got, expected)
    )
    torch.testing.assert_close(got.double(), expected.double(), atol=atol, rtol=rtol)


def near(got, expected, rtol):
    """Whole arrays: |got - expected| <= rtol |expected| in the Euclidean norm."""
    got, expected = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64) for x in (got, expected))
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= rtol * np.linalg.norm(expected) + 1e-12


def difference(got, expected, mass=None):
    """Relative Euclidean distance; with masses, of what is left when each has lost its mean under them."""
    got, expected = np.asarray(got.detach(), dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if mass is not None:
        mass = np.asarray(mass, dtype=np.float64)
        got, expected = (np.where(mass > 0, x - mass @ x / mass.sum(), 0) for x in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


# --- functions of the plan, each with its slope in the plan written out by hand --------------------------------------

WEIGHTS = torch.randn(12, 12, generator=generator(99), dtype=torch.float64)
POINTS = torch.randn(12, 3, generator=generator(98), dtype=torch.float64)


def weighted(out):
    return (out.plan * WEIGHTS[: out.plan.shape[-2], : out.plan.shape[-1]]).sum()


def weighted_slope(plan):
    return WEIGHTS.numpy()[: plan.shape[0], : plan.shape[1]]


def squared_map(out):
    points = POINTS[: out.plan.shape[-1]].to(out.plan.dtype)
    return out.map(points.expand(*out.plan.shape[:-2], -1, -1)).pow(2).sum()


def squared_map_slope(plan):
    """L = sum_i |z_i|^2 with z_i = sum_j P_ij y_j / sum_j P_ij: dL/dP_ij = 2 <z_i, y_j - z_i> / sum_j P_ij."""
    y, slope = POINTS.numpy()[: plan.shape[1]], np.zeros(plan.shape)
    for i in range(len(plan)):
        if plan[i].sum() > 0:
            z = plan[i] @ y / plan[i].sum()
            slope[i] = 2 * (y - z) @ z / plan[i].sum()
    return slope


def shannon(out):
    return out.entropy().sum()


def shannon_slope(plan):
    return np.where(plan > 0, -np.log(np.where(plan > 0, plan, 1)) - 1, 0)


PLAN_LOSSES = {
    "weighted": (weighted, weighted_slope),
    "map": (squared_map, squared_map_slope),
    "entropy": (shannon, shannon_slope),
}
FIVE_LOSSES = {"value": None, "sharp": None, **PLAN_LOSSES}


def loss_and_objective(name):
    if name in PLAN_LOSSES:
        return PLAN_LOSSES[name][0], "value"
    return (lambda out: out.value.sum()), name


def expected_gradients(name, cost, a, b, epsilon, reach):
    if name == "sharp":
        return sharp_gradients_by_lstsq(cost, a, b, epsilon, reach)
    slow = sinkhorn_by_newton(cost, a, b, epsilon, reach)
    if name == "value":
        return value_gradients(slow, a, b, epsilon, reach)
    return plan_gradients_by_lstsq(PLAN_LOSSES[name][1](slow.plan), cost, a, b, epsilon, reach)


@cache
def batch_with_gradients(name, count, n, m, seed, zeros_a, zeros_b, epsilon, reach, dtype):
    """A batch, and for each of its problems what the gradients are. Cached for the back ends."""
    inputs = [x.to(dtype) for x in problem(count, n=n, m=m, seed=seed, zeros_a=zeros_a, zeros_b=zeros_b, reach=reach)]
    alone = zip(*(x.double() for x in inputs), strict=True)
    return inputs, [expected_gradients(name, *x, epsilon, reach) for x in alone]


# --- the oracles themselves ------------------------------------------------------------------------------------------


def test_the_two_slow_solvers_agree():
    for seed, epsilon in enumerate([0.02, 0.1, 1.0]):
        cost, a, b = problem(n=6, m=9, seed=seed, zeros_a=[2], zeros_b=[0])
        newton, loop = sinkhorn_by_newton(cost, a, b, epsilon), sinkhorn_by_loop(cost, a, b, epsilon)
        assert newton.residual <= 1e-13
        for name in ("plan", "value", "f", "g"):
            close(getattr(newton, name), getattr(loop, name), atol=1e-10)


def test_the_oracles_gradients_equal_unrolled_iterations():
    """2,000 sweeps under torch's own tape, no derivation by hand."""
    for reach in REACHES:
        cost, a, b = problem(n=4, m=3, seed=5, reach=reach)
        factor = 1.0 if reach is None else reach / (reach + 0.2)
        logits = [x.log().requires_grad_() for x in (a, b)]
        leaf = cost.clone().requires_grad_()
        p, q = (x.softmax(-1) if reach is None else x.exp() for x in logits)
        g = torch.zeros(3, dtype=torch.float64)
        for _ in range(2000):
            f = -0.2 * factor * torch.logsumexp((g - leaf) / 0.2 + q.log(), 1)
            g = -0.2 * factor * torch.logsumexp((f[:, None] - leaf) / 0.2 + p.log()[:, None], 0)
        plan = p[:, None] * q * ((f[:, None] + g - leaf) / 0.2).exp()
        got = torch.autograd.grad((plan * WEIGHTS[:4, :3]).sum(), [leaf, *logits])
        d_cost, d_a, d_b = plan_gradients_by_lstsq(WEIGHTS[:4, :3], cost, a, b, 0.2, reach)
        near(got[0], d_cost, 1e-9)
        for one, mass, slope in [(got[1], a, d_a), (got[2], b, d_b)]:  # chain rule of softmax or of exp
            near(one, mass.numpy() * (slope - (mass.numpy() @ slope if reach is None else 0)), 1e-9)


# --- values ----------------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("epsilon", [0.02, 0.2, 5.0])
def test_plan_values_and_potentials(epsilon, reach, backend):
    cost, a, b = problem(3, n=6, m=4, seed=1, reach=reach)
    a[1, 2], b[2, 0] = 0, 0
    if reach is None:
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    options = {"epsilon": epsilon, "reach": reach, "backend": backend, **TIGHT}
    out, sharp = sinkhorn(cost, a, b, **options), sinkhorn(cost, a, b, objective="sharp", **options)
    assert out.converged.all()
    for i in range(3):
        slow = sinkhorn_by_newton(cost[i], a[i], b[i], epsilon, reach)
        assert slow.residual <= 1e-12
        for name in ("plan", "value", "f", "g"):
            close(getattr(out, name)[i], getattr(slow, name), atol=1e-8)
        close(sharp.value[i], sharp_value(slow, cost[i], a[i], b[i], reach), atol=1e-8)
        close(sharp.plan[i], slow.plan, atol=1e-8)


@on_every_backend
@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_gaussians_on_a_grid_have_their_closed_form(epsilon, backend):
    x = torch.linspace(-7, 7, 141, dtype=torch.float64)
    a, b = ((-(x - mean).square() / 2 / deviation**2).exp() for mean, deviation in [(0.3, 0.8), (-0.5, 1.2)])
    out = sinkhorn((x[:, None] - x).square(), a / a.sum(), b / b.sum(), epsilon=epsilon, tolerance=1e-10,
                   max_iterations=20_000, backend=backend)  # fmt: skip
    close(out.value, gaussian_entropic_value(0.3, 0.8, -0.5, 1.2, epsilon), atol=1e-6)


@on_every_backend
def test_soft_marginals_become_hard_ones(backend):
    cost, a, b = problem(2, seed=3)
    hard = sinkhorn(cost, a, b, epsilon=0.1, backend=backend, **TIGHT)
    soft = sinkhorn(cost, a, b, epsilon=0.1, reach=1e6, backend=backend, tolerance=1e-9, max_iterations=20_000)
    close(soft.plan, hard.plan, atol=1e-5)
    close(soft.value, hard.value, atol=1e-5)


@on_every_backend
def test_what_costs_too_much_is_not_moved(backend):
    """Two places a thousand units of the cost from everything: their mass is paid for, reach times it, and stays."""
    cost, a, b = problem(n=4, m=5, seed=4, reach=0.5)
    cost[2], cost[:, 1] = 1000.0, 1000.0
    out, (d_cost, d_a, d_b) = gradients(lambda t: t.value, (cost, a, b), epsilon=0.1, reach=0.5, backend=backend,
                                        **TIGHT)  # fmt: skip
    assert out.converged
    assert all(x.isfinite().all() for x in (*out, d_cost, d_a, d_b))
    close(out.plan[2], torch.zeros(5))
    close(d_cost, out.plan)
    close(d_a[2], 0.5 + 0.1 * b.sum(), atol=1e-9)
    close(d_b[1], 0.5 + 0.1 * a.sum(), atol=1e-9)


# --- gradients in float64 --------------------------------------------------------------------------------------------


SHAPES = [(6, 6, (), ()), (3, 9, (), (4,)), (8, 5, (0, 3), (1, 4)), (1, 4, (), ()), (4, 1, (2,), ())]


@on_every_backend
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("name", FIVE_LOSSES)
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_gradients_equal_the_dense_system(epsilon, name, reach, backend):
    loss, objective = loss_and_objective(name)
    options = {"epsilon": epsilon, "reach": reach, "objective": objective, "backend": backend, **TIGHT}
    for n, m, zeros_a, zeros_b in SHAPES:
        inputs, expected = batch_with_gradients(name, 2, n, m, n, zeros_a, zeros_b, epsilon, reach, torch.float64)
        out, got = gradients(loss, inputs, **options)
        assert out.converged.all()
        for i in range(2):
            for one, other in zip(got, expected[i], strict=True):
                close(one[i], other, atol=1e-6 * (1 + np.abs(other).max()))
            if reach is None:  # the constant that the constraints leave free is shared out evenly
                close(inputs[1][i] @ got[1][i], inputs[2][i] @ got[2][i], atol=1e-8)


@on_every_backend
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("name", FIVE_LOSSES)
def test_gradients_equal_finite_differences(name, reach, backend):
    """Masses through a softmax, or unbalanced through exp, which lets their sums vary."""
    cost, a, b = problem(n=4, m=3, seed=7, reach=reach)
    loss, objective = loss_and_objective(name)

    def of_leaves(cost, logits_a, logits_b):
        a, b = (x.softmax(-1) if reach is None else x.exp() for x in (logits_a, logits_b))
        return loss(sinkhorn(cost, a, b, epsilon=0.2, reach=reach, objective=objective, backend=backend, **TIGHT))

    leaves = [x.clone().requires_grad_() for x in (cost, a.log(), b.log())]
    assert gradcheck(of_leaves, leaves, eps=1e-5, atol=1e-6, rtol=1e-5)


@on_every_backend
@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("name", FIVE_LOSSES)
def test_absent_positions_have_no_gradient(name, reach, backend):
    loss, objective = loss_and_objective(name)
    for dtype in (torch.float32, torch.float64):
        inputs = problem(2, n=6, m=8, zeros_a=[0, 3], zeros_b=[2, 5, 6], seed=15, reach=reach)
        inputs[0][:, 0], inputs[0][..., 5] = 1e6, 1e6  # what stands there must not matter
        out, got = gradients(lambda t: loss(t), [x.to(dtype) for x in inputs], epsilon=0.05, reach=reach,
                             objective=objective, backend=backend, max_iterations=5000)  # fmt: skip
        assert out.converged.all()
        for nothing in (got[0][:, [0, 3]], got[0][:, :, [2, 5, 6]], got[1][:, [0, 3]], got[2][:, [2, 5, 6]]):
            assert (nothing == 0).all()
        assert all(x.isfinite().all() for x in got)
        assert all((x != 0).any() for x in got)


@on_every_backend
@pytest.mark.parametrize("filling", [-1e6, -1.0, 1e6])
def test_what_stands_at_absent_positions_does_not_matter_with_soft_marginals(filling, backend):
    cost, a, b = problem(n=6, m=5, zeros_a=[1], zeros_b=[4], seed=16, reach=0.5)
    changed = cost.clone()
    changed[1], changed[:, 4] = filling, filling
    options = {"epsilon": 0.1, "reach": 0.5, "objective": "sharp", "backend": backend, **TIGHT}
    expected, slopes = gradients(lambda t: t.value, (cost, a, b), **options)
    out, got = gradients(lambda t: t.value, (changed, a, b), **options)
    close(out.value, expected.value, atol=1e-10)
    for one, other in zip(got, slopes, strict=True):
        close(one, other, atol=1e-9)


@on_every_backend
@pytest.mark.parametrize("objective", ["value", "sharp"])
@pytest.mark.parametrize("reach", [None, 1.0])
def test_value_and_plan_are_differentiated_together(reach, objective, backend):
    """One backward pass of both equals the sum of two; the samples keep their own weights, one of them 0."""
    inputs = problem(3, n=5, m=4, seed=8, reach=reach)
    weights = torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64)
    options = {"epsilon": 0.1, "reach": reach, "objective": objective, "backend": backend, **TIGHT}

    def value(out):
        return (weights * out.value).sum()

    _, both = gradients(lambda out: value(out) + weighted(out), inputs, **options)
    _, first = gradients(value, inputs, **options)
    _, second = gradients(weighted, inputs, **options)
    for x, y, z in zip(both, first, second, strict=True):
        close(x, y + z, atol=1e-8)
    for x in first:
        assert (x[1] == 0).all()
        assert (x[0] != 0).any()


@on_every_backend
@pytest.mark.parametrize("objective", ["value", "sharp"])
def test_only_what_asks_for_a_gradient_gets_one(objective, backend):
    inputs = problem(2, seed=9)
    options = {"epsilon": 0.1, "objective": objective, "backend": backend, **TIGHT}
    _, all_three = gradients(lambda out: out.value.sum() + weighted(out), inputs, **options)
    for k in range(3):
        leaves = [x.clone().requires_grad_(i == k) for i, x in enumerate(inputs)]
        out = sinkhorn(*leaves, **options)
        assert {name for name in Transport._fields if getattr(out, name).requires_grad} == {"plan", "value"}
        (out.value.sum() + weighted(out)).backward()
        assert [x.grad is not None for x in leaves] == [i == k for i in range(3)]
        close(leaves[k].grad, all_three[k], atol=1e-10)
    out = sinkhorn(*inputs, **options)
    assert not any(getattr(out, name).requires_grad for name in Transport._fields)
    with torch.no_grad():
        out = sinkhorn(*(x.clone().requires_grad_() for x in inputs), **options)
    assert not any(getattr(out, name).requires_grad for name in Transport._fields)


@on_every_backend
def test_the_graph_may_be_used_again(backend):
    leaves = [x.requires_grad_() for x in problem(2, seed=10)]
    out = sinkhorn(*leaves, epsilon=0.1, objective="sharp", backend=backend, **TIGHT)
    loss = out.value.sum() + weighted(out)
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    third = torch.autograd.grad(2 * out.value.sum() + 2 * weighted(out), leaves)
    for x, y in zip(third, first, strict=True):
        close(x, 2 * y, atol=1e-9)


@on_every_backend
@pytest.mark.parametrize("objective", ["value", "sharp"])
@pytest.mark.parametrize("through", ["value", "plan"])
def test_a_second_derivative_is_refused(through, objective, backend):
    leaves = [x.requires_grad_() for x in problem(seed=11)]
    out = sinkhorn(*leaves, epsilon=0.2, objective=objective, backend=backend)
    loss = out.value.sum() if through == "value" else weighted(out)
    for slope in torch.autograd.grad(loss, leaves, create_graph=True):
        with pytest.raises(RuntimeError, match="once"):
            (slope.square().sum() + leaves[0].sum()).backward(retain_graph=True)


@on_every_backend
@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_have_the_type_of_the_inputs(dtype, reach, backend):
    inputs = [x.to(dtype) for x in problem(2, n=9, m=9, seed=12, reach=reach)]
    for objective in ("value", "sharp"):
        _, got = gradients(lambda out: out.value.sum() + out.plan.square().sum(), inputs, epsilon=0.1, reach=reach,
                           objective=objective, backend=backend)  # fmt: skip
        assert {x.dtype for x in got} == {dtype}
        assert all(x.isfinite().all() for x in got)


@on_every_backend
@pytest.mark.parametrize("reach", [None, 0.5])
def test_strides_make_no_difference(reach, backend):
    cost, a, b = problem(4, n=6, m=5, seed=13, reach=reach)
    upstream = torch.randn(4, 5, 6, generator=generator(1), dtype=torch.float64).mT  # not contiguous
    options = {"epsilon": 0.1, "reach": reach, "objective": "sharp", "backend": backend, **TIGHT}
    _, expected = gradients(lambda t: (t.plan * upstream).sum() + t.value.sum(), (cost, a, b), **options)
    leaf = cost.mT.contiguous().requires_grad_()
    wide_a, wide_b = (torch.stack((x, -x), -1).requires_grad_() for x in (a, b))
    out = sinkhorn(leaf.mT, wide_a[..., 0], wide_b[..., 0], **options)
    ones = out.value.new_ones(()).expand(4)
    got = torch.autograd.grad([out.plan, out.value], [leaf, wide_a, wide_b], [upstream, ones])
    for x, y in zip((got[0].mT, got[1][..., 0], got[2][..., 0]), expected, strict=True):
        close(x, y, atol=1e-10)


@on_every_backend
def test_the_map_carries_a_gradient_to_the_points(backend):
    cost, a, b = problem(2, n=4, m=5, zeros_a=[1], seed=14)
    out = sinkhorn(cost, a, b, epsilon=0.1, backend=backend, **TIGHT)
    y = torch.randn(2, 5, 3, generator=generator(2), dtype=torch.float64, requires_grad=True)
    mapped = out.map(y)
    assert mapped.shape == (2, 4, 3)
    for k in range(2):
        for i in range(4):
            expected = torch.zeros(3) if i == 1 else out.plan[k, i] @ y[k] / out.plan[k, i].sum()
            close(mapped[k, i], expected, atol=1e-12)
    assert gradcheck(out.map, [y], eps=1e-6, atol=1e-8)
    hard = out.hard()
    assert hard.dtype == torch.int64
    assert hard.tolist() == [[-1 if i == 1 else int(out.plan[k, i].argmax()) for i in range(4)] for k in range(2)]
    p = out.plan[0][out.plan[0] > 0]
    close(out.entropy()[0], -(p * p.log()).sum(), atol=1e-12)


# --- gradients in float32, at tolerances that are used ---------------------------------------------------------------


@cache
def near_permutations(epsilon, objective):
    """Three problems in float32, and their gradients from the oracles in float64 (of the rounded inputs)."""
    drawn = [matching_problem(seed=10 * k, noise=noise) for k, noise in enumerate([0.2, 0.35, 0.8])]
    inputs = [torch.stack(x).float() for x in zip(*(d[:3] for d in drawn), strict=True)]
    expected = []
    for cost, a, b in zip(*(x.double() for x in inputs), strict=True):
        a, b = a / a.sum(), b / b.sum()
        if objective == "value":
            expected.append(value_gradients(sinkhorn_by_newton(cost, a, b, epsilon), a, b, epsilon))
        else:
            expected.append(sharp_gradients_by_lstsq(cost, a, b, epsilon))
    return inputs, expected


@on_every_backend
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("objective", ["value", "sharp"])
def test_float32_gradients_near_a_permutation(objective, epsilon, tolerance, backend):
    """OT.md section 5. At 1e-3 little is promised in the masses; "sharp" multiplies what the marginals lack.

    The gradient in the cost is measured in the sum of absolute values, like the residual: the plan's is 1.
    """
    allowed_cost, allowed_mass = {1e-3: (5e-3, 0.25), 1e-5: (2e-4, 5e-3)}[tolerance]
    inputs, expected = near_permutations(epsilon, objective)
    out, got = gradients(lambda t: t.value.sum(), inputs, epsilon=epsilon, objective=objective, tolerance=tolerance,
                         max_iterations=20_000, backend=backend)  # fmt: skip
    assert out.converged.all()
    for i in range(3):
        astray = np.abs(got[0][i].double().numpy() - expected[i][0]).sum()
        assert astray <= allowed_cost * np.abs(expected[i][0]).sum()
        for k in (1, 2):
            assert difference(got[k][i], expected[i][k], inputs[k][i]) <= allowed_mass


@on_every_backend
@pytest.mark.parametrize("objective", ["value", "sharp"])
@pytest.mark.parametrize("epsilon", [0.005, 0.01, 0.05])
@pytest.mark.parametrize("masses", ["uniform", "other"])
def test_equal_partners_are_matched_and_no_gradient_explodes(masses, epsilon, objective, backend):
    """A permutation to float32's last digit, which matched features and uniform masses give.

    What the potentials of two pairs differ by hangs on flows of exp(-difference of costs / epsilon), far below a
    rounding error; the linear system is singular. Plan and gradient in the cost are clear all the same (the plan
    itself, for both objectives), and those in the masses must stay in the range of the costs.
    """
    for seed in (3, 300):
        cost, a, b, order = matching_problem(seed=seed, noise=0.2, exact=True)
        if masses == "uniform":
            a = b = torch.full_like(a, 1 / len(a))
        out, got = gradients(lambda t: t.value, (cost.float(), a.float(), b.float()), epsilon=epsilon, tolerance=1e-5,
                             objective=objective, max_iterations=20_000, backend=backend)  # fmt: skip
        assert out.converged
        assert all(x.isfinite().all() for x in (*out, *got))
        assert (out.hard() == order).all()
        assert all(x.abs().max() < 10 for x in got[1:])
        if epsilon < 0.05:  # else some mass goes astray
            plan = torch.zeros_like(cost)
            plan[torch.arange(len(a)), order] = a
            near(out.plan, plan, 1e-3)
            near(got[0], plan, 1e-2)


@on_every_backend
@pytest.mark.parametrize("reach", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", FIVE_LOSSES)
def test_float32_gradients_with_soft_marginals(name, reach, backend):
    loss, objective = loss_and_objective(name)
    inputs, expected = batch_with_gradients(name, 3, 12, 9, 16, (), (), 0.05, reach, torch.float32)
    out, got = gradients(lambda t: loss(t), inputs, epsilon=0.05, reach=reach, objective=objective, tolerance=1e-5,
                         max_iterations=20_000, backend=backend)  # fmt: skip
    assert out.converged.all()
    for i in range(3):
        assert difference(got[0][i], expected[i][0]) <= 1e-3
        for one, other in zip(got[1:], expected[i][1:], strict=True):
            assert difference(one[i], other) <= 5e-3


@on_every_backend
def test_the_plans_own_marginals_are_used(backend):
    """At tolerance 1e-3 the system with the wanted marginals is indefinite: its solution was wrong by 220 times."""
    for seed in range(5):
        cost, a, b, _ = matching_problem(n=25, seed=100 + seed, noise=0.35)
        inputs = [x.float() for x in (cost, a, b)]
        out, got = gradients(lambda t: t.value, inputs, epsilon=0.01, objective="sharp", tolerance=1e-3,
                             max_iterations=5000, backend=backend)  # fmt: skip
        assert out.converged
        expected = sharp_gradients_by_lstsq(*inputs[:1], a / a.sum(), b / b.sum(), 0.01)
        assert difference(got[0], expected[0]) <= 0.02
        for one, other, mass in [(got[1], expected[1], a), (got[2], expected[2], b)]:
            assert difference(one, other, mass) <= 0.5


# --- memory ----------------------------------------------------------------------------------------------------------


def held(loss, inputs, **options):
    """Bytes that the graph of loss(sinkhorn) saves by torch's mechanism, and bytes of all living tensors it adds."""
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def living():
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    leaves = [x.clone().requires_grad_() for x in inputs]
    gc.collect()  # what earlier tests left would be counted before and not after
    before = living()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = loss(sinkhorn(*leaves, **options))
    after = living()
    result.backward()
    return sum(saved.values()), after - before


@on_every_backend
@pytest.mark.parametrize(("objective", "reach"), [("value", None), ("sharp", None), ("sharp", 0.5)])
def test_memory_does_not_grow_with_iterations(objective, reach, backend):
    inputs = [x.float() for x in problem(8, n=32, m=32, seed=17, reach=reach)]
    size = inputs[0].numel() * 4
    options = {"epsilon": 0.02, "reach": reach, "objective": objective, "tolerance": 1e-12, "backend": backend}
    few, many = (held(lambda out: out.value.sum(), inputs, max_iterations=limit, **options) for limit in (20, 2000))
    assert few[0] > 0
    assert many[0] <= few[0]
    assert many[1] <= few[1] + 4096
    assert max(many) <= 4 * size


# --- divergence and padding ------------------------------------------------------------------------------------------


def squared_distances(x, y):
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def divergence_of(x, y, a, b, **options):
    costs = squared_distances(x, y), squared_distances(x, x), squared_distances(y, y)
    return sinkhorn_divergence(*costs, a, b, **options)


@on_every_backend
@pytest.mark.parametrize("reach", [None, 0.7])
def test_divergence_is_put_together_from_three_problems(reach, backend):
    x, y = (torch.randn(2, k, 2, generator=generator(k), dtype=torch.float64) for k in (4, 5))
    _, a, b = problem(2, n=4, m=5, seed=18, reach=reach)
    out = divergence_of(x, y, a, b, epsilon=0.3, reach=reach, backend=backend, **TIGHT)
    for i in range(2):
        parts = [
            sinkhorn_by_newton(squared_distances(u, v)[i], p[i], q[i], 0.3, reach)
            for u, v, p, q in [(x, y, a, b), (x, x, a, a), (y, y, b, b)]
        ]
        expected = parts[0].value - parts[1].value / 2 - parts[2].value / 2
        if reach is not None:
            expected += 0.3 / 2 * float(a[i].sum() - b[i].sum()) ** 2
        close(out.value[i], expected, atol=1e-9)
        assert out.value[i] > 0
        for part, slow in zip((out.cross, out.source, out.target), parts, strict=True):
            close(part.plan[i], slow.plan, atol=1e-9)


@on_every_backend
@pytest.mark.parametrize("reach", [None, 0.7])
def test_divergence_of_a_measure_from_itself_is_nothing_and_flat(reach, backend):
    x = torch.randn(5, 2, generator=generator(3), dtype=torch.float64)
    _, a, _ = problem(n=5, m=5, seed=19, reach=reach)
    leaves = [x.clone().requires_grad_(), x, a.clone().requires_grad_(), a.clone().requires_grad_()]
    out = divergence_of(*leaves, epsilon=0.3, reach=reach, backend=backend, **TIGHT)
    close(out.value, 0.0, atol=1e-10)
    d_x, d_a, d_b = torch.autograd.grad(out.value, [leaves[0], *leaves[2:]])
    close(d_x, torch.zeros_like(x), atol=1e-8)
    for slope in (d_a, d_b):
        close(slope - (slope.mean() if reach is None else 0), torch.zeros(5), atol=1e-8)


@on_every_backend
@pytest.mark.parametrize("reach", [None, 0.7])
def test_divergence_gradients_equal_finite_differences(reach, backend):
    x, y = (torch.randn(k, 2, generator=generator(k), dtype=torch.float64, requires_grad=True) for k in (3, 4))
    logits = [x.log().requires_grad_() for x in problem(n=3, m=4, seed=20, reach=reach)[1:]]

    def value(x, y, logits_a, logits_b):
        a, b = (z.softmax(-1) if reach is None else z.exp() for z in (logits_a, logits_b))
        return divergence_of(x, y, a, b, epsilon=0.5, reach=reach, backend=backend, **TIGHT).value

    assert gradcheck(value, [x, y, *logits], eps=1e-5, atol=1e-6, rtol=1e-5)


@on_every_backend
def test_a_wide_blur_leaves_the_difference_of_means(backend):
    """Large epsilon: half of the squared maximum mean discrepancy with kernel -C, here the distance of the means."""
    x, y = (torch.randn(k, 2, generator=generator(k), dtype=torch.float64) for k in (4, 5))
    _, a, b = problem(n=4, m=5, seed=21)
    out = divergence_of(x, y, a, b, epsilon=1e5, backend=backend, **TIGHT)
    close(out.value, (a @ x - b @ y).square().sum(), atol=1e-3)


@on_every_backend
@pytest.mark.parametrize("reach", [None, 0.5])
def test_padded_problems_equal_single_ones(reach, backend):
    shapes = [(3, 5), (6, 2), (4, 4), (1, 1)]
    drawn = [problem(n=n, m=m, seed=22 + n, reach=reach) for n, m in shapes]
    leaves = [[x.clone().requires_grad_() for x in kind] for kind in zip(*drawn, strict=True)]
    cost, a, b = pad_problems(*leaves)
    assert (cost.shape, a.shape, b.shape) == ((4, 6, 5), (4, 6), (4, 5))
    for k, (n, m) in enumerate(shapes):
        assert (a[k, n:] == 0).all()
        assert (b[k, m:] == 0).all()
        close(cost[k, :n, :m], drawn[k][0], atol=0)
    options = {"epsilon": 0.1, "reach": reach, "objective": "sharp", "backend": backend, **TIGHT}
    out = sinkhorn(cost, a, b, **options)
    out.value.sum().backward()
    for k, (n, m) in enumerate(shapes):
        alone, expected = gradients(lambda t: t.value, drawn[k], **options)
        close(out.value[k], alone.value, atol=1e-10)
        close(out.plan[k, :n, :m], alone.plan, atol=1e-10)
        assert (out.plan[k, n:] == 0).all()
        assert (out.plan[k, :, m:] == 0).all()
        for leaf, slope in zip(leaves, expected, strict=True):
            close(leaf[k].grad, slope, atol=1e-8)


def test_padding_without_masses_is_uniform():
    costs = [torch.rand(n, m, generator=generator(n)) for n, m in [(2, 3), (4, 1)]]
    cost, a, b = pad_problems(costs)
    close(a, [[1 / 2, 1 / 2, 0, 0], [1 / 4] * 4], atol=1e-7)
    close(b, [[1 / 3, 1 / 3, 1 / 3], [1, 0, 0]], atol=1e-7)
    assert cost.dtype == a.dtype == b.dtype == torch.float32
    assert sinkhorn(cost, a, b).converged.all()
