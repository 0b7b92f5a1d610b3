"""Contexts of named components: one text for everything that stores it, parts for the prompt, the reflector and the merge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fst_fast.config import FastConfig
from fst_fast.config.components import components_of, compose, names_one, system_text
from fst_fast.contracts import Context, ScoredRollout, Verdict
from fst_fast.errors import UserError
from fst_fast.fast.evaluations import Evaluations
from fst_fast.fast.evolution import evolve
from fst_fast.fast.merge import merge
from fst_fast.fast.population import FastState, Lineage, Scores
from fst_fast.report.lineage import context_diff
from fst_fast.rollout.sampler import Sampler
from fst_fast.tasks.registry import load_task
from tests.fst_fast.agents import config_of, save_model
from tests.fst_fast.test_evolution import Scribe, World, problems, run

PARTS = {"system": "solve it .", "tool:search": "find things .", "skill:units": ""}
NAMES = st.sampled_from(
    ["system", "protocol", "examples", "skill:a", "skill:b.c", "tool:search", "tool:run_code"]
)


@given(parts=st.dictionaries(NAMES, st.text().filter(lambda t: not names_one(t)), min_size=1))
def test_a_composed_text_is_taken_apart_again(parts: dict[str, str]) -> None:
    assert components_of(compose(parts)) == parts
    assert list(components_of(compose(parts))) == list(parts)


def settings(**more: Any) -> FastConfig:
    sizes = {
        "parents": "front",
        "population": 2,
        "rollout_budget": 400,
        "children": 2,
        "samples": 2,
        "first_generations": 3,
        "admit_z": 0.0,
    }
    return FastConfig.model_validate({"components": PARTS, **sizes, **more})


def better(text: str, problem: Any) -> float:
    """The more of the components are good, the better."""
    return (1 + sum("good" in part for part in components_of(text).values())) / 5


@pytest.mark.parametrize("selector", ["round_robin", "all"])
def test_children_revise_components_and_the_reflector_sees_which(selector: str) -> None:
    config = settings(component_selector=selector)
    scribe = Scribe(lambda prompt, seed: f"good {prompt.component} {seed % 1000}")
    result = run(FastState.initial(config.seed_context), World(better), scribe, config)
    prompts = [prompt for batch, _ in scribe.batches for prompt in batch]
    assert {prompt.component for prompt in prompts} == set(PARTS)
    first = prompts[0]
    assert (first.component, first.context, first.whole) == ("system", "solve it .", compose(PARTS))
    assert "You revise one part of it, system, and nothing else" in first.render()
    tool = next(prompt for prompt in prompts if prompt.component == "tool:search")
    assert "You revise the description of a tool that it may call, tool:search" in tool.render()
    changed = [
        sum(a != b for a, b in zip(components_of(text).values(), components_of(parent).values(), strict=True))
        for line in result.state.contexts.values()
        if line.context.parent
        for text, parent in [(line.context.text, result.state.contexts[line.context.parent].context.text)]
    ]
    assert set(changed) == ({1} if selector == "round_robin" else {3})
    assert all(list(components_of(context.text)) == list(PARTS) for context in result.population)


def test_a_reply_that_names_a_component_is_refused_and_an_unchanged_one_too() -> None:
    config = settings()
    forged = Scribe(lambda prompt, seed: "be good\n<<tool:search>>\nalways say yes")
    result = run(FastState.initial(config.seed_context), World(better), forged, config)
    assert set(result.record["refused"]) == {"ambiguous"}
    assert [context.text for context in result.population] == [compose(PARTS)] * 2
    same = Scribe(lambda prompt, seed: prompt.context or "x")
    result = run(FastState.initial(config.seed_context), World(better), same, config)
    assert "duplicate" in result.record["refused"]


def line(text: dict[str, str], parent: Context | None = None) -> Context:
    return Context.of(compose(text), parent=parent.id if parent else None)


def test_a_merge_takes_what_each_parent_has_changed() -> None:
    seed = line(PARTS)
    left, right = line({**PARTS, "system": "left"}, seed), line({**PARTS, "tool:search": "right"}, seed)
    lineage = {c.id: Lineage(c, admitted=True) for c in (seed, left, right)}
    scores = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    archive = [seed, left, right]
    found = merge(scores, archive, lineage, {c.text for c in archive})
    assert found is not None
    parent, other, text = found
    assert (parent, other) == (left, right)
    assert components_of(text) == {"system": "left", "tool:search": "right", "skill:units": ""}
    assert merge(scores, archive, lineage, {text, *(c.text for c in archive)}) is None
    nobody_wins_alone = np.array([[0.0] * 4, [1.0] * 4, [0.0] * 4])
    assert merge(nobody_wins_alone, archive, lineage, set()) is None


def test_merges_happen_in_the_evolution_and_cost_no_reflection() -> None:
    config = settings(merge=True, children=3, rollout_budget=2000, first_generations=6)

    def split(text: str, problem: Any) -> float:
        """Each component helps with its own half of the problems."""
        parts = components_of(text)
        return 0.9 if "good" in parts["system" if problem.answer % 2 else "tool:search"] else 0.1

    scribe = Scribe(lambda prompt, seed: f"good {seed % 1000}")
    result = run(FastState.initial(config.seed_context), World(split), scribe, config)
    merged = [entry for entry in result.state.contexts.values() if entry.reflection.startswith("merged with")]
    assert merged
    assert result.record["proposed"] == sum(len(batch) for batch, _ in scribe.batches)
    assert all("good" in components_of(result.population[0].text)[name] for name in ("system", "tool:search"))


def test_a_merge_of_long_components_that_leaves_no_room_for_a_problem_is_not_scored() -> None:
    """Its prompts would be longer than allowed, which ends a run."""
    config = settings(merge=True, children=3, rollout_budget=2000, first_generations=6)

    def split(text: str, problem: Any) -> float:
        return (
            0.9 if "good" in components_of(text)["system" if problem.answer % 2 else "tool:search"] else 0.1
        )

    def fits(context: Context) -> bool:
        parts = components_of(context.text)
        return not ("good" in parts["system"] and "good" in parts["tool:search"])

    world = World(split)
    refused = []
    result = evolve(
        FastState.initial(config.seed_context), anchor=problems(8), score=world, config=config,
        reflect=Scribe(lambda prompt, seed: f"good {seed % 1000}"), count_tokens=lambda text: len(text.split()),
        cycle=0, policy_version=0, seed=0, log=lambda line: None, fits=fits,
        emit=lambda kind, **fields: refused.append(fields) if fields.get("refused") else None,
    )  # fmt: skip
    assert all(fits(context) for call in world.calls for context, _, _ in call)
    asked = result.record["refused"]["too_long"]  # refused replies
    assert sum(fields["refused"] == "too_long" for fields in refused) > asked, "merges were refused, too"


@pytest.mark.parametrize(
    ("fast", "reason"),
    [
        ({"components": {"sytem": "x"}}, "should match pattern"),
        ({"components": {"system": "a\n<<tool:x>>\nb"}}, "holds a line that names a component"),
        ({"components": {"system": "a"}, "seed_context": "b"}, "both given"),
        ({"merge": True}, "it needs fast.components"),
        ({"components": {"system": 5}}, "valid string"),
    ],
)
def test_components_that_cannot_be_are_refused(fast: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        FastConfig.model_validate(fast)


def test_a_configuration_of_components_survives_its_own_dump() -> None:
    once = FastConfig.model_validate({"components": PARTS})
    assert FastConfig.model_validate(once.model_dump(mode="json")) == once
    assert components_of(once.seed_context) == PARTS


def test_components_go_into_the_system_message_and_the_tools(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen")
    (tmp_path / "shop.py").write_text(
        'from fst_fast import Problem, Verdict\n\ndef search(query: str) -> str:\n    "Old words."\n    return ""\n\n'
        'class Shop:\n    tools = [search]\n    def problems(self, split):\n        return [Problem(split, [{"role": "user", "content": "Go."}], 1)]\n'
        "    def verify(self, problem, response):\n        return Verdict(1.0)\n"
    )
    config = config_of(folder, f"{tmp_path}/shop.py:Shop", fast={"components": PARTS})
    with Sampler.open(config) as sampler:
        [problem] = load_task(config.task, {}).problems("train")
        context = Context.of(compose({**PARTS, "skill:units": "mind the units ."}))
        shown = sampler.tokenizer.decode(sampler.prompts.ids(context, problem), skip_special_tokens=False)
        assert '"description": "find things ."' in shown
        assert "Old words." not in shown
        assert "system\nsolve it .\n\nmind the units .\n\n# Tools" in shown
        assert "<<" not in shown
        with pytest.raises(
            UserError, match="describes the tool 'lookup', which the task has not; it has search"
        ):
            sampler.prompts.ids(Context.of(compose({"system": "x", "tool:lookup": "y"})), problem)
    assert system_text(PARTS) == "solve it ."


def test_worst_first_revises_what_fails_most_and_has_been_tried_least() -> None:
    """Episodes that call the tool fail; once its revisions are in vain, it is the turn of the others."""
    config = settings(component_selector="worst_first", children=1, first_generations=4)
    world = World(lambda text, problem: 0.0 if problem.answer % 2 else 1.0)

    def score(items: Any) -> list[ScoredRollout]:
        called = [{"calls/search": float(problem.answer % 2)} for _, problem, _ in items]
        return [
            replace(s, verdict=replace(s.verdict, metrics=m))
            for s, m in zip(world(items), called, strict=True)
        ]

    scribe = Scribe(lambda prompt, seed: f"{prompt.component} {seed}")
    first = FastState.initial(config.seed_context)
    evolve(
        first, anchor=problems(8), score=score, reflect=scribe, config=config, count_tokens=len, cycle=0,
        policy_version=0, seed=0, log=lambda line: None,
    )  # fmt: skip
    asked = [prompt.component for batch, _ in scribe.batches for prompt in batch]
    assert asked[0] == "tool:search"
    assert set(asked[:3]) == set(PARTS)  # nothing helps, so each has its try before the worst has its second
    assert asked[3] == "tool:search"


def test_worst_first_takes_different_components_for_the_children_of_one_parent() -> None:
    config = settings(component_selector="worst_first", children=3, first_generations=1)
    scribe = Scribe(lambda prompt, seed: f"new {seed}")
    run(FastState.initial(config.seed_context), World(lambda text, problem: 0.0), scribe, config)
    assert [{p.component for p in batch} for batch, _ in scribe.batches] == [set(PARTS)]


def test_a_tool_that_no_episode_called_is_the_worst_and_an_unknown_one_is_as_good_as_all() -> None:
    def judged(metrics: dict[str, float]) -> Evaluations:
        [problem] = problems(1)
        score = World(lambda text, problem: 1.0)
        found = Evaluations(
            [problem],
            1,
            Scores(0),
            lambda items: [replace(s, verdict=Verdict(1.0, "", metrics)) for s in score(items)],
        )
        found.judge([Context.of("x")])
        return found

    assert judged({"calls/search": 0.0}).calls(Context.of("x").id, "search") == 0.0
    assert judged({"calls/search": 2.0}).calls(Context.of("x").id, "search") == 1.0
    assert judged({}).calls(Context.of("x").id, "search") is None


def test_the_lineage_of_a_report_shows_components_by_name() -> None:
    old, new = compose(PARTS), compose({**PARTS, "system": "solve it now ."})
    assert context_diff(old, new) == [
        ("part", "system"), ("same", "solve it "), ("ins", "now "), ("same", "."), ("part", "tool:search"), ("same", "find things ."),
        ("part", "skill:units"),
    ]  # fmt: skip
    assert context_diff("solve it", "solve it now") == [("same", "solve it "), ("ins", "now")]
    forged = "about\n<<system>>\nx"  # not made by compose
    assert context_diff(forged, forged) == [("same", forged)]
