"""The mini world: tokenizer, documents, the shipped base and its measured behaviour, a reproducible build, the reflector of rules."""

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
from fst_fast.contexts.reflectors.mini import MAX_SENTENCES, SENTENCES, reflect, split_sentences
from fst_fast.errors import UserError
from fst_fast.mini import documents, world
from fst_fast.mini.build import build_base, mini_task
from fst_fast.mini.evaluate import measure_contexts
from fst_fast.mini.tokenizer import make_tokenizer
from fst_fast.tasks.star_graph import draw_graph, judge


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


# --- tokenizer


def test_every_question_and_instruction_is_in_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [i.text for i in world.CATALOGUE] + [
        p.messages[0]["content"] for p in mini_task().problems("validation")[:20]
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


@pytest.mark.parametrize("context", [[], [i for i in world.CATALOGUE if i.family == "box"]])
def test_documents_are_written_as_the_chat_template_writes_them(
    tokenizer: PreTrainedTokenizerFast, context: list[world.Instruction], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "draw_context", lambda rng: context)
    document = documents.answer_document(np.random.default_rng(0), arms=5, path=4)
    question = re.findall(r"<\|user\|> (.*) <\|end\|>", document.prompt)[0]
    system = [{"role": "system", "content": world.context_text(context)}] if context else []
    chat = [
        *system,
        {"role": "user", "content": question},
        {"role": "assistant", "content": " ".join(document.response[:-1])},
    ]
    expected = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert (
        tokenizer(document.prompt)["input_ids"] + tokenizer.convert_tokens_to_ids(document.response)
        == expected
    )
    assert len(document.response) == len(document.supervised)


@given(st.integers(2, 15), st.integers(0, 10**6))
def test_a_list_document_repeats_every_edge_and_supervises_the_looked_up_node(edges: int, seed: int) -> None:
    document = documents.list_document(np.random.default_rng(seed), edges=edges)
    given_edges = set(re.findall(r"(\d+),(\d+)", document.prompt))
    triples = [document.response[i : i + 3] for i in range(0, 3 * edges, 3)]
    assert {(a, b) if sign == "," else (b, a) for a, sign, b in triples} == given_edges
    assert len(given_edges) == edges
    assert [i % 3 == 2 for i in range(3 * edges)] + [True] == document.supervised


def frequencies(law: world.Law, n: int = 3000) -> dict[str, float]:
    rng = np.random.default_rng(0)
    seen = {"reward": 0.0, "traced": 0.0, "boxed": 0.0}
    for _ in range(n):
        graph = draw_graph(rng, arms=5, path=4, ids=40)
        text = " ".join(documents.draw_response(rng, graph, law))
        seen["reward"] += (judge(graph.path, set(graph.edges), text).reward or 0.0) / n
        seen["traced"] += ("<" in text) / n
        seen["boxed"] += ("boxed" in text) / n
    return seen


def sentences(*families: str) -> list[world.Instruction]:
    return [max((i for i in world.CATALOGUE if i.family == f), key=lambda i: i.strength) for f in families]


def test_documents_follow_the_law() -> None:
    law = world.law(sentences("trace", "box", "check"))
    seen = frequencies(law)
    assert abs(seen["traced"] - law.trace) < 0.03
    assert abs(seen["boxed"] - law.box) < 0.03
    right_arm = law.trace + (1 - law.trace) / 5
    assert abs(seen["reward"] - law.box * law.check * right_arm) < 0.03


@pytest.mark.parametrize("family", world.HARMFUL)
def test_a_harmful_sentence_dominates_the_helpful_ones(family: str) -> None:
    assert frequencies(world.law(sentences("trace", "box", "check", family)))["reward"] < 0.1


def test_neither_order_nor_weaker_or_useless_sentences_change_the_law() -> None:
    best = world.law(sentences("trace", "box", "check"))
    assert best == world.law(
        sentences("check", "useless", "box", "trace")[::-1]
        + [i for i in world.CATALOGUE if i.family == "box"]
    )
    assert world.law(sentences("useless")) == world.law([])


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


def test_neither_the_seed_context_nor_the_right_instruction_suffices() -> None:
    model = AutoModelForCausalLM.from_pretrained(mini.path(), dtype=torch.float32).eval()
    contexts = {k: world.MEASURED_CONTEXTS[k] for k in ("seed", "trace", "box", "all", "all+goal_only")}
    tokenizer = AutoTokenizer.from_pretrained(mini.path())
    scores = measure_contexts(model, tokenizer, mini_task(), contexts, problems=256, seed=0)
    mean = {name: score["mean"] for name, score in scores.items()}
    assert mean["seed"] <= 0.05
    assert 0.30 <= mean["all"] <= 0.70
    assert max(mean["trace"], mean["box"]) < 0.6 * mean["all"]
    assert mean["all+goal_only"] < 0.15


# --- the build


def test_the_same_seed_builds_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fst_fast.mini.build.measure_contexts", lambda *_, **__: {})
    monkeypatch.setattr("fst_fast.mini.build._DOCS_PER_STEP", 2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_base(tmp_path / name, seed=seed, steps=6, threads=1, log=lambda line: None)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


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


@dataclass
class Prompt:
    context: str
    failures: list[Failure] = field(default_factory=list)


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


def test_the_reflector_reads_the_feedback_but_does_not_know_what_helps() -> None:
    family = {i.text: i.family for i in world.CATALOGUE}

    def shares(feedback: str) -> dict[str, float]:
        added = [
            s
            for seed in range(600)
            for s in proposal(Prompt("solve the problem .", [Failure(feedback)]), seed)
        ]
        added = [s for s in added if s != "solve the problem ."]
        return {
            f: sum(family[s] == f for s in added) / len(added)
            for f in ("box", "trace", "check", "useless", *world.HARMFUL)
        }

    box, arm = shares(FEEDBACK[0]), shares(FEEDBACK[1])
    assert box["box"] > 1.5 * arm["box"]
    assert arm["trace"] > 1.5 * box["trace"]
    assert 0.0 < box["check"] < 0.1  # now and then a sentence that has nothing to do with the feedback
    for seen in (box, arm):
        assert seen["useless"] > 0.1
        assert sum(seen[f] for f in world.HARMFUL) > 0.1


def test_the_reflector_repeats_itself_for_the_same_generator_state() -> None:
    prompt = Prompt("be polite . box the path .", [Failure(f) for f in FEEDBACK])
    assert [proposal(prompt, 5)] * 3 == [proposal(prompt, 5) for _ in range(3)]


def test_splitting_and_joining_keeps_a_context() -> None:
    text = f"{world.BEST_CONTEXT} no full stop"
    assert " ".join(split_sentences(text)) == text
