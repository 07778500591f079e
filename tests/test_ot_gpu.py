"""The solver for a GPU against slow loops in float64.

Without a CUDA device the kernels run in Triton's interpreter, which must be switched on before Triton is imported. The
one test marked ``gpu`` runs this file once more, compiled, on a device: OTCXR_TEST_DEVICE=cuda.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from oracles import sinkhorn_by_loop

DEVICE = os.environ.get("OTCXR_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="the solver for a GPU is written in Triton")

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from otcxr.ot import gpu  # noqa: E402

TILED = gpu._Layout(resident=False, rows=8, columns=32, warps=4)  # several tiles, the last one partly empty
SHAPES = [(5, 7), (12, 9), (20, 17), (1, 1), (1, 6), (6, 1)]


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch):
    """Triton prepares a module again whenever one of its functions calls another; once per kernel is enough."""
    careful = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if self.fn.__module__ == gpu.__name__:
            return self.rewrite()(*args, **kwargs)
        return careful(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)


def masses(generator, batch, size, zeros=()):
    out = torch.rand(batch, size, generator=generator, dtype=torch.float64) + 0.1
    out[:, list(zeros)] = 0
    return (out / out.sum(-1, keepdim=True)).float().to(DEVICE)


def problem(n, m, batch=2, seed=0, zeros_a=(), zeros_b=()):
    """Costs in [0, 2] and masses that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    cost = (2 * torch.rand(batch, n, m, generator=generator)).to(DEVICE)
    return cost, masses(generator, batch, n, zeros_a), masses(generator, batch, m, zeros_b)


def array(x):
    return x.double().cpu().numpy()


def marginal_errors(out, a, b, reach=None):
    """The L1 errors of both marginals of every plan, in float64."""
    plan, f, g, a, b = (array(x) for x in (out.plan, out.f, out.g, a, b))
    want_a, want_b = (a, b) if reach is None else (a * np.exp(-f / reach), b * np.exp(-g / reach))
    return np.maximum(np.abs(plan.sum(2) - want_a).sum(1), np.abs(plan.sum(1) - want_b).sum(1))


def balanced_by_loop(cost, a, b, epsilon, tolerance=1e-10):
    """The oracle for one problem; masses in float32 differ in their sums, with which it could not converge."""
    a, b = array(a), array(b)
    slow = sinkhorn_by_loop(array(cost), a / a.sum(), b / b.sum(), epsilon, tolerance=tolerance)
    assert slow.residual <= tolerance, "the oracle itself must have converged"
    return slow


def unbalanced_by_loop(cost, a, b, epsilon, reach):
    """Both updates with their damping, in the log domain, one problem without absent positions."""
    cost, a, b = array(cost), array(a), array(b)
    damping = reach / (reach + epsilon)
    f, g = np.zeros(len(a)), np.ones(len(b))
    before = g - 1
    while np.abs(g - before).max() > 1e-12:
        before = g
        f = -damping * epsilon * logsumexp((g[None, :] - cost) / epsilon + np.log(b)[None, :], axis=1)
        g = -damping * epsilon * logsumexp((f[:, None] - cost) / epsilon + np.log(a)[:, None], axis=0)
    return np.outer(a, b) * np.exp((f[:, None] + g[None, :] - cost) / epsilon), f, g


def implicit_by_least_squares(plan, gradient, epsilon, kappa):
    """The whole system of one plan, solved in float64; of all balanced solutions the smallest."""
    rows, columns = np.flatnonzero(plan.sum(1)), np.flatnonzero(plan.sum(0))
    p, w = plan[np.ix_(rows, columns)], (gradient * plan)[np.ix_(rows, columns)]
    top = np.hstack([(1 + kappa) * np.diag(p.sum(1)), p])
    bottom = np.hstack([p.T, (1 + kappa) * np.diag(p.sum(0))])
    right = np.concatenate([w.sum(1), w.sum(0)])
    solution = np.linalg.lstsq(np.vstack([top, bottom]), right, rcond=1e-13)[0]
    x, y = np.zeros(len(plan)), np.zeros(plan.shape[1])
    x[rows], y[columns] = solution[: len(rows)], solution[len(rows) :]
    return plan * (x[:, None] + y[None, :] - gradient) / epsilon, x, y


def test_kernels_run_where_they_should():
    interpreted = isinstance(gpu._solve_resident, InterpretedFunction)
    assert interpreted == (DEVICE == "cpu"), "Triton was imported before this file could choose how it runs"


# --- balanced --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "m", "layout"),
    [*((n, m, None) for n, m in SHAPES), (12, 9, TILED), (1, 6, TILED)],
)
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 10.0])
def test_solution_equals_the_slow_loop(n, m, epsilon, layout):
    cost, a, b = problem(n, m, batch=1, seed=n)
    out = gpu.solve(cost, a, b, epsilon, None, 1000, 3e-6, layout=layout)
    slow = balanced_by_loop(cost[0], a[0], b[0], epsilon)
    assert (out.residual <= 3e-6).all()
    np.testing.assert_allclose(array(out.plan)[0], slow.plan, atol=5e-6)
    potentials = array(out.f)[0][:, None] + array(out.g)[0][None, :]
    np.testing.assert_allclose(potentials, slow.f[:, None] + slow.g[None, :], atol=3e-5 * max(1, epsilon))


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
@pytest.mark.parametrize("epsilon", [0.04, 0.2])
def test_absent_positions_get_nothing_whatever_they_cost(epsilon, layout):
    cost, a, b = problem(9, 12, zeros_a=(0, 4, 8), zeros_b=(3, 11), seed=11)
    here = (a > 0).unsqueeze(2) & (b > 0).unsqueeze(1)
    cost = torch.where(here, cost, torch.where(torch.rand_like(cost) < 0.5, 1e30, -1e30))
    out = gpu.solve(cost, a, b, epsilon, None, 300, 1e-5, layout=layout)
    slow = balanced_by_loop(cost[1], a[1], b[1], epsilon)
    assert (out.residual <= 1e-5).all()
    assert (out.plan[~here] == 0).all()
    assert all(x.isfinite().all() for x in out)
    np.testing.assert_allclose(array(out.plan)[1], slow.plan, atol=1e-5)


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.1, 1), (0.1, 2), (0.1, 7), (0.01, 1), (0.01, 5), (0.01, 25)])
def test_unfinished_problems_stop_at_the_limit_with_an_honest_residual(epsilon, iterations, reach, layout):
    cost, a, b = problem(5, 7, seed=5)
    out = gpu.solve(cost, a, b, epsilon, reach, iterations, 1e-9, layout=layout)
    assert out.iterations.tolist() == [iterations] * 2
    assert out.iterations.dtype == torch.int64
    assert (out.residual > 1e-6).all()
    np.testing.assert_allclose(array(out.residual), marginal_errors(out, a, b, reach), rtol=1e-3, atol=1e-6)
    product = array(a)[:, :, None] * array(b)[:, None, :]
    exponent = (array(out.f)[:, :, None] + array(out.g)[:, None, :] - array(cost)) / epsilon
    np.testing.assert_allclose(array(out.plan), product * np.exp(exponent), rtol=3e-4, atol=1e-7)


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
def test_every_problem_stops_as_soon_as_it_is_done(layout):
    cost, a, b = problem(5, 7, batch=3, seed=6)
    cost *= torch.tensor([0.1, 1.0, 0.4], device=DEVICE)[:, None, None]
    out = gpu.solve(cost, a, b, 0.1, None, 500, 1e-4, layout=layout)
    counts = out.iterations.tolist()
    assert (out.residual <= 1e-4).all()
    assert counts[0] < counts[2] < counts[1] < 500
    before = gpu.solve(cost[1:2], a[1:2], b[1:2], 0.1, None, counts[1] - 1, 1e-4, layout=layout)
    assert before.residual > 1e-4
    alone = gpu.solve(cost[2:], a[2:], b[2:], 0.1, None, 500, 1e-4, layout=layout)
    assert alone.iterations.tolist() == counts[2:]
    assert torch.equal(alone.plan[0], out.plan[2])


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
@pytest.mark.parametrize("shift", [-300.0, 50.0])
def test_a_constant_in_the_cost_moves_only_the_potentials(shift, layout):
    cost, a, b = problem(5, 7, seed=7, batch=1)
    cost = (cost * 256).round() / 256  # exact with the shift, too
    plain, moved = (gpu.solve(x, a, b, 0.2, None, 300, 1e-4, layout=layout) for x in (cost, cost + shift))
    assert torch.equal(plain.iterations, moved.iterations)
    torch.testing.assert_close(moved.plan, plain.plan, atol=1e-6, rtol=0)
    potentials = [out.f.unsqueeze(2) + out.g.unsqueeze(1) for out in (plain, moved)]
    torch.testing.assert_close(potentials[1] - shift, potentials[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
@pytest.mark.parametrize("width", [200, 400])
@pytest.mark.parametrize("iterations", [3, 30])
def test_small_epsilon_stays_finite_and_is_flagged(width, iterations, layout):
    cost, a, b = problem(12, 9, seed=8)
    cost[:, 0, 0], cost[:, 1, 0] = 0.0, 2.0
    epsilon = 2.0 / width
    out = gpu.solve(cost, a, b, epsilon, None, iterations, 1e-7, layout=layout)
    assert all(x.isfinite().all() for x in out)
    assert (out.residual > 1e-7).all()
    assert (out.residual < 1).all(), "annealing must bring even a few sweeps near"
    np.testing.assert_allclose(array(out.residual), marginal_errors(out, a, b), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
def test_small_epsilon_is_solved(layout):
    cost, a, b = problem(5, 7, seed=1, batch=1)
    out = gpu.solve(cost, a, b, 0.01, None, 1000, 2e-5, layout=layout)
    slow = balanced_by_loop(cost[0], a[0], b[0], 0.01)
    assert out.residual <= 2e-5
    np.testing.assert_allclose(array(out.plan)[0], slow.plan, atol=5e-5)


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
def test_annealing_shortens_the_way_to_a_small_epsilon(layout):
    """Points on a line: 71 iterations from annealed potentials, 137 without."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(size, generator=generator).sort()[0] for size in (10, 12))
    a, b = (torch.rand(size, generator=generator) ** 3 for size in (10, 12))
    cost = ((x[:, None] - y) ** 2).unsqueeze(0).to(DEVICE)
    a, b = ((mass / mass.sum()).unsqueeze(0).to(DEVICE) for mass in (a, b))
    out = gpu.solve(cost, a, b, float(cost.max() - cost.min()) / 400, None, 200, 1e-4, layout=layout)
    assert out.residual <= 1e-4
    assert out.iterations <= 90


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
@pytest.mark.parametrize("epsilon", [0.02, 0.1])
def test_vanishing_masses_have_the_right_potential(epsilon, layout):
    cost, a, b = problem(5, 7, seed=9, batch=1)
    a[:, 2], b[:, 6], b[:, 0] = 1e-37, 1e-37, 1e-20
    a, b = a / a.sum(), b / b.sum()
    out = gpu.solve(cost, a, b, epsilon, None, 1000, 3e-6, layout=layout)
    slow = balanced_by_loop(cost[0], a[0], b[0], epsilon)
    assert out.residual <= 3e-6
    potentials = array(out.f)[0][:, None] + array(out.g)[0][None, :]
    np.testing.assert_allclose(potentials, slow.f[:, None] + slow.g[None, :], atol=1e-4)


def test_no_problem_at_all():
    out = gpu.solve(*problem(5, 7, batch=0), 0.1, None, 10, 1e-4)
    assert [tuple(x.shape) for x in out] == [(0, 5, 7), (0, 5), (0, 7), (0,), (0,)]
    d_cost, x, y = gpu.implicit(out.plan, out.plan, 0.1, 0.0)
    assert (d_cost.shape, x.shape, y.shape) == ((0, 5, 7), (0, 5), (0, 7))


# --- unbalanced ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "layout"), [(-0.5, None), (0.0, None), (0.4, None), (0.2, TILED)])
@pytest.mark.parametrize(("epsilon", "reach"), [(0.1, 0.05), (0.1, 0.5), (0.02, 0.2), (1.0, 3.0)])
def test_unbalanced_solution_equals_the_slow_loop(epsilon, reach, shift, layout):
    cost, a, b = problem(5, 7, batch=1, seed=11)
    cost, a = cost + shift, 1.7 * a
    out = gpu.solve(cost, a, b, epsilon, reach, 250, 1e-6, layout=layout)
    plan, f, g = unbalanced_by_loop(cost[0], a[0], b[0], epsilon, reach)
    total = plan.sum()
    np.testing.assert_allclose(array(out.residual), marginal_errors(out, a, b, reach), atol=1e-6 * max(1, total))
    np.testing.assert_allclose(array(out.plan)[0], plan, atol=1e-5 * max(1, total))
    if total > 0.05:  # the residual is absolute: it says nothing about potentials where hardly anything moves
        np.testing.assert_allclose(array(out.f)[0], f, atol=1e-4)
        np.testing.assert_allclose(array(out.g)[0], g, atol=1e-4)


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
@pytest.mark.parametrize("reach", [0.02, 0.05, 0.5])
def test_what_is_given_up_as_too_far_keeps_its_potential(reach, layout):
    cost, a, b = problem(5, 7, batch=1, seed=9)
    cost[:, 1] = 20 - cost[:, 1]
    cost[:, :, 3] += 15
    out = gpu.solve(cost, a, b, 0.05, reach, 300, 1e-6, layout=layout)
    plan, f, g = unbalanced_by_loop(cost[0], a[0], b[0], 0.05, reach)
    np.testing.assert_allclose(array(out.plan)[0], plan, atol=1e-5)
    np.testing.assert_allclose(array(out.f)[0], f, atol=1e-4)
    np.testing.assert_allclose(array(out.g)[0], g, atol=1e-4)


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
@pytest.mark.parametrize("reach", [10.0, 1e4])
def test_a_large_reach_with_different_masses_takes_few_iterations(reach, layout):
    """33 and 29; without moving the constant 411 and more than 1000, and with it inside f and g rounding would show."""
    cost, a, b = problem(5, 7, batch=1, seed=1)
    out = gpu.solve(cost, a, 1.3 * b, 0.1, reach, 1000, 1e-4, layout=layout)
    assert out.iterations <= 50
    assert out.residual <= 1e-4
    assert abs(float(out.plan.sum()) - 1.3**0.5) < 0.05


def test_a_large_reach_is_balanced():
    cost, a, b = problem(5, 7, seed=12)
    balanced, soft = (gpu.solve(cost, a, b, 0.3, reach, 300, 1e-5) for reach in (None, 1e6))
    torch.testing.assert_close(soft.plan, balanced.plan, atol=3e-5, rtol=0)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_unbalanced_stays_finite_where_nothing_is_worth_moving_or_everything(shift):
    cost, a, b = problem(5, 7, seed=13)
    out = gpu.solve(cost + shift, a, b, 0.1, 0.5, 50, 1e-5)
    assert all(x.isfinite().all() for x in out)
    assert shift < 0 or (out.plan == 0).all()


# --- implicit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
@pytest.mark.parametrize("kappa", [0.0, 0.3, 4.0])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_implicit_gradient_equals_least_squares(n, m, kappa, layout):
    generator = torch.Generator().manual_seed(n + 1)
    plan = torch.rand(2, n, m, generator=generator) ** 4
    if n > 5 and m > 5:
        plan[:, 3], plan[:, :, 0], plan[1, :, 4] = 0, 0, 0
    plan = (plan / plan.sum((1, 2), keepdim=True)).to(DEVICE)
    gradient = torch.randn(2, n, m, generator=generator).to(DEVICE)
    out = [array(x) for x in gpu.implicit(plan, gradient, 0.1, kappa, layout=layout)]
    for k in range(2):
        d_cost, x, y = implicit_by_least_squares(array(plan)[k], array(gradient)[k], 0.1, kappa)
        rounding = 1e-6 * np.abs(array(plan)[k] * array(gradient)[k]).max() / 0.1
        np.testing.assert_allclose(out[0][k], d_cost, atol=2e-5 * np.abs(d_cost).max() + rounding)
        assert (out[1][k][x == 0] == 0).all()
        assert (out[2][k][y == 0] == 0).all()
        if kappa:
            np.testing.assert_allclose(out[1][k], x, atol=2e-5)
            np.testing.assert_allclose(out[2][k], y, atol=2e-5)
        else:
            there = array(plan)[k] > 0
            difference = (out[1][k] - x)[:, None] + (out[2][k] - y)[None, :]
            np.testing.assert_allclose(difference[there], 0, atol=3e-5)


def test_implicit_gradient_of_a_solved_problem():
    cost, a, b = problem(12, 9, seed=14, zeros_a=(2,))
    out = gpu.solve(cost, a, b, 0.05, None, 200, 1e-3)
    d_cost, _, _ = gpu.implicit(out.plan, cost, 0.05, 0.0)
    for k in range(2):
        expected, _, _ = implicit_by_least_squares(array(out.plan)[k], array(cost)[k], 0.05, 0.0)
        np.testing.assert_allclose(array(d_cost)[k], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
def test_implicit_gradient_is_as_good_for_a_tiny_loss(layout):
    plan, gradient = problem(5, 7)[0], problem(5, 7, seed=1)[0]
    small, plain = (gpu.implicit(plan, gradient * scale, 0.1, 0.0, layout=layout)[0] for scale in (2.0**-80, 1.0))
    torch.testing.assert_close(small * 2.0**80, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [None, TILED], ids=["resident", "tiled"])
def test_implicit_gradient_of_a_permutation_is_zero(layout):
    """Nothing can move: every d_cost is 0, and rounding must not be blown up to something else."""
    plan = torch.eye(7, device=DEVICE).unsqueeze(0) * torch.rand(1, 7, 1, device=DEVICE)
    gradient = problem(7, 7, batch=1)[0]
    d_cost, x, y = gpu.implicit(plan, gradient, 0.01, 0.0, layout=layout)
    torch.testing.assert_close(d_cost, torch.zeros_like(d_cost), atol=1e-4, rtol=0)
    assert (x.abs() < 10).all()
    assert (y.abs() < 10).all()


# --- limits ----------------------------------------------------------------------------------------------------------


def test_what_is_not_supported_is_refused():
    cost, a, b = problem(5, 7)
    with pytest.raises(NotImplementedError, match="float32, received torch.float64"):
        gpu.solve(cost.double(), a.double(), b.double(), 0.1, None, 10, 1e-4)
    with pytest.raises(NotImplementedError, match="1024 rows and columns, received 3 x 1025"):
        gpu.implicit(torch.zeros(1, 3, 1025, device=DEVICE), torch.zeros(1, 3, 1025, device=DEVICE), 0.1, 0.0)
    assert not gpu.supports(cost.cpu())
    assert gpu.supports(cost) == (DEVICE == "cuda")
    assert not gpu.supports(cost.double())


@pytest.mark.parametrize(
    ("n", "m", "rows", "columns", "resident"),
    [(1, 1, 16, 16, True), (49, 49, 64, 64, True), (49, 9, 64, 16, True), (128, 65, 128, 128, True),
     (129, 5, 256, 16, False), (196, 196, 16, 256, False), (784, 1024, 4, 1024, False)],
)  # fmt: skip
def test_blocks_hold_the_columns_and_resident_ones_the_rows(n, m, rows, columns, resident):
    layout = gpu._layout(torch.empty(1, n, m))
    assert (layout.rows, layout.columns, layout.resident) == (rows, columns, resident)


COMPILE = """
import re, subprocess, sys, tempfile, warnings
from pathlib import Path
warnings.simplefilter("error")
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from otcxr.ot import gpu

TYPES = {"n": "i32", "m": "i32", "max_iterations": "i32", "epsilon": "fp32", "reach": "fp32", "kappa": "fp32"}
TYPES |= {"tolerance": "fp32", "iterations_out": "*i64"}
for name, size, more in [("_solve_resident", 49, {"BALANCED": True}), ("_solve_resident", 49, {"BALANCED": False}),
                         ("_solve_tiled", 196, {"BALANCED": True}), ("_solve_tiled", 196, {"BALANCED": False}),
                         ("_implicit", 49, {"RESIDENT": True}), ("_implicit", 196, {"RESIDENT": False})]:
    layout = gpu._layout(torch.empty(1, size, size))
    constants = more | {"ROWS": layout.rows, "COLUMNS": layout.columns}
    kernel = getattr(gpu, name)
    names = [x.name for x in kernel.params]
    types = {x: "constexpr" if x in constants else TYPES.get(x, "*fp32") for x in names}
    aligned = {(k,): [["tt.divisibility", 16]] for k, x in enumerate(names) if types[x].startswith("*")}
    options = {"num_warps": layout.warps, "maxnreg": layout.registers, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    block = re.search(r"threadsPerWarp = .([0-9]+, [0-9]+, [0-9]+)", built.asm["ttgir"])[1]
    print(name, len(built.asm["cubin"]) > 1000, block, sep=";")
"""


def test_kernels_compile_for_an_h100(tmp_path):
    """Triton brings all it needs to build for a GPU that is not here: what the interpreter forgives shows there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    source = Path(gpu.__file__).parents[2]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert re.fullmatch(r"\w+;True;1, 4, 8", line), "8 lanes of a warp along columns, 4 along rows"


# --- on a device -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_all_of_this_file_on_a_cuda_device():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OTCXR_TEST_DEVICE": "cuda"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if DEVICE == "cuda":

    @pytest.mark.parametrize(("batch", "n", "m"), [(512, 49, 49), (64, 49, 9), (32, 196, 196), (4, 784, 784)])
    def test_usual_sizes_are_solved(batch, n, m):
        cost, a, b = problem(n, m, batch=batch, seed=20)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = gpu.solve(cost, a, b, 0.05, None, 2000, 1e-4)
        d_cost, x, y = gpu.implicit(out.plan, cost, 0.05, 0.0)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= 4 * cost.numel() * 4 + 10e6
        assert (out.residual <= 1e-4).all()
        np.testing.assert_allclose(marginal_errors(out, a, b), 0, atol=1.1e-4)
        expected, _, _ = implicit_by_least_squares(array(out.plan)[0], array(cost)[0], 0.05, 0.0)
        np.testing.assert_allclose(array(d_cost)[0], expected, atol=1e-3 * np.abs(expected).max())
        assert x.isfinite().all()
        assert y.isfinite().all()

    @pytest.mark.parametrize("size", [49, 196])
    def test_solve_and_implicit_can_be_captured_in_a_graph(size):
        cost, a, b = problem(size, size, batch=8, seed=21)

        def step():
            out = gpu.solve(cost, a, b, 0.1, None, 500, 1e-4)
            return out, gpu.implicit(out.plan, cost, 0.1, 0.0)[0]

        step()  # compile
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, d_captured = step()
        cost.copy_(problem(size, size, batch=8, seed=22)[0])
        graph.replay()
        torch.cuda.synchronize()
        out, d_cost = step()
        torch.testing.assert_close(captured.plan, out.plan)
        torch.testing.assert_close(d_captured, d_cost)
        assert torch.equal(captured.iterations, out.iterations)
