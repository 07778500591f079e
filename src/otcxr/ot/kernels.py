"""What numba compiles: one transport problem at a time, all of it in the cache.

A problem is copied (without its absent positions) into a workspace and stays there until it is done: scaled iterations
that read the kernel once each, its own stopping, Newton's method where the iterations would creep, the adjoint for
``objective="sharp"``.

    K = exp((f0 + g0 - C) / epsilon)            formed once, and again when the scalings get too large
    s = 1 / (K v),   u = a s                    rows     (s = (K v)^-lambda exp(-(1 - lambda) f0 / epsilon) with reach)
    w = 1 / (K^T u), v = b w                    columns  (the same with g0), with momentum on ln w
    P = u K v,   f = f0 + epsilon ln s,   g = g0 + epsilon ln w

**Newton.** With the rows exact, the error of the columns h = b - P^T 1 is removed by v <- v exp(t y), S y = h, with
S = diag(c) - P^T diag(1/r) P. S is the Laplacian of a graph: its off-diagonal entries are minus sums of products of
positive numbers and its rows add up to what the marginals give away (0 when balanced). Eliminating nodes by adding
weights, never subtracting (Grassmann, Taksar and Heyman, Operations Research 1985), solves it to full relative accuracy
even where the plan is nearly a permutation and S nearly 0; a factorisation of S itself would lose every digit there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from otcxr.ot.simd import (
    exp,
    fetch_add,
    fma,
    lanes,
    largest,
    load,
    load_part,
    log,
    magnitude,
    maximum,
    minimum,
    smallest,
    splat,
    store,
    store_part,
    total,
    where_equal,
)

__all__ = ["implicit_lots", "solve_lots"]

# numba's cache on disk notices a change of this file, but not of simd.py: this line makes it one (a test checks it)
_SIMD_DIGEST = "2993d3715fc42bf5"
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})


class _Work(NamedTuple):
    """Workspace of one thread: arrays for n rows and m columns, padded to whole blocks and vectors."""

    C: Any  # (n m) cost of the present positions; a large number in the padding
    K: Any  # (n m) kernel, later the plan
    M: Any  # (m m) weights of the graph
    F: Any  # (m m) weights times offsets
    rows: Any  # (n) which rows are present
    columns: Any  # (m)
    A: Any  # (n) masses
    B: Any  # (m)
    f0: Any  # (n) potentials that are in the kernel
    g0: Any  # (m)
    s: Any  # (n) scaling without the mass
    u: Any  # (n) scaling with the mass
    w: Any  # (m)
    v: Any  # (m)
    c: Any  # (m) K^T u
    h: Any  # (m) right-hand side
    y: Any  # (m) solution
    p: Any  # (m) direction, and the last accepted v
    q: Any  # (m) image of the direction, and the last accepted w
    ground: Any  # (m) what the marginals give away
    x: Any  # (n) solution on the rows
    log_w: Any  # (m) ln w
    past: Any  # (m) ln w one iteration ago


@_compiled
def _vectors(size, unit):
    return (size + unit - 1) // unit * unit


@_compiled
def _aligned(count, like):
    """Zeros that begin on a cache line."""
    raw = np.zeros(count + 64, like.dtype)
    skip = (-raw.ctypes.data) % 64 // like.itemsize
    return raw[skip : skip + count]


@_compiled
def _workspace(n, m, like):
    lane = lanes(like)
    n, m = _vectors(n, 16), _vectors(m, lane)
    return _Work(
        _aligned(n * m, like), _aligned(n * m, like), _aligned(m * m, like), _aligned(m * m, like),
        np.zeros(n, np.int64), np.zeros(m, np.int64), _aligned(n, like), _aligned(m, like), _aligned(n, like),
        _aligned(m, like), _aligned(n, like), _aligned(n, like), _aligned(m, like), _aligned(m, like),
        _aligned(m, like), _aligned(m, like), _aligned(m, like), _aligned(m, like), _aligned(m, like),
        _aligned(m, like), _aligned(n, like), _aligned(m, like), _aligned(m, like),
    )  # fmt: skip


@_compiled
def _take(cost, a, b, at, work):
    """Copy the present rows and columns of problem ``at``. Returns their numbers and the range of the cost."""
    _, n, m = cost.shape
    lane = lanes(cost)
    kind = cost.dtype.type
    flat = cost.reshape(-1)
    count_n = count_m = 0
    for i in range(n):
        if a[at, i] > 0:
            work.rows[count_n] = i
            work.A[count_n] = a[at, i]
            count_n += 1
    for j in range(m):
        if b[at, j] > 0:
            work.columns[count_m] = j
            work.B[count_m] = b[at, j]
            count_m += 1
    wide = _vectors(count_m, lane)
    for i in range(count_n, _vectors(count_n, 16)):
        work.A[i] = work.u[i] = 0
    for j in range(count_m, wide):
        work.B[j] = 0
    low, high = splat(kind(np.inf)), splat(kind(-np.inf))
    inner = count_m // lane * lane
    for i in range(count_n):
        source, target = (at * n + work.rows[i]) * m, i * wide
        if count_m == m:
            for j in range(0, inner, lane):
                store(work.C, target + j, load(flat, source + j))
            for j in range(inner, wide, lane):
                store(work.C, target + j, load_part(flat, source + j, m - j, kind(1e30)))
        else:
            for j in range(count_m):
                work.C[target + j] = flat[source + work.columns[j]]
            for j in range(count_m, wide):
                work.C[target + j] = 1e30
        for j in range(0, inner, lane):
            here = load(work.C, target + j)
            low, high = minimum(low, here), maximum(high, here)
        for j in range(inner, wide, lane):
            low = minimum(low, load(work.C, target + j))
            high = maximum(high, load_part(work.C, target + j, count_m - j, work.C[target]))
    return count_n, count_m, smallest(low), largest(high)


@_compiled
def _form(work, n, wide, epsilon, shrink):
    """Kernel from g0; f0 is the largest value of every row (balanced), or its exact update (with reach)."""
    kind, lane = work.C.dtype.type, lanes(work.C)
    inverse = splat(kind(1) / epsilon)
    for i in range(n):
        row = i * wide
        top = splat(kind(-np.inf))
        for j in range(0, wide, lane):
            top = maximum(top, load(work.g0, j) - load(work.C, row + j))
        height = largest(top)
        up = splat(height)
        mass = splat(kind(0))
        for j in range(0, wide, lane):
            value = exp((load(work.g0, j) - load(work.C, row + j) - up) * inverse)
            store(work.K, row + j, value)
            mass = fma(value, load(work.B, j), mass)
        work.f0[i] = -height
        if shrink < 1:
            work.f0[i] = -shrink * (height + epsilon * np.log(max(total(mass), kind(1e-37))))
            factor = splat(kind(np.exp(min((work.f0[i] + height) / epsilon, kind(80)))))
            for j in range(0, wide, lane):
                store(work.K, row + j, load(work.K, row + j) * factor)
    for k in range(n * wide, _vectors(n, 4) * wide):
        work.K[k] = 0
    for j in range(wide):
        work.w[j] = 1
        work.v[j] = work.B[j]
        work.log_w[j] = work.past[j] = 0


@_compiled
def _columns_exactly(work, n, wide, epsilon, shrink):
    """g0 = -lambda epsilon ln sum_i a_i exp((f0_i - C_ij) / epsilon)."""
    kind, lane = work.C.dtype.type, lanes(work.C)
    inverse, zero = splat(kind(1) / epsilon), splat(kind(0))
    for j in range(0, wide, lane):
        top = splat(kind(-np.inf))
        for i in range(n):
            top = maximum(top, splat(work.f0[i]) - load(work.C, i * wide + j))
        mass = zero
        for i in range(n):
            part = exp((splat(work.f0[i]) - load(work.C, i * wide + j) - top) * inverse)
            mass = fma(splat(work.A[i]), part, mass)
        update = (top + splat(kind(epsilon)) * log(mass)) * splat(kind(-shrink))
        store(work.g0, j, update)
    for j in range(wide):
        if work.B[j] == 0:
            work.g0[j] = 0


@_compiled
def _translate(work, n, m, reach):
    """Move a constant from f0 to g0: t = reach / 2 ln(<a, exp(-f / reach)> / <b, exp(-g / reach)>), the best one.

    Iterations alone would take very many to find it when the masses differ and reach is large against epsilon.
    """
    kind = work.C.dtype.type
    low, up = work.f0[0], work.g0[0]
    for i in range(n):
        low = min(low, work.f0[i])
    for j in range(m):
        up = min(up, work.g0[j])
    left = right = kind(0)
    for i in range(n):
        left += work.A[i] * np.exp((low - work.f0[i]) / reach)
    for j in range(m):
        right += work.B[j] * np.exp((up - work.g0[j]) / reach)
    shift = kind(0.5) * (reach * kind(np.log(left / right)) + up - low)
    for i in range(n):
        work.f0[i] += shift
    for j in range(m):
        work.g0[j] -= shift


@_compiled
def _rows(work, n, wide, epsilon, shrink):
    """One half iteration: s, u from v, and c = K^T u in the same reading of the kernel."""
    kind, lane = work.C.dtype.type, lanes(work.C)
    tiny, one = kind(1e-37), kind(1)
    K, v, c = work.K, work.v, work.c
    zero = splat(kind(0))
    for j in range(0, wide, lane):
        store(c, j, zero)
    for i in range(0, _vectors(n, 4), 4):
        row0 = i * wide
        row1, row2, row3 = row0 + wide, row0 + 2 * wide, row0 + 3 * wide
        t0, t1, t2, t3 = zero, zero, zero, zero
        for j in range(0, wide, lane):
            x = load(v, j)
            t0 = fma(load(K, row0 + j), x, t0)
            t1 = fma(load(K, row1 + j), x, t1)
            t2 = fma(load(K, row2 + j), x, t2)
            t3 = fma(load(K, row3 + j), x, t3)
        if shrink < 1:
            for k, d in enumerate((total(t0), total(t1), total(t2), total(t3))):
                power = splat(-shrink) * log(splat(d)) - splat((one - shrink) * work.f0[i + k] / epsilon)
                work.s[i + k] = largest(exp(maximum(minimum(power, splat(kind(40))), splat(kind(-40)))))
        else:
            work.s[i] = one / (total(t0) + tiny)
            work.s[i + 1] = one / (total(t1) + tiny)
            work.s[i + 2] = one / (total(t2) + tiny)
            work.s[i + 3] = one / (total(t3) + tiny)
        u0, u1 = work.A[i] * work.s[i], work.A[i + 1] * work.s[i + 1]
        u2, u3 = work.A[i + 2] * work.s[i + 2], work.A[i + 3] * work.s[i + 3]
        work.u[i], work.u[i + 1], work.u[i + 2], work.u[i + 3] = u0, u1, u2, u3
        t0, t1, t2, t3 = splat(u0), splat(u1), splat(u2), splat(u3)
        for j in range(0, wide, lane):
            x = fma(t0, load(K, row0 + j), load(c, j))
            x = fma(t1, load(K, row1 + j), x)
            x = fma(t2, load(K, row2 + j), x)
            store(c, j, fma(t3, load(K, row3 + j), x))


@_compiled
def _error(work, wide, epsilon, shrink, reach):
    """L1 error of the columns; leaves what is missing in every column in h."""
    kind, lane = work.C.dtype.type, lanes(work.C)
    error = splat(kind(0))
    for j in range(0, wide, lane):
        wanted = load(work.B, j)
        if shrink < 1:
            g = load(work.g0, j) + splat(kind(epsilon)) * log(load(work.w, j))
            wanted = wanted * exp(g * splat(kind(-1) / reach))
        missing = wanted - load(work.v, j) * load(work.c, j)
        store(work.h, j, missing)
        error = error + magnitude(missing)
    return total(error)


@_compiled
def _columns(work, wide, epsilon, shrink, pull, momentum):
    """The other half iteration: w and v from c. Returns nothing; 1 and 0 for ``pull`` and ``momentum`` are Sinkhorn's.

    l <- l + pull (l' - l) + momentum (l - l of one iteration ago),   l = ln w,   l' = -ln c
    """
    kind, lane = work.C.dtype.type, lanes(work.C)
    top, bottom = splat(kind(60)), splat(kind(-60))
    share, keep = splat(kind(pull)), splat(kind(momentum))
    for j in range(0, wide, lane):
        new = log(load(work.c, j)) * splat(-shrink)
        if shrink < 1:
            new = new - load(work.g0, j) * splat((kind(1) - shrink) / epsilon)
        now, past = load(work.log_w, j), load(work.past, j)
        new = fma(share, new - now, fma(keep, now - past, now))
        new = maximum(minimum(new, top), bottom)
        store(work.past, j, now)
        store(work.log_w, j, new)
        scaling = exp(new)
        store(work.w, j, scaling)
        store(work.v, j, scaling * load(work.B, j))


@_compiled
def _weights(work, n, m, wide, grow):
    """M_jk = sum_i P_ij P_ik / (grow r_i) for k <= j, from K, u and v; r are the actual marginals of the rows."""
    kind, lane = work.C.dtype.type, lanes(work.C)
    zero = splat(kind(0))
    for j in range(m):
        for k in range(0, j + 1, lane):
            store(work.M, j * wide + k, zero)
    for i in range(0, _vectors(n, 4), 4):
        factors = (kind(0), kind(0), kind(0), kind(0))
        f0, f1, f2, f3 = factors
        for k in range(4):
            # r = u (K v), so P_ij P_ik / r = K_ij v_j K_ik v_k u / (K v)
            scale = kind(0)
            if i + k < n:
                mass = splat(kind(0))
                for j in range(0, wide, lane):
                    mass = fma(load(work.K, (i + k) * wide + j), load(work.v, j), mass)
                scale = work.u[i + k] / (grow * total(mass) + kind(1e-37))
            if k == 0:
                f0 = scale
            elif k == 1:
                f1 = scale
            elif k == 2:
                f2 = scale
            else:
                f3 = scale
        row0 = i * wide
        row1, row2, row3 = row0 + wide, row0 + 2 * wide, row0 + 3 * wide
        for j in range(m):
            vj = work.v[j]
            x0, x1 = splat(f0 * vj * work.K[row0 + j]), splat(f1 * vj * work.K[row1 + j])
            x2, x3 = splat(f2 * vj * work.K[row2 + j]), splat(f3 * vj * work.K[row3 + j])
            for k in range(0, j + 1, lane):
                value = fma(x0, load(work.K, row0 + k), load(work.M, j * wide + k))
                value = fma(x1, load(work.K, row1 + k), value)
                value = fma(x2, load(work.K, row2 + k), value)
                store(work.M, j * wide + k, fma(x3, load(work.K, row3 + k), value))
    for j in range(m):
        for k in range(0, j + 1, lane):
            store(work.M, j * wide + k, load(work.M, j * wide + k) * load(work.v, k))


@_compiled
def _eliminate(work, m, wide):
    """Solve (diag(ground + row sums of M) - M) y = h on the lower triangle of M; no subtraction anywhere.

    Node p is taken out by giving its edges to its neighbours: M_ij += M_pi M_pj / d_p, d_p = ground_p + sum_j M_pj.
    """
    kind, lane = work.C.dtype.type, lanes(work.C)
    M = work.M
    for p in range(m - 1, -1, -1):
        mass = splat(kind(0))
        for j in range(0, p, lane):
            mass = mass + load_part(M, p * wide + j, p - j, kind(0))
        d = work.ground[p] + total(mass)
        M[p * wide + p] = d
        if d <= 0:
            continue
        h, ground = work.h[p], work.ground[p]
        for i in range(p):
            share = M[p * wide + i] / d
            if share > 0:
                work.h[i] += share * h
                work.ground[i] += share * ground
                x = splat(share)
                for j in range(0, i, lane):
                    store_part(M, i * wide + j, fma(x, load(M, p * wide + j), load(M, i * wide + j)), i - j)
    for p in range(m):
        d = M[p * wide + p]
        reached = splat(kind(0))
        for j in range(0, p, lane):
            reached = fma(load_part(M, p * wide + j, p - j, kind(0)), load(work.y, j), reached)
        # a node without edges (all weights underflowed) has nothing to be corrected against
        work.y[p] = (work.h[p] + total(reached)) / d if d > 0 and (p > 0 or work.ground[0] > 0) else kind(0)


@_compiled
def _log_sum(work, n):
    """sum a ln s: what the rows add to the dual value, in units of epsilon."""
    lane = lanes(work.C)
    value = splat(work.C.dtype.type(0))
    for i in range(0, _vectors(n, lane), lane):
        value = fma(load(work.A, i), log(load(work.s, i)), value)
    return total(value)


@_compiled
def _newton(work, n, m, wide, epsilon, shrink, reach, error, budget, precision):
    """One damped Newton step on the columns. Returns the new error, the passes it took, whether a step was taken."""
    kind = work.C.dtype.type
    kappa = epsilon / reach if shrink < 1 else kind(0)
    grow = kind(1) + kappa
    whole = kind(0)
    for j in range(m):
        whole += work.B[j]
    # Levenberg's damping, in proportion to the error: clusters that hardly touch would be sent too far apart otherwise,
    # by rounding alone in the end, and hold the others back; as it vanishes with the error, the end stays quadratic
    damping = kind(0.1) * min(error / whole, kind(1)) + 10 * precision
    for j in range(m):
        mass = work.v[j] * work.c[j]
        work.ground[j] = kappa * (work.h[j] + mass) + mass * (kappa / grow + damping)
        work.y[j] = 0
        work.p[j], work.q[j] = work.v[j], work.w[j]
    for j in range(m, wide):
        work.y[j] = 0
        work.p[j], work.q[j] = 0, 1
    _weights(work, n, m, wide, grow)
    _eliminate(work, m, wide)
    if shrink >= 1:  # the free constant: none on average
        mean = kind(0)
        for j in range(m):
            mean += work.B[j] * work.y[j]
        for j in range(m):
            work.y[j] -= mean
    furthest = kind(0)
    for j in range(m):
        if work.B[j] < kind(1e-6) * whole:  # a column with next to no mass must not hold the others back
            work.y[j] = min(max(work.y[j], kind(-10)), kind(10))
        furthest = max(furthest, abs(work.y[j]))
    step = kind(1) if furthest <= 10 else kind(10) / furthest
    # two clusters that hardly touch have to move far before any mass does: then only the dual value tells a good step,
    # it rises by epsilon (sum of a times the change of ln s + step <b, y>), at first by epsilon step <h, y>
    slope, linear, before = kind(0), kind(0), _log_sum(work, n)
    for j in range(m):
        slope += work.h[j] * work.y[j]
        linear += work.B[j] * work.y[j]
    spent = 0
    while spent < budget - 1:  # one is kept for the way back
        for j in range(m):
            factor = np.exp(step * work.y[j])
            work.v[j], work.w[j] = work.p[j] * factor, work.q[j] * factor
        _rows(work, n, wide, epsilon, shrink)
        now = _error(work, wide, epsilon, shrink, reach)
        spent += 1
        rise = _log_sum(work, n) - before + step * linear
        risen = shrink >= 1 and rise >= max(kind(0.1) * step * slope, 100 * precision)
        if now <= error * (1 - kind(0.25) * step) or risen:
            # an iteration finds the potentials of columns that hardly count in S
            _logarithms(work, wide)
            _columns(work, wide, epsilon, shrink, 1, 0)
            _rows(work, n, wide, epsilon, shrink)
            return _error(work, wide, epsilon, shrink, reach), spent + 1, True
        step *= kind(0.4)
        if step < kind(1e-3):
            break
    for j in range(m):
        work.v[j], work.w[j] = work.p[j], work.q[j]
    _rows(work, n, wide, epsilon, shrink)
    return _error(work, wide, epsilon, shrink, reach), spent + 1, False


@_compiled
def _logarithms(work, wide):
    """ln w anew, after w was set otherwise; no momentum."""
    for j in range(0, wide, lanes(work.C)):
        value = log(load(work.w, j))
        store(work.log_w, j, value)
        store(work.past, j, value)


@_compiled
def _too_large(work, n, m):
    """Whether a scaling has left the range in which products with it are safe."""
    limit = work.C.dtype.type(1e12)
    for j in range(m):
        if not 1 / limit < work.w[j] < limit:
            return True
    for i in range(n):  # noqa: SIM110  # numba compiles no generators
        # next to no mass may ask for any scaling, and u = a s is small all the same
        if work.A[i] > 1e-9 and not 1 / limit < work.s[i] < limit:
            return True
    return False


@_compiled
def _absorb(work, n, m, wide, epsilon, shrink):
    """Put the scalings of the columns into g0 and form the kernel anew."""
    kind = work.C.dtype.type
    for j in range(m):
        work.g0[j] += epsilon * kind(np.log(max(work.w[j], kind(1e-37))))
    _form(work, n, wide, epsilon, shrink)


@_compiled
def _run(work, n, m, epsilon, shrink, reach, budget, tolerance, precision):
    """Iterate at one epsilon until the columns are within tolerance. Returns the error and the iterations spent.

    Near the solution an iteration takes the error of ln w times a matrix with eigenvalues from 0 to theta < 1, so a
    step with momentum (Polyak's heavy ball) brings it down by (1 - sqrt(1 - theta)) / (1 + sqrt(1 - theta)) instead of
    theta. theta is read off the errors, and raised while they fall more slowly than it promises; a rise of the error is
    answered by an iteration without momentum.
    """
    kind, lane = work.C.dtype.type, lanes(work.C)
    wide = _vectors(m, lane)
    newton_cost = 2.5 * (m / 8 + 0.4 * m * m / n)  # in iterations, from operation counts, for a few steps
    spent, before, best, stuck = 0, kind(np.inf), kind(np.inf), 0
    error, one_ago, two_ago, three_ago = kind(np.inf), kind(np.inf), kind(np.inf), kind(np.inf)
    theta, moving, since = kind(0), False, 0  # since: iterations without a break
    # what float32 loses in forming the residual is not to be found above the tolerance afterwards
    goal = max(kind(0.9) * tolerance, tolerance - 4 * precision)
    while True:
        _rows(work, n, wide, epsilon, shrink)
        spent, since = spent + 1, since + 1
        three_ago, two_ago, one_ago = two_ago, one_ago, error
        error = _error(work, wide, epsilon, shrink, reach)
        if error <= goal or spent >= budget:
            return error, spent
        if since % 5 == 0:
            slow = not error < before
            if not slow and since > 5:
                slow = 5 * np.log(goal / error) / np.log(error / before) > newton_cost
            before = error
            while slow and spent < budget - 1:
                # what neither iterations nor Newton's method improve any more has come to the end of the precision
                stuck = stuck + 1 if error > kind(0.7) * best else 0
                best = min(best, error)
                if stuck > 8 and error < 300 * precision:
                    return error, spent
                after, passes, taken = _newton(
                    work, n, m, wide, epsilon, shrink, reach, error, budget - spent, precision
                )
                spent += passes
                slow = taken and (after < kind(0.9) * error or passes == 2)  # 2: the first one was good
                error = after
                if error <= goal or spent >= budget:
                    return error, spent
                before, since, theta = kind(np.inf), 0, kind(0)
                _logarithms(work, wide)
                if _too_large(work, n, m):
                    _absorb(work, n, m, wide, epsilon, shrink)
                    _rows(work, n, wide, epsilon, shrink)
                    spent += 1
                    error = _error(work, wide, epsilon, shrink, reach)
                    if error <= goal or spent >= budget:
                        return error, spent
        if spent % 10 < 2 and _too_large(work, n, m):
            _absorb(work, n, m, wide, epsilon, shrink)
            before, since, theta = kind(np.inf), 0, kind(0)
            continue
        if since >= 4 and since % 4 == 0:
            if theta == 0:
                theta = kind(min(np.sqrt(error / two_ago), 0.995)) if error < two_ago else theta
                moving = False
            else:
                root = np.sqrt(1 - theta)
                if (error / three_ago) ** (1.0 / 3.0) > (1 - root) / (1 + root) + 0.05:
                    theta = kind(min(theta + 0.4 * (1 - theta), 0.999))
        if theta == 0 or error > one_ago:
            moving = False
            _columns(work, wide, epsilon, shrink, 1, 0)
        elif not moving:
            moving = True
            _columns(work, wide, epsilon, shrink, 2 / (2 - theta), 0)
        else:
            root = np.sqrt(1 - theta)
            _columns(work, wide, epsilon, shrink, 4 / (1 + root) ** 2, ((1 - root) / (1 + root)) ** 2)


@_compiled
def _solve_one(work, n, m, width, epsilon, shrink, reach, budget, tolerance, precision):
    """Solve the problem in the workspace. Returns the error and the iterations spent."""
    kind, lane = work.C.dtype.type, lanes(work.C)
    wide = _vectors(m, lane)
    for j in range(wide):
        work.g0[j] = 0
    # the range of the cost that single precision holds as exp(-C / epsilon); beyond, epsilon comes down in steps
    levels = 1
    start = width / kind(40)
    if start > epsilon:
        levels = min(1 + int(np.ceil(np.log(start / epsilon) / np.log(2.0))), budget)
    spent, error = 0, kind(np.inf)
    for level in range(levels - 1, -1, -1):
        here = kind(epsilon * 2.0**level)
        if level < levels - 1:
            for j in range(m):
                work.g0[j] += 2 * here * kind(np.log(max(work.w[j], kind(1e-37))))
        pull = reach / (reach + here) if shrink < 1 else kind(1)
        if shrink < 1:
            for _ in range(3):
                _form(work, n, wide, here, pull)
                _columns_exactly(work, n, wide, here, pull)
                _translate(work, n, m, reach)
        _form(work, n, wide, here, pull)
        if level > 0:
            allowed = max(1, min(40, budget - spent - level))
            error, used = _run(work, n, m, here, pull, reach, allowed, kind(0.02), precision)
        else:
            error, used = _run(work, n, m, here, pull, reach, budget - spent, tolerance, precision)
        spent += used
    return error, spent


@_compiled
def _plan_in_place(work, n, wide):
    """K <- u K v, the plan; u <- its marginal on the rows, c <- that on the columns."""
    kind, lane = work.C.dtype.type, lanes(work.C)
    zero = splat(kind(0))
    for j in range(0, wide, lane):
        store(work.c, j, zero)
    for i in range(n):
        u, mass = splat(work.u[i]), zero
        for j in range(0, wide, lane):
            value = u * load(work.K, i * wide + j) * load(work.v, j)
            store(work.K, i * wide + j, value)
            mass = mass + value
            store(work.c, j, load(work.c, j) + value)
        work.u[i] = total(mass)


@_compiled
def _image(work, n, wide, grow):
    """q = grow c p - P^T diag(1 / (grow r)) P p; A holds 1 / (grow r)."""
    kind, lane = work.C.dtype.type, lanes(work.C)
    K, p, q = work.K, work.p, work.q
    zero, grown = splat(kind(0)), splat(grow)
    for j in range(0, wide, lane):
        store(q, j, grown * load(work.c, j) * load(p, j))
    for i in range(0, _vectors(n, 4), 4):
        row0 = i * wide
        row1, row2, row3 = row0 + wide, row0 + 2 * wide, row0 + 3 * wide
        t0, t1, t2, t3 = zero, zero, zero, zero
        for j in range(0, wide, lane):
            x = load(p, j)
            t0 = fma(load(K, row0 + j), x, t0)
            t1 = fma(load(K, row1 + j), x, t1)
            t2 = fma(load(K, row2 + j), x, t2)
            t3 = fma(load(K, row3 + j), x, t3)
        t0, t1 = splat(-total(t0) * work.A[i]), splat(-total(t1) * work.A[i + 1])
        t2, t3 = splat(-total(t2) * work.A[i + 2]), splat(-total(t3) * work.A[i + 3])
        for j in range(0, wide, lane):
            x = fma(t0, load(K, row0 + j), load(q, j))
            x = fma(t1, load(K, row1 + j), x)
            x = fma(t2, load(K, row2 + j), x)
            store(q, j, fma(t3, load(K, row3 + j), x))


@_compiled
def _adjoint(work, n, m, kappa, accuracy):
    """Solve [(1 + kappa) diag(r), P; P^T, (1 + kappa) diag(c)] (x, y) = (W 1, W^T 1), W = G * P.

    Expects P in K, its marginals in u and c, G in C (padding arbitrary but finite). G is shifted in every row by its
    value at the row's largest entry, first: where the plan is nearly a permutation the right-hand side is a small
    difference of large numbers otherwise. The shift comes back in x.
    """
    kind, lane = work.C.dtype.type, lanes(work.C)
    wide = _vectors(m, lane)
    zero, grow = splat(kind(0)), kind(1) + kappa
    least = kind(1e-37) if work.C.itemsize == 4 else kind(1e-300)  # what holds less has nothing to say
    for i in range(n):
        mass = grow * work.u[i]
        work.A[i] = kind(1) / mass if mass > least else kind(0)
    for j in range(wide):
        mass = grow * work.c[j]
        work.w[j] = kind(1) / mass if mass > least else kind(0)
    for j in range(0, wide, lane):
        store(work.h, j, zero)
        store(work.y, j, zero)
        store(work.p, j, zero)
        store(work.q, j, zero)
    steepest = zero
    for i in range(n):
        row = i * wide
        top = zero
        for j in range(0, wide, lane):
            top = maximum(top, load(work.K, row + j))
            steepest = maximum(steepest, magnitude(load(work.C, row + j)))
        top, there = splat(largest(top)), splat(kind(-np.inf))
        for j in range(0, wide, lane):
            there = maximum(there, where_equal(load(work.K, row + j), top, load(work.C, row + j), there))
        work.s[i] = largest(there)
        shift, mass = splat(work.s[i]), zero
        for j in range(0, wide, lane):
            mass = fma(load(work.C, row + j) - shift, load(work.K, row + j), mass)
        work.x[i] = total(mass) * work.A[i]  # without y
        # h = W^T 1 - P^T x; the shift cancels up to (1 - 1 / grow), which reach leaves over
        level = splat(work.x[i] - work.s[i] * (kind(1) - kind(1) / grow))
        for j in range(0, wide, lane):
            value = (load(work.C, row + j) - shift - level) * load(work.K, row + j)
            store(work.h, j, load(work.h, j) + value)
    # conjugate gradients on the Schur complement, preconditioned by its diagonal without the plan; h is scaled first,
    # as its square may be below the smallest number where the plan is nearly a permutation
    largest_h = zero
    for j in range(0, wide, lane):
        largest_h = maximum(largest_h, magnitude(load(work.h, j)))
    size = largest(largest_h)
    scale = splat(kind(1) / size if size > 0 else kind(0))
    norms = zero
    for j in range(0, wide, lane):
        h = load(work.h, j) * scale
        p = h * load(work.w, j)
        store(work.h, j, h)
        store(work.p, j, p)
        norms = fma(h, p, norms)
    rho = total(norms)
    goal = rho * accuracy * accuracy
    done = not rho > 0
    for i in range(n, _vectors(n, 4)):
        work.A[i] = 0
        for j in range(0, wide, lane):
            store(work.K, i * wide + j, zero)
    for _ in range(0 if done else 30):
        _image(work, n, wide, grow)
        curvatures = zero
        for j in range(0, wide, lane):
            curvatures = fma(load(work.q, j), load(work.p, j), curvatures)
        curvature = total(curvatures)
        if not curvature > 0:
            break
        alpha = splat(rho / curvature)
        norms = zero
        for j in range(0, wide, lane):
            store(work.y, j, fma(alpha, load(work.p, j), load(work.y, j)))
            h = load(work.h, j) - alpha * load(work.q, j)
            store(work.h, j, h)
            z = h * load(work.w, j)
            store(work.v, j, z)
            norms = fma(h, z, norms)
        after = total(norms)
        if after <= goal:
            done = True
            break
        beta = splat(after / rho)
        rho = after
        for j in range(0, wide, lane):
            store(work.p, j, fma(beta, load(work.p, j), load(work.v, j)))
    # what they do to parts that hardly count in the norm nobody watches: bounded as it should be, or solved directly
    bound = kind(20) * largest(steepest)
    for j in range(m):
        work.y[j] *= size
        done = done and abs(work.y[j]) <= bound
    if not done:
        for j in range(0, wide, lane):
            store(work.y, j, zero)
        _offsets(work, n, m, wide, kappa)
        _eliminate_offsets(work, m, wide)
    for j in range(0, wide, lane):
        store(work.q, j, zero)
    for i in range(n):
        row, mass = i * wide, zero
        for j in range(0, wide, lane):
            mass = fma(load(work.K, row + j), load(work.y, j), mass)
        work.x[i] += work.s[i] / grow - total(mass) * work.A[i]
        work.x[i] = work.x[i] if work.A[i] > 0 else kind(0)
        shift, level = splat(work.s[i]), splat(work.x[i] - work.s[i])
        for j in range(0, wide, lane):
            value = (load(work.C, row + j) - shift - level) * load(work.K, row + j)
            store(work.q, j, load(work.q, j) + value)
    # the columns once more from the rows: what next to no mass asks for does not show in any norm
    for j in range(0, wide, lane):
        store(work.y, j, load(work.q, j) * load(work.w, j))


@_compiled
def _offsets(work, n, m, wide, kappa):
    """The implicit system as least squares on a graph: weights M, flows F = M * offsets, ground and its flow in h.

    M_jk = sum_i P_ij P_ik / ((1 + kappa) r_i)
    F_jk = sum_i P_ij P_ik (G_ij - G_ik) / ((1 + kappa) r_i)
    """
    kind, lane = work.C.dtype.type, lanes(work.C)
    zero, grow = splat(kind(0)), kind(1) + kappa
    for j in range(m):
        work.ground[j] = work.c[j] * kappa * (kind(2) + kappa) / grow
        work.h[j] = 0
        for k in range(0, j + 1, lane):
            store(work.M, j * wide + k, zero)
            store(work.F, j * wide + k, zero)
    for i in range(n):
        row = i * wide
        shift = splat(work.s[i])
        scale = work.A[i]
        for j in range(m):
            work.h[j] += work.K[row + j] * work.C[row + j] * kappa / grow
            weight = splat(work.K[row + j] * scale)
            slope = splat(work.C[row + j] - work.s[i])
            for k in range(0, j + 1, lane):
                edge = weight * load(work.K, row + k)
                store(work.M, j * wide + k, load(work.M, j * wide + k) + edge)
                offset = slope - (load(work.C, row + k) - shift)
                store(work.F, j * wide + k, fma(edge, offset, load(work.F, j * wide + k)))


@_compiled
def _eliminate_offsets(work, m, wide):
    """Solve sum_k M_jk (y_j - y_k) + ground_j y_j = sum_k F_jk + h_j on the lower triangles.

    As ``_eliminate``, with the right-hand side kept on the edges: what node p passes on are averages of offsets, so y
    stays within sums of them along the graph however weak some edges are. Sums over nodes, first, would cancel.
    """
    kind, lane = work.C.dtype.type, lanes(work.C)
    M, F = work.M, work.F
    least = kind(1e-37) if work.C.itemsize == 4 else kind(1e-300)
    for p in range(m - 1, -1, -1):
        mass = splat(kind(0))
        for j in range(0, p, lane):
            mass = mass + load_part(M, p * wide + j, p - j, kind(0))
        d = work.ground[p] + total(mass)
        M[p * wide + p] = d
        if d <= least:
            continue
        for i in range(p):
            weight, flow = M[p * wide + i] / d, F[p * wide + i] / d
            if weight > 0:
                work.h[i] += weight * work.h[p] - flow * work.ground[p]
                work.ground[i] += weight * work.ground[p]
                x, y = splat(weight), splat(flow)
                for j in range(0, i, lane):
                    edge, current = load(M, p * wide + j), load(F, p * wide + j)
                    new = fma(x, current, load(F, i * wide + j)) - y * edge
                    store_part(M, i * wide + j, fma(x, edge, load(M, i * wide + j)), i - j)
                    store_part(F, i * wide + j, new, i - j)
    for p in range(m):
        d = M[p * wide + p]
        reached = splat(kind(0))
        for j in range(0, p, lane):
            part = load_part(M, p * wide + j, p - j, kind(0)) * load(work.y, j)
            reached = reached + part + load_part(F, p * wide + j, p - j, kind(0))
        # a node without edges (all weights underflowed) has nothing to be compared with
        work.y[p] = (work.h[p] + total(reached)) / d if d > least and (p > 0 or work.ground[0] > least) else kind(0)


@_compiled
def _give_plan(work, n, m, plan, at):
    """Write the plan to its place among the absent positions."""
    lane = lanes(work.C)
    wide = _vectors(m, lane)
    _, rows, columns = plan.shape
    flat = plan.reshape(-1)
    if n < rows or m < columns:
        plan[at] = 0
    inner = m // lane * lane
    for i in range(n):
        start = (at * rows + work.rows[i]) * columns
        if m == columns:
            for j in range(0, inner, lane):
                store(flat, start + j, load(work.K, i * wide + j))
            for j in range(inner, m, lane):
                store_part(flat, start + j, load(work.K, i * wide + j), m - j)
        else:
            for j in range(m):
                flat[start + work.columns[j]] = work.K[i * wide + j]


@_compiled
def _give_gradient(work, n, m, d_cost, x, y, at, epsilon, one):
    """Write P (one + (x + y - G) / epsilon), x and y."""
    kind, lane = work.C.dtype.type, lanes(work.C)
    wide = _vectors(m, lane)
    inverse, first = splat(kind(1) / epsilon), splat(kind(one))
    for i in range(n):
        for j in range(0, wide, lane):
            slope = splat(work.x[i]) + load(work.y, j) - load(work.C, i * wide + j)
            store(work.K, i * wide + j, fma(slope, inverse, first) * load(work.K, i * wide + j))
    _give_plan(work, n, m, d_cost, at)
    _give(work.x, work.rows, n, x, at)
    _give(work.y, work.columns, m, y, at)


@_compiled
def _give(values, places, count, out, at):
    """Write ``values`` to their places among the absent ones."""
    if count < out.shape[1]:
        out[at] = 0
    for i in range(count):
        out[at, places[i]] = values[i]


@_compiled
def solve_lots(
    counter, step, cost, a, b, epsilon, reach, limit, tolerance, plan, f, g, residual, iterations, sharp, d_cost, x, y
):
    """Solve lots of ``step`` problems until none is left in the counter; ``reach`` 0 means exact marginals."""
    kind = cost.dtype.type
    lane = lanes(cost)
    work = _workspace(cost.shape[1], cost.shape[2], cost)
    epsilon, reach = kind(epsilon), kind(reach)
    shrink = reach / (reach + epsilon) if reach > 0 else kind(1)
    precision = kind(6e-8) if cost.itemsize == 4 else kind(1.1e-16)
    start = fetch_add(counter, step)
    while start < len(cost):
        for at in range(start, min(start + step, len(cost))):
            n, m, low, high = _take(cost, a, b, at, work)
            wide = _vectors(m, lane)
            error, iterations[at] = _solve_one(
                work, n, m, high - low, epsilon, shrink, reach, limit, kind(tolerance), precision
            )
            f[at] = 0
            g[at] = 0
            blur = splat(epsilon)
            for i in range(0, _vectors(n, lane), lane):
                store(work.f0, i, fma(blur, log(load(work.s, i)), load(work.f0, i)))
            for j in range(0, wide, lane):
                store(work.g0, j, fma(blur, log(load(work.w, j)), load(work.g0, j)))
            _give(work.f0, work.rows, n, f, at)
            _give(work.g0, work.columns, m, g, at)
            _plan_in_place(work, n, wide)
            missing = splat(kind(0))
            for i in range(0, _vectors(n, lane), lane):
                wanted = load(work.A, i)
                if reach > 0:
                    wanted = wanted * exp(load(work.f0, i) * splat(kind(-1) / reach))
                missing = missing + magnitude(wanted - load(work.u, i))
            residual[at] = max(error, total(missing))
            _give_plan(work, n, m, plan, at)
            if sharp:
                for i in range(n):
                    height = splat(work.f0[i])
                    for j in range(0, wide, lane):
                        slope = load(work.C, i * wide + j) - height - load(work.g0, j)
                        store(work.C, i * wide + j, slope)
                    for j in range(m, wide):
                        work.C[i * wide + j] = 0
                _adjoint(
                    work, n, m, epsilon / reach if reach > 0 else kind(0), kind(max(50 * precision, 0.1 * tolerance))
                )
                _give_gradient(work, n, m, d_cost, x, y, at, epsilon, 1)
        start = fetch_add(counter, step)


@_compiled
def implicit_lots(counter, step, plan, gradient, epsilon, kappa, d_cost, x, y):
    """The adjoint of lots of ``step`` problems for any gradient in the plan."""
    kind = plan.dtype.type
    lane = lanes(plan)
    work = _workspace(plan.shape[1], plan.shape[2], plan)
    _, rows, columns = plan.shape
    start = fetch_add(counter, step)
    while start < len(plan):
        for at in range(start, min(start + step, len(plan))):
            n = m = 0
            for i in range(rows):
                if plan[at, i].sum() > 0:
                    work.rows[n] = i
                    n += 1
            for j in range(columns):
                if plan[at, :, j].sum() > 0:
                    work.columns[m] = j
                    m += 1
            wide = _vectors(m, lane)
            for i in range(_vectors(n, 4)):
                for j in range(wide):
                    inside = i < n and j < m
                    work.C[i * wide + j] = gradient[at, work.rows[i], work.columns[j]] if inside else 0
                    work.K[i * wide + j] = plan[at, work.rows[i], work.columns[j]] if inside else 0
            for i in range(n):
                work.u[i] = 1
            for j in range(wide):
                work.v[j] = 1
            _plan_in_place(work, n, wide)
            _adjoint(work, n, m, kind(kappa), kind(3e-6 if plan.itemsize == 4 else 5e-15))
            _give_gradient(work, n, m, d_cost, x, y, at, kind(epsilon), 0)
        start = fetch_add(counter, step)
