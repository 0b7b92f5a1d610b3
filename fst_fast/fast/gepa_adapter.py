"""The bridge to gepa 0.1.4, in both directions: a user's GEPAAdapter can score for our fast phase, and gepa can use our
scorer and reflector.

gepa's contract is `evaluate(batch, {component: text}, capture_traces)` and `make_reflective_dataset`; ours is `ScoreFn`
and `Reflector`. gepa itself is imported only by `GepaBridge.evaluate`, for its return type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fst_fast.config.components import components_of, compose, names_one
from fst_fast.contracts import FULL_REWARD, Context, Problem, Rollout, RolloutRequest, ScoredRollout, Verdict
from fst_fast.fast.reflection import Failure, ReflectionPrompt, Reflector, Refusal, ask, extract
from fst_fast.fast.scoring import ScoreFn


def problems_of(instances: Sequence[Any]) -> list[Problem]:
    """Problems from a GEPAAdapter's data: the instance is the answer, its text the message, its index the id."""
    return [
        Problem(str(i), [{"role": "user", "content": str(instance)}], instance)
        for i, instance in enumerate(instances)
    ]


def score_with(adapter: Any, *, component: str = "", policy_version: int) -> ScoreFn:
    """A ScoreFn that uses a GEPAAdapter, for the problems of `problems_of`.

    The adapter is called once per context, with the context as the text of `component`, or, without one, with the components that it is
    made of; scores must be in [0, 1]. Its reflective dataset gives the feedback if it has one record per instance; where it says different
    things of the components, all of them. The rollouts have no tokens, because adapters do not return them, so they cannot be reused for
    training."""

    def score(items: Sequence[RolloutRequest]) -> list[ScoredRollout]:
        answers: dict[int, ScoredRollout] = {}
        for context in {context.id: context for context, _, _ in items}.values():
            places = [i for i, item in enumerate(items) if item[0].id == context.id]
            candidate = {component: context.text} if component else components_of(context.text)
            batch = adapter.evaluate([items[i][1].answer for i in places], candidate, capture_traces=True)
            reflective = adapter.make_reflective_dataset(candidate, batch, list(candidate))
            said: list[dict[str, None]] = [{} for _ in places]
            for records in map(list, reflective.values()):
                if len(records) == len(places):
                    for known, record in zip(said, records, strict=True):
                        known[str(record.get("Feedback", ""))] = None
            for i, reward, output, feedback in zip(places, batch.scores, batch.outputs, said, strict=True):
                _, problem, sample = items[i]
                assert 0.0 <= reward <= 1.0, (
                    f"the adapter gave {reward} on {problem.id}; rewards lie in [0, 1]"
                )
                nothing = (np.zeros(0, np.int64), np.zeros(0, np.float32))
                rollout = Rollout(problem.id, context.id, sample, *nothing, "stop", policy_version, 1.0)
                verdict = Verdict(float(reward), "\n".join(filter(None, feedback)))
                answers[i] = ScoredRollout(rollout, verdict, str(output))
        return [answers[i] for i in range(len(items))]

    return score


@dataclass
class GepaBridge:
    """A GEPAAdapter that uses our ScoreFn and Reflector; its data are Problems. A candidate of the one component `component` is a context of
    one text, any other a context of components.

    gepa has no notion of an unjudged response, so here, and only here, one counts as 0. A refused reply proposes nothing."""

    score: ScoreFn
    reflect: Reflector
    count_tokens: Callable[[str], int]
    max_context_tokens: int
    log: Callable[[str], None]
    component: str = "context"
    asked: int = 0
    spells_special: Callable[[str], bool] = lambda text: False

    def evaluate(self, batch: list[Problem], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        from gepa.core.adapter import EvaluationBatch

        context = Context.of(self._text(candidate))
        answers = self.score([RolloutRequest(context, problem, 0) for problem in batch])
        return EvaluationBatch(
            outputs=[answer.response for answer in answers],
            scores=[answer.verdict.reward or 0.0 for answer in answers],
            trajectories=list(zip(batch, answers, strict=True)) if capture_traces else None,
        )

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        records = [
            {
                "Inputs": {"problem": "\n\n".join(message["content"] for message in problem.messages)},
                "Generated Outputs": answer.response,
                "Feedback": answer.verdict.feedback,
                "Reward": answer.verdict.reward or 0.0,
            }
            for problem, answer in eval_batch.trajectories
            if (answer.verdict.reward or 0.0) < FULL_REWARD
        ]
        return dict.fromkeys(components_to_update, records)

    def propose_new_texts(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        one = self._is_one(candidate)
        prompts = [
            ReflectionPrompt(
                candidate[name],
                [
                    Failure(r["Inputs"]["problem"], r["Generated Outputs"], r["Feedback"], r["Reward"])
                    for r in reflective_dataset[name]
                ],
                component="" if one else name,
                whole="" if one else self._text(candidate),
            )
            for name in components_to_update
        ]
        seeds = [self.asked + i for i in range(1, len(prompts) + 1)]
        self.asked += len(prompts)
        new = {}
        for name, reply in zip(
            components_to_update, ask(self.reflect, prompts, seeds, self.log), strict=True
        ):
            text = extract(
                reply,
                known_texts=[candidate[name]],
                count_tokens=self.count_tokens,
                max_tokens=self.max_context_tokens,
                spells_special=self.spells_special,
            )
            if not isinstance(text, Refusal) and (one or not names_one(text)):
                new[name] = text
        return new

    def _is_one(self, candidate: Mapping[str, str]) -> bool:
        return set(candidate) == {self.component}

    def _text(self, candidate: Mapping[str, str]) -> str:
        return candidate[self.component] if self._is_one(candidate) else compose(candidate)
