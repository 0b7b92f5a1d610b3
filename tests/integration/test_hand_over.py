"""Two processes sample what one does, whatever their shares, and notice weights that differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launch import REPO, one_thread

SCRIPT = str(REPO / "tests" / "integration" / "two_ranks.py")


def run(launcher: list[str], out: Path) -> Any:
    path = f"{REPO}{os.pathsep}{REPO / 'kernels'}"
    done = subprocess.run(
        [*launcher, SCRIPT, str(out)], capture_output=True, text=True, cwd=REPO, env={**one_thread(), "PYTHONPATH": path}, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_two_processes_sample_what_one_does_and_notice_weights_that_differ(tmp_path: Path) -> None:
    torchrun = str(Path(sys.executable).parent / "torchrun")
    [(alone, nothing)] = run([sys.executable], tmp_path / "one.json")
    two = run(
        [torchrun, "--nproc_per_node=2", f"--master_port={31700 + os.getpid() % 1000}"], tmp_path / "two.json"
    )
    assert [len(wave) for wave in alone] == [1, 7, 0]
    assert nothing == ""
    for waves, said in two:
        for mine, theirs in zip(waves, alone, strict=True):
            assert [(p, ids, reward) for p, ids, _, reward in mine] == [
                (p, ids, r) for p, ids, _, r in theirs
            ]
            for (_, _, a, _), (_, _, b, _) in zip(mine, theirs, strict=True):
                assert a == pytest.approx(b, abs=2e-5)
        assert said.startswith(
            "the processes hold different weights after the hand-over; checksums by rank: ["
        )


RELEASED = """
import json, sys
from fst_fast.config import Config
from fst_fast import distributed
from fst_fast.policy.trained import TrainedPolicy, checksum, load

distributed.init()
config = Config.model_validate({"policy": {"zero_stage": int(sys.argv[1]), "lora": json.loads(sys.argv[2])}})
base = load(config)
policy = TrainedPolicy(config, base)

def held(model=policy.rollout_model):
    return sum(p.numel() for p in model.parameters()), checksum(model)

policy.hand_over()
found = [held()]
policy.release()
found += [held(), held(base)]
policy.hand_over()
found.append(held())
print(json.dumps(found))
"""


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("lora", ["null", '{"rank": 2}'])
def test_the_replica_has_no_memory_while_a_step_is_computed(stage: int, lora: str) -> None:
    """Under ZeRO-3, and of its trained weights, that is. Without it what samples is what is trained, and stays."""
    path = f"{REPO}{os.pathsep}{REPO / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", RELEASED, str(stage), lora], capture_output=True, text=True, cwd=REPO, env={**one_thread(), "PYTHONPATH": path}, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    before, released, base, after = json.loads(done.stdout.splitlines()[-1])
    assert after == before
    if stage == 0:
        assert released == before
    elif lora == "null":
        assert released == [0, 0.0]
    else:  # the adapters go; the weights beside them are the reference's
        assert before[0] > base[0] == released[0] > 0
    assert base[1] != 0
