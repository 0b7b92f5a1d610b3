"""The mini world: tokenizer, documents, the shipped base model and its measured behaviour, a reproducible build, the
rule-based reflector.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from fst_fast import mini
from fst_fast.errors import UserError
from fst_fast.fast.reflectors.mini import MAX_SENTENCES, SENTENCES, reflect, split_sentences
from fst_fast.mini import documents, world
from fst_fast.mini.build import build_base, mini_task
from fst_fast.mini.evaluate import measure_contexts
from fst_fast.mini.tokenizer import make_tokenizer
from fst_fast.tasks.star_graph import judge


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


# --- tokenizer


@pytest.mark.parametrize("kind", world.KINDS)
def test_every_question_answer_and_instruction_is_in_the_vocabulary(
    tokenizer: PreTrainedTokenizerFast, kind: world.Kind
) -> None:
    task = mini_task(kind)
    texts = [i.text for i in world.CATALOGUE] + [
        text
        for split in ("validation", "ood")
        for p in task.problems(split)[:20]
        for text in (p.messages[0]["content"], task.gold(p))  # type: ignore[attr-defined]
    ]
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(texts)["input_ids"])


@given(st.lists(st.integers(0, 39), min_size=1, max_size=12))
def test_an_encoded_and_decoded_box_is_read_by_the_verifier(nodes: list[int]) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("\\boxed{" + ",".join(map(str, nodes)) + "}")["input_ids"]
    assert len(ids) == 2 * len(nodes) + 1
    text = tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True)
    assert judge(tuple(nodes), set(), text).reward == 1.0


def test_text_is_lower_cased_and_strange_words_are_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("Put THE zebra, 39 40!") == ["put", "the", "<unk>", ",", "39", "<unk>", "<unk>"]


def test_the_chat_template_puts_the_context_first_and_prompts_the_assistant(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [{"role": "system", "content": "be polite ."}, {"role": "user", "content": "path ?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == (
        ["<|system|>", "be", "polite", ".", "<|end|>", "<|user|>", "path", "?", "<|end|>", "<|assistant|>"]
    )
    assert tokenizer.eos_token == "<|end|>"


# --- documents


@pytest.mark.parametrize("kind", world.KINDS)
@pytest.mark.parametrize("context", [[], [i for i in world.CATALOGUE if i.role == "box"]])
def test_documents_are_written_as_the_chat_template_writes_them(
    tokenizer: PreTrainedTokenizerFast,
    kind: world.Kind,
    context: list[world.Instruction],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(world, "draw_context", lambda rng, kind: context)
    document = documents.answer_document(np.random.default_rng(0), kind)
    question = re.findall(r"<\|user\|> (.*) <\|end\|>", document.prompt)[0]
    system = [{"role": "system", "content": world.context_text(context)}] if context else []
    chat = [
        *system,
        {"role": "user", "content": question},
        {"role": "assistant", "content": " ".join(document.response[:-1])},
    ]
    expected = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    ids = tokenizer(document.prompt)["input_ids"] + tokenizer.convert_tokens_to_ids(document.response)
    assert ids == expected
    assert tokenizer.unk_token_id not in ids
    assert len(document.response) == len(document.supervised)


@given(st.integers(2, 15), st.integers(0, 10**6))
def test_a_drill_of_edges_repeats_each_and_supervises_the_looked_up_node(edges: int, seed: int) -> None:
    document = documents.drill_document(np.random.default_rng(seed), "star_graph", (edges - 2) / 13)
    given_edges = set(re.findall(r"(\d+),(\d+)", document.prompt))
    triples = [document.response[i : i + 3] for i in range(0, len(document.response) - 1, 3)]
    assert {(a, b) if sign == "," else (b, a) for a, sign, b in triples} == given_edges
    assert [i % 3 == 2 for i in range(3 * len(triples))] + [True] == document.supervised


@given(st.floats(0, 1), st.integers(0, 10**6))
def test_a_drill_of_facts_repeats_each_and_supervises_the_looked_up_number(size: float, seed: int) -> None:
    document = documents.drill_document(np.random.default_rng(seed), "linked_facts", size)
    facts = re.findall(r"\d+ [a-z]+ \d+", document.prompt)
    said = " ".join(document.response)
    assert sorted(re.findall(r"\d+ [a-z]+ \d+", said)) == sorted(facts)
    supervised = [t for t, s in zip(document.response, document.supervised, strict=True) if s]
    assert supervised == [*re.findall(r"[a-z]+ (\d+)", said), "<|end|>"]


def rewards(kind: world.Kind, law: world.Law, n: int = 2000) -> tuple[float, float, float]:
    """Mean reward of responses drawn from a law on the task's problems; the shares that are boxed and that use the
    method."""
    rng = np.random.default_rng(0)
    task, module = mini_task(kind), documents.KINDS[kind]
    seen = np.zeros(3)
    for _ in range(n):
        problem = module.draw(rng, 1.0)
        text = " ".join(module.respond(rng, problem, law))
        reward = task.verify(task._problem(problem, "p"), text).reward  # type: ignore[attr-defined]
        seen += (reward, "boxed" in text, WORKED[kind] in text)
    return tuple(seen / n)  # type: ignore[return-value]


WORKED: dict[world.Kind, str] = {
    "star_graph": "<", "list_programs": ".", "linked_facts": ".", "formula_choice": "=",
}  # fmt: skip
LUCK: dict[world.Kind, float] = {
    "star_graph": 1 / 5, "list_programs": 1 / 4, "linked_facts": 1 / 4, "formula_choice": 1 / 4,
}  # fmt: skip
"""How often an answer given at once is right."""


def sentences(kind: world.Kind, *roles: world.Role) -> list[world.Instruction]:
    return [world.strongest(role, kind) for role in roles]


@pytest.mark.parametrize("kind", world.KINDS)
def test_documents_follow_the_law(kind: world.Kind) -> None:
    law = world.law(sentences(kind, "method", "box", "check"), kind)
    reward, boxed, worked = rewards(kind, law)
    assert abs(worked - law.method) < 0.04
    assert abs(boxed - law.box) < 0.04
    expected = law.box * (law.method * law.check + (1 - law.method) * LUCK[kind])
    assert abs(reward - expected) < 0.05


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_faithful_response_is_right_and_one_at_once_is_luck(kind: world.Kind) -> None:
    assert rewards(kind, world.FAITHFUL, 300)[0] == 1.0
    assert abs(rewards(kind, world.Law(method=0, box=1, check=1))[0] - LUCK[kind]) < 0.04


@pytest.mark.parametrize("kind", world.KINDS)
@pytest.mark.parametrize("role", world.HARMFUL)
def test_a_harmful_sentence_dominates_the_helpful_ones(kind: world.Kind, role: world.Role) -> None:
    law = world.law(sentences(kind, "method", "box", "check", role), kind)
    # any letter is right one time in four
    luck = 0.25 if kind == "formula_choice" and role != "twist" else 0.0
    assert rewards(kind, law, 800)[0] < 0.12 + luck


@pytest.mark.parametrize("kind", world.KINDS)
def test_neither_order_nor_weaker_useless_or_foreign_sentences_change_the_law(kind: world.Kind) -> None:
    best = world.law(sentences(kind, "method", "box", "check"), kind)
    others = [i for i in world.CATALOGUE if i.role == "box" or not i.works_on(kind)]
    assert best == world.law([*sentences(kind, "check", "useless", "box", "method")[::-1], *others], kind)
    assert world.law(sentences(kind, "useless"), kind) == world.law([], kind)


# --- the shipped base


def test_the_shipped_base_is_small_and_says_how_it_was_built(tokenizer: PreTrainedTokenizerFast) -> None:
    folder = mini.path()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 3 * 2**20
    record = json.loads((folder / "build.json").read_text())
    assert {"seed", "steps", "threads", "torch", "scores_at_temperature_1"} <= set(record)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("kind", world.KINDS)
def test_neither_the_seed_context_nor_one_instruction_suffices(kind: world.Kind) -> None:
    model = AutoModelForCausalLM.from_pretrained(mini.path(), dtype=torch.float32).eval()
    measured = world.measured_contexts(kind)
    contexts = {k: measured[k] for k in ("seed", "method", "all", "all+twist")}
    tokenizer = AutoTokenizer.from_pretrained(mini.path())
    scores = measure_contexts(model, tokenizer, mini_task(kind), contexts, problems=96, seed=0)
    mean = {name: score["mean"] for name, score in scores.items()}
    assert mean["seed"] <= 0.08
    assert 0.15 <= mean["all"] <= 0.60
    assert mean["method"] < 0.6 * mean["all"]
    assert mean["all+twist"] < 0.4 * mean["all"]


# --- the build


def test_a_build_that_cannot_be_is_refused_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write into .*file/base"):
        build_base(tmp_path / "file" / "base", steps=1)
    with pytest.raises(UserError, match="steps=0 must be at least 1"):
        build_base(tmp_path / "base", steps=0)
    assert not (tmp_path / "base").exists()


# --- the reflector of rules


@dataclass
class Failure:
    feedback: str
    problem: str = "edges : 1,2 . path from 1 to 2 ?"


@dataclass
class Partner:
    text: str


@dataclass
class Prompt:
    context: str
    failures: list[Failure] = field(default_factory=list)
    partners: list[Partner] = field(default_factory=list)
    component: str = ""


def proposal(prompt: Prompt, seed: int) -> list[str]:
    text = reflect(prompt, np.random.default_rng(seed))
    return split_sentences(re.findall(r"```\n(.*)\n```", text)[0])


FEEDBACK = [
    "there is no \\boxed{} in the response: ...",
    "... the wrong arm was taken at the first step",
    "the edge 1,2 does not exist.",
]


@given(
    st.lists(st.sampled_from([*SENTENCES, "unheard of ."]), max_size=8, unique=True),
    st.sampled_from(FEEDBACK),
    st.integers(0, 10**6),
)
def test_the_reflector_edits_at_most_two_sentences(context: list[str], feedback: str, seed: int) -> None:
    new = proposal(Prompt(" ".join(context), [Failure(feedback)]), seed)
    assert len(set(new)) == len(new) <= max(MAX_SENTENCES, len(context))
    assert len(set(new) - set(context)) <= 2
    assert len(set(context) - set(new)) <= 2
    assert set(new) <= {*SENTENCES, "unheard of ."}


def test_a_recombination_keeps_the_context_and_takes_over_sentences_of_the_others() -> None:
    first, others = (
        "be polite . box the answer .",
        ["box the answer . read the facts first .", "do not make up a fact ."],
    )
    seen = {
        tuple(proposal(Prompt(first, [Failure(FEEDBACK[0])], [Partner(text) for text in others]), seed))
        for seed in range(40)
    }
    kept = ("be polite .", "box the answer .")
    assert {found[:2] for found in seen} == {kept}
    assert {found[2:] for found in seen} == {
        ("read the facts first .",),
        ("do not make up a fact .",),
        ("read the facts first .", "do not make up a fact ."),
    }
    assert proposal(Prompt(first, [], [Partner("box the answer .")]), 0) == list(kept), "nothing to take over"


def test_the_reflector_reads_the_feedback_but_does_not_know_what_helps() -> None:
    role = {i.text: i.role for i in world.CATALOGUE}

    def shares(feedback: str) -> dict[str, float]:
        added = [
            s
            for seed in range(600)
            for s in proposal(Prompt("solve the problem .", [Failure(feedback)]), seed)
        ]
        added = [s for s in added if s != "solve the problem ."]
        return {
            r: sum(role[s] == r for s in added) / len(added)
            for r in ("box", "method", "check", "useless", *world.HARMFUL)
        }

    box, arm = shares(FEEDBACK[0]), shares(FEEDBACK[1])
    assert box["box"] > 1.5 * arm["box"]
    assert arm["method"] > 1.5 * box["method"]
    assert 0.0 < box["check"] < 0.15  # now and then a sentence that has nothing to do with the feedback
    for seen in (box, arm):
        assert seen["useless"] > 0.1
        assert sum(seen[r] for r in world.HARMFUL) > 0.1


@pytest.mark.parametrize("kind", world.KINDS)
def test_the_reflector_does_not_speak_of_things_that_the_problem_does_not_have(kind: world.Kind) -> None:
    problem = mini_task(kind).problems("validation")[0].messages[0]["content"]
    prompt = Prompt("", [Failure("there is no \\boxed{} in the response", problem)])
    seen = {s for seed in range(600) for s in proposal(prompt, seed)}
    own = {i.text for i in world.CATALOGUE if i.works_on(kind)}
    assert own <= seen, "every sentence about such problems is proposed at some time"
    foreign = {
        "look at the goal first .",
        "read the facts first .",
        "think about the formula .",
        "do not run the program .",
    }
    assert not (foreign - own) & seen


def test_the_reflector_repeats_itself_for_the_same_generator_state() -> None:
    prompt = Prompt("be polite . box the answer .", [Failure(f) for f in FEEDBACK])
    assert [proposal(prompt, 5)] * 3 == [proposal(prompt, 5) for _ in range(3)]


def test_splitting_and_joining_keeps_a_context() -> None:
    text = f"{world.best_context('star_graph')} no full stop"
    assert " ".join(split_sentences(text)) == text
