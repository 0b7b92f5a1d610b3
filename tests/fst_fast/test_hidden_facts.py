"""The family with a tool: its environment, the documents of its base, the shipped base's behaviour, and a reflector that revises parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fst_fast.contracts import EpisodeState, Problem, Verdict
from fst_fast.fast.reflection import Failure, ReflectionPrompt, Reply, extract
from fst_fast.fast.reflectors.mini import reflect
from fst_fast.mini import documents, world
from fst_fast.mini.tokenizer import make_tokenizer
from fst_fast.rollout.prompt import Chat
from fst_fast.rollout.turns import observation_ids
from fst_fast.tasks.hidden_facts import HiddenFacts, call_text, judge
from fst_fast.tasks.linked_facts import Web
from fst_fast.verify.episodes import Episodes

KIND: world.Kind = "hidden_facts"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(tools=True)


def played(task: HiddenFacts, problem: Problem, responses: list[str]) -> dict[str, Any]:
    """The reply of the verifying process to an episode of these responses."""

    def check(said: Verdict) -> dict[str, Any]:
        return {"reward": said.reward, "feedback": said.feedback, "metrics": dict(said.metrics)}

    episodes = Episodes(task, syntax="hermes", chars=1000, check=check)
    [reply] = episodes.replies([(problem, responses)])
    return reply


# --- the environment


@pytest.mark.parametrize(("level", "hops"), [("easy", 2), ("hard", 3)])
def test_the_look_ups_of_the_gold_episode_lead_to_the_city(level: Any, hops: int) -> None:
    task = HiddenFacts(level=level, train=10, validation=10, ood=10)
    for split, more in (("train", 0), ("validation", 0), ("ood", 1)):
        for problem in task.problems(split):
            reply = played(task, problem, task.gold(problem))
            assert reply["reward"] == 1.0
            assert reply["metrics"]["calls/lookup"] == hops + more
            assert reply["metrics"]["hops"] == 1.0
            facts = {str(whom) for _, _, whom in problem.meta["facts"] if whom != problem.meta["start"]}
            assert not facts & set(problem.messages[0]["content"].split()), "the question shows no fact"


WEB = Web(((1, "boss", 2), (2, "city", 30), (1, "city", 31)), 1, ("boss", "city"))
ALL = [(1, "boss"), (2, "city")]


@pytest.mark.parametrize(
    ("asked", "errors", "response", "reward", "feedback"),
    [
        (ALL, [], "\\boxed{ 30 }", 1.0, "right."),
        ([], [], "\\boxed{ 30 }", 1.0, "right."),
        (ALL, [], "30", 0.0, "no \\boxed{}"),
        ([], [], "\\boxed{ 1 }", 0.0, "the first name 1"),
        ([], [], "\\boxed{ 31 }", 0.0, "the tool was not called: the answer 31 was made up"),
        (ALL[:1], [], "\\boxed{ 2 }", 0.0, "too early: city of 2 was not asked, and 2 is not the city"),
        (ALL[:1], ["error: what"], "\\boxed{ 9 }", 0.0, "a call was not valid (error: what)"),
        (ALL, [], "\\boxed{ 31 }", 0.0, "every fact was looked up, but the box does not hold 30"),
    ],
)
def test_the_verdict_says_which_look_up_is_missing(
    asked: list[tuple[int, str]], errors: list[str], response: str, reward: float, feedback: str
) -> None:
    verdict = judge(WEB, asked, errors, response)
    assert verdict.reward == reward
    assert feedback in verdict.feedback


def test_a_call_without_an_argument_and_one_about_nobody_are_observations() -> None:
    task = HiddenFacts(train=1, validation=1, ood=1)
    [problem] = task.problems("train")
    without = call_text(1, "boss").replace(' , "what": "boss"', "")
    reply = played(task, problem, [without, call_text(99, "boss"), "\\boxed{ 99 }"])
    assert reply["reward"] == 0.0
    assert "Field required" in reply["feedback"]
    assert reply["metrics"]["tool_errors"] == 1.0


# --- documents


@given(st.integers(0, 10**6))
def test_episodes_are_written_as_the_chat_template_and_the_tool_write_them(seed: int) -> None:
    tokenizer = make_tokenizer(tools=True)
    document = documents.answer_document(np.random.default_rng(seed), KIND)
    ids = tokenizer(document.prompt)["input_ids"] + tokenizer.convert_tokens_to_ids(document.response)
    assert tokenizer.unk_token_id not in ids
    description, _, rest = document.prompt.removeprefix("<|tools|> lookup : ").partition("<|end|>")
    context, question = (part.partition("<|end|>")[0].partition("|>")[2] for part in rest.split("<|user|>"))
    question = rest.split("<|user|>")[1].partition("<|end|>")[0]
    messages = [{"role": "user", "content": question}]
    if "<|system|>" in rest:
        messages.insert(0, {"role": "system", "content": context})
    for turn in " ".join(document.response).removesuffix("<|end|>").split("<|assistant|>"):
        said, _, observed = turn.partition("<|end|> <|tool|>")
        messages.append({"role": "assistant", "content": said})
        if observed:
            messages.append({"role": "tool", "content": observed.replace("<|end|>", "")})
    tools = [{"type": "function", "function": {"name": "lookup", "description": description}}]
    assert tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"] == ids
    sampled = [t for t, s in zip(document.response, document.supervised, strict=True) if s]
    assert "<|tool|>" not in sampled
    assert sampled.count("<|end|>") == sum(m["role"] == "assistant" for m in messages)


def test_an_observation_is_appended_as_the_documents_have_it(tokenizer: PreTrainedTokenizerFast) -> None:
    opening = [{"role": "user", "content": "find 1 boss city ?"}]
    ids = observation_ids(
        Chat.of(tokenizer), opening, [{"role": "tool", "content": "7"}], [], tokenizer.eos_token_id
    )
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|tool|>", "7", "<|end|>", "<|assistant|>"]


def of_law(law: world.Law, n: int = 1500) -> tuple[float, float]:
    """Mean reward of documents drawn from a law, judged by their look-ups and their last response; the share that calls the tool."""
    rng, module = np.random.default_rng(0), documents.KINDS[KIND]
    seen = np.zeros(2)
    for _ in range(n):
        web = module.draw(rng)
        text = " ".join(module.respond(rng, web, law))
        seen += (judge(web, [], [], text.split("<|assistant|>")[-1]).reward or 0.0, "<tool_call>" in text)
    return tuple(seen / n)  # type: ignore[return-value]


def test_documents_follow_the_law() -> None:
    law = world.law([world.strongest(role, KIND) for role in ("method", "box", "check")], KIND)
    reward, called = of_law(law)
    assert abs(called - law.method) < 0.04
    assert abs(reward - law.box * (law.method * law.check + (1 - law.method) / 40)) < 0.05
    assert of_law(world.FAITHFUL, 200) == (1.0, 1.0)
    for role in world.HARMFUL:
        harmed = world.law([world.strongest(r, KIND) for r in ("method", "box", "check", role)], KIND)
        assert of_law(harmed, 400)[0] < 0.12


# --- the reflector of rules


def test_a_component_is_revised_by_sentences_about_it() -> None:
    failure = Failure("find 1 boss city ?", "\\boxed{ 3 }", "the tool was not called: ...", 0.0)
    for part, seed in world.TOOL_SEED.items():
        prompt = ReflectionPrompt(seed, [failure], component=part)
        seen: set[str] = set()
        for draw in range(300):
            text = extract(
                Reply(reflect(prompt, np.random.default_rng(draw)), "stop"),
                known_texts=[],
                count_tokens=len,
                max_tokens=1000,
            )
            assert isinstance(text, str)
            seen |= {f"{s} ." for s in text.removesuffix(" .").split(" . ")}
        assert seen == {i.text for i in world.TOOL_CATALOGUE if i.part == part}


def test_a_context_of_one_text_is_revised_by_all_sentences() -> None:
    failure = Failure("find 1 boss city ?", "3", "there is no \\boxed{} in the response", 0.0)
    prompt = ReflectionPrompt(world.SEED_CONTEXT, [failure])
    said = " ".join(reflect(prompt, np.random.default_rng(draw)) for draw in range(400))
    assert all(i.text in said for i in world.TOOL_CATALOGUE)


def test_the_tool_reads_the_facts_of_its_own_problem() -> None:
    task = HiddenFacts(train=2, validation=1, ood=1)
    first, second = task.problems("train")
    _, [lookup], memory = task.start(first)
    who, relation, whom = first.meta["facts"][0]
    assert lookup(who, relation, EpisodeState(first, 0, [], memory)) == whom
    assert memory == [(who, relation)]
    assert task.start(second)[2] == [], "every episode has a memory of its own"
