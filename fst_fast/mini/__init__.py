"""The mini world: a base model of 0.8M parameters shipped with the package, so that the whole method runs on a laptop in minutes.

world.py       the law: which sentences of a context change how a problem is answered
tokenizer.py   the word-level tokenizer with its chat template
documents/     training documents generated from the law
build.py       trains the base model from scratch (`fst base build`)
evaluate.py    mean reward under given contexts
data/          the shipped base model, a Hugging Face folder
"""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder of the shipped base model, for AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained."""
    return Path(__file__).parent / "data"


def default_config() -> Path:
    """The configuration of the mini star graph, shipped with the package (in a clone a symlink to
    configs/mini/star_graph.yaml)."""
    return Path(__file__).parent / "star_graph.yaml"
