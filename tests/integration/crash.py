"""Runs as children of a process that has already loaded torch and DeepSpeed: a run that is killed and continued costs seconds."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.integration.launch import REPO, one_thread

SMALL = [
    "--slow.steps=4", "--slow.problems_per_step=2", "--slow.group_size=4", "--slow.lr=1e-3", "--slow.warmup_steps=0",
    "--fast.population=2", "--fast.cycle_steps=2", "--fast.anchor_size=2", "--fast.children=2", "--fast.samples=1",
    "--fast.rollout_budget=16", "--eval.every=2", "--eval.problems=2", "--eval.final_problems=2", "--eval.samples=1",
    "--eval.kl_problems=1", "--checkpoint.every=1",
]  # fmt: skip
TINY = [
    *SMALL, "--task=list_programs", "--rollout.max_response_tokens=40",
    "--fast.seed_context=write the list after each operation . put the final answer in the box .",
]  # fmt: skip
LAST = ("checkpoints", "step-000004", "model", "model.safetensors")

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["tests.integration.preload"])


def train(
    run_dir: Path, *more: str, fault: str = "", hook: Callable[[], None] | None = None
) -> tuple[int, str]:
    """One run of `fst train` in a process of its own: its exit code (-9: killed) and what it printed."""
    child, printed = start(run_dir, *more, fault=fault, hook=hook)
    child.join()
    assert child.exitcode is not None
    return child.exitcode, printed.read_text()


def train_two(
    run_dir: Path, *more: str, fault: str = "", limit_s: float = 120.0, hook: Callable[[], None] | None = None
) -> tuple[list[int], str]:
    """The same on two processes. As launchers do, a process is ended where it outlives by `limit_s` one that failed (exit code -9)."""
    started = start_two(run_dir, *more, fault=fault, hook=hook)
    children = [child for child, _ in started]
    multiprocessing.connection.wait([child.sentinel for child in children])
    until = time.monotonic() + limit_s if any(child.exitcode for child in children) else None
    for child in children:
        child.join(None if until is None else max(until - time.monotonic(), 0.0))
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode or 0 for child in children], "".join(p.read_text() for _, p in started)


def start_two(
    run_dir: Path, *more: str, fault: str = "", hook: Callable[[], None] | None = None
) -> list[tuple[Any, Path]]:
    """A started run on two processes: each with the file that gets what it prints."""
    return start_group(2, run_dir, _fst, _argv(run_dir, more), env={"FST_FAULT": fault}, hook=hook)


def start_group(
    processes: int,
    printed: Path,
    function: Callable[..., None],
    *arguments: Any,
    env: dict[str, str] | None = None,
    hook: Callable[[], None] | None = None,
) -> list[tuple[Any, Path]]:
    """`function(*arguments)` in processes that know each other, as under a launcher: each with PRINTED.RANK.out, which gets what it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        out = printed.with_name(f"{printed.name}.{rank}.out")
        rendezvous = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        started.append((_started(function, arguments, {**rendezvous, **(env or {})}, out, hook), out))
    return started


def start(
    run_dir: Path, *more: str, fault: str = "", hook: Callable[[], None] | None = None
) -> tuple[Any, Path]:
    """A started run, and the file that gets what it prints. hook: called in its process first, to break something."""
    printed = run_dir.with_name(f"{run_dir.name}.out")
    return _started(_fst, (_argv(run_dir, more),), {"FST_FAULT": fault}, printed, hook), printed


def fst(
    *argv: str, printed: Path, fault: str = "", hook: Callable[[], None] | None = None
) -> tuple[int, str]:
    """One command of `fst`: its exit code and what it printed."""
    child = _started(_fst, (list(argv),), {"FST_FAULT": fault}, printed, hook)
    child.join()
    assert child.exitcode is not None
    return child.exitcode, printed.read_text()


def _argv(run_dir: Path, more: Sequence[str]) -> list[str]:
    return ["train", "--run-dir", str(run_dir), *TINY, *more]


def _fst(argv: list[str]) -> None:
    from fst_fast.cli import main

    sys.exit(main(argv))


def _started(
    function: Callable[..., None], arguments: Sequence[Any], env: dict[str, str], printed: Path, hook: Callable[[], None] | None
) -> Any:  # fmt: skip
    printed.write_text("")
    child = _forkserver.Process(target=_main, args=(function, arguments, env, printed, hook))
    child.start()
    return child


def _main(
    function: Callable[..., None], arguments: Sequence[Any], env: dict[str, str], printed: Path, hook: Callable[[], None] | None
) -> None:  # fmt: skip
    with open(printed, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(REPO)
    os.environ |= {**one_thread(), **env}
    if hook is not None:
        hook()
    function(*arguments)


def until(child: Any, condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; the child must not end before."""
    while not condition():
        assert child.is_alive(), "the run ended too early"
        child.join(0.02)


def same(run_dir: Path, unbroken: Path, *, but_for: str = "") -> None:
    """The two runs have written the same metrics, rollouts, contexts, problems and weights, byte for byte, and both have ended. but_for: a
    field of the metrics that may differ."""
    assert (run_dir / "summary.json").is_file()
    one, other = (
        re.sub(rf'"{but_for}": "\w+"', "", (folder / "metrics.jsonl").read_text()) if but_for
        else (folder / "metrics.jsonl").read_text()
        for folder in (run_dir, unbroken)
    )  # fmt: skip
    assert one == other
    for name in ("rollouts.jsonl", "contexts.json", "problems.json"):
        kept = [f.read_bytes() if f.exists() else None for f in (run_dir / name, unbroken / name)]
        assert kept[0] == kept[1], name
    assert run_dir.joinpath(*LAST).read_bytes() == unbroken.joinpath(*LAST).read_bytes()
