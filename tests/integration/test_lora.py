"""Runs with LoRA: resumed after a kill, evaluated, exported."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

pytest.importorskip("peft")

from fst_fast.commands.evaluate import evaluate_run
from fst_fast.commands.export import export
from fst_fast.policy import lora
from fst_fast.state import State
from tests.integration.launch import REPO, one_thread, records
from tests.integration.test_train import command, run

LORA = ["--policy.lora.rank=4", "--slow.lr=1e-3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "whole"
    run(folder, *LORA)
    return folder


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        command(folder, *LORA), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPO, env=one_thread()
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 4/"):
                process.kill()
                break
    assert not (folder / "summary.json").exists()
    run(folder, "--resume", *LORA)
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_checkpoint_evaluates_exports_and_holds_no_second_copy_of_the_moments(
    whole: Path, tmp_path: Path
) -> None:
    reported = json.loads((whole / "summary.json").read_text())
    assert reported["kl_seed"] > 0
    measured = evaluate_run(whole)
    assert measured["channels"]["both"]["mean"] == pytest.approx(
        reported["channels"]["both"]["mean"], abs=1e-9
    )
    assert measured["kl_evolved"] == pytest.approx(reported["kl_evolved"], rel=1e-2, abs=1e-9)
    out = export(whole, tmp_path / "model")
    assert (out / lora.FOLDER / "adapter_config.json").is_file()
    assert not lora.has_adapters(AutoModelForCausalLM.from_pretrained(out))
    newest = sorted((whole / "checkpoints").glob("step-*"))[-1]
    assert State.load(newest / "state.json").step
    size = {
        n: sum(f.stat().st_size for f in (newest / n).rglob("*.safetensors"))
        for n in ("optimiser", "adapter")
    }
    assert size["optimiser"] < 3.2 * size["adapter"]
    assert [s for s in records(whole, "step") if s["grad_norm"] > 0]
