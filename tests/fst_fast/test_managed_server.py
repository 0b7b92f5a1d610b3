"""A vLLM server that the run starts, as processes: killed while it samples, hanging, brought back with the weights it had."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from torch import nn

from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.policy.trained import load
from fst_fast.rollout import vllm_client
from fst_fast.rollout.vllm_args import vllm_args
from fst_fast.rollout.vllm_hosts import Hosts, Weights
from tests.fst_fast import fake_vllm
from tests.fst_fast.test_vllm import PROMPT, config, engine, generate, moved


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    settings = config(
        args={
            "command": [sys.executable, fake_vllm.__file__],
            "env": {"FAKE_VLLM_FAULT": str(tmp_path / "fault")},
            "retries": 0,
            "folder": str(tmp_path),
        }
    )
    made = Hosts(vllm_args(settings), settings, longest=320, probe_ids=PROMPT, pad_id=0, note=lambda _: None)
    made.enter(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return load(Config())


def server_of(hosts: Hosts) -> psutil.Process:
    assert hosts.managed is not None
    return next(
        p
        for p in psutil.Process().children(recursive=True)
        if f"--uds={hosts.managed.socket}" in p.cmdline() and "fst_fast.verify.attached" not in p.cmdline()
    )


@pytest.mark.parametrize("how", ["dies", pytest.param("hangs", marks=pytest.mark.chaos)])
def test_a_server_that_dies_in_a_wave_or_hangs_is_restarted_with_its_weights(
    base: nn.Module, hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    sampling = engine(hosts, moved(base))
    undisturbed = generate(sampling, 3)
    if how == "dies":
        (tmp_path / "fault").write_text("exit")
    else:
        os.kill(server_of(hosts).pid, signal.SIGSTOP)
        monkeypatch.setattr(vllm_client, "CONNECT_S", 0.5)
        client = hosts.clients[0]._client
        client.timeout = 0.5
        hosts.note = lambda _: setattr(
            client, "timeout", 60.0
        )  # told of the restart: what follows may take its time
    again = generate(sampling, 3)
    assert hosts.generation == 1
    assert [r.response_ids.tolist() for r in again] == [r.response_ids.tolist() for r in undisturbed]
    assert hosts.mismatch is not None
    assert hosts.mismatch < 1e-5


def test_the_log_of_a_server_says_why_it_does_not_come_up(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "fault").write_text("no memory")
    with pytest.raises(
        UserError,
        match=r"did not start; .*vllm\.log says: ValueError: No available memory for the cache blocks",
    ):
        hosts.prepare(Weights(nn.Module(), None))
    assert hosts.managed is not None
    assert not hosts.managed.has_ended()


def test_of_a_log_the_error_of_the_engine_is_shown_not_a_warning_and_not_what_followed_from_it(
    hosts: Hosts,
) -> None:
    assert hosts.managed is not None
    hosts.managed.log.write_text(
        "(APIServer pid=1) WARNING 11-30 [x.py:1] `OSError: [Errno 24] Too many open files`. Consider increasing with ulimit -n\n"
        "(EngineCore pid=2) ERROR 11-30 [core.py:9] ValueError: No available memory for the cache blocks.\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n"
        "(APIServer pid=1) WARNING 11-30 [x.py:2] AnotherError: nothing\n"
        + 10_000
        * "(APIServer pid=1) ERROR 11-30 [x.py:3] EngineDeadError: EngineCore encountered an issue. See stack trace (above)\n"
    )
    assert hosts.managed.last_words().endswith("says: ValueError: No available memory for the cache blocks.")
    hosts.managed.log.write_text("")
    assert hosts.managed.last_words() == f"see {hosts.managed.log}"
