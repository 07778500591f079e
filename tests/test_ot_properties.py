"""What must hold of every transport problem, checked on problems that hypothesis draws across everything legal."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzz_ot
from oracles import sinkhorn_by_newton
from otcxr.ot import Transport, backends, sinkhorn
from strategies import dtypes, log_uniform, problems, reaches

torch.set_num_threads(1)
fixed = functools.partial(settings, derandomize=True, database=None, deadline=None)
on_every_backend = pytest.mark.parametrize("backend", backends())
objectives = st.sampled_from(["value", "sharp"])
# Two solutions can only be compared where both have converged, to the tolerance times what the problem makes of it.
PRECISE = {"tolerance": 1e-10, "max_iterations": 20_000}
doubles, moderate = st.just(torch.float64), log_uniform(0.02, 10.0)
comparable = problems(dtypes=doubles, epsilons=moderate, batches=(None, 1, 3), shifts=False)


def solve(problem, **options):
    """Transport and gradients of value and plan together."""
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    out = sinkhorn(*leaves, **problem.options, **options)
    slope = torch.linspace(-1, 1, out.plan.shape[-2] * out.plan.shape[-1]).reshape(out.plan.shape[-2:]).to(out.plan)
    return out, torch.autograd.grad(out.value.sum() + (out.plan * slope).sum(), leaves)


def scale(problem):
    """How far values are apart at all: what is compared absolutely is compared in this unit."""
    return 1 + float(problem.cost.abs().max()) if problem.cost.numel() else 1.0


def close(got, expected, atol):
    torch.testing.assert_close(got.detach().double(), expected.detach().double(), atol=atol, rtol=0)


def divergence(x, y):
    """x ln(x / y) - x + y, entry by entry."""
    return torch.where(x > 0, x * (x / torch.where(y > 0, y, 1.0)).clamp_min(1e-300).log(), 0.0) - x + y


def same(out, expected, unit=1.0, atol=1e-6):
    """Equal to what two converged solutions can be; for potentials in the mass they move."""
    both = out.converged & expected.converged
    for name in ("plan", "value"):
        close(getattr(out, name)[both], getattr(expected, name)[both], atol * unit)


# --- every problem ---------------------------------------------------------------------------------------------------


@on_every_backend
@fixed(max_examples=1000)
@given(problems(), objectives, st.sampled_from([1, 2, 7, 50, 1000]), st.sampled_from([1e-2, 1e-4, 1e-6]))
def test_everything_is_finite_and_the_residual_is_the_plans(backend, problem, objective, limit, tolerance):
    out, slopes = solve(problem, objective=objective, max_iterations=limit, tolerance=tolerance, backend=backend)
    batch, (n, m) = problem.cost.shape[:-2], problem.cost.shape[-2:]
    shapes = {"plan": (*batch, n, m), "f": (*batch, n), "g": (*batch, m)}
    for name in Transport._fields:
        assert getattr(out, name).shape == shapes.get(name, batch), name
        assert getattr(out, name).isfinite().all(), name
    for slope, given_to in zip(slopes, problem[:3], strict=True):
        assert slope.shape == given_to.shape
        assert slope.isfinite().all()

    plan, a, b = out.plan.detach().double(), problem.a.double(), problem.b.double()
    if problem.reach is None:
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    else:
        a, b = a * (-out.f.double() / problem.reach).exp(), b * (-out.g.double() / problem.reach).exp()
    residual = torch.maximum((plan.sum(-1) - a).abs().sum(-1), (plan.sum(-2) - b).abs().sum(-1))
    rounding = 100 * torch.finfo(out.plan.dtype).eps * torch.maximum(a.sum(-1), b.sum(-1)).clamp_min(1)
    assert ((out.residual - residual).abs() <= rounding + 1e-3 * residual).all()
    assert torch.equal(out.converged, out.residual <= tolerance)
    assert (out.iterations <= limit).all()
    assert (out.iterations >= 0).all()
    assert (out.plan >= 0).all()

    no_a, no_b = problem.a == 0, problem.b == 0
    nowhere = no_a.unsqueeze(-1) | no_b.unsqueeze(-2)
    for nothing in (out.plan[nowhere], out.f[no_a], out.g[no_b], slopes[0][nowhere], slopes[1][no_a], slopes[2][no_b]):
        assert (nothing == 0).all()


@on_every_backend
@fixed(max_examples=200)
@given(problems(dtypes=doubles, epsilons=log_uniform(0.05, 10.0), shifts=False))
def test_moderate_problems_converge(backend, problem):
    out = sinkhorn(*problem[:3], **problem.options, tolerance=1e-9, max_iterations=10_000, backend=backend)
    assert out.converged.all()


@on_every_backend
@fixed(max_examples=200)
@given(problems(dtypes=st.just(torch.float32), epsilons=log_uniform(0.05, 10.0), shifts=False))
def test_moderate_problems_converge_in_float32(backend, problem):
    out = sinkhorn(*problem[:3], **problem.options, tolerance=1e-4, backend=backend)
    assert out.converged.all()


@on_every_backend
@fixed(max_examples=200)
@given(problems(dtypes=doubles, epsilons=moderate, shifts=False), objectives)
def test_plan_and_value_follow_from_the_potentials(backend, problem, objective):
    """P = a b exp((f + g - C) / epsilon), both objectives summed from the plan, and the constant of the potentials."""
    out = sinkhorn(*problem[:3], **problem.options, objective=objective, backend=backend, **PRECISE)
    cost, a, b, reach = *problem[:3], problem.reach
    product = a.unsqueeze(-1) * b.unsqueeze(-2)
    close(out.plan, product * ((out.f.unsqueeze(-1) + out.g.unsqueeze(-2) - cost) / problem.epsilon).exp(), 1e-10)

    value = (out.plan * cost).sum((-1, -2))
    if reach is not None:
        value = value + reach * (divergence(out.plan.sum(-1), a).sum(-1) + divergence(out.plan.sum(-2), b).sum(-1))
    else:
        close((a * out.f).sum(-1), (b * out.g).sum(-1), 1e-10)
    if objective == "value":
        value = value + problem.epsilon * divergence(out.plan, product).sum((-1, -2))
    done = out.converged
    close(out.value[done], value[done], 1e-7)


@on_every_backend
@fixed(max_examples=100)
@given(problems(dtypes=doubles, batches=(None,)))
def test_the_solution_is_the_oracles(backend, problem):
    """Everything legal, as far as it converges (``test_moderate_problems_converge`` says what must)."""
    out = sinkhorn(*problem[:3], **problem.options, backend=backend, **PRECISE)
    slow = sinkhorn_by_newton(*problem[:3], **problem.options)
    assert slow.residual <= 1e-11 * max(1.0, slow.plan.sum())
    if out.converged:
        # a constant moved between soft marginals shows in the residual only as epsilon / reach of what it is
        stiff = 1.0 if problem.reach is None else max(1.0, problem.reach / problem.epsilon / 100)
        unit = scale(problem) * max(1.0, slow.plan.sum()) * stiff
        close(out.plan, torch.tensor(slow.plan), 1e-7 * unit)
        close(out.value, torch.tensor(slow.value), 1e-7 * unit)


# --- the same problem, put otherwise ---------------------------------------------------------------------------------


@on_every_backend
@fixed(max_examples=100)
@given(comparable, objectives)
def test_source_and_target_can_be_swapped(backend, problem, objective):
    options = {"objective": objective, "backend": backend, **PRECISE}
    out = sinkhorn(*problem[:3], **problem.options, **options)
    back = sinkhorn(problem.cost.mT, problem.b, problem.a, **problem.options, **options)
    same(back._replace(plan=back.plan.mT), out)


@on_every_backend
@fixed(max_examples=100)
@given(comparable, objectives, st.integers(0, 2**32 - 1))
def test_the_order_of_positions_does_not_matter(backend, problem, objective, seed):
    rng = np.random.default_rng(seed)
    rows, columns = (torch.tensor(rng.permutation(size)) for size in problem.cost.shape[-2:])
    options = {"objective": objective, "backend": backend, **PRECISE}
    out = sinkhorn(*problem[:3], **problem.options, **options)
    moved = problem.with_inputs(problem.cost[..., rows, :][..., columns], problem.a[..., rows], problem.b[..., columns])
    again = sinkhorn(*moved[:3], **problem.options, **options)
    same(again, out._replace(plan=out.plan[..., rows, :][..., columns]))


@on_every_backend
@fixed(max_examples=100)
@given(problems(dtypes=doubles, epsilons=moderate, batches=(2, 4), shifts=False), objectives)
def test_a_batch_equals_a_loop(backend, problem, objective):
    options = {"objective": objective, "backend": backend, **PRECISE}
    out, slopes = solve(problem, **options)
    for i in range(len(problem.cost)):
        alone, own = solve(problem.with_inputs(*(x[i] for x in problem[:3])), **options)
        assert out.converged[i] == alone.converged
        same(Transport(*(x[i] for x in out)), alone)
        if problem.epsilon >= 0.05:
            for whole, part in zip(slopes, own, strict=True):
                close(whole[i], part, 1e-5 * (1 + float(part.abs().max())))


@pytest.mark.skipif("native" not in backends(), reason="numba is not here")
@fixed(max_examples=100)
@given(problems(batches=(2, 4)), objectives, st.sampled_from([1, 5, 1000]))
def test_natively_the_neighbours_in_a_batch_change_nothing_at_all(problem, objective, limit):
    """Converged or not, to the last digit: every problem is solved alone. (In PyTorch a batch is annealed together.)"""
    options = {"objective": objective, "backend": "native", "max_iterations": limit}
    out, slopes = solve(problem, **options)
    for i in range(len(problem.cost)):
        alone, own = solve(problem.with_inputs(*(x[i] for x in problem[:3])), **options)
        for name in ("plan", "residual", "iterations", "converged"):
            assert torch.equal(getattr(out, name)[i], getattr(alone, name)), name
        close(out.value[i], alone.value, 1e-5 * scale(problem))
        assert torch.equal(slopes[0][i], own[0])


@on_every_backend
@fixed(max_examples=100)
@given(problems(dtypes=doubles, epsilons=moderate, batches=(None, 2), reaches=st.none(), shifts=False),
       st.integers(-100, 100), objectives)  # fmt: skip
def test_a_constant_added_to_the_cost_is_added_to_the_value(backend, problem, shift, objective):
    options = {"objective": objective, "backend": backend, **PRECISE}
    out = sinkhorn(*problem[:3], **problem.options, **options)
    moved = sinkhorn(problem.cost + shift, problem.a, problem.b, **problem.options, **options)
    assert (moved.converged == out.converged).all()
    same(moved._replace(value=moved.value - shift), out)


@on_every_backend
@fixed(max_examples=100)
@given(problems(dtypes=doubles, epsilons=moderate, batches=(None,), shifts=False), objectives)
def test_absent_positions_are_as_if_they_were_not_there(backend, problem, objective):
    options = {"objective": objective, "backend": backend, **PRECISE}
    rows, columns = problem.a.nonzero()[:, 0], problem.b.nonzero()[:, 0]
    out = sinkhorn(*problem[:3], **problem.options, **options)
    small = sinkhorn(problem.cost[rows][:, columns], problem.a[rows], problem.b[columns], **problem.options, **options)
    same(out._replace(plan=out.plan[rows][:, columns]), small)


@on_every_backend
@fixed(max_examples=100)
@given(problems(dtypes=dtypes, batches=(4,)), objectives, st.sampled_from([(2, 2), (1, 4), (4, 1), (2, 1, 2)]))
def test_leading_dimensions_are_one_long_one(backend, problem, objective, lead):
    out, slopes = solve(problem, objective=objective, backend=backend)
    folded = problem.with_inputs(*(x.reshape(*lead, *x.shape[1:]) for x in problem[:3]))
    again, own = solve(folded, objective=objective, backend=backend)
    for x, y in zip((*again, *own), (*out, *slopes), strict=True):
        assert x.shape[: len(lead)] == lead
        assert torch.equal(x.reshape(y.shape), y)


@on_every_backend
@fixed(max_examples=100)
@given(problems(dtypes=doubles, epsilons=moderate, batches=(2,), shifts=False), log_uniform(0.1, 10), objectives)
def test_the_unit_of_the_cost_does_not_matter(backend, problem, factor, objective):
    """Cost, epsilon and reach in another unit: the same plan, the value in the new unit."""
    options = {"objective": objective, "backend": backend, **PRECISE}
    out = sinkhorn(*problem[:3], **problem.options, **options)
    reach = None if problem.reach is None else factor * problem.reach
    scaled = {"epsilon": factor * problem.epsilon, "reach": reach, **options}
    other = sinkhorn(factor * problem.cost, problem.a, problem.b, **scaled)
    same(other._replace(value=other.value / factor), out)


@on_every_backend
@fixed(max_examples=100)
@given(comparable)
def test_the_plan_is_the_best_one(backend, problem):
    """No plan along the ray to the independent coupling, nor to nothing when marginals are soft, has a lower value."""
    out = sinkhorn(*problem[:3], **problem.options, backend=backend, **PRECISE)
    cost, a, b, reach = *problem[:3], problem.reach
    product = a.unsqueeze(-1) * b.unsqueeze(-2)

    def price(plan):
        total = (plan * cost).sum((-1, -2)) + problem.epsilon * divergence(plan, product).sum((-1, -2))
        if reach is not None:
            for marginal, mass in ((plan.sum(-1), a), (plan.sum(-2), b)):
                total = total + reach * divergence(marginal, mass).sum(-1)
        return total

    best = price(out.plan)
    for step in (1e-3, 0.1, 0.5):
        others = [(1 - step) * out.plan + step * product]
        if reach is not None:
            others += [(1 - step) * out.plan, (1 + step) * out.plan]
        for other in others:
            assert (price(other) >= best - 1e-8)[out.converged].all()


# --- back ends and the fuzz ------------------------------------------------------------------------------------------


@pytest.mark.skipif(len(backends()) < 2, reason="only one back end is here")
@fixed(max_examples=200)
@given(problems(epsilons=log_uniform(0.01, 10.0), batches=(None, 1, 4), reaches=reaches, shifts=False), objectives)
def test_back_ends_agree(problem, objective):
    double = problem.cost.dtype == torch.float64
    options = {"objective": objective, "max_iterations": 5000, "tolerance": 1e-10 if double else 1e-5}
    (first, first_slopes), *others = (solve(problem, backend=name, **options) for name in backends())
    for other, slopes in others:
        same(other, first, atol=1e-7 if double else 2e-4)
        both = first.converged & other.converged
        if both.all() and double and problem.epsilon >= 0.05:
            for x, y in zip(slopes, first_slopes, strict=True):
                close(x, y, 1e-4 * (1 + float(y.abs().max())))


@on_every_backend
def test_a_sample_of_the_fuzz_holds(backend):
    failures = fuzz_ot.fuzz(problems=2000, seed=0, backend=backend, count=20)
    assert not failures, "\n".join(failures[:10])


def test_the_fuzz_notices_what_is_wrong(monkeypatch):
    """Every check fails for a solver that is broken in just that way."""
    honest = sinkhorn

    def broken(change):
        def solve(*inputs, **options):
            return change(honest(*inputs, **options))

        return solve

    def with_first(name, value):
        def change(out):
            part = getattr(out, name).clone()
            part.view(-1)[0] = value
            return out._replace(**{name: part})

        return change

    for change, reason in [
        (with_first("plan", float("nan")), "plan is not finite"),
        (with_first("value", float("inf")), "value is not finite"),
        (with_first("plan", -0.1), "plan is negative"),
        (with_first("plan", 0.5), "residual is not that of the plan"),
        (with_first("iterations", 10_000), "too many iterations"),
        (with_first("residual", 5.0), "converged disagrees with residual"),
        (lambda out: out._replace(plan=out.plan + 1e-3), "mass where there is none"),
        (lambda out: out._replace(f=out.f + 1), "potential where there is no mass"),
        (lambda out: out._replace(value=out.value * float("nan")), "gradient in cost is not finite"),
        (lambda out: out._replace(converged=out.converged & False, residual=out.residual + 1), "gives up before"),
    ]:
        monkeypatch.setattr(fuzz_ot, "sinkhorn", broken(change))
        failures = "\n".join(fuzz_ot.fuzz(problems=200, seed=0, backend="portable", count=20))
        assert reason in failures
        assert "--first" in failures

    def scaled(*inputs, **options):
        out = honest(*inputs, **options)
        return out._replace(value=out.value * 1e4)

    monkeypatch.setattr(fuzz_ot, "sinkhorn", scaled)
    failures = "\n".join(fuzz_ot.fuzz(problems=200, seed=0, backend="portable", count=20))
    for reason in ("gradient in cost is not the plan", "gradient in the masses explodes"):
        assert reason in failures

    class Leak(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad + 1e-3

    def leaking(*inputs, **options):
        return honest(*(Leak.apply(x) for x in inputs), **options)

    monkeypatch.setattr(fuzz_ot, "sinkhorn", leaking)
    failures = "\n".join(fuzz_ot.fuzz(problems=200, seed=0, backend="portable", count=20))
    for name in ("cost", "a", "b"):
        assert f"gradient in {name} where there is no mass" in failures
