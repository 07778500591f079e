"""Several processes as one: sums and rows over all of them with gradient, BatchNorm over the whole batch, agreement.

With W processes, each sees B images of a batch of N = W B. Convention, held by every loss of this project: the loss of
the training is the *mean over processes* of what each process returns, and gradients are averaged likewise (DDP and
FSDP do that). A term that couples the whole batch is computed whole by every process; a term that is a mean over images
may be computed on the own images only, because all processes have equally many.

Where nothing is distributed every function here is the identity and costs nothing.

    all_sum       y = sum_w x_w              gradient of x_v:  sum_w dL_w / dy
    gather_rows   y = (x_0; ...; x_{W-1})    gradient of x_v:  rows of v in sum_w dL_w / dy
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from otcxr.errors import OtcxrError

__all__ = [
    "SyncBatchNorm",
    "agree",
    "all_sum",
    "alone",
    "convert_batch_norm",
    "everyone",
    "first_row",
    "from_first",
    "gather_rows",
    "mean_of_rows",
    "mean_over_processes",
    "process",
    "processes",
    "together",
]

T = TypeVar("T")


_ALONE: ContextVar[bool] = ContextVar("otcxr_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process computes for itself: no other one takes part, nothing is summed or gathered."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def processes() -> int:
    """Number of processes that compute together; 1 where nothing is distributed, and within ``alone``."""
    if _ALONE.get():
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process() -> int:
    """Number of this process, from 0. Process 0 writes files and talks."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def all_sum(x: Tensor) -> Tensor:
    """Sum of ``x``, of the same shape in every process, over the processes; differentiable."""
    if processes() == 1:
        return x
    out: Tensor = _AllSum.apply(x)  # type: ignore[no-untyped-call]
    return out


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes())]
        dist.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        first = process() * ctx.rows
        return total[first : first + ctx.rows]


def gather_rows(x: Tensor) -> Tensor:
    """Rows (B, ...) of all processes, in the order of the processes: (W B, ...); differentiable.

    Every process must bring equally many rows.
    """
    if processes() == 1:
        return x
    out: Tensor = _GatherRows.apply(x)  # type: ignore[no-untyped-call]
    return out


def first_row(rows: int) -> int:
    """Where the own ``rows`` rows begin among those that ``gather_rows`` returns."""
    return process() * rows if processes() > 1 else 0


def mean_of_rows(x: Tensor) -> tuple[Tensor, Tensor | int]:
    """Mean of the rows (N_w, d) of all processes, (d,), and their number; processes may bring different numbers."""
    if processes() == 1:
        return x.mean(0), len(x)
    count = all_sum(x.new_tensor(float(len(x))))
    return all_sum(x.sum(0)) / count, count


class _NormalizeTogether(torch.autograd.Function):
    """Batch normalisation with the moments of all processes.

        y = (x - m) / sqrt(v + eps) w + b,     m, v over all N positions of all processes
        dx = w / sqrt(v + eps) (dy - sum dy / N - xhat sum(dy xhat) / N),   both sums over all processes

    One collective each way: (mean, variance, count) of every process, merged without cancellation by
    ``v = sum_w n_w (v_w + (m_w - m)^2) / N``; and the two sums of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        over = [0, *range(2, x.dim())]
        own_variance, own_mean = torch.var_mean(wide, over, correction=0)
        channels = x.shape[1]
        own = torch.cat((own_mean, own_variance, own_mean.new_tensor([x.numel() / channels])))
        parts = [torch.empty_like(own) for _ in range(processes())]
        dist.all_gather(parts, own)
        every = torch.stack(parts)
        means, variances, counts = every[:, :channels], every[:, channels:-1], every[:, -1:]
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        out = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), total)
        ctx.mark_non_differentiable(mean, variance, total)
        return out, mean, variance, total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        over = [0, *range(2, x.dim())]
        shape = (1, -1, *(1,) * (x.dim() - 2))
        wide = gradient.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        of_bias, of_weight = wide.sum(over), (wide * normal).sum(over)
        both = torch.cat((of_bias, of_weight))
        dist.all_reduce(both)
        mean_bias, mean_weight = (both / total).chunk(2)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        of_x = (wide - mean_bias.view(shape) - normal * mean_weight.view(shape)) * factor.view(shape)
        if weight is None:
            return of_x.to(x.dtype), None, None, None
        return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batch of all processes, on CPU tensors too; alone it is an ordinary BatchNorm.

    Inputs (B, C) or (B, C, ...), any floating type; moments in at least float32. Names of weights and statistics are
    those of torch's BatchNorm. Source: Ioffe and Szegedy, ICML 2015, arXiv:1502.03167, with the batch of all processes.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm needs an input (B, C, ...), received shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or processes() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        out, mean, variance, total = _NormalizeTogether.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self.eps
        )
        if self.track_running_stats:
            self._update(mean, variance, total)
        result: Tensor = out
        return result

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, total: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.copy_((1 - share) * self.running_mean + share * mean)
        unbiased = variance * (total / (total - 1))
        self.running_var.copy_((1 - share) * self.running_var + share * unbiased)


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm below ``module`` by ``SyncBatchNorm`` with the same weights, statistics and names."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncBatchNorm):
            new = SyncBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )  # fmt: skip
            new.weight, new.bias = child.weight, child.bias
            new.running_mean, new.running_var = child.running_mean, child.running_var
            new.num_batches_tracked = child.num_batches_tracked
            new.train(child.training)
            setattr(module, name, new)
        else:
            convert_batch_norm(child)
    return module


def everyone(value: T) -> list[T]:
    """A small plain value of every process, in their order."""
    if processes() == 1:
        return [value]
    values: list[Any] = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The value of process 0, in every process."""
    if processes() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values)
    result: T = values[0]
    return result


def mean_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Mean of each number over the processes, in float64; every process brings equally many. Not differentiable."""
    if processes() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    means: list[float] = (total / processes()).tolist()
    return means


def agree(problem: OtcxrError | None) -> None:
    """Raise in every process if any has a problem, so that none waits for one that has gone.

    Raises: The problem of the lowest process that has one; ``told_elsewhere`` is set in all but process 0.
    """
    first = next((found for found in everyone(problem) if found is not None), None)
    if first is not None:
        first.told_elsewhere = process() != 0
        raise first


@contextmanager
def together() -> Iterator[None]:
    """Raise in every process what any of them raises within it (``agree``).

    Where the processes wait for each other within it, none may raise before that and another one not.
    """
    problem = None
    try:
        yield
    except OtcxrError as error:
        problem = error
    agree(problem)
