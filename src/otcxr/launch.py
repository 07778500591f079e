"""On what a training runs: one process or many, from one CPU to many nodes, through Fabric."""

from __future__ import annotations

import atexit
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.precision.amp import MixedPrecision
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from otcxr.distributed import convert_batch_norm, processes
from otcxr.errors import ConfigError
from otcxr.settings import TrainConfig

__all__ = ["full_state", "make_fabric", "restore_optimizer", "set_up"]


def make_fabric(train: TrainConfig) -> Fabric:
    """Make and launch Fabric: processes exist and know each other afterwards.

    torchrun and SLURM have started the processes already and say how many; else ``train.devices`` are started here, by
    running the command again for each.

    Raises: ConfigError: no such device, or a batch that cannot be cut evenly.
    """
    if train.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.accelerator is cuda but this machine has no usable GPU; use cpu or auto")
    accelerator = train.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    devices, nodes = _layout(train)
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise ConfigError(f"{devices} GPUs are asked for on each machine, this one has {torch.cuda.device_count()}; "
                          "lower train.devices, or the processes per node that torchrun or SLURM starts; under SLURM "
                          "let every task see all GPUs of its node (--gpus-per-node)")  # fmt: skip
    count = devices * nodes
    pieces = count * train.accumulate
    if train.batch_size % pieces or train.batch_size // pieces < 2:
        near = max(2 * pieces, round(train.batch_size / pieces) * pieces)
        error = ConfigError(
            f"train.batch_size = {train.batch_size} cannot be cut into {pieces} equal parts of at least 2 images "
            f"({count} processes, train.accumulate = {train.accumulate}); use {near}"
        )
        error.told_elsewhere = _number() != 0
        raise error
    precision: dict[str, Any] = {"precision": train.precision}
    if train.precision == "bf16-mixed":
        precision = {"plugins": _Mixed("bf16-mixed", device=accelerator)}
    strategy: Any = "auto"
    if train.strategy == "fsdp":
        strategy = ModelParallelStrategy(_shard, data_parallel_size=count, tensor_parallel_size=1)
    elif count > 1:
        # what BatchNorm and queues keep is equal in all processes anyway: no need to send it at every step
        known = inspect.signature(DistributedDataParallel).parameters  # the name has changed with torch 2.13
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        quiet: dict[str, Any] = {name: False}
        strategy = DDPStrategy(**quiet)
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy, **precision)
    fabric.launch()
    atexit.unregister(_leave)  # of an earlier training
    atexit.register(_leave)
    return fabric


class _Mixed(MixedPrecision):
    """Autocast decides for every operation; what goes in stays as it is.

    Fabric's own rounds all inputs to half precision first: the geometry, with which true positions come to lie in
    other cells, and the pixels that are to be restored.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def _leave() -> None:
    """Leave the group of processes before the interpreter ends: gloo's threads would abort it, exit code and all."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _layout(train: TrainConfig) -> tuple[int, int]:
    """Processes on each machine, and machines."""
    if torch.distributed.is_torchelastic_launched():
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return local, world // local
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES") or os.environ.get("SLURM_JOB_NUM_NODES") or 1)
        tasks = int(os.environ["SLURM_NTASKS"])
        if tasks % nodes:
            raise ConfigError(f"SLURM starts {tasks} tasks on {nodes} nodes; every node needs equally many: use "
                              "--ntasks-per-node")  # fmt: skip
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(tasks // nodes))  # Fabric wants it said
        return tasks // nodes, nodes
    return train.devices, train.nodes


def _number() -> int:
    """Number of this process, where torchrun or SLURM has started it, before the processes know each other."""
    if torch.distributed.is_torchelastic_launched():
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if SLURMEnvironment.detect() else 0


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Spread the weights of a method over the processes: each stage of the encoder by itself, then the rest.

    While one stage computes, only its weights are whole. Source: Zhao et al., VLDB 2023, arXiv:2304.11277.
    """
    from torch.distributed.fsdp import fully_shard

    data = mesh["data_parallel"]
    for child in module.get_submodule("encoder").children():
        if any(parameter.requires_grad for parameter in child.parameters()):
            fully_shard(child, mesh=data)
    fully_shard(module, mesh=data)
    return module


def set_up(
    fabric: Fabric, method: nn.Module, train: TrainConfig, make: Callable[[nn.Module], Optimizer]
) -> tuple[Any, Any]:
    """Put a method on its devices and make its optimizer.

    Returns: What to call for the loss, and the optimizer; both as Fabric wraps them.
    """
    if processes() > 1 and train.sync_batchnorm:
        convert_batch_norm(method)
    if train.strategy == "fsdp":  # it wants weights in the default layout
        module = fabric.setup_module(method.to(fabric.device))
        return module, fabric.setup_optimizers(make(method))
    # channels last: on a CPU replicate padding is several times slower in the default layout
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module, wrapped = fabric.setup(method, make(method))
    return module, wrapped


def full_state(method: nn.Module, optimizer: Any, train: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimizer state, whole; every process must call it, process 0 gets all of it."""
    if train.strategy == "ddp":
        return method.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dict(get_model_state_dict(method, options=options))
    if not optimizer.optimizer.state:
        return weights, {}  # asking an optimizer that has not stepped makes it step, and fill its momentum with decay
    return weights, dict(get_optimizer_state_dict(method, optimizer.optimizer, options=options))


def restore_optimizer(method: nn.Module, optimizer: Any, state: Mapping[str, Any], train: TrainConfig) -> None:
    """Load what ``full_state`` gave for the optimizer; every process brings all of it."""
    if train.strategy == "ddp":
        optimizer.load_state_dict(state)
        return
    if not state:  # of step 0
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(method, optimizer.optimizer, dict(state), options=options)
