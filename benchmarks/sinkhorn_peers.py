"""Contestants of bench_sinkhorn.py: ours and the peers behind one interface, the workload, and a float64 reference.

Every contestant is used in its fastest documented mode for the objective at hand; what it differentiates is said in
``differentiates`` and goes into the results. R is the entropic value, S the sharp cost <P, C>.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["CONTESTANTS", "Contestant", "Outcome", "Problem", "gap", "marginal_error", "reference", "workload"]

Knob = dict[str, Any]
MOST = 5000  # iterations no contestant may exceed
TIGHTEST = 1e-30  # a tolerance nobody reaches: forces the number of iterations


class Problem(NamedTuple):
    """A batch of problems: cost (B, n, m) in [0, 2], masses a (B, n) and b (B, m) summing to 1; float32."""

    cost: Tensor
    a: Tensor
    b: Tensor


class Outcome(NamedTuple):
    """Plan and gradients of the summed objective as float64 arrays; None where the contestant gives no gradient."""

    plan: np.ndarray
    cost: np.ndarray | None
    a: np.ndarray | None
    b: np.ndarray | None

    def finite(self) -> bool:
        """Whether plan and gradients hold no NaN or infinity."""
        return all(x is None or bool(np.isfinite(x).all()) for x in self)


def workload(B: int, n: int, m: int, seed: int, d: int = 32) -> Problem:
    """Cosine cost between two sets of features, about half with a counterpart, and learned-like masses."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, n, d, generator=g)
    at = torch.stack([torch.randint(0, n, (m,), generator=g) for _ in range(B)])
    y = torch.gather(x, 1, at[..., None].expand(B, m, d)) * 0.8 + torch.randn(B, m, d, generator=g) * 0.8
    x, y = torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(y, dim=-1)
    cost = (1.0 - x @ y.transpose(-1, -2)).clamp(0.0, 2.0)
    a = 0.9 * torch.randn(B, n, generator=g).softmax(-1) + 0.1 / n
    b = 0.9 * torch.randn(B, m, generator=g).softmax(-1) + 0.1 / m
    return Problem(cost, a, b)


def marginal_error(plan: np.ndarray, problem: Problem) -> float:
    """L1 error of the worse marginal of the worst problem of the batch, in float64; NaN if the plan holds one."""
    a, b = problem.a.double().numpy(), problem.b.double().numpy()
    plan = np.asarray(plan, dtype=np.float64)
    worse = np.maximum(np.abs(plan.sum(-1) - a).sum(-1), np.abs(plan.sum(-2) - b).sum(-1))
    return float(worse.max())


def _double(x: Any) -> np.ndarray | None:
    if x is None:
        return None
    return (x.detach().double().numpy() if isinstance(x, Tensor) else np.asarray(x)).astype(np.float64)


class Contestant:
    """One solver in one mode.

    ``role`` is "ours", "peer", "by hand" (a peer whose gradient its user has to form) or "information".
    """

    name = ""
    title = ""
    role = "peer"
    objectives = "RS"
    differentiates: dict[str, str] = {}  # noqa: RUF012
    share = 1.0  # of the time allowed
    follows = ""  # the contestant that makes the very same iterations
    tape = 0.0  # plans' worth of memory that one iteration adds to the tape, roughly

    def knobs(self, target: float) -> list[Knob] | None:
        """Settings to try in turn for a marginal error; None: search the fewest iterations."""
        return None

    def iterations(self, count: int) -> Knob:
        """The setting that runs exactly ``count`` iterations."""
        raise NotImplementedError

    def plan(self, problem: Problem, epsilon: float, knob: Knob) -> np.ndarray:
        """Solve without gradients (used to search the knob)."""
        raise NotImplementedError

    def prepare(self, problem: Problem, objective: str, epsilon: float, knob: Knob) -> Callable[[], Any]:
        """Make ready what must not be timed; the result runs forward and backward once."""
        raise NotImplementedError

    def read(self, raw: Any) -> Outcome:
        """Turn what the timed call returned into arrays."""
        plan, *gradients = raw
        return Outcome(_double(plan), *(_double(x) for x in gradients))  # type: ignore[arg-type]


class Ours(Contestant):
    """otcxr.ot.sinkhorn with one back end."""

    role = "ours"
    differentiates = {"R": "cost, a, b (envelope)", "S": "cost, a, b (implicit)"}  # noqa: RUF012

    def __init__(self, backend: str) -> None:
        self.name, self.title, self.backend = backend, f"ours, {backend}", backend

    def knobs(self, target: float) -> list[Knob]:
        return [{"tolerance": target, "max_iterations": MOST}]

    def iterations(self, count: int) -> Knob:
        return {"tolerance": TIGHTEST, "max_iterations": count}

    def prepare(self, problem: Problem, objective: str, epsilon: float, knob: Knob) -> Callable[[], Any]:
        from otcxr.ot import sinkhorn

        words = {**knob, "epsilon": epsilon, "objective": {"R": "value", "S": "sharp"}[objective]}
        if "backend" in inspect.signature(sinkhorn).parameters:
            words["backend"] = self.backend
        elif self.backend != "portable":
            raise NotImplementedError("otcxr.ot.sinkhorn has no argument 'backend' yet")
        leaves = [x.detach().clone().requires_grad_() for x in problem]

        def call() -> Any:
            transport = sinkhorn(*leaves, **words)
            return transport.plan, *torch.autograd.grad(transport.value.sum(), leaves), transport.iterations

        return call

    def read(self, raw: Any) -> Outcome:
        return super().read(raw[:4])


class Pot(Contestant):
    """ot.solve_batch of POT. R: envelope gradient. S: autodiff through all iterations."""

    def __init__(self, name: str, method: str, grads: dict[str, str], *, masses: bool = False) -> None:
        self.name, self.method, self.grads, self.masses = name, method, grads, masses
        self.title = {"sinkhorn": "POT", "log_sinkhorn": "POT, log domain"}[method]
        self.follows = "" if name == "pot" else "pot"
        self.objectives = "".join(grads)
        self.tape = 2.0 if method == "sinkhorn" else 2.3  # the former is mostly fragmentation of the heap
        self.share = 1.0 if method == "sinkhorn" else 0.3
        inputs = "cost, a, b" if masses else "cost"
        self.differentiates = {key: f"{inputs} (grad={grad!r})" for key, grad in grads.items()}
        if grads == {"R": "detach"}:
            self.title += ", envelope by hand"
            self.role, self.tape = "by hand", 0.0
            self.differentiates = {"R": "cost (grad='detach'; its user differentiates sum(plan * cost))"}

    def iterations(self, count: int) -> Knob:
        return {"max_iter": count, "tol": 0.0}

    def _solve(self, leaves: list[Tensor] | Problem, epsilon: float, grad: str, knob: Knob) -> Any:
        import ot

        cost, a, b = leaves
        return ot.solve_batch(cost, reg=epsilon, a=a, b=b, method=self.method, reg_type="kl", grad=grad, **knob)

    def plan(self, problem: Problem, epsilon: float, knob: Knob) -> np.ndarray:
        with torch.no_grad():
            return _double(self._solve(problem, epsilon, "detach", knob).plan)  # type: ignore[return-value]

    def prepare(self, problem: Problem, objective: str, epsilon: float, knob: Knob) -> Callable[[], Any]:
        grad = self.grads[objective]
        leaves = [x.detach().clone() for x in problem]
        wanted = leaves if self.masses else leaves[:1]
        for leaf in wanted:
            leaf.requires_grad_()

        def call() -> Any:
            solved = self._solve(leaves, epsilon, grad, knob)
            whole = objective == "R" and grad != "detach"
            loss = solved.value.sum() if whole else (solved.plan * leaves[0]).sum()
            got = torch.autograd.grad(loss, wanted, allow_unused=True)
            return solved.plan.detach(), *got, *(None,) * (3 - len(got))

        return call


class GeomLoss(Contestant):
    """geomloss.ot.solve_batch: symmetric updates, annealed over all iterations, no stopping rule."""

    name, title, share = "geomloss", "GeomLoss", 0.3
    differentiates = {  # noqa: RUF012
        "R": "cost, a, b (of .value, through its last step)",
        "S": "cost, a, b (of sum(plan * cost), through its last step)",
    }

    def iterations(self, count: int) -> Knob:
        return {"max_iter": count}

    def plan(self, problem: Problem, epsilon: float, knob: Knob) -> np.ndarray:
        from geomloss import ot

        with torch.no_grad():
            solved = ot.solve_batch(problem.cost, reg=epsilon, a=problem.a, b=problem.b, **knob)
            return _double(solved.plan)  # type: ignore[return-value]

    def prepare(self, problem: Problem, objective: str, epsilon: float, knob: Knob) -> Callable[[], Any]:
        from geomloss import ot

        leaves = [x.detach().clone().requires_grad_() for x in problem]

        def call() -> Any:
            solved = ot.solve_batch(leaves[0], reg=epsilon, a=leaves[1], b=leaves[2], **knob)
            loss = solved.value.sum() if objective == "R" else (solved.plan * leaves[0]).sum()
            got = torch.autograd.grad(loss, leaves, allow_unused=True)
            return solved.plan.detach(), *got

        return call


class Ott(Contestant):
    """OTT-JAX, vmap over the problems, compiled before it is timed; R by Danskin, S by implicit differentiation."""

    differentiates = {  # noqa: RUF012
        "R": "cost, a, b (reg_ot_cost, Danskin)",
        "S": "cost, a, b (sum(matrix * cost), implicit)",
    }

    def __init__(self, name: str, *, lse_mode: bool) -> None:
        self.name, self.lse_mode = name, lse_mode
        self.title = "OTT-JAX, log domain" if lse_mode else "OTT-JAX, kernel"
        self.share = 0.3 if lse_mode else 1.0
        self.compiled: dict[Any, Any] = {}

    def knobs(self, target: float) -> list[Knob]:
        # It measures what we measure, so threshold = target stops as early as it can, but in float32; the others help
        # its faster mode where the first raises (its linear solver sometimes does).
        tries = ((1.0, 10), (0.95, 10)) if self.lse_mode else ((1.0, 10), (0.95, 10), (0.95, 5), (0.5, 10))
        return [
            {"threshold": target * times, "max_iterations": MOST, "min_iterations": 0, "inner_iterations": inner}
            for times, inner in tries
        ]

    def iterations(self, count: int) -> Knob:
        return {"threshold": TIGHTEST, "max_iterations": count, "min_iterations": count, "inner_iterations": 10}

    def prepare(self, problem: Problem, objective: str, epsilon: float, knob: Knob) -> Callable[[], Any]:
        import jax
        import jax.numpy as jnp

        inputs = [jnp.asarray(x.numpy()) for x in problem]
        rest = {key: value for key, value in knob.items() if key != "threshold"}
        key = (objective, epsilon, tuple(rest.items()), problem.cost.shape)
        if key not in self.compiled:
            function = jax.value_and_grad(self._total(objective, epsilon, rest), argnums=(0, 1, 2), has_aux=True)
            self.compiled[key] = jax.jit(function).lower(*inputs, jnp.float32(0.0)).compile()
        run, threshold = self.compiled[key], jnp.float32(knob["threshold"])

        def call() -> Any:
            (_, potentials), gradients = jax.block_until_ready(run(*inputs, threshold))
            return inputs[0], epsilon, potentials, gradients

        return call

    def _total(self, objective: str, epsilon: float, knob: Knob) -> Callable[..., Any]:
        import jax
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn

        def one(cost: Any, a: Any, b: Any, threshold: Any) -> Any:
            problem = linear_problem.LinearProblem(geometry.Geometry(cost, epsilon=epsilon), a=a, b=b)
            solved = sinkhorn.Sinkhorn(lse_mode=self.lse_mode, threshold=threshold, **knob)(problem)
            value = solved.reg_ot_cost if objective == "R" else (solved.matrix * cost).sum()
            return value, (solved.f, solved.g)

        def total(cost: Any, a: Any, b: Any, threshold: Any) -> Any:
            values, potentials = jax.vmap(one, (0, 0, 0, None))(cost, a, b, threshold)
            return values.sum(), potentials

        return total

    def read(self, raw: Any) -> Outcome:
        import jax.numpy as jnp

        cost, epsilon, (f, g), gradients = raw
        plan = jnp.exp((f[:, :, None] + g[:, None, :] - cost) / epsilon)  # what its .matrix computes, in float32
        return super().read((plan, *gradients))


class Naive(Contestant):
    """The loop everybody writes first: log domain in torch, autograd through all iterations."""

    name, title, share, tape, follows = "naive", "naive loop", 0.3, 2.0, "pot"
    differentiates = {"R": "cost, a, b (autograd)", "S": "cost, a, b (autograd)"}  # noqa: RUF012

    def iterations(self, count: int) -> Knob:
        return {"iterations": count}

    @staticmethod
    def _plan(cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: float, iterations: int) -> Tensor:
        kernel = -cost / epsilon
        u, v = torch.zeros_like(log_a), torch.zeros_like(log_b)
        for _ in range(iterations):
            u = log_a - torch.logsumexp(kernel + v.unsqueeze(-2), -1)
            v = log_b - torch.logsumexp(kernel + u.unsqueeze(-1), -2)
        return (kernel + u.unsqueeze(-1) + v.unsqueeze(-2)).exp()

    def plan(self, problem: Problem, epsilon: float, knob: Knob) -> np.ndarray:
        cost, a, b = problem
        return _double(self._plan(cost, a.log(), b.log(), epsilon, **knob))  # type: ignore[return-value]

    def prepare(self, problem: Problem, objective: str, epsilon: float, knob: Knob) -> Callable[[], Any]:
        leaves = [x.detach().clone().requires_grad_() for x in problem]

        def call() -> Any:
            cost, a, b = leaves
            plan = self._plan(cost, a.log(), b.log(), epsilon, **knob)
            loss = (plan * cost).sum()
            if objective == "R":
                product = a.unsqueeze(-1) * b.unsqueeze(-2)
                loss = loss + epsilon * ((plan * (plan / product + 1e-30).log()).sum() - plan.sum() + product.sum())
            return plan.detach(), *torch.autograd.grad(loss, leaves)

        return call


class Exact(Contestant):
    """ot.emd in a loop: another problem (no regularisation), for information."""

    name, title, role, share = "exact", "exact (ot.emd)", "information", 0.3
    differentiates = {"R": "cost, a, b (duals)", "S": "cost, a, b (duals)"}  # noqa: RUF012

    def knobs(self, target: float) -> list[Knob]:
        return [{}]

    def prepare(self, problem: Problem, objective: str, epsilon: float, knob: Knob) -> Callable[[], Any]:
        import ot

        cost, a, b = (x.double().numpy() for x in problem)
        a, b = a / a.sum(-1, keepdims=True), b / b.sum(-1, keepdims=True)

        def call() -> Any:
            solved = [ot.emd(*one, numItermax=10**7, log=True) for one in zip(a, b, cost, strict=True)]
            plan = np.stack([one[0] for one in solved])
            return plan, plan, np.stack([one[1]["u"] for one in solved]), np.stack([one[1]["v"] for one in solved])

        return call


CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Ours("portable"),
        Ours("native"),
        Pot("pot", "sinkhorn", {"R": "envelope", "S": "autodiff"}),
        Pot("pot-log", "log_sinkhorn", {"R": "envelope", "S": "autodiff"}),
        Pot("pot-hand", "sinkhorn", {"R": "detach"}),
        GeomLoss(),
        Ott("ott-kernel", lse_mode=False),
        Ott("ott-log", lse_mode=True),
        Naive(),
        Exact(),
    )
}


# Reference in float64 --------------------------------------------------------------------------------------------


def reference(problem: Problem, epsilon: float, residual: float = 1e-12) -> dict[str, Any]:
    """Solve every problem to ``residual`` in float64 by annealed log-domain Sinkhorn and Newton on the dual.

    Returns the plan and gradients of R and S as Outcomes (0 where there is no mass), the largest residual left and
    the smallest eigenvalue, beside the 0 of the free constant, of the dual's Hessian scaled to unit diagonal.
    Masses are divided by their float64 sums first: in float32 the two totals differ in the eighth digit.
    """
    cost, a, b = (x.double().numpy() for x in problem)
    out: dict[str, list[tuple[np.ndarray, ...]]] = {"R": [], "S": []}
    worst, smallest = 0.0, 1.0
    for one, mass, other in zip(cost, a, b, strict=True):
        rows, columns = np.flatnonzero(mass > 0), np.flatnonzero(other > 0)
        inner = one[np.ix_(rows, columns)]
        f, g, plan, left = _solve_one(inner, mass[rows] / mass.sum(), other[columns] / other.sum(), epsilon, residual)
        worst = max(worst, left)
        scaled = plan / np.sqrt(plan.sum(1)[:, None] * plan.sum(0)[None, :])
        smallest = min(smallest, 1.0 - float(np.linalg.svd(scaled, compute_uv=False)[1]))
        alpha, beta = _implicit(plan, (inner * plan).sum(1), (inner * plan).sum(0))
        sharp = plan + plan * (alpha[:, None] + beta[None, :] - inner) / epsilon
        full = np.zeros_like(one)
        for objective, parts in (("R", (plan, plan, f, g)), ("S", (plan, sharp, alpha, beta))):
            wide = []
            for part in parts:
                if part.ndim == 2:
                    whole = full.copy()
                    whole[np.ix_(rows, columns)] = part
                else:
                    whole = np.zeros(len(mass) if part is parts[2] else len(other))
                    whole[rows if part is parts[2] else columns] = part
                wide.append(whole)
            out[objective].append(tuple(wide))
    gathered = {key: Outcome(*(np.stack(part) for part in zip(*many, strict=True))) for key, many in out.items()}
    return {**gathered, "residual": worst, "smallest_eigenvalue": smallest}


def _solve_one(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, epsilon: float, residual: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Potentials relative to a b^T, plan and L1 residual of one problem with positive masses."""
    from scipy.special import logsumexp

    log_a, log_b = np.log(a), np.log(b)
    f, g = np.zeros_like(a), np.zeros_like(b)
    width = float(np.ptp(cost))
    schedule = [width * 0.7**k for k in range(200) if width * 0.7**k > epsilon] + [epsilon] * 300
    for current in schedule:
        f = -current * logsumexp((g[None, :] - cost) / current + log_b[None, :], axis=1)
        g = -current * logsumexp((f[:, None] - cost) / current + log_a[:, None], axis=0)

    for _ in range(1000):
        plan = np.exp((f[:, None] + g[None, :] - cost) / epsilon + log_a[:, None] + log_b[None, :])
        rows, columns = a - plan.sum(1), b - plan.sum(0)
        left = max(float(np.abs(rows).sum()), float(np.abs(columns).sum()))
        if left <= residual:
            return f, g, plan, left
        step_f, step_g = _implicit(plan, epsilon * rows, epsilon * columns)
        # No entry of the plan may change by more than a factor e: then every step raises the (concave) dual, while
        # the residual of nearly separate problems may well rise on the way.
        change = np.abs(step_f[:, None] + step_g[None, :]).max() / epsilon
        size = 1.0 / max(1.0, float(change))
        f, g = f + size * step_f, g + size * step_g
    raise RuntimeError(f"the reference stands at a residual of {left:.3g} instead of {residual:g}")


def _implicit(plan: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve [diag(r) P; P^T diag(c)] (x, y) = (rows, columns) with the plan's own marginals r and c.

    The system is scaled to unit diagonal and its one null vector (the free constant) is removed by adding it back.
    """
    n = len(rows)
    root = np.sqrt(np.concatenate([plan.sum(1), plan.sum(0)]))
    matrix = np.eye(len(root))
    matrix[:n, n:] = plan / root[:n, None] / root[None, n:]
    matrix[n:, :n] = matrix[:n, n:].T
    null = np.concatenate([root[:n], -root[n:]])
    null /= np.linalg.norm(null)
    right = np.concatenate([rows, columns]) / root
    right -= null * (null @ right)
    solution = np.linalg.lstsq(matrix + np.outer(null, null), right, rcond=None)[0] / root
    return solution[:n], solution[n:]


def gap(got: np.ndarray | None, want: np.ndarray, present: np.ndarray | None = None) -> list[float] | None:
    """Relative L2 error per problem; with ``present`` (B, n), potentials: centred over the positions with mass."""
    if got is None:
        return None
    errors = []
    for at in range(len(want)):
        x, y = got[at], want[at]
        if present is not None:
            x, y = x[present[at]], y[present[at]]
            x, y = x - x.mean(), y - y.mean()
        errors.append(float(np.linalg.norm(x - y) / np.linalg.norm(y)))
    return errors
