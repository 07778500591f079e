"""The folder of a run: the only channel between training, evaluation, explanation and report.

    config.yaml  environment.json  skipped.csv  metrics.jsonl  last.ckpt  last-1.ckpt ...
    encoder.safetensors  encoder.json  method.safetensors  pairs/*.npz
    best/{encoder.safetensors, encoder.json, last.ckpt}
    evaluation/*.json *.csv *.npz labels/*.csv   classifier/TASK/{classifier.json, weights.safetensors}
    explain/*.png index.json   report.html

Every file is written under a temporary name and renamed, so a reader never sees half of one. ``metrics.jsonl`` alone
is appended to; a last line that was cut is dropped when it is read.
"""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from otcxr.errors import CheckpointError, DataError
from otcxr.files import locked, storage_error, sweep, write_atomic
from otcxr.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from otcxr.nn.encoder import Encoder

__all__ = ["Run", "describe_environment"]

_log = logging.getLogger(__name__)
_FOLDERS = ("best", "pairs", "evaluation", "evaluation/labels", "classifier/linear", "classifier/finetune", "explain")

_PACKAGES = ("torch", "numpy", "opencv-python-headless", "scikit-learn", "lightning-fabric", "captum", "pydicom")


def describe_environment() -> dict[str, Any]:
    """Machine, versions and date: what a number needs to be believed."""
    import torch

    versions = {name: metadata.version(name) for name in _PACKAGES}
    with suppress(metadata.PackageNotFoundError):  # optional: transport is compiled where it is there
        versions["numba"] = metadata.version("numba")
    return {
        "otcxr": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


class Run:
    """One run's folder.

    Args:
        path: The folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def features(self) -> Path:
        """Folder in which features of the encoder are kept, for all who judge it."""
        return self.path / "evaluation" / "features"

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run that exists.

        Raises: DataError: there is no run in this folder.
        """
        run = cls(path)
        if not (run.path / "config.yaml").is_file():
            raise DataError(f"{path} holds no run (no config.yaml); expected the --out folder of 'otcxr pretrain'")
        return run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing; a second process that wants it is refused, a dead one holds nothing.

        Raises: ConfigError: another process holds it. StorageError: the folder cannot be written to.
        """
        with locked(self.path):
            self._sweep()
            try:
                yield
            finally:
                if not (self.path / "config.yaml").exists():  # it never became a run: leave no trace
                    (self.path / ".lock").unlink(missing_ok=True)
                    with suppress(OSError):  # it held other files before
                        self.path.rmdir()

    def _sweep(self) -> None:
        """Remove what killed processes were writing, by its name and place; nothing else."""
        if not (self.path / "config.yaml").is_file():
            return
        places = [self.path, *(self.path / name for name in _FOLDERS)]
        for place in places:
            sweep(place)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    # --- settings and facts ---
    def write_config(self, config: Mapping[str, Any]) -> None:
        write_atomic(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))

    def read_config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load((self.path / "config.yaml").read_text())
        return config

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON; NaN is refused, because JSON has none."""
        write_atomic(self.path / name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Read JSON; None where the file does not exist."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else None

    # --- metrics ---
    def append_metrics(self, line: Mapping[str, Any]) -> None:
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise storage_error(path, error) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        lines = []
        for text in path.read_text().splitlines() if path.is_file() else ():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # only a line cut by a kill; the steps after it are done again on resume
                break
        return lines

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of steps after ``step``: they will be done again."""
        kept = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(kept))

    # --- weights ---
    def write_checkpoint(self, state: Mapping[str, Any], keep: int = 1, *, best: bool = False) -> None:
        """Write ``last.ckpt``; the ones before become ``last-1.ckpt`` and so on, ``keep`` in all.

        A kill between two renames leaves a gap in the numbers, never fewer whole checkpoints than before.

        Args:
            state: Everything that decides the next step.
            keep: How many remain.
            best: Also write it to ``best/``.
        """
        import torch

        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        if best:
            write_atomic(self.path / "best" / "last.ckpt", buffer.getvalue())
        write_atomic(self.path / "last.ckpt", buffer.getvalue(), before=lambda: self._move_checkpoints(keep))
        for path, number in self._older():
            if number >= keep:
                path.unlink(missing_ok=True)

    def _older(self) -> list[tuple[Path, int]]:
        """Earlier checkpoints with their numbers, newest first."""
        found = ((path, re.fullmatch(r"last-(\d+)\.ckpt", path.name)) for path in self.path.glob("last-*.ckpt"))
        return sorted(((path, int(name[1])) for path, name in found if name), key=lambda item: item[1])

    def _move_checkpoints(self, keep: int) -> None:
        for number in range(keep - 1, 0, -1):
            older = self.path / ("last.ckpt" if number == 1 else f"last-{number - 1}.ckpt")
            if older.exists():
                older.replace(self.path / f"last-{number}.ckpt")

    def read_checkpoint(self, tell: Callable[[str], None] | None = None) -> dict[str, Any] | None:
        """Return the newest whole checkpoint, None where there is none yet.

        Args:
            tell: Told when a damaged one was passed over; it is then put aside as ``NAME.damaged``, so that it does
                not take the place of a whole one.
        Raises: CheckpointError: there are checkpoints but all are damaged.
        """
        damaged: dict[Path, str] = {}
        for path in (self.path / "last.ckpt", *(path for path, _ in self._older())):
            if not path.is_file():
                continue
            try:
                state = _load_whole(path)
            except (PermissionError, MemoryError):  # these say nothing about the file
                raise
            except Exception as error:  # torch raises several types for a damaged file
                damaged[path] = f"{path} is damaged ({_first_line(error)})"
                continue
            if damaged and tell is not None:
                tell(f"warning: {'; '.join(damaged.values())}; going on from {path.name}, step {state['step']}")
                for broken in damaged:
                    broken.replace(broken.with_name(f"{broken.name}.damaged"))
            return state
        if damaged:
            raise CheckpointError(f"{'; '.join(damaged.values())}; remove it to start again")
        return None

    def write_weights(self, method: nn.Module, encoder: Encoder, facts: Mapping[str, Any]) -> None:
        """Write the plain encoder, its description, and the whole method (for pairs of new images)."""
        self._write_encoder("", encoder, facts)
        write_atomic(self.path / "method.safetensors", _plain(method))

    def write_best(self, encoder: Encoder, facts: Mapping[str, Any]) -> None:
        """Write the plain encoder to ``best/``; ``facts`` say by which measure it is the best so far."""
        self._write_encoder("best/", encoder, facts)

    def _write_encoder(self, folder: str, encoder: Encoder, facts: Mapping[str, Any]) -> None:
        from otcxr.nn.encoder import describe

        write_atomic(self.path / f"{folder}encoder.safetensors", _plain(encoder))
        self.write_json(f"{folder}encoder.json", {**describe(encoder), **facts})

    # --- arrays ---
    def write_arrays(self, name: str, arrays: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **dict(arrays))
        write_atomic(self.path / name, buffer.getvalue())


def _plain(module: nn.Module) -> bytes:
    from safetensors.torch import save

    data: bytes = save({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()})
    return data


def _load_whole(path: Path) -> dict[str, Any]:
    """Load a checkpoint after comparing every part of it with its checksum (the file is a zip archive)."""
    import zipfile

    import torch

    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise CheckpointError(f"the checksum of {broken} is wrong")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120]
