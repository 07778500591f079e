"""Hypothesis strategies: transport problems across everything that is legal."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor


class Problem(NamedTuple):
    """A batch of problems with common options; ``batch`` None: one problem without a leading dimension."""

    cost: Tensor
    a: Tensor
    b: Tensor
    epsilon: float
    reach: float | None

    @property
    def options(self) -> dict:
        return {"epsilon": self.epsilon, "reach": self.reach}

    def with_inputs(self, cost=None, a=None, b=None) -> Problem:
        return self._replace(**{k: v for k, v in {"cost": cost, "a": a, "b": b}.items() if v is not None})


def log_uniform(low: float, high: float):
    """Floats whose logarithm is spread evenly (hypothesis's own floats crowd around whole numbers)."""
    return st.integers(0, 1000).map(lambda step: math.exp(math.log(low) + step / 1000 * math.log(high / low)))


BATCHES = (None, None, 1, 1, 2, 2, 3, 3, 4, 4, 0)
epsilons = log_uniform(0.005, 10.0)
reaches = st.one_of(st.none(), log_uniform(0.05, 10.0))
dtypes = st.sampled_from([torch.float32, torch.float64])


@st.composite
def masses(draw, rng, shape, reach):
    """Uniform, random, sharply peaked, with zeros, on one position, with vanishing ones; a sum of 1 unless soft."""
    out = np.ones(shape)
    kind = draw(st.sampled_from(["uniform", "random", "peaked", "zeros", "one", "tiny", "tiny and zeros"]))
    size = shape[-1]
    if kind == "random":
        out = rng.random(shape) + 0.01
    elif kind == "peaked":
        out = np.exp(8 * rng.standard_normal(shape))
    elif kind == "one":
        out = np.eye(size)[rng.integers(size, size=shape[:-1])]
    if "zeros" in kind:
        out = rng.random(shape) * (rng.random(shape) > 0.4)
    if "tiny" in kind:
        out = np.where(rng.random(shape) < 0.3, 10.0 ** rng.uniform(-30, -3, shape), out)
    kept = np.arange(size) == rng.integers(size, size=(*shape[:-1], 1))  # some mass must be somewhere
    out = np.where(kept & (out.sum(-1, keepdims=True) < 0.1), 1.0, out)
    out = out / out.sum(-1, keepdims=True)
    return out if reach is None else out * np.exp(rng.uniform(-1.5, 1.5, (*shape[:-1], 1)))


@st.composite
def problems(draw, batches=BATCHES, dtypes=dtypes, epsilons=epsilons, reaches=reaches, shifts=True):
    """Sizes 1 to 12, costs up to 2, sparse, equal or like those of matched features, and shifted by up to 100.

    With soft marginals a cost is not below -reach.
    """
    n, m, batch = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.sampled_from(batches))
    lead = () if batch is None else (batch,)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype, epsilon, reach = draw(dtypes), draw(epsilons), draw(reaches)
    cost = 2 * rng.random((*lead, n, m))
    kind = draw(st.sampled_from(["random", "sparse", "equal", "repeated", "matched", "whole"]))
    if kind == "sparse":
        cost *= rng.random(cost.shape) < 0.3
    elif kind == "equal":
        cost[...] = draw(st.floats(0, 2))
    elif kind == "repeated":
        cost = cost[..., rng.integers(n, size=n), :]
    elif kind == "matched":
        cost = 1 - np.eye(n, m)[rng.permutation(n)] + 0.1 * cost
    elif kind == "whole":
        cost = cost.round()
    if shifts:
        shift = draw(st.one_of(st.just(0.0), st.integers(-1000, 1000).map(lambda tenth: tenth / 10)))
        cost = cost + (shift if reach is None else max(shift, -reach))
    inputs = cost, draw(masses(rng, (*lead, n), reach)), draw(masses(rng, (*lead, m), reach))
    return Problem(*(torch.tensor(x, dtype=torch.float64).to(dtype) for x in inputs), epsilon, reach)
