"""The paper's five experiments as they are configured, two cycles each: a random model of Qwen3's architecture stands for the model, rows in the
data set's columns for the data set, a server in this process for the reflection model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")
pytest.importorskip("math_verify")
pytest.importorskip("reasoning_gym")
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import fst_fast
from fst_fast import cli
from fst_fast.config.load import load
from tests.fst_fast import families
from tests.fst_fast.hub import cached_data_set
from tests.fst_fast.test_reflectors import completion, serving
from tests.integration.launch import REPO, records

CONFIGS = REPO / "configs" / "paper"
# name -> data set on the Hub, its config, its splits with rows in its columns
DATA: dict[str, tuple[str, str | None, dict[str, list[dict[str, Any]]]]] = {
    "hover_hard": ("hover-nlp/hover", None, {split: [
        {"id": i, "uid": f"u{i}", "claim": f"Town {i} lies by the river of the poet who met Ada.", "label": i % 2, "num_hops": 2 + i % 3, "hpqa_id": "x",
         "supporting_facts": [{"key": title, "value": 0} for title in (f"Town {i}", "Ada (poet)", f"Town {i}")]} for i in range(30)
    ] for split in ("train", "validation")}),
    "physics": ("hicai-zju/SciKnowEval", "v2", {"test": [
        {"question": f"A mass of {i} kg is pulled with {2 * i} N. Its acceleration?", "choices": {"text": ["1", "2", "3", "4"], "label": list("ABCD")},
         "answerKey": "B" if i % 5 else "", "type": "mcq-4-choices" if i % 3 else "open-ended-qa", "domain": "Physics" if i % 4 else "Chemistry",
         "details": {"level": "L3", "task": "t", "subtask": "s", "source": "x"}, "prompt": {"default": "Choose."}, "answer": ""} for i in range(90)
    ]}),
    "math": ("POLARIS-Project/Polaris-Dataset-53K", None, {"train": [
        {"problem": f"Compute $\\frac{{{i}}}{{3}}$.", "answer": f"\\frac{{{i}}}{{3}}", "difficulty": f"{i % 8}/8"} for i in range(60)
    ]}),
}  # fmt: skip
SMALLER = {
    "codeio": {"train": 60, "validation": 12, "longest": 1500},
    "star_graph": {"arms": 3, "path": 3, "ids": 20, "train": 40, "validation": 8},
}
GOOD = "```\nName what is asked for, step by step.\n```"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = families.make("qwen3")
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=40960, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_dry_run_needs_neither_network_nor_data(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "# fast rollouts per cycle, at most: " in out
    assert out.endswith("# not looked at: the rows of data sets, the model, the endpoints\n")
    text = path.read_text()
    assert "supply" not in text
    config = load(path)
    assert config.model.path.startswith("Qwen/Qwen3-")
    assert config.fast.reflector_args["base_url"]
    assert path.stem in {*DATA, *SMALLER}


@pytest.mark.parametrize("name", ["hover_hard", *(
    pytest.param(name, marks=pytest.mark.long) for name in ("physics", "math", "codeio", "star_graph")
)])  # fmt: skip
def test_it_trains_two_cycles(
    name: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name in DATA:
        spec = cached_data_set(tmp_path, monkeypatch, *DATA[name])
        assert spec == load(CONFIGS / f"{name}.yaml").task
    small = [
        "--slow.steps=2", "--slow.problems_per_step=2", "--fast.cycle_steps=1", "--fast.anchor_size=2", "--fast.rollout_budget=24", "--fast.children=1",
        "--rollout.max_response_tokens=6", "--eval.every=0", "--eval.final_problems=2", "--eval.samples=1", "--eval.kl_problems=2", "--verify.workers=1",
        "--policy.zero_stage=0", f"--model.path={model}", *(f"--task_args.{key}={value}" for key, value in SMALLER.get(name, {}).items()),
    ]  # fmt: skip
    with serving(lambda number, body: completion(GOOD.replace("asked for", f"asked for {number}"))) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        small.append(f"--fast.reflector_args.base_url=http://127.0.0.1:{server.server_address[1]}/v1")
        config = load(CONFIGS / f"{name}.yaml", small)
        result = fst_fast.train(config, run_dir=tmp_path / "run")
    steps, cycles = records(tmp_path / "run", "step"), records(tmp_path / "run", "cycle")
    assert [record["step"] for record in steps] == [1, 2]
    assert [record["unjudged"] for record in steps] == [0, 0]
    assert len(cycles) == 2
    assert all(0 < cycle["fast_rollouts"] <= 24 for cycle in cycles)
    assert server.requests, "the reflection model was asked"
    asked = server.requests[0]["messages"][0]["content"]
    assert config.fast.seed_context in asked
    assert len(result.lineage) >= 2, "its contexts were scored"
    assert set(result.summary["channels"]) == {"neither", "context", "weights", "both"}
    assert all(math.isfinite(cell["mean"]) for cell in result.summary["channels"].values())
