"""The model card of an exported run, README.md as the Hugging Face Hub shows it: rewards, contexts, how to use them, what made the weights."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fst_fast import __version__
from fst_fast.config import Config
from fst_fast.contracts import CELLS
from fst_fast.rollout.prompt import System
from fst_fast.run.metrics import METRICS
from fst_fast.state import State

CONFIG = "fst_config.yaml"
PROMPTS = {
    "system": '[{"role": "system", "content": context}, {"role": "user", "content": question}]',
    "user": '[{"role": "user", "content": f"{context}\\n\\n{question}"}]',
}


def model_card(
    config: Config, state: State, run_dir: Path, *, system: System, usage: str, versions: Mapping[str, str]
) -> str:
    """The text. system, usage: where a context goes. versions: of the packages that wrote the checkpoint."""
    population = Counter(context.text for context in state.population)
    return "\n".join(
        [
            *_front_matter(config),
            "",
            f"# {re.sub(r'[^ -~]|[`<>#*_]', ' ', run_dir.resolve().name)}",
            "",
            f"Trained by Fast-Slow Training ([arXiv 2605.12484](https://arxiv.org/abs/2605.12484)) with fst-fast {__version__}: method `{config.method}`, "
            f"task {_code(config.task)}, step {state.step} of {config.slow.steps}. The weights go with the contexts below: {usage}.",
            "",
            "## Reward",
            "",
            *_cells(last_evaluation(run_dir, state.step), config),
            "",
            "## Contexts",
            "",
            "The population, the best first.",
            "",
            *(line for text, places in population.items() for line in (*_times(places), *_fenced(text), "")),
            "The evolution began with",
            "",
            *_fenced(config.fast.seed_context),
            "",
            "## Use",
            "",
            *_fenced(_program(system), "python"),
            "",
            "## How it was made",
            "",
            *_fenced(f"fst train {CONFIG} --run-dir runs/again", "bash"),
            "",
            f"- base model: {_base(config)}; SHA-256 of its files `{state.base_weights or 'unknown'}`",
            f"- seed {config.seed}; {state.counters.rollouts:,} rollouts, of which {state.counters.fast_rollouts:,} scored contexts",
            f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items()) or 'unknown'}",
            "",
        ]
    )


def last_evaluation(run_dir: Path, step: int) -> dict[str, Any] | None:
    """The newest evaluation of a run up to `step`, as metrics.jsonl has it; None where there is none."""
    found = None
    with contextlib.suppress(FileNotFoundError), open(run_dir / METRICS, encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):  # a line that is being written
                record = json.loads(line)
                if record["kind"] == "eval" and record["step"] <= step:
                    found = record
    return found


def _front_matter(config: Config) -> Iterator[str]:
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation")
    if config.model.revision:  # a model of the Hub
        yield f"base_model: {'/'.join(config.model.path.split('/')[:2])}"
    yield from ("tags:", "- fst-fast", "- fast-slow-training", "- reinforcement-learning", "---")


def _cells(evaluation: dict[str, Any] | None, config: Config) -> Iterator[str]:
    if evaluation is None:
        yield "Not measured yet."
        return
    k = evaluation["k"]
    yield (
        f"Mean reward over {k} samples of each validation problem ± standard error, at step {evaluation['step']}, temperature "
        f"{config.eval.temperature:g}, top-p {config.eval.top_p:g}."
    )
    yield from ("", f"| | mean@{k} | pass@{k} | problems |", "|---|---|---|---|")
    for name, label in CELLS.items():
        cell = evaluation["channels"].get(name)
        figures = "not measured | | |"
        if cell and cell["n"]:
            stderr = "" if cell["stderr"] is None else f" ± {100 * cell['stderr']:.1f}"
            figures = f"{100 * cell['mean']:.1f}{stderr} % | {100 * cell['pass_at_k']:.1f} % | {cell['n']} |"
        yield f"| {name}: {label} | {figures}"


def _program(system: System) -> str:
    return f"""import json
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = snapshot_download("THIS_REPOSITORY")  # or the folder that holds this file
context = json.loads(Path(folder, "contexts.json").read_text())["population"][0]["text"]
question = "..."
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
messages = {PROMPTS[system]}
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))"""


def _base(config: Config) -> str:
    if config.model.revision:
        return f"{_code(config.model.path)} of the Hugging Face Hub, commit `{config.model.revision}`"
    return _code(Path(config.model.path).name)


def _times(places: int) -> list[str]:
    return [f"In {places} places of the population:", ""] if places > 1 else []


def _fenced(text: str, language: str = "text") -> list[str]:
    """A block of code whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text, fence]


def _code(text: str) -> str:
    return f"`{re.sub(r'[`|]|[^ -~]', ' ', text)}`"
