"""What tests/test_distributed.py computes twice: cut over two processes, and whole in one.

    python tests/distributed_worker.py FOLDER PROCESS LIST       one of the two processes: the cases of LIST, in turn

A case is a function of a ``Part``: the share of process 0 or 1, or the whole. It returns tensors under keys
(kind, group, name); the kind says how the results of the two processes make up that of one:

    mean    mean over the processes                     losses, gradients of what all hold, each from its own images
    same    equal in both, and to the whole             what was summed or averaged already
    rows    one below the other                         outputs for the own images
    share   one below the other, over the number        gradients of the own images: the loss is a mean over processes
    first   that of process 0                           files, and what only process 0 computes

Tolerances are relative to the largest number of a group.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from conftest import drawn_once
from oracles import nt_xent_by_loops
from otcxr.data import phantom
from otcxr.data.dataset import DataConfig
from otcxr.data.geometry import ViewBatch
from otcxr.data.views import ViewsConfig
from otcxr.distributed import (
    SyncBatchNorm,
    agree,
    all_sum,
    alone,
    convert_batch_norm,
    everyone,
    from_first,
    gather_rows,
    mean_of_rows,
    mean_over_processes,
    process,
    processes,
)
from otcxr.errors import ConfigError, DataError
from otcxr.losses import covariance, nt_xent, variance, variance_at_positions, variance_within
from otcxr.methods import METHODS, Method, Observed, SSLMethod, StepOutput
from otcxr.methods.otcxr import OTCXRSettings
from otcxr.methods.simclr import SimCLRSettings
from otcxr.nn.encoder import ENCODERS, Architecture, Encoder, build_encoder, load_encoder
from otcxr.runs import Run
from otcxr.train import EncoderConfig, PretrainConfig, TrainConfig, pretrain

WORLD = 2
LIMIT_S = 60  # for one exchange between the processes; after it the waiting one fails

Results = dict[tuple[str, str, str], Tensor]

# Methods that draw random numbers in ``forward``: processes draw different ones by design, so no equality is asked for
DRAWS = frozenset[str]()


class Part(NamedTuple):
    """What is computed here: the share of one process, or everything (None); and where files may go."""

    process: int | None
    folder: Path

    def cut(self, whole: Tensor, sizes: tuple[int, ...] | None = None) -> Tensor:
        """The own rows; ``sizes`` says how many each process has, else equally many."""
        if self.process is None:
            return whole
        return whole.split(sizes or len(whole) // WORLD)[self.process]

    def members(self) -> range:
        """The processes whose losses are computed here."""
        return range(WORLD) if self.process is None else range(self.process, self.process + 1)


class Case(NamedTuple):
    compute: Callable[[Part], Results]
    tolerance: float = 1e-8


CASES: dict[str, Case] = {}


def case(name: str, tolerance: float = 1e-8) -> Callable[[Callable[[Part], Results]], Callable[[Part], Results]]:
    def enter(function: Callable[[Part], Results]) -> Callable[[Part], Results]:
        CASES[name] = Case(function, tolerance)
        return function

    return enter


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


# --- sums, rows and means ---


def _of_process(y: Tensor, number: int) -> Tensor:
    """A loss that differs between the processes, as that of every method does."""
    return ((number + 1) * y).sin().mul(normal(*y.shape, seed=50 + number)).sum()


def _values(part: Part, name: str, x: Tensor, y: Tensor) -> Results:
    loss = torch.stack([_of_process(y, w) for w in part.members()]).mean()
    loss.backward()
    return {("same", "value", name): y.detach(), ("mean", "loss", name): loss.detach(),
            ("share", "gradient", name): gradient(x)}  # fmt: skip


@case("all_sum")
def _all_sum(part: Part) -> Results:
    x = part.cut(normal(WORLD, 3, 4)).requires_grad_()
    return _values(part, "x", x, x.sum(0) if part.process is None else all_sum(x[0]))


@case("gather_rows")
def _gather_rows(part: Part) -> Results:
    # a transposed view: what is exchanged must be brought into one piece first
    x = part.cut(normal(WORLD * 3, 5, 4)).requires_grad_()
    return _values(part, "x", x, gather_rows(x.transpose(1, 2)))


@case("mean_of_rows")
def _mean_of_rows(part: Part) -> Results:
    out: Results = {}
    for sizes in ((4, 4), (5, 2), (7, 0)):
        x = part.cut(normal(sum(sizes), 4, seed=sizes[0]), sizes).requires_grad_()
        mean, count = mean_of_rows(x)
        out |= _values(part, str(sizes), x, mean)
        out["same", "count", str(sizes)] = torch.as_tensor(count, dtype=torch.float64)
    return out


@case("talk")
def _talk(part: Part) -> Results:
    """Agreement, with process 1 in trouble; checked in place."""
    if part.process is None:
        agree(None)
        assert everyone("x") == ["x"]
        assert from_first("x") == "x"
        assert mean_over_processes([1.0, 2.0], torch.device("cpu")) == [1.0, 2.0]
        assert (processes(), process()) == (1, 0)
        return {}
    me = part.process
    assert (processes(), process()) == (WORLD, me)
    assert everyone((me, "x")) == [(0, "x"), (1, "x")]
    assert from_first({"me": me}) == {"me": 0}
    assert mean_over_processes([float(me), 3.0], torch.device("cpu")) == [0.5, 3.0]
    agree(None)
    for troubled in ({1}, {0}, {0, 1}):
        caught = None
        try:
            agree(ConfigError(f"trouble in {me}") if me in troubled else None)
        except ConfigError as error:
            caught = error
        assert caught is not None
        assert str(caught) == f"trouble in {min(troubled)}"
        assert caught.told_elsewhere == (me != 0)
    return {}


# --- BatchNorm ---

_NORM_SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, int], dict[str, Any]]] = {
    "rows": ((8, 5), (4, 4), {}),
    "images": ((6, 5, 3, 4), (3, 3), {}),
    "channels-last": ((6, 5, 3, 4), (3, 3), {}),
    "no-affine": ((6, 5, 3, 4), (3, 3), {"affine": False}),
    "momentum-none": ((6, 5, 3, 4), (3, 3), {"momentum": None}),
    "momentum-0.3": ((8, 5), (4, 4), {"momentum": 0.3, "eps": 1e-3}),
    "no-statistics": ((6, 5, 3, 4), (3, 3), {"track_running_stats": False}),
    "unequal": ((8, 5), (5, 3), {}),
    "unequal-images": ((6, 5, 3, 4), (5, 1), {"momentum": None}),
    "one-row-each": ((2, 5), (1, 1), {}),
    "volumes": ((4, 5, 2, 3, 2), (2, 2), {}),
}


def _norm(name: str, part: Part, dtype: torch.dtype = torch.float64) -> Results:
    """Two forward passes, so that statistics are updated twice; in one process by torch's own BatchNorm."""
    shape, sizes, options = _NORM_SHAPES[name]
    kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer: nn.Module = (kind if part.process is None else SyncBatchNorm)(shape[1], **options).to(wide)
    if options.get("affine", True):
        with torch.no_grad():
            layer.weight.copy_(1 + normal(shape[1], seed=7) / 4)
            layer.bias.copy_(normal(shape[1], seed=8))
    out: Results = {}
    for step in range(2):
        # a mean far from 0 and a spread of its own for every channel: cancellation would show
        stretch = torch.arange(1, shape[1] + 1, dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
        x = part.cut(normal(*shape, seed=step) * stretch + 3 * stretch, sizes).to(dtype)
        if name == "channels-last":
            x = x.contiguous(memory_format=torch.channels_last)
        x = x.detach().requires_grad_()
        y = layer(x)
        assert y.dtype == dtype
        coefficient = part.cut(normal(*shape, seed=20 + step), sizes).to(dtype)
        # the mean over processes of W * (sum over the own rows) is the sum over all rows
        loss = (y * coefficient + (y * coefficient).square()).sum() * (1 if part.process is None else WORLD)
        loss.backward()
        out["rows", "output", str(step)] = y.detach().double()
        out["share", "gradient of input", str(step)] = gradient(x).double()
    for key, value in layer.named_parameters():
        out["mean", f"gradient of {key}", ""] = gradient(value).double()
    for key, value in layer.named_buffers():
        out["same", key, ""] = value.double()
    layer.eval()
    if options.get("track_running_stats", True):
        x = part.cut(normal(*shape, seed=9), sizes).to(dtype)
        out["rows", "evaluation", ""] = layer(x).detach().double()
    return out


for _name in _NORM_SHAPES:
    case(f"norm:{_name}")(functools.partial(_norm, _name))


@case("norm:half", tolerance=0.02)
def _norm_half(part: Part) -> Results:
    """Half-precision inputs, weights in float32: against float64, to the precision of the inputs."""
    return _norm("images", part, torch.float64 if part.process is None else torch.bfloat16)


# --- losses that couple the batch ---


def _valid(images: int, tokens: int, seed: int = 0) -> Tensor:
    """Where tokens are: few in the images of process 0, many in those of process 1, none or one in some."""
    share = torch.linspace(0.3, 0.9, images).unsqueeze(1)
    valid = torch.rand(images, tokens, generator=torch.Generator().manual_seed(seed)) < share
    valid[0], valid[1], valid[-1] = False, False, False  # one image of process 0 counts, two of process 1
    valid[-1, 2] = True
    valid[:, 1] = False  # a position that no image fills, and one that a single image fills
    valid[:, 0] = False
    valid[1, 0] = True
    return valid


_COUPLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nt_xent": lambda x, valid: nt_xent(x[:, 0], x[:, 1], 0.3),
    "variance": lambda x, valid: variance(x[valid], 1.3),
    "covariance": lambda x, valid: covariance(x[valid]),
    "variance_at_positions": lambda x, valid: variance_at_positions(x, valid, 1.3),
    "variance_within": lambda x, valid: variance_within(x, valid, 1.3),
}


def _loss(name: str, part: Part) -> Results:
    out: Results = {}
    for seed in range(3):
        x = part.cut(normal(6, 9, 5, seed=seed)).requires_grad_()
        valid = part.cut(_valid(6, 9, seed))
        loss = _COUPLED[name](x, valid)
        loss.backward()
        out["mean", "loss", str(seed)] = loss.detach()
        out["share", "gradient", str(seed)] = gradient(x)
    return out


for _name in _COUPLED:
    case(f"loss:{_name}")(functools.partial(_loss, _name))


# --- the contract of every method ---

_OTCXR = OTCXRSettings(
    mass="attention", overlap_weight=0.0, hidden=16, outputs=8, global_hidden=16, global_outputs=12, epsilon=0.1,
    place=0.0, mass_area=0.95, within_target=1.5,
)  # fmt: skip
VARIANTS: dict[str, tuple[str, Any]] = {
    **{name: (name, method.settings) for name, method in METHODS.items()},
    **{
        f"otcxr:{name}": ("otcxr", replace(_OTCXR, **changes))
        for name, changes in {
            "score": {"mass": "score", "mass_gradient": True},
            "score-infused": {"mass": "score", "mass_gradient": True, "infuse": True},
            "attention": {"mass": "attention", "mass_gradient": True},
            "attention-infused": {"mass": "attention", "mass_gradient": False, "infuse": True},
            "uniform": {"mass": "uniform"},
            "uniform-infused": {"mass": "uniform", "infuse": True},
            "pooled": {"variance_rows": ("pooled",)},
            "tokens": {"variance_rows": ("tokens",)},
            "position": {"variance_rows": ("position",)},
            "within-image": {"variance_rows": ("within-image",)},
            "no-rows": {"variance_rows": ()},
            "sharp": {"objective": "sharp"},
            "sharp-score": {"objective": "sharp", "mass": "score", "mass_gradient": True},
            "reach": {"reach": 0.5},
            "no-global": {"global_weight": 0.0},
            "absolute-cost": {"centred_cost": False},
            "nearest-score": {"pairing": "nearest", "mass": "score", "mass_gradient": True},
        }.items()
    },
    "simclr:cold": ("simclr", SimCLRSettings(hidden=16, outputs=8, temperature=0.1)),
}


def precise(settings: Any) -> Any:
    """The same with an exact transport, and narrow heads, for time.

    The solver stops when the marginals are right to the tolerance, and what it gives is wrong by as much. Rounding can
    move a problem to the other side of that line; with a tolerance of the order of rounding that moves nothing.
    """
    finer = {"tolerance": 1e-11, "max_iterations": 20_000}
    narrower = dict.fromkeys(("hidden", "outputs", "global_hidden", "global_outputs"), 24)
    known = {field.name for field in fields(settings)}
    return replace(settings, **{name: value for name, value in (finer | narrower).items() if name in known})


def view_batch(images: int, sizes: tuple[int, ...] = (64, 48), stride: int = 16) -> ViewBatch:
    """Random views; a third of the positions is not valid, other ones in every image, at least two are."""
    views, valid, clean = [], [], []
    for number, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(number)
        cells = size // stride
        pixels = torch.rand(images, 1, size, size, generator=generator)
        grid = torch.rand(images, 1, cells, cells, generator=generator) < torch.linspace(0.5, 0.9, images).view(
            -1, 1, 1, 1
        )
        grid[..., :1, :2] = True
        views.append(pixels.double())
        valid.append(grid.repeat_interleave(stride, -1).repeat_interleave(stride, -2))
        clean.append(pixels.double().square())
    geometry = torch.eye(3, dtype=torch.float64)[:2].expand(len(sizes), images, 2, 3).clone()
    return ViewBatch(tuple(views), geometry, tuple(valid), tuple(clean))


def cut_views(part: Part, batch: ViewBatch) -> ViewBatch:
    assert batch.clean is not None
    return ViewBatch(
        tuple(map(part.cut, batch.views)), part.cut(batch.geometry.transpose(0, 1)).transpose(0, 1),
        tuple(map(part.cut, batch.valid)), tuple(map(part.cut, batch.clean)),
    )  # fmt: skip


def build(name: str) -> SSLMethod:
    row, settings = VARIANTS[name]
    encoder = build_encoder("resnet18", width=4, stride=16, padding="replicate", seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        method = METHODS[row].build(encoder, precise(settings))
    return method.double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


LOCAL = ("otcxr", "pcrlv2", "vicregl", "dino")  # methods that use local views


def _contract(name: str, part: Part, sizes: tuple[int, ...] = (64, 48)) -> Results:
    """Two passes under DDP, which refuses the second one if a weight got no gradient in the first."""
    method = build(name)
    module: nn.Module = method
    if part.process is not None:
        module = DistributedDataParallel(convert_batch_norm(method))
    batch = cut_views(part, view_batch(6, sizes))
    out: Results = {}
    for step in range(2):
        method.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        output = module(batch, observe=step == 0)
        drawn = not torch.equal(before, torch.get_rng_state())
        assert drawn == (VARIANTS[name][0] in DRAWS), f"random numbers drawn: {drawn}; list the method in DRAWS or not"
        output.loss.backward()
        without = [key for key, value in method.named_parameters() if value.requires_grad and value.grad is None]
        assert not without, f"no gradient: {without}"
        if drawn:
            continue
        out["mean", "loss", str(step)] = output.loss.detach()
        for key, value in method.named_parameters():
            if value.requires_grad:
                out["same", f"gradient {step}", key] = gradient(value).clone()
        method.after_step((step + 1) / 2)
        for key, value in method.named_buffers():
            out["same", f"buffer {key}", str(step)] = value.double().clone()
    return out


for _name in VARIANTS:
    case(f"contract:{_name}")(functools.partial(_contract, _name))
for _name in LOCAL:
    case(f"contract-local:{_name}")(functools.partial(_contract, _name, sizes=(64, 64, 32, 32, 48)))


def _alone(name: str, part: Part) -> Results:
    """Process 0 computes for itself, while process 1 does not; then they go on together."""
    method = build(name)
    if part.process is not None:
        convert_batch_norm(method)
    batch = cut_views(Part(0, part.folder), view_batch(6))
    out: Results = {}
    if part.process != 1:
        with alone():
            assert processes() == 1
            torch.manual_seed(3)
            loss = method(batch, observe=True).loss
            loss.backward()
            found = method.match(batch)
        out["first", "loss", ""] = loss.detach()
        out["first", "gradient", ""] = torch.cat(
            [gradient(value).flatten() for value in method.parameters() if value.requires_grad]
        )
        if found is not None:
            out["first", "plan", ""] = found.plan
    if part.process is not None:
        assert processes() == WORLD
        assert everyone(part.process) == [0, 1]
    return out


for _name in METHODS:
    case(f"alone:{_name}")(functools.partial(_alone, _name))


@case("alone:in-the-second")
def _alone_in_the_second(part: Part) -> Results:
    """Within ``alone`` the rows of process 1 are all rows there are; checked in place."""
    if part.process == 1:
        x, y = normal(4, 5), normal(4, 5, seed=1)
        with alone():
            loss = nt_xent(x, y, 0.3)
        assert abs(float(loss) - nt_xent_by_loops(x.numpy(), y.numpy(), 0.3)) < 1e-12
    if part.process is not None:
        everyone(None)
    return {}


# --- whole trainings ---


def tiny(out: Path, method: str = "otcxr", settings: Any = None, **train: Any) -> PretrainConfig:
    """Four steps an epoch on 32-pixel phantoms."""
    known: dict[str, Any] = {
        "epochs": 5, "batch_size": 8, "accelerator": "cpu", "precision": "64-true", "log_every": 1, "health_every": 10,
        "probes": 0, "online_images": 0,
    }  # fmt: skip
    if settings is None:
        settings = precise(METHODS[method].settings)
    return PretrainConfig(
        data=DataConfig(source="phantom:48,seed=7,size=32"),
        method=method,
        settings=settings,
        views=ViewsConfig(**{**METHODS[method].views, "size": 32}),  # with the local views that the method is made for
        encoder=EncoderConfig(width=4),
        train=TrainConfig(**(known | train)),
        out=str(out),
    )


def float64(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def outcome(run: Path) -> Results:
    """The final weights, and loss and norm of the gradient of every step."""
    from safetensors.torch import load_file

    lines = Run.open(run).read_metrics()
    out: Results = {
        # of logarithms, so that the error of each number is relative to itself
        ("first", "gradient norms", ""): float64([math.log(line["gradient_norm"]) for line in lines]),
        ("first", "steps", ""): float64([line["step"] for line in lines]),
    }
    for name, value in load_file(run / "method.safetensors").items():
        out["first", f"weights {name}", ""] = value.double()
    return out


def _train(name: str, part: Part, method: str, changes: dict[str, Any]) -> Results:
    run = part.folder / "runs" / name.replace(":", "-")
    pretrain(tiny(run, method, devices=1 if part.process is None else WORLD, **changes))
    return outcome(run) if part.process != 1 else {}


TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    # three epochs where local views meet in norms over few rows, which enlarge rounding: 2e-7 after five
    **{f"train:{name}": (name, {"epochs": 3} if name == "pcrlv2" else {}) for name in METHODS if name not in DRAWS},
    # at a rate of 0.05 twenty steps multiply rounding by 1e8 (seen: 7e-15 in the first, 1e-6 in the last)
    "train:simclr-sgd": ("simclr", {"optimizer": "sgd", "learning_rate": 0.02}),
    "train:simclr-lars": ("simclr", {"optimizer": "lars", "learning_rate": 0.3, "trust": 0.02}),
    "train:otcxr-sgd": ("otcxr", {"optimizer": "sgd", "learning_rate": 0.01}),
}
for _name, (_method, _changes) in TRAININGS.items():
    CASES[_name] = Case(functools.partial(_train, _name, method=_method, changes=_changes), 1e-7)

# against the whole with one BatchNorm: these must differ, or the trainings above prove nothing
APART: dict[str, tuple[str, dict[str, Any]]] = {"apart:simclr": ("simclr", {"sync_batchnorm": False})}
for _name, (_method, _changes) in APART.items():
    CASES[_name] = Case(functools.partial(_train, _name, method=_method, changes=_changes), 1e-7)


@case("continued", tolerance=1e-7)
def _continued(part: Part) -> Results:
    """Stopped in the middle of an epoch and taken up by as many processes."""
    run = part.folder / "runs" / "continued"
    count = 1 if part.process is None else WORLD
    if part.process is not None:
        pretrain(tiny(run, "simclr", epochs=3, devices=count), stop_after=6)
    pretrain(replace(tiny(run, "simclr", epochs=3, devices=count), resume=True))
    return outcome(run) if part.process != 1 else {}


@case("source-of-one")
def _source_of_one(part: Part) -> Results:
    """A source that only process 1 cannot read ends both, and process 0 says why."""
    if part.process is None:
        return {}
    config = tiny(part.folder / "runs" / "source-of-one", "simclr", devices=WORLD)
    if part.process == 1:
        config = replace(config, data=replace(config.data, source="folder:/nowhere/at/all"))
    caught = None
    try:
        pretrain(config)
    except DataError as error:
        caught = error
    assert caught is not None
    assert "/nowhere/at/all" in str(caught)
    assert caught.told_elsewhere == (part.process != 0)
    return {}


@case("continued-by-one", tolerance=1e-7)
def _continued_by_one(part: Part) -> Results:
    """Left by two processes in the middle of an epoch; ``taken_up`` ends it with one."""
    run = part.folder / "runs" / "continued-by-one"
    if part.process is None:
        pretrain(tiny(run, "simclr", epochs=3))
        return outcome(run)
    pretrain(tiny(run, "simclr", epochs=3, devices=WORLD), stop_after=6)
    return {}


def taken_up(folder: Path) -> Results:
    run = folder / "runs" / "continued-by-one"
    pretrain(replace(tiny(run, "simclr", epochs=3), resume=True))
    return outcome(run)


def sharded(method: str, part: Part, precision: str = "32-true") -> Results:
    """Three steps of weights spread over the processes, in 32 bits; in one process, which holds all of them, also 64.

    Plain descent: Adam divides by the size of the gradient, so where that is rounding only, rounding decides the step.
    """
    run = part.folder / "runs" / f"fsdp-{method}-{precision}"
    train = {"optimizer": "sgd", "learning_rate": 1e-3, "epochs": 1, "precision": precision}
    if part.process is not None:
        train |= {"strategy": "fsdp", "devices": WORLD}
    pretrain(tiny(run, method, **train), stop_after=3)
    return outcome(run) if part.process != 1 else {}


# momentum copies, queues, a centre, parameters without a use in a step
SHARDED = ("simclr", "densecl", "dino", "pcrlv2")
for _name in SHARDED:
    case(f"fsdp:{_name}")(functools.partial(sharded, _name))


@case("fsdp-continued", tolerance=0.0)
def _shards_continued(part: Part) -> Results:
    """A continuation is the same training, bit for bit; both by two processes, compared in process 0."""
    if part.process is None:
        return {}
    for optimizer in ("adamw", "sgd"):
        train: dict[str, Any] = {"optimizer": optimizer, "epochs": 2, "precision": "32-true", "strategy": "fsdp",
                                 "devices": WORLD}  # fmt: skip
        whole, cut = (part.folder / "runs" / f"fsdp-{name}-{optimizer}" for name in ("whole", "cut"))
        pretrain(tiny(whole, "otcxr", **train))
        pretrain(tiny(cut, "otcxr", **train), stop_after=5)
        pretrain(replace(tiny(cut, "otcxr", **train), resume=True))
        if part.process == 0:
            expected, found = outcome(whole), outcome(cut)
            assert expected.keys() == found.keys()
            different = [key for key in expected if not torch.equal(expected[key], found[key])]
            assert not different, different
            encoder = load_encoder(cut).state_dict()
            assert encoder
            for name, value in encoder.items():
                assert torch.equal(value.double(), found["first", f"weights encoder.{name}", ""]), name
        everyone(None)
    return {}


# --- a loss that is a mean over images, and an encoder without BatchNorm ---


class PlainEncoder(Encoder):
    """Two convolutions without any norm: what it says of an image depends on that image only."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.channels, self.strides = (4, 8), (4, 16)
        self.fine = nn.Conv2d(architecture.in_channels, 4, 4, 4)
        self.coarse = nn.Conv2d(4, 8, 4, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        fine = self.fine(images).tanh()
        return fine, self.coarse(fine).tanh()


@dataclass(frozen=True)
class MeanSettings:
    """Settings of ``Mean``.

    Attributes:
        power: Of the distance.
    """

    power: float = 2.0


class Mean(SSLMethod):
    """Both views of an image say the same and lie on a sphere: each image for itself."""

    def forward(self, batch: ViewBatch, *, observe: bool = False) -> StepOutput:
        first, second = (self.encoder(view)[-1].flatten(1) for view in batch.views[:2])
        length = (first.square().mean(1) - 1).square() + (second.square().mean(1) - 1).square()
        loss = ((first - second).abs().pow(self.settings.power).mean(1) + length).mean()
        pooled, tokens = torch.cat((first, second)).detach(), first.unflatten(1, (self.encoder.channels[-1], -1)).mT
        observed = Observed(pooled, tokens.detach(), None) if observe else None
        return StepOutput(loss, {"distance": loss.detach()}, observed)


@contextmanager
def mean_method() -> Iterator[None]:
    """Within it there is a method "mean" and an encoder "plain"."""
    METHODS["mean"], ENCODERS["plain"] = Method(Mean, MeanSettings()), PlainEncoder
    try:
        yield
    finally:
        del METHODS["mean"], ENCODERS["plain"]


def accumulated(run: Path, accumulate: int, method: str = "mean", **train: Any) -> Results:
    with mean_method():
        config = tiny(run, method, epochs=3, accumulate=accumulate, **train)
        if method == "mean":
            config = replace(config, encoder=EncoderConfig("plain", width=4))
        pretrain(config)
    return outcome(run)


def _accumulate(accumulate: int, part: Part) -> Results:
    """Several parts in each of two processes against the whole batch at once."""
    run = part.folder / "runs" / f"accumulate-{accumulate}"
    if part.process is None:
        return accumulated(run, 1)
    out = accumulated(run, accumulate, devices=WORLD)
    return out if part.process == 0 else {}


CASES["accumulate:1"] = Case(functools.partial(_accumulate, 1))
CASES["accumulate:2"] = Case(functools.partial(_accumulate, 2))


def work(folder: Path, number: int, names: list[str]) -> None:
    """Be one of the processes: compute the cases, leave a file for each, stop at the first that fails."""
    torch.set_num_threads(1)
    phantom.render = drawn_once
    os.environ.update({
        # what torchrun sets: Fabric then uses the group of processes that is there already
        "RANK": str(number), "LOCAL_RANK": str(number), "GROUP_RANK": "0", "ROLE_RANK": str(number),
        "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": str(WORLD), "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    })  # fmt: skip
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=number, world_size=WORLD,
        timeout=timedelta(seconds=LIMIT_S),
    )  # fmt: skip
    part = Part(number, folder)
    for place, name in enumerate(names):
        try:
            result: Any = CASES[name].compute(part)
        except BaseException:
            result = traceback.format_exc()
        file = folder / f"{place}-{number}.pt"
        torch.save(result, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
        if isinstance(result, str):
            return


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    status = 0
    try:
        work(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]).read_text().splitlines())
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo sometimes aborts when the interpreter ends in order
