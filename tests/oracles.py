"""Slow, obviously right formulas that the tests hold the fast ones against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.special import kl_div, logsumexp

# --- measures and statistics -----------------------------------------------------------------------------------------


def auroc_by_pairs(labels, scores, weights=None) -> float:
    """Every positive against every negative: 1 if it scores higher, a half if the same."""
    weights = np.ones(len(labels)) if weights is None else weights
    won = total = 0.0
    for y, s, w in zip(labels, scores, weights, strict=True):
        for z, t, v in zip(labels, scores, weights, strict=True):
            if y == 1 and z == 0:
                total += w * v
                won += w * v * (1.0 if s > t else 0.5 if s == t else 0.0)
    return won / total if total else float("nan")


def average_precision_by_steps(labels, scores, weights=None) -> float:
    """Lower the threshold through the distinct scores; add the gain in recall times the precision reached."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float)
    positives = weights[labels == 1].sum()
    if not positives:
        return float("nan")
    area = recall_before = 0.0
    for threshold in sorted(set(scores[~np.isnan(labels)]), reverse=True):
        called = (scores >= threshold) & ~np.isnan(labels)
        if weights[called].sum():
            hits = weights[called & (labels == 1)].sum()
            area += (hits / positives - recall_before) * hits / weights[called].sum()
            recall_before = hits / positives
    return area


def sensitivity_at_by_thresholds(labels, scores, least, weights=None) -> float:
    """Of all thresholds at which the specificity is at least ``least``, the best sensitivity."""
    weights = np.ones(len(labels)) if weights is None else weights
    best = math.nan
    positive = sum(w for y, w in zip(labels, weights, strict=True) if y == 1)
    negative = sum(w for y, w in zip(labels, weights, strict=True) if y == 0)
    if not positive or not negative:
        return best
    for c in (-math.inf, *sorted(set(scores))):
        below = sum(w for y, s, w in zip(labels, scores, weights, strict=True) if y == 0 and s <= c)
        above = sum(w for y, s, w in zip(labels, scores, weights, strict=True) if y == 1 and s > c)
        if below / negative >= least - 1e-12:
            best = above / positive if math.isnan(best) else max(best, above / positive)
    return best


def confusion_by_loop(labels, scores, threshold, weights=None) -> tuple[float, float, float, float]:
    """True positives, false positives, false negatives, true negatives at score >= threshold."""
    counts = dict.fromkeys(("tp", "fp", "fn", "tn"), 0.0)
    for y, s, w in zip(labels, scores, np.ones(len(labels)) if weights is None else weights, strict=True):
        counts[("t" if (s >= threshold) == (y == 1) else "f") + ("p" if s >= threshold else "n")] += w
    return counts["tp"], counts["fp"], counts["fn"], counts["tn"]


def logistic_by_search(x, y, weights, sloped: bool) -> tuple[float, float]:
    """Maximum likelihood of y on x by scipy's simplex search, started anew until it stays."""
    from scipy.optimize import minimize

    def misfit(theta):
        z = theta[0] + (theta[1] if sloped else 1.0) * x
        return float((weights * (np.logaddexp(0, z) - y * z)).sum())

    theta = np.array([0.0, 1.0]) if sloped else np.array([0.0])
    for _ in range(4):
        theta = minimize(
            misfit, theta, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 5000}
        ).x
    return float(theta[0]), float(theta[1]) if sloped else 1.0


def holm_by_closed_testing(p_values: Sequence[float]) -> list[float]:
    """Reject a hypothesis only if Bonferroni rejects every set of hypotheses that holds it."""
    places = range(len(p_values))
    adjusted = [0.0] * len(p_values)
    for size in range(1, len(p_values) + 1):
        for chosen in combinations(places, size):
            bonferroni = min(1.0, size * min(p_values[i] for i in chosen))
            for i in chosen:
                adjusted[i] = max(adjusted[i], bonferroni)
    return adjusted


# --- transport -------------------------------------------------------------------------------------------------------


class SlowTransport(NamedTuple):
    """One solved problem in float64."""

    plan: np.ndarray
    value: float
    f: np.ndarray
    g: np.ndarray
    residual: float


def sinkhorn_by_loop(cost, a, b, epsilon, tolerance=1e-12, limit=20_000) -> SlowTransport:
    """Sinkhorn in the log domain, one problem, positions without mass taken out before and put back as zeros."""
    cost, a, b = (np.asarray(x, dtype=np.float64) for x in (cost, a, b))
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    c, p, q = cost[np.ix_(rows, columns)], a[rows], b[columns]
    f, g = np.zeros(len(p)), np.zeros(len(q))
    for _ in range(limit):
        f = -epsilon * logsumexp((g[None, :] - c) / epsilon + np.log(q)[None, :], axis=1)
        g = -epsilon * logsumexp((f[:, None] - c) / epsilon + np.log(p)[:, None], axis=0)
        plan = np.outer(p, q) * np.exp((f[:, None] + g[None, :] - c) / epsilon)
        residual = max(np.abs(plan.sum(1) - p).sum(), np.abs(plan.sum(0) - q).sum())
        if residual <= tolerance:
            break
    value = (plan * c).sum() + epsilon * kl_div(plan, np.outer(p, q)).sum()
    shift = (p @ f - q @ g) / 2
    whole = SlowTransport(np.zeros(cost.shape), float(value), np.zeros(len(a)), np.zeros(len(b)), float(residual))
    whole.plan[np.ix_(rows, columns)] = plan
    whole.f[rows], whole.g[columns] = f - shift, g + shift
    return whole


def sinkhorn_by_newton(cost, a, b, epsilon, reach=None) -> SlowTransport:
    """Balanced or unbalanced transport: epsilon is lowered step by step, each with some sweeps and Newton on the dual,

        maximise  s(f, a) + s(g, b) - eps sum(P),   s(f, a) = <a, f>,  unbalanced  reach <a, 1 - exp(-f / reach)>

    whose slope is what the marginals lack. Rows of the Newton system are divided by their masses, so that vanishing
    ones do no harm; a step changes f + g by one eps at most and is halved until the dual rises or the residual falls.
    Balanced, f + t and g - t are solutions, too: <a, f> = <b, g> is chosen. The value is summed term by term.
    """
    cost, a, b = (np.asarray(x, dtype=np.float64) for x in (cost, a, b))
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    p, q = a[rows], b[columns]
    shift = cost[np.ix_(rows, columns)].min() if reach is None else 0.0  # leaves more digits to the exponents
    c = cost[np.ix_(rows, columns)] - shift
    f, g, n = np.zeros(len(p)), np.zeros(len(q)), len(p)

    def state(f, g, blur):
        """Plan, wanted marginals, and the value of the dual."""
        plan = np.exp((f[:, None] + g[None, :] - c) / blur + np.log(p)[:, None] + np.log(q)[None, :])
        if reach is None:
            return plan, p, q, p @ f + q @ g - blur * plan.sum()
        ends = p * np.exp(-f / reach), q * np.exp(-g / reach)
        return plan, *ends, reach * (p.sum() + q.sum() - ends[0].sum() - ends[1].sum()) - blur * plan.sum()

    def lacking(plan, wanted_a, wanted_b, _):
        return np.concatenate([wanted_a - plan.sum(1), wanted_b - plan.sum(0)])

    blur = max(epsilon, float(np.ptp(c)) / 2)
    while True:
        keep = 1.0 if reach is None else reach / (reach + blur)
        for _ in range(20):  # sweeps and Newton in turns: the former find vanishing masses' potentials at once
            for _ in range(10):
                f = -keep * blur * logsumexp((g[None, :] - c) / blur + np.log(q)[None, :], axis=1)
                g = -keep * blur * logsumexp((f[:, None] - c) / blur + np.log(p)[:, None], axis=0)
            now = state(f, g, blur)
            for _ in range(50):
                plan, wanted_a, wanted_b, dual = now
                missing, soft = lacking(*now), 0.0 if reach is None else blur / reach
                r, s = plan.sum(1) + soft * wanted_a + 1e-300, plan.sum(0) + soft * wanted_b + 1e-300
                matrix = np.block([[np.eye(n), plan / r[:, None]], [plan.T / s[:, None], np.eye(len(q))]])
                step = blur * np.linalg.lstsq(matrix, missing / np.concatenate([r, s]), rcond=1e-15)[0]
                together = np.abs(step[:n, None] + step[None, n:]).max()  # changes the plan; the rest only the ends
                size = 1 / max(1.0, together / blur, 0.0 if reach is None else np.abs(step).max() / reach)
                while size > 1e-6:
                    then = state(f + size * step[:n], g + size * step[n:], blur)
                    fallen = np.abs(lacking(*then)).sum() < np.abs(missing).sum()
                    if fallen or then[3] > dual + 1e-13 * abs(dual):
                        break
                    size /= 2
                if size <= 1e-6:
                    break  # there is no digit left to gain
                f, g, now = f + size * step[:n], g + size * step[n:], then
            if np.abs(lacking(*now)).sum() <= 1e-13 * max(1.0, now[0].sum()):
                break
        if blur == epsilon:
            break
        blur = max(epsilon, 0.7 * blur)

    plan, wanted_a, wanted_b, _ = now
    residual = max(np.abs(plan.sum(1) - wanted_a).sum(), np.abs(plan.sum(0) - wanted_b).sum())
    value = (plan * (c + shift)).sum() + epsilon * kl_div(plan, np.outer(p, q)).sum()
    if reach is None:
        half = (p @ f - q @ g) / (p.sum() + q.sum())
        f, g = f - half + shift / 2, g + half + shift / 2
    else:
        value += reach * (kl_div(plan.sum(1), p).sum() + kl_div(plan.sum(0), q).sum())
    whole = SlowTransport(np.zeros(cost.shape), float(value), np.zeros(len(a)), np.zeros(len(b)), float(residual))
    whole.plan[np.ix_(rows, columns)] = plan
    whole.f[rows], whole.g[columns] = f, g
    return whole


def sharp_value(slow: SlowTransport, cost, a, b, reach=None) -> float:
    """<P, C>, and the penalties of the marginals when they are soft; no entropic term."""
    cost, a, b = (np.asarray(x, dtype=np.float64) for x in (cost, a, b))
    value = (slow.plan * cost).sum()
    if reach is not None:
        value += reach * (kl_div(slow.plan.sum(1), a).sum() + kl_div(slow.plan.sum(0), b).sum())
    return float(value)


def value_gradients(slow: SlowTransport, a, b, epsilon, reach=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of the entropic value in cost, a and b (envelope theorem); 0 where there is no mass."""
    if reach is None:
        return slow.plan, slow.f, slow.g
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    d_a = reach * (1 - np.exp(-slow.f / reach)) + epsilon * (b.sum() - np.exp(-slow.f / reach))
    d_b = reach * (1 - np.exp(-slow.g / reach)) + epsilon * (a.sum() - np.exp(-slow.g / reach))
    return slow.plan, np.where(a > 0, d_a, 0.0), np.where(b > 0, d_b, 0.0)


def plan_gradients_by_lstsq(slope, cost, a, b, epsilon, reach=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients in cost, a and b of a function of the plan whose slope in the plan is given.

    Every input is moved alone, and the linearised equations of the plan are solved for the change of f and g:

        dP_ij = P_ij (da_i / a_i + db_j / b_j + (df_i + dg_j - dC_ij) / eps)
        sum_j dP_ij = da_i          or, unbalanced, d(a_i exp(-f_i / reach)); the columns likewise

    Balanced, mass can only be moved in a and b together: da = e_i goes with db = b, which adds <b, y> to x_i where
    x and y are the gradients, centred so that <a, x> = <b, y>, which is half of what da = a with db = b gives.
    Masses must be 0 or well above rounding: da_i / a_i is one of the numbers.
    """
    slow = sinkhorn_by_newton(cost, a, b, epsilon, reach)
    assert slow.residual <= 1e-12, slow.residual
    a, b, slope = (np.asarray(x, dtype=np.float64) for x in (a, b, slope))
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    here = np.ix_(rows, columns)
    p, q, f, g, plan = a[rows], b[columns], slow.f[rows], slow.g[columns], slow.plan[here]
    n, m = plan.shape
    r, c = plan.sum(1), plan.sum(0)
    weights = slope[here] * plan

    soft = 0.0 if reach is None else 1 / reach
    matrix = np.block([[np.diag(r * (1 / epsilon + soft)), plan / epsilon],
                       [plan.T / epsilon, np.diag(c * (1 / epsilon + soft))]])  # fmt: skip
    scale = 1 / np.concatenate([r, c])[:, None]  # every equation in parts of its own mass

    def change(d_a, d_b, d_cost):
        """Changes of the function for columns of changes: (n, K), (m, K), (n, m, K)."""
        fixed = d_a[:, None] / p[:, None, None] + d_b[None] / q[None, :, None] - d_cost / epsilon  # dP / P so far
        wanted_a = d_a if reach is None else np.exp(-f / reach)[:, None] * d_a
        wanted_b = d_b if reach is None else np.exp(-g / reach)[:, None] * d_b
        moved = plan[..., None] * fixed
        right = np.concatenate([wanted_a - moved.sum(1), wanted_b - moved.sum(0)])
        potentials = np.linalg.lstsq(scale * matrix, scale * right, rcond=1e-15)[0]
        through = weights.sum(1) @ potentials[:n] + weights.sum(0) @ potentials[n:]
        return np.tensordot(weights, fixed) + through / epsilon

    count, nothing = n * m, np.zeros
    d_cost = change(nothing((n, count)), nothing((m, count)), np.eye(count).reshape(n, m, count))
    still = nothing((n, m, n + m))
    if reach is None:
        d_a = np.hstack([np.eye(n), np.repeat(p[:, None], m, 1)])
        d_b = np.hstack([np.repeat(q[:, None], n, 1), np.eye(m)])
        d_masses = change(d_a, d_b, still) - change(p[:, None], q[:, None], still[..., :1]) / 2
    else:
        d_masses = change(np.eye(n, n + m), np.eye(m, n + m, n), still)
    whole = np.zeros(slow.plan.shape), np.zeros(len(a)), np.zeros(len(b))
    whole[0][here], whole[1][rows], whole[2][columns] = d_cost.reshape(n, m), d_masses[:n], d_masses[n:]
    return whole


def sharp_gradients_by_lstsq(cost, a, b, epsilon, reach=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of ``sharp_value``: through the plan, and where cost, a and b stand in the formula themselves."""
    cost, a, b = (np.asarray(x, dtype=np.float64) for x in (cost, a, b))
    slow = sinkhorn_by_newton(cost, a, b, epsilon, reach)
    if reach is None:
        d_cost, d_a, d_b = plan_gradients_by_lstsq(cost, cost, a, b, epsilon)
        return d_cost + slow.plan, d_a, d_b
    ratio_a = np.divide(slow.plan.sum(1), a, out=np.ones_like(a), where=a > 0)
    ratio_b = np.divide(slow.plan.sum(0), b, out=np.ones_like(b), where=b > 0)
    slope = cost + reach * (np.log(ratio_a)[:, None] + np.log(ratio_b)[None, :])
    d_cost, d_a, d_b = plan_gradients_by_lstsq(slope, cost, a, b, epsilon, reach)
    return d_cost + slow.plan, d_a + reach * (1 - ratio_a), d_b + reach * (1 - ratio_b)


def gaussian_entropic_value(mean_a, deviation_a, mean_b, deviation_b, epsilon) -> float:
    """Entropic transport between two Gaussians on the line with cost (x - y)^2.

    Source: Janati, Muzellec, Peyre, Cuturi, NeurIPS 2020, arXiv:2006.02572, theorem 1 with epsilon = 2 sigma^2.
    """
    half = epsilon / 2
    root = np.sqrt(4 * deviation_a**2 * deviation_b**2 + half**2)
    bures = deviation_a**2 + deviation_b**2 - root + half * (1 - np.log(2 * half)) + half * np.log(root + half)
    return float((mean_a - mean_b) ** 2 + bures)


def cosine_cost_by_loops(x, y) -> np.ndarray:
    """One minus the cosine of every pair; a zero vector has cosine 0 with everything."""
    out = np.ones((len(x), len(y)))
    for i, u in enumerate(np.asarray(x, dtype=np.float64)):
        for j, v in enumerate(np.asarray(y, dtype=np.float64)):
            if np.linalg.norm(u) and np.linalg.norm(v):
                out[i, j] = 1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    return out


# --- losses ----------------------------------------------------------------------------------------------------------


def nt_xent_by_loops(first, second, temperature) -> float:
    """SimCLR's equation 1, term by term: the positive stays in the denominator, only the point itself is left out."""
    z = [v / np.linalg.norm(v) for v in [*np.asarray(first, dtype=np.float64), *np.asarray(second, dtype=np.float64)]]
    n, losses = len(z) // 2, []
    for i in range(2 * n):
        positive = i + n if i < n else i - n
        others = sum(np.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i)
        losses.append(-np.log(np.exp(z[i] @ z[positive] / temperature) / others))
    return float(np.mean(losses))


def variance_by_loops(rows, target=1.0) -> float:
    """VICReg's hinge, one dimension after the other."""
    rows, total = np.asarray(rows, dtype=np.float64), 0.0
    for column in rows.T:
        unbiased = sum((x - column.mean()) ** 2 for x in column) / (len(column) - 1)
        total += max(0.0, target - np.sqrt(unbiased + 1e-4))
    return total / rows.shape[1]


def covariance_by_loops(rows) -> float:
    """VICReg's off-diagonal penalty, one pair of dimensions after the other."""
    rows, total = np.asarray(rows, dtype=np.float64), 0.0
    centred = rows - rows.mean(0)
    for i in range(rows.shape[1]):
        for j in range(rows.shape[1]):
            if i != j:
                total += (sum(x[i] * x[j] for x in centred) / (len(rows) - 1)) ** 2
    return total / rows.shape[1]


# --- networks --------------------------------------------------------------------------------------------------------


def attention_by_loops(queries, keys, values, allowed) -> tuple[np.ndarray, np.ndarray]:
    """One head, one image: every query over the allowed keys. Returns the mixed values and the weights."""
    mixed, weights = np.zeros((len(queries), values.shape[1])), np.zeros((len(queries), len(keys)))
    for i, q in enumerate(queries):
        scores = {j: np.exp(q @ keys[j] / np.sqrt(len(q))) for j in range(len(keys)) if allowed[j]}
        for j, score in scores.items():
            weights[i, j] = score / sum(scores.values())
            mixed[i] += weights[i, j] * values[j]
    return mixed, weights


def head_by_loops(rows, steps) -> np.ndarray:
    """A head applied layer by layer to rows (N, C).

    Steps: ("linear", weight, bias or None), ("norm", scale or None, shift or None), ("relu",) or ("gelu",). The norm is
    BatchNorm in training: biased variance over the rows, plus 1e-5.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in rows]
    for kind, *weights in steps:
        if kind == "linear":
            matrix, bias = weights
            rows = [np.array([w @ row for w in matrix]) + (0 if bias is None else bias) for row in rows]
        elif kind == "norm":
            scale, shift = weights
            mean = sum(rows) / len(rows)
            spread = np.sqrt(sum((row - mean) ** 2 for row in rows) / len(rows) + 1e-5)
            rows = [(row - mean) / spread * (1 if scale is None else scale) for row in rows]
            rows = [row + (0 if shift is None else shift) for row in rows]
        elif kind == "relu":
            rows = [np.array([max(x, 0.0) for x in row]) for row in rows]
        else:
            assert kind == "gelu"
            rows = [np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in row]) for row in rows]
    return np.array(rows)


# --- losses of MoCo, DenseCL, BYOL, SimSiam, Barlow Twins and DINO ---------------------------------------------------


def cosine(u, v) -> float:
    """<u, v> / (|u| |v|)."""
    dot = sum(float(x) * float(y) for x, y in zip(u, v, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in u) * sum(float(y) ** 2 for y in v))


def info_nce_by_loops(query, key, negatives, temperature) -> float:
    """MoCo's equation 1 for one query: its key against the negatives, all compared by cosine."""
    right = math.exp(cosine(query, key) / temperature)
    wrong = sum(math.exp(cosine(query, negative) / temperature) for negative in negatives)
    return -math.log(right / (right + wrong))


def partners_by_loops(tokens, others, allowed) -> list[int]:
    """For every token the most similar one of the allowed others; the first of equal ones."""
    return [
        max((j for j in range(len(others)) if allowed[j]), key=lambda j: cosine(token, others[j])) for token in tokens
    ]


def densecl_dense_by_loops(
    tokens, key_tokens, projected, key_projected, valid, key_valid, negatives, temperature
) -> float:
    """DenseCL's dense term: pairs by backbone tokens, loss on their projections, the mean in each image first.

    Args: lists over images; tokens (n, C) and (m, C), projections (n, d) and (m, d), valid (n,) and (m,).
    """
    images = []
    for i in range(len(tokens)):
        partner = partners_by_loops(tokens[i], key_tokens[i], key_valid[i])
        images.append([
            info_nce_by_loops(projected[i][at], key_projected[i][partner[at]], negatives, temperature)
            for at in range(len(tokens[i])) if valid[i][at]
        ])  # fmt: skip
    return sum(sum(losses) / len(losses) for losses in images) / len(images)


def byol_by_loops(predictions, targets) -> float:
    """Squared distances of vectors of length 1, of both views: predictions and targets are (2, B, d), other view's."""
    total = 0.0
    for v in (0, 1):
        for p, z in zip(predictions[v], targets[1 - v], strict=True):
            p, z = p / np.linalg.norm(p), z / np.linalg.norm(z)
            total += sum((x - y) ** 2 for x, y in zip(p, z, strict=True)) / len(predictions[v])
    return total


def simsiam_by_loops(predictions, embeddings) -> float:
    """SimSiam's equation 4: half of each direction's negative cosine."""
    first = [-cosine(p, z) for p, z in zip(predictions[0], embeddings[1], strict=True)]
    second = [-cosine(p, z) for p, z in zip(predictions[1], embeddings[0], strict=True)]
    return sum(first) / len(first) / 2 + sum(second) / len(second) / 2


def cross_correlation_by_loops(first, second) -> np.ndarray:
    """Barlow Twins' equation 2 entry by entry; every dimension has mean 0 and biased variance 1, but for 1e-5."""
    columns = []
    for rows in (first, second):
        standard = []
        for column in np.asarray(rows, dtype=np.float64).T:
            mean = sum(column) / len(column)
            biased = sum((x - mean) ** 2 for x in column) / len(column)
            standard.append([(x - mean) / math.sqrt(biased + 1e-5) for x in column])
        columns.append(standard)
    return np.array([[sum(x * y for x, y in zip(a, b, strict=True)) / len(a) for b in columns[1]] for a in columns[0]])


def barlow_by_loops(first, second, redundancy) -> float:
    """Barlow Twins' equation 1."""
    matrix, total = cross_correlation_by_loops(first, second), 0.0
    for i in range(len(matrix)):
        for j in range(len(matrix)):
            total += (1 - matrix[i, i]) ** 2 if i == j else redundancy * matrix[i, j] ** 2
    return total


def softmax_by_loops(scores) -> list[float]:
    """exp(s_k) / sum exp(s)."""
    powers = [math.exp(float(s) - float(max(scores))) for s in scores]
    return [p / sum(powers) for p in powers]


def distillation_by_loops(student, teacher) -> float:
    """Mean over rows of -sum_k p_k ln softmax(s)_k, from scores (N, K) and probabilities (N, K)."""
    rows = []
    for scores, probabilities in zip(student, teacher, strict=True):
        said = softmax_by_loops(scores)
        rows.append(-sum(float(p) * math.log(q) for p, q in zip(probabilities, said, strict=True)))
    return sum(rows) / len(rows)


def dino_by_loops(students, teachers, centre, student_temperature, teacher_temperature) -> float:
    """DINO's algorithm 1 from raw scores: students of all views (V, B, K), teachers of the first two (2, B, K)."""
    pairs = []
    for u, teacher in enumerate(teachers):
        wanted = [softmax_by_loops((row - centre) / teacher_temperature) for row in teacher]
        for v, student in enumerate(students):
            if v != u:
                pairs.append(distillation_by_loops(np.asarray(student) / student_temperature, wanted))
    return sum(pairs) / len(pairs)
