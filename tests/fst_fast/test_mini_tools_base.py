"""The shipped base `mini_tools`, which calls a tool as its context says, and the configuration that trains it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fst_fast import mini
from fst_fast.config import load
from fst_fast.config.components import components_of
from fst_fast.mini import world
from fst_fast.mini.build import mini_task
from fst_fast.mini.evaluate import measure_contexts
from fst_fast.mini.tokenizer import make_tokenizer
from tests.fst_fast.agents import tokenizer_of

KIND: world.Kind = "hidden_facts"


def test_both_shipped_bases_together_stay_small_and_say_how_they_were_built() -> None:
    tokenizer = make_tokenizer(tools=True)
    folders = [mini.path(base) for base in mini.BASES]
    assert sum(f.stat().st_size for folder in folders for f in folder.iterdir()) <= 3 * 2**20
    record = json.loads((mini.path("mini_tools") / "build.json").read_text())
    assert {"seed", "steps", "threads", "torch", "scores_at_temperature_1"} <= set(record)
    shipped = AutoTokenizer.from_pretrained(mini.path("mini_tools"))
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template


def test_the_tokenizers_of_the_bases_are_known_and_no_others() -> None:
    assert all(mini.speaks(AutoTokenizer.from_pretrained(mini.path(base))) for base in mini.BASES)
    assert not any(mini.speaks(tokenizer_of(name)) for name in ("qwen", "llama"))


def test_no_component_suffices_alone_and_all_of_them_do_better() -> None:
    folder = mini.path("mini_tools")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = ("seed", "method", "box", "check", "method+box", "all", "all in one text", "all+twist")
    measured = world.measured_contexts(KIND)
    scores = measure_contexts(
        model,
        AutoTokenizer.from_pretrained(folder),
        mini_task(KIND),
        {name: measured[name] for name in names},
        problems=128,
        seed=0,
    )
    mean = {name: score["mean"] for name, score in scores.items()}
    assert mean["seed"] <= 0.08
    assert 0.3 <= mean["all"] <= 0.65
    assert 0.3 <= mean["all in one text"] <= 0.65
    assert max(mean[role] for role in ("method", "box", "check")) < 0.5 * mean["all"]
    assert mean["method+box"] < 0.85 * mean["all"]
    assert mean["all+twist"] < 0.4 * mean["all"]


def test_the_configuration_starts_from_the_seed_components() -> None:
    config = load.load(Path(mini.__file__).parent / "hidden_facts.yaml")
    assert components_of(config.fast.seed_context) == world.TOOL_SEED
    assert world.measured_contexts(KIND)["seed"] == config.fast.seed_context
