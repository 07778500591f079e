"""Worker processes that decode, and someone who watches them.

A file may make a decoder crash, hang or ask for all memory. It then costs its worker, not the pack: the worker is
killed, the file is set aside with the reason, and another worker takes its place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import NamedTuple

from otcxr.errors import DataError, OtcxrError
from otcxr.packing.reduce import Reduced, Task, reduce_image, thumbnail

__all__ = ["Failure", "decode_all", "work"]

_PIPE = 1 << 20  # bytes a worker can leave without waiting for the reader
_WINDOW = 16  # tasks under way for each worker, done ones that wait for an earlier one included
_BIRTH_S = 120.0  # for a worker to start
_STILLBORN = 3  # workers in a row that die before they start
_AHEAD = 2  # tasks a worker has at a time: the next one begins while the last result is read


class Failure(NamedTuple):
    """Why a file is set aside, and a small picture of it where there is one."""

    reason: str
    thumbnail: bytes | None = None


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    tasks: Connection
    results: Connection
    born: float
    ready: bool = False
    given: deque[tuple[int, Task]] = field(default_factory=deque)
    since: float = 0.0  # when it began with the first of them


class _Team:
    """The workers, and what they are at."""

    def __init__(self, workers: int, memory_gb: float, timeout_s: float) -> None:
        self._memory_gb, self._timeout_s = memory_gb, timeout_s
        self._stillborn = 0
        self.returned: deque[tuple[int, Task]] = deque()  # tasks of workers that died at another one
        self.done: dict[int, Reduced | Failure] = {}
        self.workers = [self._start() for _ in range(workers)]

    def give(self, worker: _Worker, item: tuple[int, Task]) -> None:
        if not worker.given:
            worker.since = time.monotonic()
        worker.given.append(item)
        with contextlib.suppress(OSError):  # it has just died, which is noticed below
            worker.tasks.send(item)

    def collect(self) -> None:
        """Wait for a result, a death or the end of somebody's time, and settle what there is."""
        now = time.monotonic()
        ends = [self._end(worker) for worker in self.workers if worker.given or not worker.ready]
        # the end of a process closes its pipe, which can then be read to its end
        wait([worker.results for worker in self.workers], timeout=max(0.0, min(ends, default=now) - now))
        for place, worker in enumerate(self.workers):
            alive = True
            try:
                while worker.results.poll():
                    self._take(worker, worker.results.recv())
            except (EOFError, OSError):
                alive = False
            if not alive:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(5)
                self._bury(place, _death(worker.process.poll(), self._memory_gb))
            elif (worker.given or not worker.ready) and time.monotonic() > self._end(worker):
                self._bury(place, f"it was not decoded within {self._timeout_s:g} s")

    def stop(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.wait()
            worker.tasks.close()
            worker.results.close()

    def _end(self, worker: _Worker) -> float:
        return worker.since + self._timeout_s if worker.ready else worker.born + _BIRTH_S

    def _take(self, worker: _Worker, message: tuple[int, Reduced | Failure] | None) -> None:
        worker.since = time.monotonic()
        if message is None:
            worker.ready, self._stillborn = True, 0
            return
        number, result = message
        worker.given.popleft()
        self.done[number] = result

    def _bury(self, place: int, reason: str) -> None:
        """Set the file aside that a worker was at, give back what else it had, and start another one."""
        worker = self.workers[place]
        worker.process.kill()
        worker.process.wait()
        worker.tasks.close()
        worker.results.close()
        if worker.ready and worker.given:
            number, _ = worker.given.popleft()
            self.done[number] = Failure(reason)
        if not worker.ready:  # no file's fault
            self._stillborn += 1
            if self._stillborn > _STILLBORN:
                raise OtcxrError(f"decode workers do not start ({reason}); run a smaller number with --workers, or see "
                                 "whether the machine is out of memory")  # fmt: skip
        self.returned.extendleft(reversed(worker.given))
        self.workers[place] = self._start()

    def _start(self) -> _Worker:
        task_end, tasks = Pipe(duplex=False)
        results, result_end = Pipe(duplex=False)
        with contextlib.suppress(ImportError, AttributeError, OSError):
            import fcntl

            fcntl.fcntl(result_end.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)
        ends = task_end.fileno(), result_end.fileno()
        # a plain process: multiprocessing's would import the caller's script again
        call = f"from otcxr.packing.workers import work; work({ends[0]}, {ends[1]}, {self._memory_gb!r})"
        path = os.pathsep.join(place for place in sys.path if place)
        process = subprocess.Popen([sys.executable, "-c", call], pass_fds=ends, stdin=subprocess.DEVNULL,
                                   env={**os.environ, "PYTHONPATH": path})  # fmt: skip
        task_end.close()
        result_end.close()
        return _Worker(process, tasks, results, time.monotonic())


def decode_all(
    tasks: Iterator[Task], *, workers: int, memory_gb: float, timeout_s: float
) -> Iterator[tuple[int, Reduced | Failure]]:
    """Decode and reduce, in the order of the tasks.

    Args:
        tasks: Asked for as they are needed; at most some dozens are under way.
        workers: Processes.
        memory_gb: What a worker may take beyond what it starts with; more, and the file is set aside.
        timeout_s: Seconds for a file; longer, and it is set aside.
    Returns: (number of the task, what came of it), from 0 on without gaps.
    Raises: OtcxrError: workers cannot be started.
    """
    team = _Team(workers, memory_gb, timeout_s)
    numbered = enumerate(tasks)
    head = issued = 0  # next result to hand out, tasks asked for
    exhausted = False
    try:
        while True:
            for depth in range(1, _AHEAD + 1):  # everybody's first before anybody's second
                for worker in team.workers:
                    if len(worker.given) >= depth:
                        continue
                    if team.returned:
                        team.give(worker, team.returned.popleft())
                    elif not exhausted and issued < head + _WINDOW * workers:  # results that wait take memory
                        item = next(numbered, None)
                        if item is None:
                            exhausted = True
                        else:
                            issued += 1
                            team.give(worker, item)
            if not any(worker.given for worker in team.workers):
                return
            team.collect()
            while head in team.done:
                yield head, team.done.pop(head)
                head += 1
    finally:
        team.stop()


def work(tasks_end: int, results_end: int, memory_gb: float) -> None:
    """What a worker does until its tasks end; of the pipes it has the descriptors."""
    tasks, results = Connection(tasks_end, writable=False), Connection(results_end, readable=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the one who watches stops the others
    _die_with_parent()
    import cv2

    cv2.setNumThreads(1)  # one file a process: the cores are divided by processes
    # C libraries write to standard error what the reason says in our words, in the middle of the progress
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _limit_memory(memory_gb)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        results.send(None)
        while True:
            number, task = tasks.recv()
            result: Reduced | Failure
            try:
                result = reduce_image(task)
            except DataError as error:
                result = Failure(str(error), thumbnail(task.image))
            except MemoryError:
                result = Failure(f"decoding it takes more than {memory_gb:g} GB")
            except Exception as error:  # a bug, or a library's; the pack goes on
                result = Failure(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            results.send((number, result))


def _death(exit_code: int | None, memory_gb: float) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else str(-exit_code)
        return f"decoding it ended its worker ({name})"
    return f"decoding it ended its worker (exit code {exit_code}, limit {memory_gb:g} GB)"


def _limit_memory(memory_gb: float) -> None:
    """Limit what this process takes beyond what it has; without effect where the system has no such limit."""
    with contextlib.suppress(ImportError, OSError, ValueError, StopIteration):
        import resource

        lines = open("/proc/self/status").read().splitlines()  # noqa: SIM115, PTH123
        now = int(next(line for line in lines if line.startswith("VmData:")).split()[1]) * 1024
        limit = now + int(memory_gb * 1e9)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _die_with_parent() -> None:
    """Let the system kill this process when the one that watches it is killed (Linux)."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
