"""Whole runs on a vLLM server that they start: the fake one, or with FST_VLLM=PATH (`make vllm`) a real one on this CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fst_fast import fake_vllm
from tests.integration.launch import REPO, one_thread, records

REAL = os.environ.get("FST_VLLM")
FOLDER = tempfile.mkdtemp(prefix="fst-")  # of the sockets, by which the servers of this module are known
SERVER = {
    "folder": FOLDER,
    "command": [REAL] if REAL else [sys.executable, fake_vllm.__file__],
    "args": ["--enforce-eager"],
    "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
}
CONFIG: dict[str, Any] = {
    "task": "list_programs",
    "slow": {"steps": 3, "problems_per_step": 2, "group_size": 4, "lr": 1e-3, "warmup_steps": 0},
    "fast": {
        "population": 2, "cycle_steps": 3, "anchor_size": 2, "children": 1, "samples": 1, "rollout_budget": 8,
        "seed_context": "write the list after each operation . put the final answer in the box .",
    },
    "eval": {"every": 0, "problems": 2, "final_problems": 2, "samples": 1, "kl_problems": 1},
    "checkpoint": {"every": 1},
    "rollout": {"max_response_tokens": 40, "backend": "vllm", "backend_args": SERVER},
}  # fmt: skip


EPISODES: dict[str, Any] = {
    **CONFIG,
    "task": "hidden_facts",
    "task_args": {"level": "easy"},
    "model": {"path": "mini_tools"},
    "slow": {**CONFIG["slow"], "steps": 2},
    "fast": {
        "population": 2, "cycle_steps": 2, "anchor_size": 2, "children": 1, "samples": 1, "rollout_budget": 8, "reflector": "mini",
        "components": {  # with which the base calls the tool
            "system": "solve the problem . put the final answer in the box .",
            "protocol": "work in turns . ask again until you have the city .",
            "tool:lookup": "look up a fact . call the tool for every fact .",
        },
    },
    "rollout": {**CONFIG["rollout"], "max_response_tokens": 24, "max_turns": 4, "max_episode_tokens": 384},
}  # fmt: skip


def run(
    folder: Path,
    *,
    config: dict[str, Any] = CONFIG,
    resume: bool = False,
    kill_after: int = 0,
    fault: str = "",
    ahead: int = 0,
) -> subprocess.CompletedProcess[str]:
    config = {**config, "rollout": {**config["rollout"], "ahead": ahead}}
    script = [sys.executable, str(Path(__file__).with_name("vllm_run.py")), str(folder), json.dumps(config)]
    path = os.pathsep.join([str(REPO), str(REPO / "kernels")])
    env = {**one_thread(), "PYTHONPATH": path, **({"FST_FAULT": fault} if fault else {})}
    return subprocess.run(
        [*script, "resume" if resume else "new", str(kill_after)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )


def servers() -> list[psutil.Process]:
    """The servers of this module's runs that are there."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if (
            "serve" in words
            and any(w.startswith(f"--uds={FOLDER}") for w in words)
            and process.status() != psutil.STATUS_ZOMBIE
        ):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_what_the_server_samples_has_the_trainers_log_probs_at_every_step(whole: Path) -> None:
    steps = records(whole, "step")
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert steps[0]["reused_rollouts"] > 0
    assert any(s["grad_norm"] > 0 for s in steps)
    for step in steps:
        assert step["probe_mismatch"] < 1e-4
        assert step["server_restarts"] == 0
    assert steps[0]["mismatch_kl"] is None or abs(steps[0]["mismatch_kl"]) < 1e-6, (
        "sampled by these very weights"
    )
    (final,) = records(whole, "eval")
    assert set(final["channels"]) == {"neither", "context", "weights", "both"}
    assert final["kl_seed"] > 0
    assert (whole / "vllm.log").is_file()
    assert not servers()


def test_every_turn_of_an_episode_is_sampled_by_the_server_and_trained_on(tmp_path: Path) -> None:
    done = run(tmp_path / "run", config=EPISODES)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = records(tmp_path / "run", "step")
    assert [s["step"] for s in steps] == [1, 2]
    assert max(s["turns"] for s in steps) > 1
    assert max(s["observed_tokens"] for s in steps) > 0
    assert any(s["grad_norm"] > 0 for s in steps)
    assert all(s["probe_mismatch"] < 1e-4 for s in steps)
    assert abs(steps[0]["mismatch_kl"]) < 1e-6, "all its rollouts were sampled by these very weights"
    assert not servers()


@pytest.mark.chaos
def test_a_server_and_a_run_that_are_killed_lose_nothing(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = run(folder, kill_after=1, fault="hand_over:2")
    assert first.returncode == -9, first.stderr[-3000:]
    until = time.monotonic() + 20
    while servers() and time.monotonic() < until:
        time.sleep(0.1)
    assert not servers(), "a server outlives its run"
    assert records(folder, "step")[-1]["step"] == 1
    second = run(folder, resume=True, kill_after=2)
    assert second.returncode == 0, second.stderr[-3000:]
    steps = records(folder, "step")
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert steps[-1]["server_restarts"] == 1
    if (
        not REAL
    ):  # the fake gives the same sample to the same request every time; of the real one that is not promised
        for name in ("reward", "loss", "grad_norm"):
            assert [s[name] for s in steps] == [s[name] for s in records(whole, "step")]


def test_ahead_each_step_trains_on_what_the_weights_before_sampled_also_after_kill_9(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = run(folder, fault="hand_over:2", ahead=1)
    assert first.returncode == -9, first.stderr[-3000:]
    second = run(folder, resume=True, ahead=1)
    assert second.returncode == 0, second.stderr[-3000:]
    steps = records(folder, "step")
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert steps[0]["rollout_staleness"] == 0
    assert all(
        s["rollout_staleness"] >= 1 for s in steps[1:]
    )  # more where rollouts of the fast phase are reused
    assert any(s["grad_norm"] for s in steps)
    probes = [s["probe_mismatch"] for s in steps if s["probe_mismatch"] is not None]
    assert probes  # None: no weights were sent since the step before
    assert max(probes) < 1e-4
    assert not servers()


@pytest.mark.chaos
def test_a_server_that_cannot_start_is_one_sentence_with_its_last_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if REAL:
        monkeypatch.setitem(SERVER, "env", {"VLLM_CPU_KVCACHE_SPACE": "0.000001"})
    else:
        (tmp_path / "fault").write_text("no memory")
        monkeypatch.setitem(SERVER, "env", {"FAKE_VLLM_FAULT": str(tmp_path / "fault")})
    done = run(tmp_path / "run")
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert "refused: rollout.backend=vllm: the server did not start; " in said
    assert "Error: " in said
    assert not servers()
