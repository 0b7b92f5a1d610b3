"""Shared by all benchmarks: clocks, peak memory, hardware and versions, rows of results as JSON and as a table.

On a GPU times are those of CUDA events. On a CPU they are wall-clock times together with CPU seconds of all threads,
which are the figure to compare on a shared machine. Peak memory is the resident set of a dedicated child process on a
CPU and torch's allocated memory on a GPU, both relative to the value before the call.

    python -m benchmarks.measure MODULE FUNCTION JSON     the child: calls MODULE.FUNCTION(*JSON), which returns (warm-up, run)
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Row = dict[str, Any]
Run = Callable[[], object]


def arguments(about: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is written."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


# ------------------------------------------------------------------------------------------------------------------------- clocks

_origin: list[torch.cuda.Event] = []


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> float:
    """Seconds, for pytest.mark.benchmark(timer=clock). With a GPU, the time of a CUDA event recorded after all queued work."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    if not _origin:
        _origin.append(torch.cuda.Event(enable_timing=True))
        _origin[0].record()
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    now.synchronize()
    return _origin[0].elapsed_time(now) / 1e3


class Times(NamedTuple):
    """Times of every round, without the warm-up."""

    seconds: list[float]
    cpu_seconds: list[float]


def timed_rounds(
    benchmark: Any, prepare: Callable[[], Run], rounds: int, budget_s: float = math.inf
) -> Times:
    """Times by the pytest-benchmark fixture; prepare() returns each round's call, on other inputs than the previous round's.

    There are two warm-up calls, of which the first compiles. If the second shows that the rounds would take longer than
    budget_s, there are fewer, but at least two."""
    prepare()()
    warm = prepare()
    begin = clock()
    warm()
    seconds = max(clock() - begin, 1e-9)
    rounds = rounds if rounds * seconds <= budget_s else max(2, int(budget_s / seconds))
    cpu: list[float] = []

    def call(run: Run) -> None:
        begin = time.process_time()
        run()
        cpu.append(time.process_time() - begin)

    benchmark.pedantic(call, setup=lambda: ((prepare(),), {}), rounds=rounds)
    return Times([float(s) for s in benchmark.stats.stats.data], cpu)


def matmul_rate(n: int, k: int, m: int, dtype: torch.dtype, rounds: int = 5) -> float:
    """Floating-point operations per second of torch.mm [n, k] x [k, m], of the GPU or per CPU second of all threads;
    the rate for floors."""
    where = device()
    a, b = torch.randn(n, k, device=where, dtype=dtype), torch.randn(m, k, device=where, dtype=dtype)
    out = torch.empty(n, m, device=where, dtype=dtype)
    tick = clock if where.type == "cuda" else time.process_time
    seconds = []
    for _ in range(rounds + 1):
        begin = tick()
        torch.mm(a, b.t(), out=out)
        seconds.append(tick() - begin)
    return 2 * n * k * m / statistics.median(seconds[1:])


# ------------------------------------------------------------------------------------------------------------------------- memory


def cuda_peak_bytes(run: Run) -> int:
    """Peak bytes allocated during run(), relative to before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class ChildReport(NamedTuple):
    """peak_bytes: peak resident set during the run, relative to before; None if the system does not report it."""

    peak_bytes: int | None
    seconds: float
    cpu_seconds: float


def in_child(module: str, function: str, *arguments: Any, for_time: bool = False) -> ChildReport:
    """Runs module.function(*arguments)'s second result in a fresh process, after its first; RuntimeError with the child's last lines.

    The heap gives large blocks back as soon as they are freed, so that memory kept for later does not hide a peak. That costs time, and
    more of it where more is allocated: for_time=True leaves the allocator as it is, and its peak is not to be used.
    """
    give_back = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    environment = os.environ | ({} if for_time else give_back)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    command = [sys.executable, "-m", "benchmarks.measure", module, function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{module}.{function}{arguments}: exit code {done.returncode}\n{done.stderr[-2000:]}"
        )
    return ChildReport(**json.loads(done.stdout.splitlines()[-1]))


def resident() -> dict[str, int]:
    """VmRSS, VmHWM, RssAnon, ... of this process, in bytes; empty where the system does not report them."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in fields}


def reset_peak() -> None:
    """Begin VmHWM anew, where the system reports it."""
    if _STATUS.exists():
        _CLEAR.write_text("5")


def ranks(count: int) -> list[dict[str, str]]:
    """The environment variables of each of `count` processes of one run on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    world = size | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def cpu_environment(threads: int) -> dict[str, str]:
    """The environment of a process that trains on the CPU with the code of this tree."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    own = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    return {**os.environ, "OMP_NUM_THREADS": str(threads), **own}


def _child(module: str, function: str, arguments: str) -> None:
    warm_up, run = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    warm_up()
    gc.collect()
    before = resident().get("VmRSS")
    reset_peak()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    run()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    difference = None if before is None else resident()["VmHWM"] - before
    print(json.dumps(ChildReport(difference, seconds, cpu_seconds)._asdict()))


# -------------------------------------------------------------------------------------------------------------- what ran, and results


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if _STATUS.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def hardware() -> Row:
    """The machine's hardware, without its host name. load_average: runnable processes over the last minute."""
    about: Row = {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
    return about


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    found = {"python": platform.python_version()}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in found:
        found["torch"] = torch.__version__  # names the build, which the package version need not
    return found


def write(path: Path, result: Any) -> None:
    """As JSON; the file is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


def records(run: Path, name: str) -> list[Row]:
    """The lines of a run folder's `metrics` or `timing`."""
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


class Results:
    """Rows of one benchmark, saved after every row, so that an interrupted run keeps them."""

    def __init__(self, benchmark: str, columns: Sequence[tuple[str, str, str]], path: Path | None) -> None:
        """columns: (key of a row, heading, format) of the printed table."""
        self.benchmark, self.columns, self.path = benchmark, columns, path
        self.about: Row = {}
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            made = {"hardware": hardware(), "versions": versions(), "rows": self.rows}
            write(self.path, {"benchmark": self.benchmark, **self.about, **made})

    def table(self) -> str:
        """The rows as text; skipped rows show the reason."""
        cells = [[heading for _, heading, _ in self.columns]]
        notes: dict[int, str] = {}
        for row in self.rows:
            if row.get("skipped"):
                notes[len(cells)] = f"  skipped: {row['skipped']}"
            cells.append(
                ["" if row.get(key) is None else format(row[key], spec) for key, _, spec in self.columns]
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        formats = [spec for _, _, spec in self.columns]
        lines = []
        for i, line in enumerate(cells):
            padded = (
                cell.ljust(w) if spec == "" else cell.rjust(w)
                for cell, w, spec in zip(line, widths, formats, strict=True)
            )
            lines.append("  ".join(padded).rstrip() + notes.get(i, ""))
        return "\n".join(lines)


if __name__ == "__main__":
    _child(*sys.argv[1:])
