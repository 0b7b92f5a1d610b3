"""What the model answers under one context: a few problems, sampled and judged as in training, as text for a person.

The quickest look at a new task, grader or context before anything is trained on it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.text import Text

from fst_fast.config import Config
from fst_fast.contracts import Context, RolloutRequest
from fst_fast.errors import UserError
from fst_fast.policy.base_model import pin
from fst_fast.policy.trained import load
from fst_fast.rollout.prompt import messages_with_context
from fst_fast.rollout.sampler import Sampler
from fst_fast.rollout.template import configured_chat
from fst_fast.tasks.environments import has_turns
from fst_fast.tasks.registry import load_task, task_spec

COLOURS = {"special": "bold red", "template": "dim", "system": "cyan", "user": "green", "assistant": "yellow"}


def probe(config: Config, *, context: str | None, problems: int, samples: int, split: str) -> Iterator[str]:
    """The report, line by line. context: None means fast.seed_context. Raises UserError."""
    phi = Context.of(config.fast.seed_context if context is None else context)
    chosen = list(load_task(*task_spec(config)).problems(split)[:problems])
    if not chosen:
        raise UserError(f"--split {split} of task {config.task} has no problems")
    notes: list[str] = []
    config = pin(config, notes.append)
    with Sampler.open(config) as sampler:
        sampled = sampler.local(
            sampler.engine(load(config)),
            [RolloutRequest(phi, problem, sample) for problem in chosen for sample in range(samples)],
            stream=(config.seed, "probe"),
            policy_version=0,
            temperature=config.rollout.temperature,
        )
    yield from (*notes, sampler.template.line, *sampler.template.warnings)
    answers = iter(sampled)
    for problem in chosen:
        yield f"problem {problem.id}"
        yield _block("prompt", sampler.tokenizer.decode(sampler.prompts.ids(phi, problem)))
        for _ in range(samples):
            answer = next(answers)
            reward = "not judged" if answer.verdict.reward is None else f"reward {answer.verdict.reward:g}"
            rollout = answer.rollout
            yield f"  sample {rollout.sample}: {reward}, {len(rollout.response_ids)} tokens, finish {rollout.finish}"
            yield _block("response", answer.response)
            if answer.verdict.feedback:
                yield _block("feedback", answer.verdict.feedback)
    rewards = [s.verdict.reward for s in sampled if s.verdict.reward is not None]
    mean = f"{sum(rewards) / len(rewards):.3f}" if rewards else "none"
    yield f"context {phi.id} {phi.text!r}: mean reward {mean} over {len(rewards)} of {len(sampled)} rollouts"


def show_prompts(config: Config, *, context: str | None, problems: int, split: str) -> Iterator[Text]:
    """What the check of the chat template found, then a line for every token of the problems' prompts: id, whose text it is, its characters.
    context: None means fast.seed_context. Raises UserError."""
    phi = Context.of(config.fast.seed_context if context is None else context)
    task = load_task(*task_spec(config))
    if has_turns(task) or config.fast.components:
        raise UserError(
            f"task {config.task}: the tokens of prompts are shown for tasks of one turn and contexts of one text; without --template fst probe "
            "plays episodes and shows their text"
        )
    chosen = list(task.problems(split)[:problems])
    if not chosen:
        raise UserError(f"--split {split} of task {config.task} has no problems")
    chat, findings = configured_chat(pin(config).model)
    yield Text(findings.line)
    for warning in findings.warnings:
        yield Text(warning, style="bold red")
    for problem in chosen:
        pieces = chat.pieces(messages_with_context(phi, problem, chat.system))
        yield Text(f"problem {problem.id}: {len(pieces)} tokens", style="bold")
        for number, characters, whose in pieces:
            yield Text(f"{number:>8}  {whose:<9}  {characters!r}", style=COLOURS.get(whose, "magenta"))


def _block(name: str, text: str) -> str:
    return textwrap.indent(f"{name}: {text}", "    ")
