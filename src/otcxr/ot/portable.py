"""The solver in plain PyTorch, for any device: batches of row-vector products, converged problems leave the batch.

    K = exp((f0 + g0 - C) / epsilon)            formed once, and again when the scalings get too large
    s = 1 / (K v),   u = a s                    rows     (s = (K v)^-lambda exp(-(1 - lambda) f0 / epsilon) with reach)
    w = 1 / (K^T u), v = b w                    columns  (the same with g0), with momentum on ln w
    P = u K v,   f = f0 + epsilon ln s,   g = g0 + epsilon ln w

Problems that would creep are finished by Newton's method on the columns: h = b - P^T 1 is removed by v <- v exp(t y),
S y = h, S = diag(c) - P^T diag(1/r) P in float64. A range of the cost above 40 epsilon is reached by halving epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from otcxr.ot.problem import Solution

__all__ = ["implicit", "solve"]

_CHUNK_BYTES = 2 * 1024 * 1024  # of cost worked on at once on a CPU: the kernels stay in its caches, memory small
_BLOCK = 5  # iterations between two looks at the errors
_TINY = 1e-37
_WIDTH = 40.0  # range of cost / epsilon that a kernel in single precision holds
_LIMIT = 1e12  # of the scalings, beyond which they go into the potentials


def solve(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, reach: float | None, max_iterations: int, tolerance: float
) -> Solution:
    """Solve (B, n, m) problems. See ``otcxr.ot.sinkhorn`` for the meaning of the arguments."""
    batch = cost.shape[0]
    out = Solution(
        torch.empty_like(cost, memory_format=torch.contiguous_format), torch.empty_like(a), torch.empty_like(b),
        cost.new_empty(batch), torch.zeros(batch, dtype=torch.int64, device=cost.device),
    )  # fmt: skip
    with _alone(cost):
        for part in _chunks(cost):
            _solve_chunk(
                cost[part], a[part], b[part], epsilon, reach, max_iterations, tolerance,
                Solution(*(x[part] for x in out)),
            )  # fmt: skip
    return out


def _chunks(x: Tensor, copies: int = 1) -> Iterator[slice]:
    """The batch in parts of which so many copies fit the cache of a CPU; elsewhere in one."""
    size = max(1, x.shape[1] * x.shape[2] * x.element_size() * copies)
    step = max(1, _CHUNK_BYTES // size) if x.device.type == "cpu" else max(1, len(x))
    return (slice(start, start + step) for start in range(0, len(x), step))


@contextmanager
def _alone(x: Tensor) -> Iterator[None]:
    """On a CPU, work in the calling thread only, and give it its helpers back afterwards.

    Thousands of operations of some microseconds each end in a barrier; with one helper that another process keeps from
    running, each barrier waits for a turn of the scheduler.
    """
    threads = torch.get_num_threads()
    if x.device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _solve_chunk(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, reach: float | None, budget: int, tolerance: float,
    out: Solution,
) -> None:  # fmt: skip
    """Solve those with a moderate range of the cost at once and the others by coming down in epsilon."""
    here, there = a > 0, b > 0
    if not (here.all() and there.all()):  # what stands at absent positions must not matter
        present = here.unsqueeze(-1) & there.unsqueeze(-2)
        middle = cost.where(present, 0.0).sum((-1, -2), keepdim=True) / present.sum((-1, -2), keepdim=True)
        cost = cost.where(present, middle)
    width = cost.amax((-1, -2)) - cost.amin((-1, -2))
    hard = width > _WIDTH * epsilon
    for wanted in (False, True):
        at = (hard if wanted else ~hard).nonzero().squeeze(-1)
        if len(at) == 0:
            continue
        whole = len(at) == len(cost)
        given = (cost, a, b) if whole else (cost[at], a[at], b[at])
        batch = _Batch(*given, reach, tolerance, out if whole else None)
        batch.solve(epsilon, float(width[at].max()) if wanted else 0.0, budget)
        if not whole:
            for target, part in zip(out, batch.out, strict=True):
                target[at] = part


class _Batch:
    """Problems that are iterated together. ``at`` says which of them are still in the arrays."""

    def __init__(
        self, cost: Tensor, a: Tensor, b: Tensor, reach: float | None, tolerance: float, out: Solution | None
    ) -> None:
        count = len(cost)
        self.cost, self.a, self.b, self.reach, self.tolerance = cost, a, b, reach, tolerance
        self.out = out or Solution(
            torch.empty_like(cost), torch.empty_like(a), torch.empty_like(b), cost.new_empty(count),
            torch.zeros(count, dtype=torch.int64, device=cost.device),
        )  # fmt: skip
        self.at = torch.arange(count, device=cost.device)
        self.g0 = torch.zeros_like(b)
        self.theta: Tensor | None = None  # second largest eigenvalue of an iteration, of each problem; None: not known
        self.past: Tensor | None = None  # ln of 1 / w an iteration ago
        self.moved = False  # whether the last Newton step was good for any problem

    def solve(self, epsilon: float, width: float, budget: int) -> None:
        """Come down in epsilon as far as the range of the cost asks for; then until all are within tolerance."""
        start = width / _WIDTH
        levels = min(1 + math.ceil(math.log2(start / epsilon)), budget) if start > epsilon else 1
        spent = 0
        for level in range(levels - 1, -1, -1):
            if level < levels - 1:
                self.g0 = self._g()
            self._enter(epsilon * 2.0**level)
            if level > 0:
                spent += self._run(max(1, min(40, budget - spent - level)), 0.02, spent, last=False)
            else:
                self._run(budget - spent, self.tolerance, spent, last=True)

    # --- state at one epsilon ---

    def _enter(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.kappa = 0.0 if self.reach is None else epsilon / self.reach
        self.shrink = 1 / (1 + self.kappa)
        if self.reach is not None:
            for _ in range(3):
                self.f0 = _soft_minimum(self.cost, self.g0, self.b, epsilon) * self.shrink
                self.g0 = _soft_minimum(self.cost.mT, self.f0, self.a, epsilon) * self.shrink
                self._translate(self.reach)
        self._form()

    def _form(self) -> None:
        """Kernel from g0; f0 is the largest value of every row (balanced), or its exact update (with reach)."""
        exponent = self.g0.unsqueeze(-2) - self.cost
        if self.reach is None:
            self.f0 = -exponent.amax(-1)
        else:
            self.f0 = _soft_minimum(self.cost, self.g0, self.b, self.epsilon) * self.shrink
        self.kernel = exponent.add_(self.f0.unsqueeze(-1)).mul_(1 / self.epsilon).clamp_max_(80.0).exp_()
        self.w, self.v = torch.ones_like(self.b), self.b.clone()
        self._plain()

    def _translate(self, reach: float) -> None:
        """Move a constant from f0 to g0: t = reach / 2 ln(<a, exp(-f / reach)> / <b, exp(-g / reach)>), the best one.

        Iterations alone would take very many to find it when the masses differ and reach is large against epsilon.
        """
        left = torch.logsumexp(self.a.log() - self.f0 / reach, -1)
        right = torch.logsumexp(self.b.log() - self.g0 / reach, -1)
        shift = (0.5 * reach * (left - right)).unsqueeze(-1)
        self.f0, self.g0 = self.f0 + shift, self.g0 - shift

    def _f(self) -> Tensor:
        return self.f0 - self.epsilon * self.s.log()

    def _g(self) -> Tensor:
        return self.g0 - self.epsilon * self.w.log()

    def _rows(self) -> None:
        """One half iteration: 1 / s and u from v, and c = K^T u."""
        self.s = self._inverse_scaling(_products(self.v, self.kernel.mT), self.f0)
        self.u = self.a / self.s
        self.c = _products(self.u, self.kernel)

    def _columns(self) -> None:
        """The other half iteration: 1 / w and v from c, with momentum on ln w where ``theta`` is known."""
        if self.theta is None:
            self.w = self._inverse_scaling(self.c, self.g0)
        else:
            new = self._inverse_scaling(self.c, self.g0).log()
            now = self.w.log()
            step = self.pull * (new - now)
            if self.past is not None:
                step += self.momentum * (now - self.past)
            self.past = now
            self.w = (now + step).clamp_(-60.0, 60.0).exp_()
        self.v = self.b / self.w

    def _plain(self) -> None:
        """Iterations without momentum from here."""
        self.theta = self.past = None

    def _watch(self, error: Tensor, earlier: Tensor) -> None:
        """Read theta off the errors, now and two iterations earlier, and set the steps by it.

        Near the solution an iteration takes the error of ln w times a matrix with eigenvalues from 0 to theta < 1, so a
        step with momentum (Polyak's heavy ball) brings it down by (1 - root) / (1 + root), root = sqrt(1 - theta),
        instead of theta. theta is raised while the error falls more slowly than that; a rise of the error is answered
        by iterations without momentum.
        """
        rate = (error / earlier.clamp_min(_TINY)).sqrt()
        if self.theta is None:
            theta = rate.clamp_max(0.995).where(rate < 1, 0.0)
        else:
            root = (1 - self.theta).sqrt()
            higher = (self.theta + 0.4 * (1 - self.theta)).clamp_max(0.999)
            theta = torch.where(rate > (1 - root) / (1 + root) + 0.05, higher, self.theta)
        root = (1 - theta).sqrt().unsqueeze(-1)
        moving = (rate < 1).unsqueeze(-1)
        self.theta = theta
        self.pull = torch.where(moving, 4 / (1 + root).square(), 1.0)
        self.momentum = torch.where(moving, ((1 - root) / (1 + root)).square(), 0.0)

    def _inverse_scaling(self, d: Tensor, potential: Tensor) -> Tensor:
        if self.reach is None:
            return d.add_(_TINY)
        power = self.shrink * d.clamp_min(_TINY).log() + (1 - self.shrink) / self.epsilon * potential
        return power.clamp(-40, 40).exp()

    def _missing(self) -> Tensor:
        """What every column lacks, and with it the L1 error when summed."""
        wanted = self.b if self.reach is None else self.b * (-self._g() / self.reach).exp()
        return wanted - self.v * self.c

    # --- iterations ---

    def _run(self, budget: int, tolerance: float, before: int, *, last: bool) -> int:
        """Iterate until all are within tolerance; the last run writes the solutions. Returns the iterations spent."""
        m = self.cost.shape[-1]
        # iterations that cost as much as the Newton steps instead of them
        patience = 100 + 25 * math.sqrt(m)
        precision = 150 * torch.finfo(self.cost.dtype).eps
        # what the dtype loses in forming the residual is not to be found above the tolerance afterwards
        goal = max(0.9 * tolerance, tolerance - 2 * torch.finfo(self.cost.dtype).eps)
        spent = stuck = blocks = 0
        previous = best = math.inf
        errors: Tensor | None = None  # at the last look, of each problem
        newton = False
        while True:
            earlier = None
            if newton and budget - spent > 1:
                self._plain()
                spent += self._newton(budget - spent)
            else:
                count = min(_BLOCK, budget - spent)
                for step in range(count):
                    if spent > 0:
                        self._columns()
                    self._rows()
                    spent += 1
                    if step == count - 3:
                        earlier = _norm(self._missing())
            error = _norm(self._missing())
            if earlier is not None:
                self._watch(error, earlier)
            alive = ~(error <= goal)
            worst, left = float(error.max()), int(alive.sum())
            # what neither iterations nor Newton's method improve any more is at the end of the precision
            stuck = stuck + 1 if newton and not worst < 0.7 * best else 0
            best = min(best, worst)
            over = left == 0 or spent >= budget or (stuck > 8 and worst < precision)
            # how long would they take at the rate of the last block?
            if newton:
                newton = worst < 0.9 * previous or self.moved
            elif errors is not None:
                rate = (errors / error).log().clamp_min(1e-6) / _BLOCK
                missing = ((error / goal).log() / rate).where(alive, 0.0)
                newton = not float(missing.sum()) <= patience * left
            errors, previous = None if newton else error, worst
            if last and (over or left <= (0.99 if newton else 0.6) * len(alive)):
                self._give(torch.ones_like(alive) if over else ~alive, error, before + spent)
                if not over:
                    self._keep(alive)
                    errors = None if errors is None else errors[alive]
            if over:
                return spent
            blocks += 1
            if (newton or blocks % 2 == 0) and spent < budget and self._too_large():
                self.g0 = self._g()
                self._form()
                self._rows()
                spent += 1

    def _log_sum(self) -> Tensor:
        """Minus what the rows add to the dual value, in units of epsilon (``s`` holds inverse scalings)."""
        return (self.a * self.s.log()).sum(-1)

    def _too_large(self) -> bool:
        # next to no mass may ask for any scaling, and u = a s is small all the same
        rows = torch.where(self.a > 1e-9, self.s, 1.0)
        extreme = [((x > _LIMIT) | (x < 1 / _LIMIT)).any() for x in (rows, self.w)]
        return bool(extreme[0] | extreme[1])

    def _keep(self, alive: Tensor) -> None:
        at = alive.nonzero().squeeze(-1)
        for name in ("cost", "a", "b", "g0", "f0", "kernel", "w", "v", "s", "u", "c", "at"):
            setattr(self, name, getattr(self, name).index_select(0, at))
        for name in ("theta", "past", "pull", "momentum"):
            if self.theta is not None and getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).index_select(0, at))

    def _give(self, which: Tensor, error: Tensor, spent: int) -> None:
        """Write the solution of some of the problems to their places."""
        whole = len(self.at) == len(self.out.residual) and bool(which.all())
        at = which.nonzero().squeeze(-1)

        def pick(x: Tensor) -> Tensor:
            return x if whole else x.index_select(0, at)

        u, v, a = pick(self.u), pick(self.v), pick(self.a)
        f, g = pick(self._f()), pick(self._g())
        plan = torch.mul(pick(self.kernel), u.unsqueeze(-1), out=self.out.plan if whole else None)
        plan *= v.unsqueeze(-2)
        wanted = a if self.reach is None else a * (-f / self.reach).exp()
        residual = torch.maximum(pick(error), _norm(wanted - plan.sum(-1)))
        if not whole:
            self.out.plan[self.at[at]] = plan
        place = slice(None) if whole else self.at[at]
        self.out.f[place], self.out.g[place] = f, g
        self.out.residual[place], self.out.iterations[place] = residual, spent

    def _newton(self, budget: int) -> int:
        """One damped Newton step on the columns of all problems. Returns the passes it took."""
        missing = self._missing()
        error = _norm(missing)
        mass = self.v * self.c
        plan = self.kernel * self.u.unsqueeze(-1) * self.v.unsqueeze(-2)
        # Levenberg's damping, in proportion to the error: clusters that hardly touch would be sent too far apart
        # otherwise and hold the others back; as it vanishes with the error, the end stays quadratic
        damping = 0.1 * (error / self.b.sum(-1)).clamp_max(1.0) + 10 * torch.finfo(error.dtype).eps
        ground = self.kappa * (missing + mass) + mass * (self.kappa / (1 + self.kappa) + damping.unsqueeze(-1))
        y = _solve_graph(plan, ground, missing, 1 + self.kappa).to(plan.dtype)
        # a column with next to no mass must not hold the others back
        y = torch.where(self.b < 1e-6 * self.b.sum(-1, keepdim=True), y.clamp(-10, 10), y).where(self.b > 0, 0.0)
        step = (10.0 / y.abs().amax(-1).clamp_min(10.0)).unsqueeze(-1)
        # two clusters that hardly touch have to move far before any mass does: then only the dual value tells a good
        # step: it rises by epsilon (sum of a times the change of ln s + step <b, y>), at first by epsilon step <h, y>
        slope, linear, before = (missing * y).sum(-1), (self.b * y).sum(-1), self._log_sum()
        noise = torch.full_like(slope, 50 * torch.finfo(slope.dtype).eps)
        v, w = self.v, self.w
        waiting = torch.ones_like(error, dtype=torch.bool)
        factor = torch.ones_like(v)
        spent = 0
        while spent < min(budget - 1, 8):  # one is kept for the way back
            factor = torch.where(waiting.unsqueeze(-1), (step * y).exp(), factor)
            self.v, self.w = v * factor, w / factor
            self._rows()
            spent += 1
            waiting = _norm(self._missing()) > error * (1 - 0.25 * step.squeeze(-1))
            if self.reach is None:
                rise = before - self._log_sum() + step.squeeze(-1) * linear
                waiting &= rise < torch.maximum(0.1 * step.squeeze(-1) * slope, noise)
            if not waiting.any():
                break
            step = torch.where(waiting.unsqueeze(-1), 0.4 * step, step)
        self.moved = not bool(waiting.all())
        if waiting.any():  # no step helped: leave those as they were, and iterate on
            factor = factor.where(~waiting.unsqueeze(-1), 1.0)
            self.v, self.w = v * factor, w / factor
            self._rows()
            spent += 1
        self._plain()
        if spent < budget:  # columns with next to no mass do not count in S; an iteration finds their potential
            self._columns()
            self._rows()
            spent += 1
        return spent


def _products(x: Tensor, matrices: Tensor) -> Tensor:
    """Row vectors times matrices, (B, k) and (B, k, l) -> (B, l): much faster than column vectors here."""
    return torch.bmm(x.unsqueeze(1), matrices).squeeze(1)


def _norm(x: Tensor) -> Tensor:
    out: Tensor = torch.linalg.vector_norm(x, 1, -1)
    return out


def _soft_minimum(cost: Tensor, potential: Tensor, mass: Tensor, epsilon: float) -> Tensor:
    """-epsilon ln sum_j mass_j exp((potential_j - cost_ij) / epsilon), the exact update of the other potential."""
    return -epsilon * torch.logsumexp((potential.unsqueeze(-2) - cost) / epsilon + mass.log().unsqueeze(-2), dim=-1)


def _solve_graph(plan: Tensor, ground: Tensor, h: Tensor, grow: float) -> Tensor:
    """Solve S y = h with S = diag(c grow) - P^T diag(1 / (grow r)) P, in float64.

    S is the Laplacian of a graph with weights sum_i P_ij P_ik / (grow r_i) and ``ground`` at the nodes; its diagonal
    is formed from the weights, so that no digits are lost where they are small. With exact marginals y is 0 on average.
    """
    y = torch.empty(h.shape, dtype=torch.float64, device=h.device)
    for part in _chunks(plan, 8):  # some matrices in float64
        y[part] = _solve_graphs(plan[part].double(), ground[part].double(), h[part].double(), grow)
    return y


def _solve_graphs(plan: Tensor, ground: Tensor, h: Tensor, grow: float) -> Tensor:
    columns = plan.sum(-2)
    share = columns / columns.sum(-1, keepdim=True)
    if grow == 1:  # rounding must not feed the free constant
        h = h - share * h.sum(-1, keepdim=True)
    rows = plan.sum(-1, keepdim=True).mul_(grow).clamp_min_(1e-300)
    weights = (plan / rows).mT @ plan
    weights.diagonal(dim1=-2, dim2=-1).zero_()
    diagonal = weights.sum(-1) + ground
    mean = diagonal.mean(-1, keepdim=True).clamp_min(1e-300)
    # absent columns have no edges; a little ground fixes the free constant, which y does not feel: h adds up to 0
    diagonal = diagonal * (1 + 1e-12) + torch.where(diagonal > 0, 1e-13 * mean, mean)
    system = weights.neg_()
    system.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    scale = diagonal.rsqrt()
    system = system * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    factor, failed = torch.linalg.cholesky_ex(system)
    y = torch.cholesky_solve((h * scale).unsqueeze(-1), factor).squeeze(-1) * scale
    y = y.where(failed.unsqueeze(-1) == 0, 0.0).nan_to_num(0.0, 0.0, 0.0)
    return y - (share * y).sum(-1, keepdim=True) if grow == 1 else y


def implicit(plan: Tensor, gradient: Tensor, epsilon: float, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative through the plan: P (x + y - G) / epsilon, x, y for the gradient G in the plan.

        [(1 + kappa) diag(r), P; P^T, (1 + kappa) diag(c)] (x, y) = (W 1, W^T 1),   W = G * P,  r = P 1,  c = P^T 1

    r and c are the plan's own marginals: with the wanted ones the system is indefinite as long as they differ. G is
    shifted in every row by its value at the row's largest entry, first: where the plan is nearly a permutation the
    right-hand side is a small difference of large numbers otherwise.
    """
    d_cost, x, y = torch.empty_like(plan), plan.new_empty(plan.shape[:2]), plan.new_empty(plan.shape[::2])
    with _alone(plan):
        for part in _chunks(plan):
            d_cost[part], x[part], y[part] = _implicit_chunk(plan[part], gradient[part], epsilon, kappa)
    return d_cost, x, y


def _implicit_chunk(plan: Tensor, gradient: Tensor, epsilon: float, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    grow = 1 + kappa
    r, c = plan.sum(-1), plan.sum(-2)
    if not ((r > 0).all() and (c > 0).all()):  # what stands at absent positions does not matter
        gradient = gradient.where((r > 0).unsqueeze(-1) & (c > 0).unsqueeze(-2), 0.0)
    inner, outer = _inverse(grow * r), _inverse(grow * c)
    shift = gradient.gather(-1, plan.argmax(-1, keepdim=True))
    weighted = (gradient - shift).mul_(plan)
    x = weighted.sum(-1) * inner
    level = x - shift.squeeze(-1) * (1 - 1 / grow)
    h = weighted.sub_(level.unsqueeze(-1) * plan).sum(-2)
    y = _conjugate_gradients(plan, inner, outer, grow * c, h)
    # what they do to parts that hardly count in the norm nobody watches: bounded as it should be, or solved directly
    at = (~(y.abs().amax(-1) <= 20 * gradient.abs().amax((-1, -2)))).nonzero().squeeze(-1)
    if len(at):
        # once more in float64, so that the sums over columns that hardly touch do not cancel to noise
        wide, slope, level = plan[at].double(), (gradient[at] - shift[at]).double(), shift[at].double() * (1 - 1 / grow)
        mean = (slope * wide).sum(-1, keepdim=True) * _inverse(grow * wide.sum(-1, keepdim=True))
        h = ((slope - mean + level) * wide).sum(-2)
        y[at] = _solve_graph(wide, c[at] * (kappa * (2 + kappa) / grow), h, grow).to(y.dtype)
    x = x - _products(y, plan.mT) * inner + shift.squeeze(-1) / grow
    x = x.where(inner > 0, 0.0)
    # the columns once more from the rows: what next to no mass asks for does not show in any norm
    level = x - shift.squeeze(-1)
    y = torch.mul(gradient - shift - level.unsqueeze(-1), plan).sum(-2) * outer
    d_cost = (x.unsqueeze(-1) + y.unsqueeze(-2)).sub_(gradient).mul_(plan).mul_(1 / epsilon)
    return d_cost, x, y


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0 (and for what is so small that 1 / x is infinite)."""
    return torch.where(x > torch.finfo(x.dtype).tiny, x, math.inf).reciprocal()


def _conjugate_gradients(plan: Tensor, inner: Tensor, outer: Tensor, diagonal: Tensor, h: Tensor) -> Tensor:
    """Solve (diag(diagonal) - P^T diag(inner) P) y = h, preconditioned by ``outer`` = 1 / diagonal.

    Problems leave the batch as they converge; NaN for those that do not within 30 steps.
    """
    size = h.abs().amax(-1, keepdim=True)  # its square may be below the smallest number for a near permutation
    h = h / size.where(size > 0, 1.0)
    solution = torch.full_like(h, math.nan)
    at = torch.arange(len(h), device=h.device)
    y, residual, p = torch.zeros_like(h), h, outer * h
    rho = (h * p).sum(-1)
    goal = rho * (50 * torch.finfo(h.dtype).eps) ** 2
    for step in range(1, 31):
        image = diagonal * p - _products(_products(p, plan.mT) * inner, plan)
        # what has converged stands still until it leaves: further steps would only blow up its rounding
        alpha = torch.where(rho > goal, rho * _inverse((image * p).sum(-1)), 0.0).unsqueeze(-1)
        y = y + alpha * p
        residual = residual - alpha * image
        z = outer * residual
        after = (residual * z).sum(-1)
        p = z + (after * _inverse(rho)).unsqueeze(-1) * p
        rho = torch.where(rho > goal, after, rho)
        if step % 5 == 0:
            alive = ~(rho <= goal)
            count = int(alive.sum())
            if count <= 0.7 * len(alive) or step == 30:
                solution[at[~alive]] = y[~alive]
                if count == 0 or step == 30:
                    break
                parts = plan, inner, outer, diagonal, y, residual, p, rho, goal, at
                left = alive.nonzero().squeeze(-1)
                plan, inner, outer, diagonal, y, residual, p, rho, goal, at = (x.index_select(0, left) for x in parts)
    return solution * size
