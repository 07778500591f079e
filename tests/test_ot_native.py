"""The compiled back end: its primitives, its threads, its place beside the portable one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit

from otcxr.ot import backends, kernels, simd, sinkhorn

DTYPES = [np.float32, np.float64]


def test_the_cache_on_disk_notices_new_primitives():
    digest = hashlib.sha256(Path(simd.__file__).read_bytes()).hexdigest()[:16]
    assert digest == kernels._SIMD_DIGEST, f'simd.py changed: set _SIMD_DIGEST = "{digest}" in kernels.py'


# --- primitives ------------------------------------------------------------------------------------------------------


@njit
def apply_exp(x, out):
    for i in range(0, x.size, simd.lanes(x)):
        simd.store(out, i, simd.exp(simd.load(x, i)))


@njit
def apply_log(x, out):
    for i in range(0, x.size, simd.lanes(x)):
        simd.store(out, i, simd.log(simd.load(x, i)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_is_right_to_the_last_digits(dtype):
    low, high = (-87, 88) if dtype == np.float32 else (-708, 709)
    x = np.linspace(low, high, 1 << 14).astype(dtype)
    out = np.empty_like(x)
    apply_exp(x, out)
    exact = np.exp(x.astype(np.longdouble))
    assert np.abs(out / exact - 1).max() < 2 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_at_the_ends(dtype):
    low, high = (-87, 88) if dtype == np.float32 else (-708, 709)
    x = np.zeros(16, dtype)
    x[:5] = [-1e30, low - 1, 0, high + 1, 1e30]
    out = np.empty_like(x)
    apply_exp(x, out)
    assert (out[:3] == [0, 0, 1]).all()
    assert np.isfinite(out).all()
    assert np.allclose(out[3:5], np.exp(dtype(high)), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_is_right_to_the_last_digits(dtype):
    tiny = float(np.finfo(dtype).tiny)
    x = np.exp(np.linspace(np.log(2 * tiny), -np.log(2 * tiny), 1 << 14)).astype(dtype)
    x[: 1 << 12] = np.linspace(0.5, 2, 1 << 12)
    out = np.empty_like(x)
    apply_log(x, out)
    exact = np.log(x.astype(np.longdouble))
    assert (np.abs(out - exact) <= 2 * np.finfo(dtype).eps * np.maximum(1, np.abs(exact))).all()
    apply_log(zero := np.zeros(16, dtype), out := np.empty_like(zero))
    assert np.allclose(out, np.log(tiny), rtol=1e-5)


@njit
def copy_part(x, out, start, count):
    simd.store_part(out, start, simd.load_part(x, start, count, x[0]), count + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_parts_of_vectors_touch_nothing_else(dtype, count):
    x = np.arange(1, 33).astype(dtype)
    out = np.zeros(32, dtype)
    copy_part(x, out, 3, count)
    expected = np.zeros(32, dtype)
    expected[3 : 3 + count] = x[3 : 3 + count]
    expected[3 + count] = x[0]
    assert (out == expected).all()


@njit
def reductions(x, y):
    a, b = simd.load(x, 0), simd.load(y, 0)
    product = simd.fma(a, b, a) - a * b
    picked = simd.where_equal(a, simd.maximum(a, b), a, b) / simd.splat(x.dtype.type(2))
    return simd.total(product), simd.largest(picked), simd.smallest(simd.minimum(a, b)), simd.total(simd.magnitude(b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic(dtype):
    count = 64 // np.dtype(dtype).itemsize
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, count)).astype(dtype)
    expected = x.sum(), np.maximum(x, y).max() / 2, np.minimum(x, y).min(), np.abs(y).sum()
    assert np.allclose(reductions(x, y), expected, rtol=1e-5, atol=1e-5)


# --- threads ---------------------------------------------------------------------------------------------------------


def batch(count=300, n=20, m=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cost = 2 * torch.rand(count, n, m, generator=generator)
    a, b = (torch.rand(count, k, generator=generator).softmax(-1) for k in (n, m))
    return cost, a, b


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def with_threads(count, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("objective", ["value", "sharp"])
def test_any_number_of_threads_gives_the_same_bits(objective):
    given = [x.requires_grad_() for x in batch(2000)]

    def run():
        out = sinkhorn(*given, objective=objective, backend="native")
        return *out, *torch.autograd.grad(out.value.sum() + out.plan.square().sum(), given)

    alone = with_threads(1, run)
    assert same(alone, with_threads(2, run))
    assert same(alone, with_threads(5, run))


def test_python_threads_may_call_it_at_once():
    batches = [batch(200, seed=seed) for seed in range(6)]
    expected = [sinkhorn(*given, backend="native") for given in batches]
    got = [None] * 6

    def work(k):
        got[k] = sinkhorn(*batches[k], backend="native")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(x, y) for x, y in zip(expected, got, strict=True))


def test_a_forked_process_has_threads_of_its_own():
    """The threads of the parent are not there after a fork; waiting for them would never end."""
    # below the front door: torch's own threads do not survive a fork, whatever is done here
    code = """
import os, sys, torch
from otcxr.ot import native
torch.set_num_threads(2)
cost = torch.rand(2000, 12, 12)
mass = torch.full((2000, 12), 1 / 12)
expected = native.solve(cost, mass, mass, 0.05, None, 100, 1e-4).residual.numpy()
assert native._pool.cache_info().currsize == 1, "this must have used threads"
child = os.fork()
if child == 0:
    got = native.solve(cost, mass, mass, 0.05, None, 100, 1e-4).residual.numpy()
    os._exit(0 if (got == expected).all() else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120, check=False).returncode == 0


# --- beside the portable one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 40), (33, 16), (49, 49), (49, 9), (130, 70)])
@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("objective", ["value", "sharp"])
def test_native_equals_portable(n, m, reach, objective):
    given = [x.requires_grad_() for x in batch(5, n, m, seed=n)]
    results = []
    for backend in ("native", "portable"):
        out = sinkhorn(*given, tolerance=1e-6, max_iterations=5000, reach=reach, objective=objective, backend=backend)
        assert out.converged.all()
        weights = torch.linspace(-1, 1, n * m).reshape(n, m)
        loss = out.value.sum() + (out.plan * weights).sum()
        results.append((out.plan, out.value, *torch.autograd.grad(loss, given)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-4 * float(y.detach().abs().max()))


def test_it_is_the_choice_on_the_cpu():
    assert backends()[0] == "native"
    given = batch(3)
    assert same(sinkhorn(*given), sinkhorn(*given, backend="native"))


def test_without_numba_the_portable_path_is_taken_and_says_nothing():
    code = """
import sys, warnings
sys.modules["numba"] = None
import torch
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
from otcxr.ot import backends, sinkhorn
assert backends() == ("portable",), backends()
assert sinkhorn(torch.rand(3, 4, 5)).converged.all()
try:
    sinkhorn(torch.rand(3, 4, 5), backend="native")
except ImportError as error:
    assert "otcxr[fast]" in str(error), error
else:
    raise AssertionError("no error")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


def test_a_broken_numba_is_reported_and_not_fatal(tmp_path):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('numba needs another numpy')")
    code = "import torch; from otcxr.ot import sinkhorn; print(bool(sinkhorn(torch.rand(4, 4)).converged))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "True"
    assert "numba is installed but cannot be imported" in run.stderr
    assert "needs another numpy" in run.stderr
