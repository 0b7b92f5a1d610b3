"""Mean reward of a model under given contexts, by plain transformers generation. Used for builds and their tests, not for training."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fst_fast.config.components import components_of, system_text
from fst_fast.contracts import EpisodeState, Message, Problem, Verdict
from fst_fast.tasks.environments import is_environment
from fst_fast.tasks.tools.calls import CallError, read_calls
from fst_fast.tasks.tools.functions import Tool, ToolError

TURNS = 5


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    context: str,
    *,
    seed: int,
    temperature: float = 1.0,
) -> list[str]:
    """Sample one response per problem under the context. Seeds torch's global generator."""
    system = [{"role": "system", "content": context}]
    torch.manual_seed(seed)
    return _sample(model, tokenizer, [[*system, *p.messages] for p in problems], temperature=temperature)


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Message]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 40,
) -> list[str]:
    prompts = [
        tokenizer.apply_chat_template(
            list(chat), tools=list(tools) or None, add_generation_prompt=True, tokenize=False
        )
        for chat in chats
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output: Any = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
    )
    sampled = output[:, batch["input_ids"].shape[1] :]  # [B, T]
    return [str(text) for text in tokenizer.batch_decode(sampled, skip_special_tokens=True)]


def play_episodes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    problems: Sequence[Problem],
    context: str,
    *,
    seed: int,
) -> list[Verdict]:
    """Play one episode of an environment with tools per problem, of at most TURNS turns. context: one text, or one of components.
    Seeds torch's global generator."""
    parts = components_of(context)
    said = system_text(parts) if parts else context
    states, verdicts = [], [Verdict(0.0, "too many turns")] * len(problems)
    for problem in problems:
        messages, functions, memory = task.start(problem)
        states.append(EpisodeState(problem, seed, [*messages], memory, "hermes"))
    tools = {tool.name: tool for tool in map(Tool.of, functions)}
    schemas = [tool.schema for tool in tools.values()]
    for schema in schemas:
        function = schema["function"]
        function["description"] = parts.get(f"tool:{function['name']}", function["description"])
    torch.manual_seed(seed)
    live = list(range(len(problems)))
    for _ in range(TURNS):
        chats = [[{"role": "system", "content": said}, *states[i].messages] for i in live]
        for i, response in zip(list(live), _sample(model, tokenizer, chats, schemas), strict=True):
            states[i].messages.append({"role": "assistant", "content": response})
            results = _called(response, tools, states[i])
            states[i].messages += [{"role": "tool", "content": text} for text in results]
            if not results:
                verdicts[i] = task.step(states[i], response)
                live.remove(i)
        if not live:
            break
    return verdicts


def _called(response: str, tools: Mapping[str, Tool], state: EpisodeState) -> list[str]:
    """The results of the tools that a response calls."""
    try:
        calls = read_calls(response, state.tool_calls)
        return [asyncio.run(tools[call.name].call(call.arguments, state)) for call in calls]
    except (CallError, ToolError, KeyError) as error:
        return [f"error: {error}"]


def measure_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    contexts: Mapping[str, str],
    *,
    problems: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """For each named context: mean reward at temperature 1 on the first validation problems, its standard error, and mean metrics."""
    chosen = list(task.problems("validation")[:problems])
    scores: dict[str, dict[str, Any]] = {}
    for name, context in contexts.items():
        if is_environment(task):
            verdicts = play_episodes(model, tokenizer, task, chosen, context, seed=seed)
        else:
            responses = sample_responses(model, tokenizer, chosen, context, seed=seed)
            verdicts = [task.verify(p, r) for p, r in zip(chosen, responses, strict=True)]
        rewards = np.array([v.reward for v in verdicts], dtype=float)
        scores[name] = {
            "context": context,
            "mean": round(float(rewards.mean()), 4),
            "stderr": round(float(rewards.std() / np.sqrt(len(rewards))), 4),
            **{
                k: round(float(np.mean([v.metrics.get(k, 0.0) for v in verdicts])), 4)
                for k in verdicts[0].metrics
            },
        }
    return scores
