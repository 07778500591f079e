"""Measure otcxr.ot.sinkhorn beside its peers: writes docs/results/sinkhorn/*.json and, from them, sinkhorn.md.

    python benchmarks/bench_sinkhorn.py                       # cells that are missing, then the table
    python benchmarks/bench_sinkhorn.py --only speed-128x49   # cells whose name matches, again with --again
    python benchmarks/bench_sinkhorn.py --table               # the table only, from committed JSON
    python benchmarks/bench_sinkhorn.py --list                # names of the cells and what is there

A cell is one JSON, one or some fresh processes, at most a couple of minutes on two cores. Every peer runs with the
fewest iterations (or the loosest threshold) that brings the L1 error of the worse marginal of the worst problem of
the very batch that is timed to the target, which favours the peers; ours gets tolerance = target. The error is
measured from the plan in float64 for everybody. Contestants take turns within a round, so drift hits all alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numba", "numpy", "scipy", "POT", "geomloss", "ott-jax", "jax", "jaxlib", "lineax", "equinox")

SEEDS = (9000, 9001, 9002)  # for reports only; tuning uses seeds below 1000
TARGETS = (1e-3, 1e-5)
OBJECTIVES = "RS"
SLACK = 1.01  # a target counts as reached up to this factor, for everybody
MAIN = ((128, 49, 49), (512, 49, 49), (32, 196, 196))
MORE = ((1024, 9, 9), (256, 49, 9), (256, 36, 36), (64, 100, 100), (8, 400, 400), (2, 784, 784))
EPSILON = 0.05
SPEED = (*((size, EPSILON) for size in (*MAIN, *MORE)), ((512, 49, 49), 0.02))
TAPE_LIMIT = 8e9  # bytes, times its share; a contestant whose tape would be larger is not run, and said so
RSS_LIMIT = 14e9  # bytes; a cell that takes more is stopped, and said so
CELL_LIMIT = 420.0  # seconds after which a process of a cell is stopped
ACCURACY = ((0.01, 0.02, 0.05, 0.1), (1e-3, 1e-4, 1e-5))
MEMORY_SIZE = (512, 49, 49)
MEMORY = ("portable", "native", "pot", "geomloss", "ott-kernel", "naive")
GOALS = {  # shared design, section 5: geometric mean and smallest ratio to the fastest peer
    ("portable", "R"): (2.0, 1.5),
    ("portable", "S"): (4.0, 2.5),
    ("native", "R"): (10.0, 6.0),
    ("native", "S"): (20.0, 15.0),
}


# Cells -----------------------------------------------------------------------------------------------------------


def spell(size: tuple[int, int, int]) -> str:
    """128x49, or 256x49x9 where the problem is rectangular."""
    return f"{size[0]}x{size[1]}" + ("" if size[1] == size[2] else f"x{size[2]}")


def list_cells(threads: int) -> dict[str, dict[str, Any]]:
    """Name and job of every cell."""
    cells: dict[str, dict[str, Any]] = {}
    for size, epsilon in SPEED:
        cells[f"speed-{spell(size)}-eps{epsilon:g}-t{threads}"] = {
            "kind": "speed", "size": size, "epsilon": epsilon, "threads": threads,
        }  # fmt: skip
    for size in MAIN:
        for count in (1, 2):
            cells[f"busy-{spell(size)}-t{count}"] = {
                "kind": "busy", "size": size, "epsilon": EPSILON, "threads": count,
            }  # fmt: skip
    for name in MEMORY:
        cells[f"memory-{name}"] = {"kind": "memory", "contestant": name, "size": MEMORY_SIZE, "threads": 1}
    for batch, n in ((16, 49), (2, 196)):
        cells[f"accuracy-{n}"] = {"kind": "accuracy", "size": (batch, n, n), "threads": 1}
    cells["accuracy-zeros"] = {"kind": "zeros", "size": (16, 49, 49), "threads": 1}
    return cells


def main() -> None:
    """Run the cells that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "sinkhorn", help="folder of the JSON")
    parser.add_argument("--only", default="", metavar="REGEX", help="only cells whose name matches")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1, help="of the speed cells (default 1)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls per seed, at most")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of timed calls per contestant and group")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds to search a peer's iterations, per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of the batches")
    parser.add_argument("--again", action="store_true", help="run finished cells again")
    parser.add_argument("--table", action="store_true", help="only write the table from the JSON")
    parser.add_argument("--list", action="store_true", help="only list the cells")
    parser.add_argument("--worker", nargs=2, metavar=("JOB", "RESULT"), help=argparse.SUPPRESS)
    words = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no worker or spinning process is left behind
    if words.worker:
        job, result = words.worker
        Path(result).write_text(json.dumps(work(json.loads(job))))
        return
    cells = {name: job for name, job in list_cells(words.threads).items() if re.search(words.only, name)}
    if words.list:
        for name in cells:
            print(f"{name:32s} {'there' if finished(words.out / f'{name}.json') else 'missing'}")
        return
    if not words.table:
        for name, job in cells.items():
            if words.again or not finished(words.out / f"{name}.json"):
                job |= {key: getattr(words, key) for key in ("repeats", "budget", "limit", "seeds")}
                run_cell(name, job, words.out)
    write_table(words.out)


def finished(path: Path) -> bool:
    """Whether a cell ran to its end; one that crashed or was stopped is run again."""
    return path.is_file() and "failed" not in json.loads(path.read_text())


def run_cell(name: str, job: dict[str, Any], out: Path) -> None:
    """Run a cell in fresh processes and write its JSON last."""
    from otcxr.files import write_atomic

    print(f"== {name}", flush=True)
    start, load = time.perf_counter(), os.getloadavg()
    if job["kind"] == "memory":
        result = run_memory(job, out)
    else:
        if job["kind"] == "busy":
            job["peers"] = fastest_peers(out, job["size"])
        result = spawn(job)
    cell = {
        "cell": name, "job": job, **result, "elapsed_s": round(time.perf_counter() - start, 1),
        "load_average": {"before": load, "after": os.getloadavg()}, "command": command(), **environment(),
    }  # fmt: skip
    write_atomic(out / f"{name}.json", json.dumps(plain(cell), indent=1, allow_nan=False) + "\n")
    print(f"   {cell['elapsed_s']} s" + (f", FAILED: {cell['failed'][-200:]}" if "failed" in cell else ""), flush=True)


def command() -> str:
    """The command line without folders of this machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/bench_sinkhorn.py", *words])


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date: what a number needs to be believed."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    flags: list[str] = []
    if cpuinfo.is_file():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        numbers = "/".join(fields.get(key, "?") for key in ("cpu family", "model"))
        model = f"{fields.get('model name', model)} (family/model {numbers})"
        flags = sorted(flag for flag in fields.get("flags", "").split() if flag in ("avx2", "avx512f", "amx_bf16"))
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "machine": {"cpu": model, "cores": os.cpu_count(), "flags": flags, "system": platform.system()},
        "versions": versions,
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "src") else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def git(*words: str) -> str:
    """Output of a git command in this repository, or nothing."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def plain(x: Any) -> Any:
    """Replace NaN and infinity by words, so that the JSON is valid and hides nothing."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x


# Processes -------------------------------------------------------------------------------------------------------


def spawn(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a fresh process with its number of threads; a crash, a stop or a full memory is a result."""
    threads = str(job["threads"])
    variables = {
        **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads,
        "NUMBA_NUM_THREADS": threads, "NPROC": threads, "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false" if threads == "1" else "",
    }  # fmt: skip
    if job["kind"] in ("speed", "busy"):
        # glibc else gives large blocks back and takes them again: page faults made POT up to 10 times slower here and
        # its times erratic. Kept memory helps every peer in torch; ours does not notice.
        variables |= {"MALLOC_TRIM_THRESHOLD_": str(10**11), "MALLOC_MMAP_THRESHOLD_": str(2 * 10**9)}
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        words = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job), str(result)]
        with log.open("wb") as file:
            child = subprocess.Popen(words, stdout=file, stderr=file, env=variables)
        start, why = time.perf_counter(), ""
        try:
            while child.poll() is None and not why:
                time.sleep(0.25)
                if time.perf_counter() - start > CELL_LIMIT:
                    why = f"stopped after {CELL_LIMIT:g} s"
                elif resident(child.pid) > RSS_LIMIT:
                    why = f"stopped at {RSS_LIMIT / 1e9:g} GB of memory"
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
        if result.is_file() and not why:
            done: dict[str, Any] = json.loads(result.read_text())
            return done
        return {"failed": why or f"exit status {child.returncode}: {log.read_text(errors='replace')[-1500:]}"}


def resident(pid: int | str, field: str = "VmRSS") -> int:
    """Memory of a process in bytes (VmRSS now, VmHWM at most); 0 where it cannot be read."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in this process."""
    import warnings

    import torch

    torch.set_num_threads(job["threads"])
    warnings.filterwarnings("ignore")
    kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "speed": measure_speed, "busy": measure_busy, "memory": measure_memory, "accuracy": measure_accuracy,
        "zeros": measure_zeros,
    }  # fmt: skip
    return kinds[job["kind"]](job)


def why(error: Exception) -> str:
    """An exception in one line, without folders of this machine."""
    text = traceback.format_exception_only(error)[-1].strip()
    text = re.sub(r'File "[^"]*/([^"/]+)"', r'File "\1"', text)
    first = next((line for line in text.splitlines() if "returned non-finite" in line), "")
    return (text[:300] + (f" ... {first}" if first else "")).replace("\n", " ")


# Settings of the peers -------------------------------------------------------------------------------------------


def iteration_grid() -> list[int]:
    """Counts 1, 2, ... 20 and then in steps of 5 % up to the most allowed."""
    from sinkhorn_peers import MOST

    grid = [1]
    while grid[-1] < MOST:
        grid.append(min(MOST, max(grid[-1] + 1, round(grid[-1] * 1.05))))
    return grid


class Search:
    """The fewest iterations with which a contestant reaches a target on one batch; remembers what it has tried."""

    def __init__(self, contestant: Any, problem: Any, epsilon: float, limit_s: float) -> None:
        self.contestant, self.problem, self.epsilon, self.limit_s = contestant, problem, epsilon, limit_s
        self.errors: dict[int, float] = {}
        self.spent_s = 0.0

    def error(self, count: int) -> float:
        """Marginal error after ``count`` iterations; infinity for NaN."""
        from sinkhorn_peers import marginal_error

        if count not in self.errors:
            start = time.perf_counter()
            plan = self.contestant.plan(self.problem, self.epsilon, self.contestant.iterations(count))
            self.spent_s += time.perf_counter() - start
            error = marginal_error(plan, self.problem)
            self.errors[count] = error if math.isfinite(error) else math.inf
        return self.errors[count]

    def fewest(self, target: float, guess: int, *, trust: bool = False) -> int | None:
        """The count, from a grid; None where neither the most iterations nor the time allowed suffice.

        With ``trust`` a guess that suffices is taken: it is the fewest of a solver that makes the same iterations.
        """
        counts = iteration_grid()
        at = min(range(len(counts)), key=lambda i: abs(counts[i] - guess))
        if trust and self.error(counts[at]) <= target * SLACK:
            return counts[at]
        low = max((i for i, n in enumerate(counts) if self.errors.get(n, 0.0) > target * SLACK), default=-1)
        high = min((i for i, n in enumerate(counts) if self.errors.get(n, math.inf) <= target * SLACK), default=None)
        at, step = max(at, low + 1), 1
        while high is None or (low < 0 and high > 0):  # gallop until low fails and high suffices
            if high is not None:
                at = max(0, high - step)
            elif at >= len(counts) or not self.affords(counts[at]):
                at = max((i for i in range(low + 1, len(counts)) if self.affords(counts[i])), default=-1)
                if at < 0:
                    return None
            if self.error(counts[at]) <= target * SLACK:
                high = at
            else:
                low = at
                at = min(len(counts) - 1, at + 4 * step) if at < len(counts) - 1 else len(counts)
            step *= 2
        while high - low > 1 and self.affords(counts[(low + high) // 2]):
            middle = (low + high) // 2
            if self.error(counts[middle]) <= target * SLACK:
                high = middle
            else:
                low = middle
        return counts[high]

    def affords(self, count: int) -> bool:
        """Whether a trial fits in what is left of the time; judged by the trials so far."""
        if count in self.errors:
            return True
        return self.spent_s + count * self.spent_s / max(1, sum(self.errors)) <= self.limit_s


# Speed -----------------------------------------------------------------------------------------------------------


def clock(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, garbage collection off, and what it returned."""
    gc.disable()
    try:
        start = time.perf_counter()
        raw = call()
        return time.perf_counter() - start, raw
    finally:
        gc.enable()


class Runner:
    """One contestant on the batches of one size: finds its settings, prepares calls, checks what they return."""

    def __init__(self, contestant: Any, job: dict[str, Any], problems: dict[int, Any]) -> None:
        self.contestant, self.job, self.problems = contestant, job, problems
        self.searches: dict[int, Search] = {}
        self.beyond: dict[tuple[int, float], dict[str, Any]] = {}  # targets that it cannot reach, with either objective

    def compile(self) -> float:
        """Let ours compile on two problems of this shape; seconds it took."""
        from sinkhorn_peers import workload

        start = time.perf_counter()
        if self.contestant.role == "ours":
            tiny = workload(2, *self.job["size"][1:], 1)
            for objective in OBJECTIVES:
                with suppress(Exception):  # it is reported where it is measured
                    self.contestant.prepare(tiny, objective, self.job["epsilon"], self.contestant.knobs(1e-3)[0])()
        return time.perf_counter() - start

    def prepare(self, seed: int, objective: str, target: float, guess: int) -> dict[str, Any]:
        """Find settings that reach the target, warm up, check. The result holds ``call``, or says why there is none."""
        from sinkhorn_peers import marginal_error

        problem, epsilon = self.problems[seed], self.job["epsilon"]
        knobs = self.contestant.knobs(target)
        found: dict[str, Any] = {}
        if (seed, target) in self.beyond:
            return dict(self.beyond[seed, target])
        if knobs is None:
            limit = self.job["limit"] * self.contestant.share
            follows = self.contestant.follows == "pot"
            tape = self.contestant.tape * problem.cost.numel() * 4
            if follows and tape * guess > TAPE_LIMIT * self.contestant.share:
                return {"not_run": f"its tape would take about {tape * guess / 1e9:.0f} GB ({guess} iterations)"}
            search = self.searches.setdefault(seed, Search(self.contestant, problem, epsilon, limit))
            try:
                count = search.fewest(target, guess, trust=follows)
            except Exception as error:
                return {"failed": why(error)}
            if count is None:
                best = min(search.errors, key=lambda key: search.errors[key])
                return {
                    "not_reached": f"L1 error {search.errors[best]:.3g} after {best} iterations, the best of "
                    f"{len(search.errors)} counts up to {max(search.errors)}, {search.spent_s:.1f} s of search",
                    "best_error": search.errors[best], "iterations": best,
                }  # fmt: skip
            found["iterations"] = count
            if tape * count > TAPE_LIMIT * self.contestant.share:
                return {
                    **found,
                    "not_run": f"its tape would take about {tape * count / 1e9:.0f} GB ({count} iterations)",
                }
            knobs = [self.contestant.iterations(count)]
        failures, began, short_of = [], time.perf_counter(), True
        for knob in knobs:
            if time.perf_counter() - began > self.job["limit"] * self.contestant.share:
                break
            try:
                start = time.perf_counter()
                call = self.contestant.prepare(problem, objective, epsilon, knob)
                compiled = time.perf_counter() - start
                first, raw = clock(call)
                second = first
                if first < 8 * self.job["budget"] * self.contestant.share:
                    second, raw = clock(call)  # the first call also pays for memory that is then kept
                outcome = self.contestant.read(raw)
            except Exception as error:
                failures.append(f"{knob}: {why(error)}")
                short_of = False
                continue
            error_now = marginal_error(outcome.plan, problem)
            found |= {
                "knob": knob, "error": error_now, "prepare_s": round(compiled, 3), "first_call_s": first,
                "expected_s": second,
            }  # fmt: skip
            if not outcome.finite():
                failures.append(f"{knob}: NaN or infinity in the plan or a gradient")
                short_of = False
            elif error_now > target * SLACK:
                failures.append(f"{knob}: L1 error {error_now:.4g} instead of {target:g}")
            else:
                return {**found, "call": call, **({"tried_before": failures} if failures else {})}
        if not short_of:
            return {**found, "failed": "; ".join(failures)}
        self.beyond[seed, target] = {**found, "not_reached": "; ".join(failures)}
        return dict(self.beyond[seed, target])


def measure_speed(job: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of every contestant for both objectives and both targets."""
    from sinkhorn_peers import CONTESTANTS, workload

    problems = {seed: workload(*job["size"], seed) for seed in job["seeds"]}
    runners = {name: Runner(contestant, job, problems) for name, contestant in CONTESTANTS.items()}
    compiled = {name: round(runner.compile(), 2) for name, runner in runners.items()}
    groups = []
    for target in TARGETS:
        for objective in OBJECTIVES:
            results = time_group(runners, objective, target, job)
            groups.append({"objective": objective, "target": target, "contestants": results})
    return {"groups": groups, "first_calls_s": compiled}


def time_group(runners: dict[str, Runner], objective: str, target: float, job: dict[str, Any]) -> dict[str, Any]:
    """Time all contestants in turns for one objective and target."""
    results: dict[str, dict[str, Any]] = {}
    for name, runner in runners.items():
        if objective in runner.contestant.objectives:
            results[name] = {
                "title": runner.contestant.title, "role": runner.contestant.role,
                "differentiates": runner.contestant.differentiates[objective], "seeds": {},
            }  # fmt: skip
    guess = 40
    for at, seed in enumerate(job["seeds"]):
        ready: dict[str, tuple[Callable[[], Any], int]] = {}
        for name, result in results.items():
            if any("call_s" not in one for one in result["seeds"].values()) or result.get("once"):
                continue  # it failed, or was too slow to be measured on more than one seed
            start = time.perf_counter()
            found = runners[name].prepare(seed, objective, target, guess)
            found["preparation_s"] = round(time.perf_counter() - start, 2)
            call = found.pop("call", None)
            result["seeds"][str(seed)] = found
            if name == "pot" and "not_reached" not in found:
                guess = found.get("iterations", guess)  # the log-domain loops make the same iterations
            if call is None:
                continue
            expected = found.pop("expected_s")
            found["call_s"] = []
            allowed = job["budget"] * runners[name].contestant.share
            if expected > 2 * allowed:
                found["call_s"], found["note"] = [expected], "slow: one call on one seed is the measurement"
            else:
                ready[name] = call, max(1, min(job["repeats"], int(allowed / len(job["seeds"]) / expected)))
            result["once"] = at == 0 and expected > 2 * allowed
        order = list(ready)
        gc.collect()
        for turn in range(max((quota for _, quota in ready.values()), default=0)):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                call, quota = ready[name]
                if turn < quota:
                    seconds, _ = clock(call)
                    results[name]["seeds"][str(seed)]["call_s"].append(seconds)
    for result in results.values():
        result.update(summarise(result))
    return results


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Median over repeats, then over seeds, and quartiles over all; or the reason why there is none."""
    seeds = result["seeds"].values()
    if any(key in one for one in seeds for key in ("failed", "not_reached", "not_run")):
        for key in ("failed", "not_reached", "not_run"):
            reasons = [one[key] for one in seeds if key in one]
            if reasons:
                where = f"on {len(reasons)} of {len(seeds)} batches tried: "
                return {"status": key.replace("_", " "), "reason": where + reasons[0]}
    calls = [seconds for one in seeds for seconds in one["call_s"]]
    low, _, high = statistics.quantiles(calls, n=4, method="inclusive") if len(calls) > 1 else calls * 3
    return {
        "status": "measured",
        "median_ms": 1e3 * statistics.median(statistics.median(one["call_s"]) for one in seeds),
        "quartiles_ms": [1e3 * low, 1e3 * high],
        "calls": len(calls),
        "worst_error": max(one["error"] for one in seeds),
    }


# A busy core -----------------------------------------------------------------------------------------------------


SPINNER = "import os\nmine = os.getppid()\nwhile os.getppid() == mine:\n    for _ in range(1000000):\n        pass\n"


@contextmanager
def spinning() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that does nothing as fast as it can; it ends with us."""
    child = subprocess.Popen([sys.executable, "-S", "-c", SPINNER])
    try:
        while processor_s(child.pid) < 0.1:
            time.sleep(0.02)
        yield child
    finally:
        child.kill()
        child.wait()


def processor_s(pid: int) -> float:
    """Processor seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_busy(job: dict[str, Any]) -> dict[str, Any]:
    """Time ours and the fastest peer, idle and beside a spinning process, in alternating blocks."""
    from sinkhorn_peers import CONTESTANTS, workload

    problems = {seed: workload(*job["size"], seed) for seed in job["seeds"]}
    groups, shares = [], []
    for objective in OBJECTIVES:
        names = ["portable", "native", job["peers"][objective]]
        results: dict[str, Any] = {}
        for seed in job["seeds"]:
            ready = {}
            for name in names:
                result = results.setdefault(
                    name,
                    {"title": CONTESTANTS[name].title, "role": CONTESTANTS[name].role, "idle_s": [], "busy_s": []},
                )
                if "failed" in result:
                    continue
                runner = Runner(CONTESTANTS[name], job, problems)
                runner.compile()
                found = runner.prepare(seed, objective, 1e-3, 40)
                if "call" in found:
                    ready[name] = found["call"], max(2, min(4 * job["repeats"], int(0.2 / found["expected_s"])))
                else:
                    result["failed"] = next(found[key] for key in ("failed", "not_reached", "not_run") if key in found)
            for key in ("idle_s", "busy_s"):
                if key == "idle_s":
                    time_blocks(ready, results, key)
                else:
                    with spinning() as child:
                        start, used = time.perf_counter(), processor_s(child.pid)
                        time_blocks(ready, results, key)
                        shares.append((processor_s(child.pid) - used) / (time.perf_counter() - start))
        for result in results.values():
            if "failed" not in result:
                idle, busy = statistics.median(result["idle_s"]), statistics.median(result["busy_s"])
                result |= {
                    "idle_ms": 1e3 * idle, "busy_ms": 1e3 * busy, "ratio": busy / idle,
                    "worst_busy_ms": 1e3 * max(result["busy_s"]),
                }  # fmt: skip
        groups.append({"objective": objective, "target": 1e-3, "contestants": results})
    return {"groups": groups, "share_of_a_core_the_spinner_got": [round(share, 3) for share in shares]}


def time_blocks(ready: dict[str, Any], results: dict[str, Any], key: str) -> None:
    """Each contestant some calls in a row, at most about four seconds."""
    for name, (call, quota) in ready.items():
        call()
        start = time.perf_counter()
        for _ in range(quota):
            seconds, _ = clock(call)
            results[name][key].append(seconds)
            if time.perf_counter() - start > 4.0:
                break


def fastest_peers(out: Path, size: tuple[int, int, int]) -> dict[str, str]:
    """Name of the fastest peer per objective at 1e-3, from the speed cell; POT where that is missing."""
    peers = {"R": "pot", "S": "pot"}
    path = out / f"speed-{spell(size)}-eps{EPSILON:g}-t1.json"
    if finished(path):
        for group in json.loads(path.read_text())["groups"]:
            best = fastest(group)
            if group["target"] == 1e-3 and best:
                peers[group["objective"]] = best
    return peers


def fastest(group: dict[str, Any], roles: tuple[str, ...] = ("peer",)) -> str | None:
    """Name of the fastest contestant with one of these roles that was measured."""
    times = {
        name: result["median_ms"]
        for name, result in group["contestants"].items()
        if result["status"] == "measured" and result["role"] in roles
    }
    return min(times, key=lambda name: times[name]) if times else None


# Memory ----------------------------------------------------------------------------------------------------------


def run_memory(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """One fresh process per objective and setting of one contestant."""
    from sinkhorn_peers import CONTESTANTS

    contestant = CONTESTANTS[job["contestant"]]
    path = out / f"speed-{spell(job['size'])}-eps{EPSILON:g}-t1.json"
    speed = json.loads(path.read_text())["groups"] if finished(path) else []
    runs = []
    for objective in contestant.objectives:
        settings: dict[str, Any] = {"50 iterations": contestant.iterations(50), "500 iterations": None}
        settings["500 iterations"] = contestant.iterations(500)
        for group in speed:
            if (group["objective"], group["target"]) == (objective, 1e-3):
                seeds = group["contestants"][contestant.name]["seeds"].values()
                knobs = [one["knob"] for one in seeds if "knob" in one]
                if knobs:
                    settings = {"L1 error 1e-3": knobs[0], **settings}
        if "L1 error 1e-3" not in settings and contestant.knobs(1e-3):
            settings = {"L1 error 1e-3": contestant.knobs(1e-3)[0], **settings}
        for setting, knob in settings.items():
            result = spawn({**job, "objective": objective, "knob": knob})
            runs.append({"objective": objective, "setting": setting, "knob": knob, **result})
    size = 4 * math.prod(job["size"])
    return {"title": contestant.title, "size_of_cost": size, "allowed": 4 * size + 10_000_000, "runs": runs}


def measure_memory(job: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one forward and backward above what the process held before it, inputs included in the latter.

    The peak is the kernel's high-water mark, set back right before the call (resource.getrusage where it cannot be).
    """
    import ctypes
    import resource

    from sinkhorn_peers import CONTESTANTS, marginal_error, workload

    contestant = CONTESTANTS[job["contestant"]]
    shape, objective, knob = job["size"], job["objective"], job["knob"]
    try:
        tiny = workload(4, *shape[1:], 1)
        contestant.prepare(tiny, objective, EPSILON, knob)()
        problem = workload(*shape, job["seeds"][0])
        call = contestant.prepare(problem, objective, EPSILON, knob)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("self")
        try:
            Path("/proc/self/clear_refs").write_text("5")
            way = "VmHWM after clear_refs"
        except OSError:
            way = "ru_maxrss"
        raw = call()
        peak = resident("self", "VmHWM") if way.startswith("VmHWM") else 0
        peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        outcome = contestant.read(raw)
    except Exception as error:
        return {"failure": why(error)}
    return {
        "added": peak - before, "before": before, "way": way, "error": marginal_error(outcome.plan, problem),
        "finite": outcome.finite(),
    }  # fmt: skip


# Accuracy --------------------------------------------------------------------------------------------------------


def compare(contestant: Any, problem: Any, objective: str, epsilon: float, knob: Any, truth: Any) -> dict[str, Any]:
    """Error of one contestant's plan and gradients against the float64 reference, per problem."""
    from sinkhorn_peers import gap, marginal_error

    try:
        outcome = contestant.read(contestant.prepare(problem, objective, epsilon, knob)())
    except Exception as error:
        return {"failed": why(error), "knob": knob}
    want = truth[objective]
    pairs = {
        "cost": gap(outcome.cost, want.cost),
        "a": gap(outcome.a, want.a, problem.a.numpy() > 0),
        "b": gap(outcome.b, want.b, problem.b.numpy() > 0),
    }
    return {
        "knob": knob,
        "residual": marginal_error(outcome.plan, problem),
        **{
            f"d_{key}": None if errors is None else {"worst": worst(errors), "median": statistics.median(errors)}
            for key, errors in pairs.items()
        },
    }


def worst(errors: list[float]) -> float:
    """The largest error; NaN if there is one."""
    return max(errors, key=lambda x: math.inf if math.isnan(x) else x)


def accuracy_contestants() -> list[tuple[str, Any, Any]]:
    """Label, contestant and setting of the peers' gradients; POT also in the modes that are not timed."""
    from sinkhorn_peers import CONTESTANTS, Pot

    pot = {"max_iter": 2000, "tol": 1e-6}
    modes = [
        ("POT, envelope (R) / autodiff (S)", CONTESTANTS["pot"], pot),
        ("POT, autodiff", Pot("pot-autodiff", "sinkhorn", {"R": "autodiff", "S": "autodiff"}, masses=True), pot),
        ("POT, last_step", Pot("pot-last-step", "sinkhorn", {"R": "last_step", "S": "last_step"}, masses=True), pot),
        (
            "POT log domain, autodiff",
            Pot("pot-log-autodiff", "log_sinkhorn", {"R": "autodiff", "S": "autodiff"}, masses=True),
            pot,
        ),
        ("GeomLoss, 1000 iterations", CONTESTANTS["geomloss"], {"max_iter": 1000}),
    ]
    for name in ("ott-kernel", "ott-log"):
        modes.append((CONTESTANTS[name].title, CONTESTANTS[name], CONTESTANTS[name].knobs(1e-5)[0]))
    modes.append(("naive loop, 1000 iterations", CONTESTANTS["naive"], {"iterations": 1000}))
    return modes


def measure_accuracy(job: dict[str, Any]) -> dict[str, Any]:
    """Float32 plans and gradients against a float64 reference, over epsilon and tolerance."""
    from sinkhorn_peers import CONTESTANTS, reference, workload

    rows = []
    for epsilon in ACCURACY[0]:
        problem = workload(*job["size"], job["seeds"][0])
        truth = reference(problem, epsilon)
        for objective in OBJECTIVES:
            base = {
                "epsilon": epsilon, "objective": objective, "reference_residual": truth["residual"],
                "smallest_eigenvalue": truth["smallest_eigenvalue"],
            }  # fmt: skip
            for name in ("portable", "native"):
                for tolerance in ACCURACY[1]:
                    knob = CONTESTANTS[name].knobs(tolerance)[0]
                    row = compare(CONTESTANTS[name], problem, objective, epsilon, knob, truth)
                    rows.append({**base, "contestant": name, "role": "ours", "tolerance": tolerance, **row})
            for label, contestant, knob in accuracy_contestants() if job["size"][1] <= 49 else []:
                if objective in contestant.objectives:
                    row = compare(contestant, problem, objective, epsilon, knob, truth)
                    rows.append({**base, "contestant": label, "role": "peer", "tolerance": None, **row})
    return {"rows": rows}


def measure_zeros(job: dict[str, Any]) -> dict[str, Any]:
    """What everybody does where a mass is zero: NaN, gradients of absent positions, errors of present ones."""
    import numpy as np
    from sinkhorn_peers import CONTESTANTS, Problem, gap, marginal_error, reference, workload

    cost, a, b = workload(*job["size"], job["seeds"][0])
    a[:, :10], b[:, -5:] = 0.0, 0.0
    problem = Problem(cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True))
    truth = reference(problem, EPSILON)
    present = {"a": problem.a.numpy() > 0, "b": problem.b.numpy() > 0}
    ours = [(CONTESTANTS[name].title, CONTESTANTS[name], CONTESTANTS[name].knobs(1e-5)[0]) for name in
            ("portable", "native")]  # fmt: skip
    rows = []
    for objective in OBJECTIVES:
        for label, contestant, knob in ours + accuracy_contestants():
            row: dict[str, Any] = {"contestant": label, "objective": objective, "knob": knob}
            rows.append(row)
            try:
                outcome = contestant.read(contestant.prepare(problem, objective, EPSILON, knob)())
            except Exception as error:
                row["failed"] = why(error)
                continue
            row["residual"] = marginal_error(outcome.plan, problem)
            for key in ("plan", "cost", "a", "b"):
                got = getattr(outcome, key)
                if got is None:
                    continue
                row[f"{key}_not_finite"] = int((~np.isfinite(got)).sum())
                if key in present:
                    absent = np.abs(got[~present[key]])
                    row[f"{key}_largest_where_absent"] = float(absent.max()) if np.isfinite(absent).all() else math.nan
                    row[f"d_{key}"] = worst(gap(got, getattr(truth[objective], key), present[key]) or [math.nan])
                elif key == "cost":
                    row["d_cost"] = worst(gap(got, truth[objective].cost) or [math.nan])
    return {"rows": rows, "reference_residual": truth["residual"]}


# Table -----------------------------------------------------------------------------------------------------------


def short(x: Any, digits: int = 3) -> str:
    """A number in few digits."""
    if not isinstance(x, int | float):
        return "" if x is None else str(x)
    if not math.isfinite(x):
        return str(x)
    if x == 0:
        return "0"
    if abs(x) < 1e-2 or abs(x) >= 1e5:
        return f"{x:.1e}"
    return f"{x:.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def verdict(value: float, goal: float, *, at_most: bool = False) -> str:
    """met or missed."""
    return "met" if (value <= goal if at_most else value >= goal) else "**missed**"


def grid(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table and an empty line."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def write_table(out: Path) -> None:
    """Write the Markdown table beside the folder from the cells in it, and print the summary."""
    from pages import embed

    from otcxr.files import write_atomic

    cells = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    if not cells:
        print("no cells yet")
        return
    kinds: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if "failed" not in cell:
            kinds.setdefault(cell["job"]["kind"], []).append(cell)
    order = [(list(size), epsilon) for size, epsilon in SPEED]
    speed = sorted(
        kinds.get("speed", []),
        key=lambda c: (c["job"]["threads"], order.index((c["job"]["size"], c["job"]["epsilon"]))),
    )
    summary = table_summary(speed, kinds)
    text = [
        "# Entropic transport: speed, contention, memory, accuracy",
        "",
        f"Generated by `python benchmarks/bench_sinkhorn.py` from the JSON files in `{out.name}/`. Do not edit.",
        "",
        "R: the entropic value `<P, C> + epsilon KL(P | a b^T)`; S: the sharp cost `<P, C>`. Forward and backward, "
        "batches of problems that no one tuned on, cosine cost, non-uniform masses. Ours always differentiates cost "
        "and both masses; what a peer differentiates is listed below. Every peer has the fewest iterations or the "
        "loosest threshold that reach the error *on the batch that is timed*, found beforehand; ours only gets its "
        "tolerance. Fewest: from a grid in steps of 5 %.",
        "",
        "## Against the targets",
        "",
        *summary,
        *table_speed(speed),
        *table_busy(kinds.get("busy", [])),
        *table_memory(kinds.get("memory", [])),
        *table_accuracy(kinds.get("accuracy", [])),
        *table_zeros(kinds.get("zeros", [])),
        *table_origin(cells),
    ]
    write_atomic(out.with_suffix(".md"), "\n".join(text))
    if out.resolve() == ROOT / "docs" / "results" / "sinkhorn":
        embed(ROOT / "docs" / "ot.md", "measured", [*table_short(speed), *summary, *table_origin(cells)[-2:]])
    print("\n".join(summary))


def ratios(speed: list[dict[str, Any]], name: str, objective: str, roles: tuple[str, ...]) -> dict[str, float]:
    """Ratio of the fastest peer's time to ours at 1e-3 per cell on one thread; 0 where ours was not measured."""
    out = {}
    for cell in speed:
        for group in cell["groups"]:
            if (group["objective"], group["target"]) == (objective, 1e-3) and cell["job"]["threads"] == 1:
                best = fastest(group, roles)
                ours = group["contestants"][name]
                if best:
                    title = f"{spell(cell['job']['size'])}, epsilon {cell['job']['epsilon']:g}"
                    measured = ours["status"] == "measured"
                    out[title] = group["contestants"][best]["median_ms"] / ours["median_ms"] if measured else 0.0
    return out


def mean(values: list[float]) -> float:
    """Geometric mean; 0 if one of them is 0."""
    return statistics.geometric_mean(values) if values and min(values) > 0 else 0.0


def table_short(speed: list[dict[str, Any]]) -> list[str]:
    """Ours beside the fastest peer, on one thread."""
    header = ["batch, epsilon", "error"]
    header += [f"{objective}: {who}" for objective in OBJECTIVES for who in ("portable", "native", "fastest peer")]
    rows = []
    for target in (1e-3, 1e-5):
        for cell in speed:
            groups = {g["objective"]: g for g in cell["groups"] if g["target"] == target}
            if cell["job"]["threads"] != 1 or not groups:
                continue
            row = [f"{spell(cell['job']['size'])}, {cell['job']['epsilon']:g}", f"{target:g}"]
            for objective in OBJECTIVES:
                results, best = groups[objective]["contestants"], fastest(groups[objective])
                for name in ("portable", "native"):
                    measured = results[name]["status"] == "measured"
                    row.append(short(results[name]["median_ms"]) if measured else results[name]["status"])
                row.append(f"{short(results[best]['median_ms'])} ({results[best]['title']})" if best else "none")
            rows.append(row)
    return [
        "Milliseconds for a batch, forward and backward, one thread. R: entropic value, S: sharp. Error: L1 error of "
        "the worse marginal that the worst problem of the batch must reach.",
        "",
        *grid(header, rows),
    ]


def table_summary(speed: list[dict[str, Any]], kinds: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Every target beside what was measured."""
    rows = []
    main = [f"{spell(size)}, epsilon {EPSILON:g}" for size in MAIN]
    for (name, objective), (goal_mean, goal_least) in GOALS.items():
        found = ratios(speed, name, objective, ("peer",))
        hand = ratios(speed, name, objective, ("peer", "by hand"))
        if not found:
            continue
        least = min(found, key=lambda key: found[key])
        for where, chosen in (("three main sizes", main), ("all cells", list(found))):
            if not set(chosen) <= set(found):
                continue
            value = mean([found[key] for key in chosen])
            also = mean([hand[key] for key in chosen])
            rows.append([
                f"{name}, {objective}: geometric mean of ratios, {where} ({len(chosen)})", f"at least {goal_mean:g}",
                short(value), short(also), verdict(value, goal_mean),
            ])  # fmt: skip
        rows.append([
            f"{name}, {objective}: smallest ratio ({least})", f"at least {goal_least:g}", short(found[least]),
            short(min(hand.values())), verdict(found[least], goal_least),
        ])  # fmt: skip
    for name in ("portable", "native"):
        for threads in (1, 2):
            results = [
                (group["contestants"][name]["ratio"], f"{spell(cell['job']['size'])} {group['objective']}")
                for cell in kinds.get("busy", []) if cell["job"]["threads"] == threads
                for group in cell["groups"] if "ratio" in group["contestants"][name]
            ]  # fmt: skip
            if results:
                value, where = max(results)
                rows.append([
                    f"{name}: busy over idle time, {threads} thread(s), worst ({where})", "at most 3", short(value), "",
                    verdict(value, 3.0, at_most=True),
                ])  # fmt: skip
        for cell in kinds.get("memory", []):
            added = [run["added"] for run in cell["runs"] if "added" in run]
            if cell["job"]["contestant"] == name and added:
                rows.append([
                    f"{name}: memory added, worst of {len(added)} runs", f"at most {cell['allowed'] / 1e6:.1f} MB",
                    f"{max(added) / 1e6:.1f} MB", "", verdict(max(added), cell["allowed"], at_most=True),
                ])  # fmt: skip
        judged = [
            row for cell in kinds.get("accuracy", []) for row in cell["rows"]
            if row["contestant"] == name and row["tolerance"] == 1e-5 and "failed" not in row
        ]  # fmt: skip
        if judged:
            for title, goal, value in (
                ("L1 error at tolerance 1e-5", 1e-5 * SLACK, worst([number(row["residual"]) for row in judged])),
                ("relative error of d cost", 2e-4, worst([number(row["d_cost"]["worst"]) for row in judged])),
                (
                    "relative error of d a, d b",
                    5e-3,
                    worst([number(row[key]["worst"]) for row in judged for key in ("d_a", "d_b")]),
                ),
            ):
                rows.append([
                    f"{name}: {title}, worst of {len(judged)} rows", f"at most {short(goal)}", short(value), "",
                    verdict(value, goal, at_most=True),
                ])  # fmt: skip
    return grid(["what", "target", "measured", "also counting gradients formed by hand", ""], rows)


def number(x: Any) -> float:
    """Back from what ``plain`` made of NaN."""
    return float(x)


def table_speed(speed: list[dict[str, Any]]) -> list[str]:
    """Times per size and contestant, and everything that has no time."""
    text = []
    pairs = sorted({(cell["job"]["threads"], group["target"]) for cell in speed for group in cell["groups"]},
                   key=lambda pair: (pair[0], -pair[1]))  # fmt: skip
    reasons: dict[tuple[str, str], list[str]] = {}
    modes: dict[tuple[str, str], str] = {}
    for threads, target in pairs:
        for objective in OBJECTIVES:
            groups = [
                (cell, group) for cell in speed for group in cell["groups"]
                if (cell["job"]["threads"], group["target"], group["objective"]) == (threads, target, objective)
            ]  # fmt: skip
            names = list(groups[0][1]["contestants"])
            titles = [groups[0][1]["contestants"][name]["title"] for name in names]
            rows = []
            for cell, group in groups:
                best = fastest(group)
                row = [f"{spell(cell['job']['size'])}, {cell['job']['epsilon']:g}"]
                for name in names:
                    result = group["contestants"][name]
                    modes[result["title"], objective] = result["differentiates"]
                    if result["status"] == "measured":
                        low, high = result["quartiles_ms"]
                        shown = f"{short(result['median_ms'])} [{short(low)}, {short(high)}]"
                        row.append(f"**{shown}**" if name == best else shown)
                    else:
                        row.append(result["status"])
                        where = f"{row[0]}, {objective}, {target:g}, {threads} thread(s)"
                        reasons.setdefault((result["title"], where), []).append(result["reason"])
                for name in ("portable", "native"):
                    ours = group["contestants"][name]
                    there = best and ours["status"] == "measured"
                    row.append(short(group["contestants"][best]["median_ms"] / ours["median_ms"]) if there else "")
                rows.append(row)
            text += [
                f"## {objective} to {target:g}, {threads} thread(s)",
                "",
                "Milliseconds, median over repeats and then over seeds [quartiles over all calls]; bold: the fastest "
                "peer, to which the last two columns relate.",
                "",
                *grid(["batch, epsilon", *titles, "ratio portable", "ratio native"], rows),
            ]
    if modes:
        text += ["## What is differentiated", ""]
        text += grid(["contestant", "objective", "gradient in"], [[*key, value] for key, value in modes.items()])
    if reasons:
        text += ["## No time, and why", ""]
        rows = [[title, where, "; ".join(why).replace("|", "/")[:300]] for (title, where), why in reasons.items()]
        text += grid(["contestant", "where", "why"], rows)
    return text


def table_busy(cells: list[dict[str, Any]]) -> list[str]:
    """Times beside a spinning process."""
    rows = []
    for cell in cells:
        for group in cell["groups"]:
            for result in group["contestants"].values():
                first = [spell(cell["job"]["size"]), str(cell["job"]["threads"]), group["objective"], result["title"]]
                keys = ("idle_ms", "busy_ms", "worst_busy_ms", "ratio")
                rows.append([*first, *(short(result[key]) for key in keys)] if "ratio" in result
                            else [*first, result["failed"][:200], "", "", ""])  # fmt: skip
    if not rows:
        return []
    return [
        "## One other core busy",
        "",
        "To 1e-3, epsilon 0.05; idle and busy blocks alternate. The other process computes without pause and without "
        "a pinned core.",
        "",
        *grid(["batch", "threads", "objective", "contestant", "idle ms", "busy ms", "worst busy ms", "ratio"], rows),
    ]


def table_memory(cells: list[dict[str, Any]]) -> list[str]:
    """Memory above the inputs."""
    rows = []
    for cell in cells:
        for run in cell["runs"]:
            shown = f"{run['added'] / 1e6:.1f}" if "added" in run else run.get("failure", run.get("failed", ""))[:200]
            met = verdict(run["added"], cell["allowed"], at_most=True) if "added" in run else ""
            rows.append([cell["title"], run["objective"], run["setting"], shown, met.replace("met", "yes")
                         .replace("**missed**", "no"), short(run.get("error"))])  # fmt: skip
    if not rows:
        return []
    return [
        "## Memory",
        "",
        f"Peak resident memory of forward and backward above that before the call, {spell(MEMORY_SIZE)}, MB, fresh "
        f"process, one thread. Allowed: 4 costs + 10 MB = {cells[0]['allowed'] / 1e6:.1f} MB.",
        "",
        *grid(["contestant", "objective", "setting", "MB added", "within", "L1 error"], rows),
    ]


def table_accuracy(cells: list[dict[str, Any]]) -> list[str]:
    """Errors against the reference; ours for all tolerances in one row."""
    merged: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    hard: dict[tuple[int, float], float] = {}
    for cell in sorted(cells, key=lambda cell: cell["job"]["size"][1]):
        n = cell["job"]["size"][1]
        for row in cell["rows"]:
            merged.setdefault((str(n), f"{row['epsilon']:g}", row["objective"], row["contestant"]), []).append(row)
            hard[n, row["epsilon"]] = row["smallest_eigenvalue"]
    rows = []
    for first, group in merged.items():
        failed = [row["failed"] for row in group if "failed" in row]
        if failed:
            rows.append([*first, failed[0].replace("|", "/")[:120], "", "", "", ""])
            continue
        tolerances = " / ".join(f"{row['tolerance']:g}" for row in group if row["tolerance"] is not None)
        shown = []
        for key in ("d_cost", "d_a", "d_b"):
            shown.append(" / ".join("-" if row[key] is None else short(row[key]["worst"], 2) for row in group))
        rows.append([*first, tolerances, " / ".join(short(row["residual"], 2) for row in group), *shown])
    if not rows:
        return []
    return [
        "## Accuracy in float32",
        "",
        "Against a float64 Newton solution (residual at most 1e-12): L1 error of the worse marginal, relative L2 "
        "errors of the gradients (masses: centred over positions with mass), all for the worst problem of the batch. "
        "Ours: one number per tolerance. The error of the potentials is about that of the marginals divided by the "
        "smallest eigenvalue of the dual problem (scaled to unit diagonal), which falls with epsilon.",
        "",
        *grid(
            ["n", "epsilon", "smallest eigenvalue in the batch"],
            [[str(n), f"{epsilon:g}", short(value, 2)] for (n, epsilon), value in hard.items()],
        ),
        *grid(["n", "epsilon", "objective", "contestant", "tolerance", "L1 error", "d cost", "d a", "d b"], rows),
    ]


def table_zeros(cells: list[dict[str, Any]]) -> list[str]:
    """Zero masses."""
    rows = []
    for cell in cells:
        for row in cell["rows"]:
            first = [row["objective"], row["contestant"]]
            if "failed" in row:
                rows.append([*first, row["failed"].replace("|", "/")[:120], *[""] * 5])
                continue
            bad = ", ".join(f"{key} {row[f'{key}_not_finite']}" for key in ("plan", "cost", "a", "b")
                            if row.get(f"{key}_not_finite"))  # fmt: skip
            absent = [row[f"{key}_largest_where_absent"] for key in ("a", "b") if f"{key}_largest_where_absent" in row]
            rows.append([
                *first, short(row["residual"]), bad or "none", short(worst([number(x) for x in absent])) if absent
                else "-", *(short(row[key]) if key in row else "-" for key in ("d_cost", "d_a", "d_b")),
            ])  # fmt: skip
    if not rows:
        return []
    header = ["objective", "contestant", "L1 error", "entries not finite", "largest mass gradient where absent",
              "d cost", "d a", "d b"]  # fmt: skip
    return [
        "## Zero masses",
        "",
        "16 problems of 49 x 49 with 10 and 5 positions without mass, epsilon 0.05; errors as above, over the "
        "positions that exist. There are no gradients where there is no position: 0 is right.",
        "",
        *grid(header, rows),
    ]


def table_origin(cells: list[dict[str, Any]]) -> list[str]:
    """Machine, versions, commits, dates, and cells that failed as a whole."""
    text = []
    failed = [cell for cell in cells if "failed" in cell]
    if failed:
        text += ["## Cells that failed", ""]
        rows = [[cell["cell"], cell["failed"][-300:].replace("\n", " ").replace("|", "/")] for cell in failed]
        text += grid(["cell", "why"], rows)
    machines = sorted({f"{cell['machine']['cpu']}, {cell['machine']['cores']} cores" for cell in cells})
    versions = sorted({", ".join(f"{key} {value}" for key, value in cell["versions"].items()) for cell in cells})
    commits = sorted({cell["commit"] for cell in cells})
    dates = sorted(cell["date"] for cell in cells)
    seeds = sorted({seed for cell in cells for seed in cell["job"]["seeds"]})
    return [
        *text,
        "## Origin",
        "",
        f"Machine: {'; '.join(machines)}. Versions: {'; '.join(versions)}. Commit: {', '.join(commits)}. Dates: "
        f"{dates[0]} to {dates[-1]}. Seeds: {', '.join(map(str, seeds))}. Threads are limited for torch, numba, BLAS "
        "and XLA; garbage collection is off while timing; every contestant is called before it is timed, and "
        "OTT-JAX is compiled before that.",
        "",
    ]


if __name__ == "__main__":
    main()
