"""The mini world: base models of 0.8M and 0.5M parameters shipped with the package, so that the whole method runs on a laptop in minutes.

world.py       the law: which sentences of a context change how a problem is answered
tokenizer.py   the word-level tokenizer with its chat template
documents/     training documents generated from the law
build.py       trains the base model from scratch (`fst base build`)
evaluate.py    mean reward under given contexts
data/          the shipped base model, a Hugging Face folder; data_tools/ the one for hidden_facts, whose chat template has tools
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BASES = {"mini": "data", "mini_tools": "data_tools"}
"""The shipped base models by the name that `model.path` gives them: their folders."""


def path(base: str = "mini") -> Path:
    """The folder of a shipped base model, for AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained."""
    return Path(__file__).parent / BASES[base]


def speaks(tokenizer: Any) -> bool:
    """Whether this is the tokenizer of a shipped base, whatever its weights have learnt since."""
    words = [json.loads((path(base) / "tokenizer.json").read_text())["model"]["vocab"] for base in BASES]
    vocabulary = tokenizer.get_vocab()
    return any(known.keys() <= vocabulary.keys() for known in words)


def default_config() -> Path:
    """The configuration of the mini star graph, shipped with the package (in a clone a symlink to
    configs/mini/star_graph.yaml)."""
    return Path(__file__).parent / "star_graph.yaml"
