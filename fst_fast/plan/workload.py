"""The tokens of one step on one process: what it samples, what it trains on, and how that is cut into micro-batches.

How long contexts, problems and responses will be, nobody knows before a run: `Assumed` states it. Response lengths are drawn from a log-normal
distribution, cut at rollout.max_response_tokens, by a fixed seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fst_fast.config import Config
from fst_fast.forest import cuts

Ints = NDArray[np.int64]
SPREAD = 0.5  # standard deviation of the logarithm of a response's length


@dataclass(frozen=True)
class Assumed:
    """Lengths in tokens; None: contexts as long as allowed, problems half of what that leaves of a prompt, responses half of the longest.

    spread: standard deviation of the logarithm of a response's length; 0: all alike. verify_s: seconds that one verdict takes."""

    context: int | None = None
    problem: int | None = None
    response: int | None = None
    spread: float = SPREAD
    verify_s: float = 0.005


class MicroBatch(NamedTuple):
    tokens: int  # padding included
    rows: int  # of logits
    pairs: int  # (query, key) that see each other, of one head


@dataclass(frozen=True)
class Work:
    """K contexts x `problems` x samples sequences of one process. responses [sequences]: their lengths, by context, problem and sample."""

    contexts: int
    context: int
    problems: int
    problem: int
    responses: Ints
    longest: int  # response allowed
    packing: str = "forest"

    @property
    def sequences(self) -> int:
        return len(self.responses)

    @property
    def prompt(self) -> int:
        return self.context + self.problem

    @property
    def shared(self) -> bool:
        return self.packing == "forest"

    @property
    def prompts(self) -> int:
        """That are computed: one of each context and problem, or one of each sequence."""
        return min(self.contexts * self.problems, self.sequences) if self.shared else self.sequences

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, what they share once."""
        if not self.shared:
            return self.sequences * self.prompt
        return min(self.contexts, self.sequences) * self.context + self.prompts * self.problem

    @property
    def prompt_pairs(self) -> int:
        p, c = self.problem, self.context
        if not self.shared:
            return self.sequences * self.prompt**2 // 2
        return min(self.contexts, self.sequences) * c * c // 2 + self.prompts * p * (c + p // 2)

    @property
    def response_tokens(self) -> int:
        return int(self.responses.sum())

    @property
    def unshared_tokens(self) -> int:
        return self.sequences * self.prompt + self.response_tokens

    @cached_property
    def _leaf(self) -> tuple[Ints, Ints]:
        """[sequences] the (context, problem) of each, as a number, and its context."""
        branch = np.arange(self.sequences) * (self.contexts * self.problems) // max(self.sequences, 1)
        return branch, branch // max(self.problems, 1)

    def micro_batches(self, budget: int) -> list[MicroBatch]:
        """The micro-batches of an update on all sequences."""
        if not self.sequences:
            return []
        if not self.shared:
            return self._padded(budget)
        branch, context = self._leaf
        new_branch, new_context = np.diff(branch, prepend=-1) > 0, np.diff(context, prepend=-1) > 0
        ends = np.cumsum(self.responses + self.problem * new_branch + self.context * new_context)
        lengths = self.prompt + self.responses
        starts = cuts(ends, lengths, max(budget, int(lengths.max())))
        out = []
        for first, last in zip(starts, [*starts[1:], self.sequences], strict=True):
            part = slice(first, last)
            r = self.responses[part]
            nodes, roots = len(np.unique(branch[part])), len(np.unique(context[part]))
            pairs = int((r * self.prompt + r * r // 2).sum())
            pairs += nodes * self.problem * (self.context + self.problem // 2) + roots * self.context**2 // 2
            tokens = int(ends[last - 1] - ends[first] + lengths[first])
            out.append(MicroBatch(tokens, int(r.sum()), pairs))
        return out

    def _padded(self, budget: int) -> list[MicroBatch]:
        parts: list[list[int]] = []
        for length in np.sort(self.responses).tolist():
            if parts and (len(parts[-1]) + 1) * (self.prompt + length) <= budget:
                parts[-1].append(length)
            else:
                parts.append([length])
        whole = [(len(p), self.prompt + p[-1], sum(p)) for p in parts]
        return [MicroBatch(n * longest, rows, n * longest**2 // 2) for n, longest, rows in whole]


def draw_lengths(count: int, mean: float, spread: float, longest: int, seed: int) -> Ints:
    """Response lengths [count], whose mean before the cut is `mean`."""
    drawn = np.random.default_rng(seed).normal(-(spread**2) / 2, spread, count)
    return np.clip(np.rint(mean * np.exp(drawn)), 1, longest).astype(np.int64)


def longest(config: Config, assumed: Assumed) -> Assumed:
    """The most that the configuration allows: what memory has to hold."""
    allowed = config.rollout.max_prompt_tokens
    context = min(assumed.context or config.fast.max_context_tokens, allowed - 1)
    return Assumed(context, allowed - context, config.rollout.max_response_tokens, 0.0, assumed.verify_s)


def works(config: Config, assumed: Assumed, processes: int) -> list[Work]:
    """The share of every process in a slow step, in rank order."""
    rollout, slow = config.rollout, config.slow
    k = 1 if config.method == "rl" else config.fast.population
    context = assumed.context or min(config.fast.max_context_tokens, rollout.max_prompt_tokens - 1)
    problem = assumed.problem or max(1, (rollout.max_prompt_tokens - context) // 2)
    mean = min(assumed.response or max(1, rollout.max_response_tokens // 2), rollout.max_response_tokens)
    out = []
    for rank in range(processes):
        mine = slow.problems_per_step * (rank + 1) // processes - slow.problems_per_step * rank // processes
        lengths = draw_lengths(
            mine * slow.group_size, mean, assumed.spread, rollout.max_response_tokens, rank
        )
        out.append(
            Work(k, context, mine, problem, lengths, rollout.max_response_tokens, config.policy.packing)
        )
    return out
