"""What goes wrong around a training: requests to stop, and failures of the machine in words that name the fix."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from otcxr.errors import OtcxrError
from otcxr.memory import release_memory

__all__ = ["Collapsed", "Interrupted", "begin_worker", "explain_fault", "stop_request"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; the end of a job; SLURM's notice before it


class Interrupted(OtcxrError):
    """The run was stopped on request and can go on with ``resume``."""


class Collapsed(OtcxrError):
    """The run was stopped because its health says that nothing is learned."""


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Turn Ctrl-C, SIGTERM and SIGUSR1 into a request that is honoured after the step; a second Ctrl-C ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def begin_worker(worker: int) -> None:
    """What a loader process does first: ignore requests to stop, and keep no memory that it has freed.

    Requests to stop reach the whole group, and the training still needs its loaders: they end with the training, or
    when they find that it is gone.
    """
    release_memory()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def explain_fault(
    error: Exception, *, batch_size: int, accumulate: int, size: int, workers: int, kept: str
) -> OtcxrError | None:
    """Say what a failure of the machine means and what mends it; None where it is not one of those.

    Args:
        error: What was raised during the training.
        batch_size, accumulate, size, workers: train.batch_size, train.accumulate, views.size, data.workers.
        kept: What the last checkpoint holds, as a sentence.
    """
    text = str(error)
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or getattr(error, "errno", None) == errno.ENOMEM
    words = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    if memory or any(word in text for word in words):
        return OtcxrError(
            f"out of memory with train.batch_size = {batch_size} in {accumulate} part(s) of views of {size} pixels; "
            f"start anew (another --out) with a lower train.batch_size, train.accumulate = {2 * accumulate} or "
            f"train.precision bf16-mixed, or go on with more memory. {kept}"
        )
    # "Caught ... in DataLoader worker" is an error of the program, which keeps its traceback
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in text and not text.startswith("Caught "):
        how = "it was killed, most often for want of memory" if "killed" in text.lower() else "it ended unexpectedly"
        return OtcxrError(
            f"a loader process died: {how} ({text.splitlines()[0][:200]}); lower data.workers (now {workers}) or "
            f"data.cache_gb, which counts for each of them. {kept}"
        )
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return OtcxrError(f"too many open files; raise the limit (ulimit -n) or lower data.workers (now {workers}). "
                          f"{kept}")  # fmt: skip
    return None
