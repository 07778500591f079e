"""Optimizers: against loops in numpy, by hand, their groups, their states, and the schedule."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from otcxr.optim import LARS, OPTIMIZERS, cosine_schedule, make_optimizer, set_learning_rate

RATE, DECAY, TRUST = 0.3, 0.05, 0.02
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Loose(nn.Module):
    """Parameters of every kind, without a network: the tests write their gradients. Names ending in _c: constant."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(normal(3, seed=1))  # first, so that the order of groups is not that of parameters
        self.kernel = nn.Parameter(normal(2, 3, 3, 3, seed=2))
        self.matrix = nn.Parameter(normal(3, 4, seed=3))
        self.scalar = nn.Parameter(normal(seed=4))
        self.empty_start = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))  # |w| = 0
        self.nothing = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))  # |w| = 0 and |g| = 0, always
        self.matrix_c = nn.Parameter(normal(4, 2, seed=5))
        self.bias_c = nn.Parameter(normal(4, seed=6))
        self.frozen = nn.Parameter(normal(2, 2, seed=7), requires_grad=False)

    def constant(self):
        return [p for name, p in self.named_parameters() if name.endswith("_c")]


def gradient_of(name, shape, step):
    """The gradient that the tests write; None: none."""
    if name == "nothing" or (name == "matrix" and step in (2, 5)):
        return np.zeros(shape)
    if name in ("kernel", "gain") and step == 3:
        return None
    seed = sum(map(ord, name)) + 1000 * step
    return np.random.default_rng(seed).normal(size=shape) * 10.0 ** (step % 3 - 1)


def by_loops(name, weights, steps, rate_of, momentum, decay):
    """Weights after the steps, one number at a time. ``weights``: name -> array; ``rate_of(step, name)``."""
    weights = {key: value.copy() for key, value in weights.items()}
    memory = {key: [{"v": 0.0, "first": 0.0, "second": 0.0} for _ in value.flat] for key, value in weights.items()}
    counts = dict.fromkeys(weights, 0)
    for step in range(steps):
        for key, array in weights.items():
            gradient = gradient_of(key, array.shape, step)
            if gradient is None:
                continue
            counts[key] += 1
            rate, matrix = rate_of(step, key), array.ndim >= 2
            pull = decay if matrix else 0.0
            values, slopes = [float(x) for x in array.flat], [float(x) for x in gradient.flat]
            if name != "adamw":
                slopes = [g + pull * w for g, w in zip(slopes, values, strict=True)]
            if name == "lars" and matrix:
                w_norm, g_norm = (
                    math.sqrt(math.fsum(w * w for w in values)),
                    math.sqrt(math.fsum(g * g for g in slopes)),
                )
                if w_norm > 0 and g_norm > 0:
                    slopes = [TRUST * w_norm / g_norm * g for g in slopes]
            for i, g in enumerate(slopes):
                past = memory[key][i]
                if name == "adamw":
                    values[i] *= 1 - rate * pull
                    past["first"] = 0.9 * past["first"] + 0.1 * g
                    past["second"] = 0.999 * past["second"] + 0.001 * g * g
                    first = past["first"] / (1 - 0.9 ** counts[key])
                    second = past["second"] / (1 - 0.999 ** counts[key])
                    values[i] -= rate * first / (math.sqrt(second) + 1e-8)
                else:
                    past["v"] = momentum * past["v"] + g
                    values[i] -= rate * past["v"]
            weights[key] = np.array(values).reshape(array.shape)
    return weights


def write_gradients(module, step):
    for key, p in module.named_parameters():
        gradient = gradient_of(key, tuple(p.shape), step)
        p.grad = None if gradient is None or not p.requires_grad else torch.as_tensor(gradient).reshape(p.shape)


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@each_optimizer
def test_every_optimizer_equals_its_loop(name, momentum, decay):
    """With a schedule, a constant rate, weights and gradients of norm 0, and gradients that are missing."""
    module, steps, warmup = Loose(), 8, 2
    start = {key: p.detach().numpy().copy() for key, p in module.named_parameters()}
    optimizer = make_optimizer(
        module, name, learning_rate=RATE, weight_decay=decay, momentum=momentum, trust=TRUST,
        constant_rate=module.constant(),
    )  # fmt: skip
    for step in range(steps):
        set_learning_rate(optimizer, RATE, cosine_schedule(step, warmup, steps))
        write_gradients(module, step)
        optimizer.step()

    def rate_of(step, key):
        ramp = (
            (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        )
        return RATE if key.endswith("_c") else RATE * ramp

    trained = {key: array for key, array in start.items() if key != "frozen"}
    expected = by_loops(name, trained, steps, rate_of, momentum, decay)
    assert len(expected) == 8
    for key, p in module.named_parameters():
        if key == "frozen":
            np.testing.assert_array_equal(p.detach().numpy(), start[key])
            continue
        np.testing.assert_allclose(p.detach().numpy(), expected[key], rtol=1e-11, atol=1e-13, err_msg=key)
        assert np.abs(expected[key] - start[key]).max() > (-1 if key == "nothing" else 1e-4), key
    assert (module.nothing == 0).all()  # and not NaN


def test_the_loop_sees_every_setting():
    """The oracle above is no constant: each setting moves it by much more than the tolerance."""
    start = {key: p.detach().numpy().copy() for key, p in Loose().named_parameters()}

    def matrix(name="lars", rate=RATE, momentum=0.9, decay=DECAY):
        return by_loops(name, start, 6, lambda step, key: rate, momentum, decay)["matrix"]

    for other in (matrix("sgd"), matrix("adamw"), matrix(rate=0.2), matrix(momentum=0.0), matrix(decay=0.0)):
        assert np.abs(other - matrix()).max() > 1e-4


# --- LARS ------------------------------------------------------------------------------------------------------------


def test_lars_by_hand():
    """|w| = 5; g = (-1.5, 8) + 0.5 w = (0, 10); q = 0.1 * 5 / 10 = 0.05; v = (0, 0.5); w = (3, 4) - 2 v = (3, 3)."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "adapt": False}]
    optimizer = LARS(groups, lr=2.0, momentum=0.5, trust=0.1)
    weight.grad, bias.grad = torch.tensor([[-1.5, 8.0]]).double(), torch.tensor([0.25, -1.0]).double()
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.tensor([[3.0, 3.0]]).double(), rtol=1e-15, atol=1e-15)
    assert bias.tolist() == [2.5, 6.0]  # neither decay nor q
    # no gradient in the sum: q = 1, and momentum goes on alone, v = 0.5 v
    weight.grad, bias.grad = -0.5 * weight.detach(), torch.zeros(2).double()
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.tensor([[3.0, 2.5]]).double(), rtol=1e-15, atol=1e-15)
    assert bias.tolist() == [2.25, 7.0]


def test_lars_without_adaptation_is_sgd():
    ours, theirs = nn.Parameter(normal(4, 3)), nn.Parameter(normal(4, 3))
    lars = LARS([{"params": [ours], "adapt": False}], lr=0.1, momentum=0.9, weight_decay=0.02)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.02)
    for step in range(5):
        ours.grad = theirs.grad = normal(4, 3, seed=step)
        lars.step()
        sgd.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert (ours - normal(4, 3)).abs().max() > 0.1


@given(scale=st.integers(-12, 12).map(lambda power: 10.0**power))
def test_the_scale_of_a_gradient_moves_no_adapted_weight(scale):
    def after(factor):
        module = nn.Linear(4, 3, dtype=torch.float64)
        module.weight.data, module.bias.data = normal(3, 4, seed=1), normal(3, seed=2)
        optimizer = make_optimizer(module, "lars", learning_rate=1.0, weight_decay=0.0, trust=0.1)
        for step in range(3):
            module.weight.grad, module.bias.grad = (
                factor * normal(3, 4, seed=3 + step),
                factor * normal(3, seed=9 + step),
            )
            optimizer.step()
        return module.weight.detach(), module.bias.detach()

    (weight, bias), (scaled_weight, scaled_bias) = after(1.0), after(scale)
    torch.testing.assert_close(scaled_weight, weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        scaled_bias - normal(3, seed=2), scale * (bias - normal(3, seed=2)), rtol=1e-2, atol=1e-9
    )
    assert (weight - normal(3, 4, seed=1)).abs().max() > 0.05


def test_lars_skips_what_has_no_gradient():
    seen, unseen = nn.Parameter(normal(2, 2, seed=1)), nn.Parameter(normal(2, 2, seed=2))
    optimizer = LARS([seen, unseen], lr=0.5, weight_decay=0.1, trust=0.1)
    seen.grad = normal(2, 2, seed=3)
    optimizer.step()
    assert torch.equal(unseen.data, normal(2, 2, seed=2))
    assert unseen not in optimizer.state
    seen.grad = None  # also with momentum that would go on
    before, memory = seen.detach().clone(), optimizer.state[seen]["momentum_buffer"].clone()
    assert not torch.equal(before, normal(2, 2, seed=1))
    assert memory.abs().max() > 0
    optimizer.step()
    assert torch.equal(seen.data, before)
    assert torch.equal(optimizer.state[seen]["momentum_buffer"], memory)


def test_lars_calls_the_closure_with_gradients_and_returns_its_loss():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = LARS([weight], lr=1.0, trust=0.1)
    assert optimizer.step() is None

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert float(loss.detach()) == 25.0
    torch.testing.assert_close(weight.data, torch.tensor([[2.7, 3.6]]).double())  # g = 2 w: the step is 0.1 w
    assert weight.requires_grad
    assert weight.is_leaf
    assert torch.equal(weight.grad, torch.tensor([[6.0, 8.0]]).double())  # read, not changed
    assert not optimizer.state[weight]["momentum_buffer"].requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_changes_no_gradient(momentum):
    module = Loose()
    optimizer = make_optimizer(module, "lars", learning_rate=1.0, weight_decay=0.1, momentum=momentum)
    for _ in range(2):
        write_gradients(module, 0)
        before = [p.grad.clone() for p in module.parameters() if p.requires_grad]
        optimizer.step()
        after = [p.grad for p in module.parameters() if p.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    held = [key for state in optimizer.state.values() for key in state]
    assert held == ["momentum_buffer"] * (0 if momentum == 0 else len(before))  # plain descent needs no memory


def test_lars_never_reads_a_tensor_on_the_host():
    """A tensor on the meta device has no values: reading one raises."""
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((module[0].weight > 0).any())
    optimizer = make_optimizer(module, "lars", learning_rate=1.0, weight_decay=0.1)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    assert len(optimizer.state) == 4


def test_lars_in_other_precisions():
    """float32 follows float64; a norm beyond the range of float16 does not overflow."""
    ends = {}
    for dtype in (torch.float32, torch.float64):
        weight = nn.Parameter(normal(8, 8, seed=1, dtype=dtype))
        optimizer = LARS([weight], lr=1.0, weight_decay=0.1, trust=0.05)
        for step in range(5):
            weight.grad = normal(8, 8, seed=2 + step, dtype=dtype)
            optimizer.step()
        assert weight.dtype == optimizer.state[weight]["momentum_buffer"].dtype == dtype
        ends[dtype] = weight.detach().double()
    torch.testing.assert_close(ends[torch.float32], ends[torch.float64], rtol=1e-4, atol=1e-5)
    assert (ends[torch.float64] - normal(8, 8, seed=1)).abs().max() > 0.1
    half = nn.Parameter(torch.full((100, 100), 1000.0, dtype=torch.float16))  # |w| = 100,000
    half.grad = torch.ones_like(half)
    LARS([half], lr=1.0, momentum=0.0, trust=0.25).step()
    assert (half == 750).all()


def _sharded_equals_whole(rank, store):
    """In each of two processes: LARS on sharded parameters, against the same on whole ones."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
        sharded = fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", (2,)))
        start = copy.deepcopy(whole)
        pair = [
            (m, make_optimizer(m, "lars", learning_rate=0.1, weight_decay=0.01, trust=0.1)) for m in (whole, sharded)
        ]
        for step in range(4):
            for module, optimizer in pair:
                optimizer.zero_grad()
                (module(normal(6, 5, seed=step)) - 1).square().mean().backward()
                optimizer.step()
        for before, one, parts in zip(start.parameters(), whole.parameters(), sharded.parameters(), strict=True):
            assert isinstance(parts.data, DTensor)
            torch.testing.assert_close(parts.full_tensor(), one.data, rtol=1e-10, atol=1e-12)
            assert (one - before).abs().max() > 1e-4
    finally:
        dist.destroy_process_group()
    # all is compared: leave without the interpreter's end, in which a thread of gloo now and then aborts the process
    os._exit(0)


@pytest.mark.slow
def test_lars_on_sharded_parameters_equals_whole_ones(tmp_path):
    torch.multiprocessing.spawn(_sharded_equals_whole, (str(tmp_path / "store"),), nprocs=2)


# --- groups ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight


MODULES = {
    "linear": lambda: nn.Linear(3, 2),
    "no bias": lambda: nn.Linear(3, 2, bias=False),
    "norm only": lambda: nn.BatchNorm2d(3),
    "conv": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)),
    "attention": lambda: nn.Sequential(nn.LayerNorm(4), nn.MultiheadAttention(4, 2), nn.LayerNorm(4)),
    "tied": Tied,
    "loose": Loose,
}
each_module = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES.keys())


def check_groups(module, optimizer, name, constant, decay):
    """Every trainable parameter is in exactly one group, the one that the table of ``make_optimizer`` says."""
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in module.parameters() if p.requires_grad]
    assert sorted(map(id, listed)) == sorted(map(id, trained))
    rows = []
    for group in optimizer.param_groups:
        kinds = {(any(p is c for c in constant), p.ndim <= 1) for p in group["params"]}
        assert len(kinds) == 1  # neither empty nor mixed
        ((fixed, small),) = kinds
        rows.append((fixed, small))
        assert group["constant_rate"] is fixed
        assert group["weight_decay"] == (0.0 if small else decay)
        assert ("adapt" in group) == (name == "lars")
        if name == "lars":
            assert group["adapt"] is (not small)
        assert group["lr"] == RATE
        places = [next(i for i, p in enumerate(trained) if p is member) for member in group["params"]]
        assert places == sorted(places)
    assert rows == sorted(set(rows))  # scheduled before constant, decayed before not


@each_module
@each_optimizer
def test_every_trainable_parameter_is_in_one_group(name, build):
    module = build()
    optimizer = make_optimizer(module, name, learning_rate=RATE, weight_decay=DECAY)
    check_groups(module, optimizer, name, [], DECAY)
    assert 1 <= len(optimizer.param_groups) <= 2


LAYERS = {
    "conv": lambda: nn.Conv2d(1, 2, 3),
    "conv without bias": lambda: nn.Conv2d(1, 2, 3, bias=False),
    "batch norm": lambda: nn.BatchNorm1d(3),
    "layer norm": lambda: nn.LayerNorm(3),
    "linear": lambda: nn.Linear(2, 2),
    "nothing": nn.ReLU,
}


@given(
    layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4),
    marks=st.lists(st.sampled_from(["scheduled", "constant", "frozen"]), min_size=8, max_size=8),
    name=st.sampled_from(OPTIMIZERS),
    data=st.data(),
)
@settings(deadline=None)
def test_groups_of_any_module(layers, marks, name, data):
    module = nn.Sequential(*(LAYERS[layer]() for layer in layers))
    constant = []
    for p, mark in zip(module.parameters(), marks, strict=False):
        p.requires_grad_(mark != "frozen")
        constant += [p] if mark == "constant" else []
    asked = iter(data.draw(st.permutations(constant)))  # an iterator, in any order
    if not any(p.requires_grad for p in module.parameters()):
        with pytest.raises(ValueError, match="no trainable parameter"):
            make_optimizer(module, name, learning_rate=RATE, weight_decay=DECAY, constant_rate=asked)
        return
    optimizer = make_optimizer(module, name, learning_rate=RATE, weight_decay=DECAY, constant_rate=asked)
    check_groups(module, optimizer, name, constant, DECAY)


@each_optimizer
def test_all_four_groups_and_frozen_parameters(name):
    module = Loose()
    twice = module.constant() * 2
    optimizer = make_optimizer(module, name, learning_rate=RATE, weight_decay=DECAY, constant_rate=twice)
    names = {id(p): key for key, p in module.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == [
        ["kernel", "matrix", "empty_start", "nothing"], ["gain", "scalar"], ["matrix_c"], ["bias_c"],
    ]  # fmt: skip


def old_adamw(module, learning_rate, weight_decay):
    """As it was before there was a choice of optimizers."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


@pytest.mark.parametrize("kind", ["linear", "conv", "attention", "tied", "loose"])
def test_adamw_is_built_as_it_always_was(kind):
    module = MODULES[kind]()
    old = old_adamw(module, RATE, DECAY)
    new = make_optimizer(module, "adamw", learning_rate=RATE, weight_decay=DECAY)
    assert type(new) is torch.optim.AdamW
    assert new.defaults == old.defaults
    assert len(new.param_groups) == len(old.param_groups) == 2
    for ours, before in zip(new.param_groups, old.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in before["params"]]
        settings_of = {key: value for key, value in ours.items() if key not in ("params", "constant_rate")}
        assert settings_of == {key: value for key, value in before.items() if key != "params"}


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6), nn.Linear(6, 3)
        )


def train(module, optimizer, steps, set_rate):
    """Train on data that depend on the step only."""
    for step in steps:
        set_rate(optimizer, step)
        optimizer.zero_grad()
        loss = (module(normal(6, 1, 5, 5, seed=step, dtype=torch.float32)) - 1).square().mean()
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in module.parameters()]


def scheduled(optimizer, step):
    set_learning_rate(optimizer, 0.01, cosine_schedule(step, 3, 12))


def test_an_adamw_run_is_what_it_was_bit_for_bit():
    def old_rate(optimizer, step):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * cosine_schedule(step, 3, 12)

    one, two = network(), network()
    was = train(one, old_adamw(one, 0.01, DECAY), range(12), old_rate)
    new = make_optimizer(two, "adamw", learning_rate=0.01, weight_decay=DECAY)
    assert all(map(torch.equal, train(two, new, range(12), scheduled), was))
    assert not any(map(torch.equal, was, network().parameters()))


def test_a_checkpoint_from_before_there_was_a_choice_goes_on():
    """Its groups do not know "constant_rate"; loading puts them in place of ours."""
    one = network()
    old = old_adamw(one, 0.01, DECAY)
    train(one, old, range(6), scheduled)
    two = copy.deepcopy(one)
    new = make_optimizer(two, "adamw", learning_rate=0.01, weight_decay=DECAY)
    new.load_state_dict(copy.deepcopy(old.state_dict()))  # as from a file: the tensors are not shared
    assert "constant_rate" not in new.param_groups[0]
    assert all(map(torch.equal, train(two, new, range(6, 12), scheduled), train(one, old, range(6, 12), scheduled)))


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@each_optimizer
def test_a_saved_optimizer_goes_on_bit_for_bit(name, momentum, constant):
    def build(module):
        return make_optimizer(
            module, name, learning_rate=0.01, weight_decay=DECAY, momentum=momentum, trust=TRUST,
            constant_rate=module[-1].parameters() if constant else (),
        )  # fmt: skip

    whole = network()
    expected = train(whole, build(whole), range(10), scheduled)

    first = network()
    optimizer = build(first)
    train(first, optimizer, range(5), scheduled)
    file = io.BytesIO()
    torch.save({"module": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # plain values and tensors, nothing else

    second = network(seed=1)
    second.load_state_dict(saved["module"])
    forgetful = copy.deepcopy(second)
    loaded = build(second)
    loaded.load_state_dict(saved["optimizer"])
    assert [g["constant_rate"] for g in loaded.param_groups] == [False, False] + [True, True] * constant
    assert all(map(torch.equal, train(second, loaded, range(5, 10), scheduled), expected))
    # without the state it would not: the comparison sees it, where there is one
    stateless = name != "adamw" and momentum == 0
    lost = train(forgetful, build(forgetful), range(5, 10), scheduled)
    assert all(map(torch.equal, lost, expected)) == stateless


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lasr", r"unknown optimizer 'lasr'; did you mean 'lars'\?; known: adamw, sgd, lars"),
        ("AdamW", r"unknown optimizer 'AdamW'"),
        ("rmsprop", r"unknown optimizer 'rmsprop'; known: adamw, sgd, lars"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(nn.Linear(2, 2), name, learning_rate=RATE, weight_decay=DECAY)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("momentum", 1.0, r"momentum is 1.0, expected a number in \[0, 1\)"),
        ("momentum", -0.1, "momentum is -0.1"),
        ("momentum", math.nan, "momentum is nan"),
        ("learning_rate", -1.0, "learning_rate is -1.0, expected a finite number of at least 0"),
        ("learning_rate", math.inf, "learning_rate is inf"),
        ("weight_decay", -0.5, "weight_decay is -0.5, expected a finite number of at least 0"),
        ("weight_decay", math.nan, "weight_decay is nan"),
        ("trust", 0.0, "trust is 0.0, expected a finite number above 0"),
        ("trust", math.nan, "trust is nan"),
    ],
)
@each_optimizer
def test_numbers_out_of_range_are_refused(name, setting, value, message):
    arguments = {"learning_rate": RATE, "weight_decay": DECAY, setting: value}
    with pytest.raises(ValueError, match=message):
        make_optimizer(nn.Linear(2, 2), name, **arguments)
    if name == "lars":
        arguments["lr"] = arguments.pop("learning_rate")
        with pytest.raises(ValueError, match=message):
            LARS(nn.Linear(2, 2).parameters(), **arguments)


@each_optimizer
def test_edges_of_the_ranges_are_allowed(name):
    module = nn.Linear(2, 2)
    optimizer = make_optimizer(module, name, learning_rate=0.0, weight_decay=0.0, momentum=0.0)
    before = module.weight.detach().clone()
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(module.weight, before)  # a rate of 0 moves nothing


@each_optimizer
def test_nothing_to_train_is_refused(name):
    for module in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        message = f"{type(module).__name__} has no trainable parameter.*requires_grad_"
        with pytest.raises(ValueError, match=message):
            make_optimizer(module, name, learning_rate=RATE, weight_decay=DECAY)


@each_optimizer
def test_a_constant_rate_for_a_stranger_is_refused(name):
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    module[1].bias.requires_grad_(False)

    def build(constant):
        return make_optimizer(module, name, learning_rate=RATE, weight_decay=DECAY, constant_rate=constant)

    with pytest.raises(ValueError, match=r"shape \(2, 3\) that is no parameter of Sequential"):
        build(copy.deepcopy(module)[0].parameters())  # equal values are not identity
    with pytest.raises(ValueError, match=r"constant_rate has '1.bias' of Sequential, which is frozen"):
        build([module[0].weight, module[1].bias])
    with pytest.raises(ValueError, match=r"shape \(3,\) that is no parameter"):
        build(module[0].weight)  # one parameter instead of a list: its rows
    assert len(build([module[0].weight]).param_groups) == 3


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_the_schedule_at_its_corners():
    assert [cosine_schedule(step, 4, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine_schedule(4, 4, 20) == 1.0
    assert cosine_schedule(12, 4, 20) == pytest.approx(0.5)
    assert cosine_schedule(8, 4, 20) == pytest.approx((2 + math.sqrt(2)) / 4)
    assert cosine_schedule(20, 4, 20) == cosine_schedule(99, 4, 20) == 0.0
    assert cosine_schedule(0, 0, 10) == 1.0  # no warm-up
    assert cosine_schedule(0, 1, 1) == 1.0
    assert cosine_schedule(0, 5, 5) == 0.2
    assert cosine_schedule(5, 5, 5) == 1.0  # nothing but warm-up: no division by 0


@given(warmup=st.integers(0, 50), rest=st.integers(1, 200))
def test_the_schedule_rises_then_falls(warmup, rest):
    total = warmup + rest
    factors = [cosine_schedule(step, warmup, total) for step in range(total + 1)]
    assert all(a < b for a, b in itertools.pairwise(factors[:warmup]))
    assert all(a > b for a, b in itertools.pairwise(factors[warmup:]))
    assert max(factors) == 1.0 == factors[warmup]
    assert factors[-1] == 0.0
    assert min(factors[:-1]) > 0


@each_optimizer
@given(peak=st.floats(1e-8, 1e3), factor=st.floats(0, 1))
def test_a_scheduled_rate_is_the_product_and_a_constant_one_the_peak(name, peak, factor):
    module = Loose()
    optimizer = make_optimizer(
        module, name, learning_rate=peak, weight_decay=DECAY, constant_rate=module.constant()
    )  # fmt: skip
    assert [group["lr"] for group in optimizer.param_groups] == [peak] * 4
    set_learning_rate(optimizer, peak, factor)
    assert [group["lr"] for group in optimizer.param_groups] == [peak * factor, peak * factor, peak, peak]


def test_a_rate_of_zero_leaves_only_what_is_constant_to_move():
    for name in OPTIMIZERS:
        module = Loose()
        before = {key: p.detach().clone() for key, p in module.named_parameters()}
        optimizer = make_optimizer(
            module, name, learning_rate=RATE, weight_decay=DECAY, constant_rate=module.constant()
        )  # fmt: skip
        set_learning_rate(optimizer, RATE, 0.0)
        write_gradients(module, 0)
        optimizer.step()
        moved = {key for key, p in module.named_parameters() if not torch.equal(p, before[key])}
        assert moved == {"matrix_c", "bias_c"}, name
