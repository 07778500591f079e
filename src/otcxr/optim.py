"""Optimizers, their parameter groups and the schedule of the learning rate. Needs torch and nothing else of otcxr."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

__all__ = ["LARS", "OPTIMIZERS", "cosine_schedule", "make_optimizer", "set_learning_rate"]

OPTIMIZERS: tuple[str, ...] = ("adamw", "sgd", "lars")


def make_optimizer(
    module: nn.Module,
    name: str,
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
    trust: float = 0.001,
    constant_rate: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Build an optimizer over all trainable parameters of a module, each in exactly one group.

        group          parameters             weight_decay    adapt (lars)    rate at a step
        1, scheduled   two dimensions or more as given        True            learning_rate * factor
        2, scheduled   biases and norms       0               False           learning_rate * factor
        3, constant    two dimensions or more as given        True            learning_rate
        4, constant    biases and norms       0               False           learning_rate

    Biases and norms are what has one dimension or none. Groups without a parameter are left out; within a group the
    order is that of ``module.parameters()``. Besides torch's own keys every group carries "constant_rate" (bool), and
    with lars "adapt" (bool); both are plain values, so they are in ``state_dict``. The factor is for the caller to
    set at every step (``set_learning_rate``); until then every group has ``learning_rate``.

    Args:
        module: What is trained. Frozen parameters (``requires_grad`` False, as in a momentum copy) are left alone.
        name: One of ``OPTIMIZERS``: "adamw" (decay apart from the gradient; torch's betas 0.9 and 0.999), "sgd"
            (decay as part of the gradient, no Nesterov) or "lars" (``LARS``).
        learning_rate: Peak of the schedule, at least 0.
        weight_decay: Pull of the weights towards 0, at least 0.
        momentum: Of sgd and lars, in [0, 1); 0 is plain descent. Not used by adamw.
        trust: Of lars, > 0. Not used by the others.
        constant_rate: Parameters of the module whose rate no schedule changes, compared by identity, such as those of
            SimSiam's predictor. One that is named twice counts once.
    Returns: ``torch.optim.AdamW``, ``torch.optim.SGD`` or ``LARS``.
    Raises: ValueError: the name is unknown, a number is out of its range, the module has no trainable parameter, or
        ``constant_rate`` holds one that is not a trainable parameter of the module.
    Source: Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101 (adamw); You et al., arXiv:1708.03888 (lars); Chen and
        He, CVPR 2021, arXiv:2011.10566, table 1 (the constant rate of a predictor).
    """
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"unknown optimizer '{name}'{hint}; known: {', '.join(OPTIMIZERS)}")
    _check_numbers(learning_rate, weight_decay, momentum, trust)
    groups = _groups(module, weight_decay, constant_rate)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=False)
    for group in groups:
        group["adapt"] = group["params"][0].ndim > 1
    return LARS(groups, lr=learning_rate, momentum=momentum, trust=trust)


def _groups(module: nn.Module, weight_decay: float, constant_rate: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """The parameter groups of ``make_optimizer``."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            f"{type(module).__name__} has no trainable parameter, so there is nothing to optimise; "
            "call requires_grad_(True) on what is to be trained"
        )
    asked = list(constant_rate)  # may be an iterator; and what is compared by id must stay alive
    free = {id(p) for p in trained}
    names = {id(p): called for called, p in module.named_parameters()}
    for p in asked:
        if id(p) in names and id(p) not in free:
            raise ValueError(
                f"constant_rate has '{names[id(p)]}' of {type(module).__name__}, which is frozen (requires_grad is "
                "False) and has no rate; leave it out, or call requires_grad_(True) on it before"
            )
        if id(p) not in free:
            raise ValueError(
                f"constant_rate has a tensor of shape {tuple(p.shape)} that is no parameter of "
                f"{type(module).__name__}; pass parameters of the module itself, not copies of them"
            )
    constant = {id(p) for p in asked}
    groups: list[dict[str, Any]] = []
    for fixed in (False, True):
        members = [p for p in trained if (id(p) in constant) == fixed]
        for chosen, decay in (
            ([p for p in members if p.ndim > 1], weight_decay),
            ([p for p in members if p.ndim <= 1], 0.0),
        ):
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "constant_rate": fixed})
    return groups


def _check_numbers(learning_rate: float, weight_decay: float, momentum: float, trust: float) -> None:
    """Raise ValueError for a number that no optimizer here can work with; a NaN is in no range."""
    if not 0 <= learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}, expected a finite number of at least 0")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay}, expected a finite number of at least 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}, expected a number in [0, 1); 0.9 is usual, 0 is plain descent")
    if not 0 < trust < math.inf:
        raise ValueError(f"trust is {trust}, expected a finite number above 0; 0.001 is usual")


class LARS(torch.optim.Optimizer):
    """Descent with momentum whose step is scaled per tensor by the ratio of the norms of weight and gradient.

        g <- g + weight_decay * w
        q  = trust * |w| / |g|     if |w| > 0 and |g| > 0, else 1      (groups with "adapt" only)
        g <- q * g
        v <- momentum * v + g,     v = 0 at first
        w <- w - lr * v

    |.| is the Euclidean norm of the whole tensor, taken in at least float32. This is the form in the
    code of Barlow Twins, VICReg and MoCo v3. The paper has |g| + weight_decay * |w| below the line, with the gradient
    before decay, and the rate inside the momentum.

    All stays on the device of the parameters: nothing waits for the GPU. Costs one copy of the weights for ``v``
    (none with momentum 0), and per step about two passes more than SGD. Parameters may be float32 or float64, of any
    shape and memory format, also ``DTensor`` (the norm is then that of the whole tensor, over all shards). A parameter
    without gradient is skipped and keeps its ``v``; neither that nor a weight or gradient of zeros is an error.
    ``v`` is in ``state_dict`` as "momentum_buffer", so a loaded optimizer goes on bit for bit.

    Args:
        params: Parameters, or groups of them, each with any of the settings below and "adapt" (bool, default True;
            False leaves out q, as is usual for biases and norms).
        lr: Learning rate, at least 0.
        momentum: In [0, 1).
        weight_decay: At least 0.
        trust: > 0.
    Raises: ValueError: a number is out of its range.
    Source: You, Gitman and Ginsburg, 2017, arXiv:1708.03888, algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        _check_numbers(lr, weight_decay, momentum, trust)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. Gradients are read, not changed.

        Args:
            closure: Computes the loss and its gradients anew, with gradients enabled, before the step; or None.
        Returns: What ``closure`` returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_one(weight, weight.grad, group)
        return loss

    def _step_one(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"] != 0:
            gradient = gradient.add(weight, alpha=group["weight_decay"])
        if group["adapt"]:
            gradient = gradient * _ratio(weight, gradient, group["trust"])
        if group["momentum"] != 0:
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            gradient = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        weight.add_(gradient, alpha=-group["lr"])


def _ratio(weight: Tensor, gradient: Tensor, trust: float) -> Tensor:
    """trust * |w| / |g| as a tensor without dimensions; 1 where either norm is 0."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    w, g = torch.linalg.vector_norm(weight, dtype=wide), torch.linalg.vector_norm(gradient, dtype=wide)
    # division by 0 is harmless here: no gradient flows, and the result is not the one that is taken
    return torch.where((w > 0) & (g > 0), trust * w / g, torch.ones_like(w))


def cosine_schedule(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate: linear from 1/warmup to 1, then half a cosine to 0 at ``total``.

    Args:
        step: Steps already taken, from 0.
        warmup: Steps of the linear part; may be 0.
        total: Steps of the whole training.
    """
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, factor: float) -> None:
    """Set the rate of every group: ``peak * factor``, or ``peak`` where the group's "constant_rate" is True.

    Args:
        optimizer: From ``make_optimizer``, also wrapped by Fabric. A group without "constant_rate" (of another
            optimizer, or loaded from a checkpoint of before there was one) is scheduled.
        peak: The learning rate at its highest.
        factor: Of the schedule, such as ``cosine_schedule``.
    """
    for group in optimizer.param_groups:
        group["lr"] = peak * (1.0 if group.get("constant_rate", False) else factor)
