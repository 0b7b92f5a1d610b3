"""Options of the benchmarks that run under pytest: `python -m pytest benchmarks/NAME.py [--size ...] [--rounds N] [--out FOLDER]`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure import Results, device

_RESULTS = pytest.StashKey[list[Results]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of fst_kernels")
    group.addoption(
        "--size", help="sizes as comma-separated integers, in the order that the benchmark's file states"
    )
    group.addoption("--rounds", type=int, help="timed rounds of each case")
    group.addoption("--threads", type=int, help="CPU threads")
    group.addoption(
        "--out", type=Path, metavar="FOLDER", help="write FOLDER/NAME_cpu.json or FOLDER/NAME_cuda.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = []
    config.option.benchmark_quiet = True  # the table at the end is more detailed
    threads = config.getoption("--threads")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # also for the child processes that measure memory


def chosen_size(given: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """Parse --size, which must have as many numbers as the default."""
    if given is None:
        return default
    try:
        chosen = tuple(int(x) for x in given.split(","))
    except ValueError:
        chosen = ()
    if len(chosen) != len(default) or min(chosen) < 1:
        example = ",".join(map(str, default))
        raise pytest.UsageError(f"--size={given}; allowed: {len(default)} integers >= 1, such as {example}")
    return chosen


@pytest.fixture(scope="module")
def size(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """--size, or the benchmark's DEFAULT_SIZE for this device."""
    return chosen_size(request.config.getoption("--size"), request.module.DEFAULT_SIZE[device().type])


@pytest.fixture(scope="module")
def rounds(request: pytest.FixtureRequest) -> int:
    given: int | None = request.config.getoption("--rounds")
    return (10 if device().type == "cuda" else 3) if given is None else given


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, size: tuple[int, ...]) -> Results:
    """The results table of this benchmark: its COLUMNS, and a JSON file if --out is given."""
    config, name = request.config, Path(request.module.__file__).stem
    folder: Path | None = config.getoption("--out")
    path = None if folder is None else folder.resolve() / f"{name}_{device().type}.json"
    found = Results(name, request.module.COLUMNS, path)
    found.about = {"command": _command(config), "size": list(size)}
    config.stash[_RESULTS].append(found)
    return found


def _command(config: pytest.Config) -> str:
    """The pytest command line without --out, which does not affect the measurement."""
    given: list[str] = []
    arguments = iter(config.invocation_params.args)
    for argument in arguments:
        if argument in ("--out", "-p"):
            next(arguments, None)
        elif not argument.startswith("--out=") and argument not in ("-q", "-s", "-v"):
            given.append(argument)
    return "python -m pytest " + shlex.join(given)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for results in config.stash[_RESULTS]:
        terminalreporter.section(f"{results.benchmark} {results.about['size']}")
        terminalreporter.write_line(results.table())
        if results.path is not None:
            terminalreporter.write_line(f"written to {results.path.name}")
