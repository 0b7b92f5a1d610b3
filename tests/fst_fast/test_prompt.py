"""Contexts and problems as prompts."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fst_fast.contracts import Context, Problem
from fst_fast.errors import UserError
from fst_fast.rollout.prompt import (
    Chat,
    PromptCache,
    end_ids,
    load_tokenizer,
    messages_with_context,
    response_text,
)

TEMPLATE = (
    "{% for m in messages %}[ {{ m['role'] }} ] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[ assistant ]{% endif %}"
)
WORDS = [
    "<unk>",
    "[",
    "]",
    "system",
    "user",
    "assistant",
    "be",
    "brief",
    "use",
    "digits",
    "add",
    "1",
    "2",
    "<end>",
]
CONTEXT = Context.of("be brief")
PROBLEM = Problem("p1", [{"role": "user", "content": "add 1 2"}], answer=3)
WITH_SYSTEM = Problem("p2", [{"role": "system", "content": "use digits"}, *PROBLEM.messages], answer=3)


def render_prompt(tokenizer, context, problem):
    return Chat.of(tokenizer).prompt(context, problem)


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", chat_template=TEMPLATE
    )


def words(tokenizer, ids) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_the_context_becomes_the_system_message(tokenizer):
    ids = render_prompt(tokenizer, CONTEXT, PROBLEM)
    assert words(tokenizer, ids) == "[ system ] be brief [ user ] add 1 2 [ assistant ]"
    assert ids.dtype == np.int64


def test_an_own_system_message_follows_the_context_after_a_blank_line(tokenizer):
    assert messages_with_context(CONTEXT, WITH_SYSTEM)[0] == {
        "role": "system",
        "content": "be brief\n\nuse digits",
    }
    ids = render_prompt(tokenizer, CONTEXT, WITH_SYSTEM)
    assert words(tokenizer, ids) == "[ system ] be brief use digits [ user ] add 1 2 [ assistant ]"
    assert WITH_SYSTEM.messages[0]["content"] == "use digits"


def test_an_empty_context_leaves_the_problem_as_it_is(tokenizer):
    empty = Context.of("")
    assert words(tokenizer, render_prompt(tokenizer, empty, PROBLEM)) == "[ user ] add 1 2 [ assistant ]"
    assert messages_with_context(empty, WITH_SYSTEM) == list(WITH_SYSTEM.messages)


def test_a_tokenizer_without_chat_template_is_refused_by_name(tokenizer):
    tokenizer.chat_template = None
    tokenizer.name_or_path = "models/plain"
    with pytest.raises(UserError, match="tokenizer of model models/plain has no chat template"):
        render_prompt(tokenizer, CONTEXT, PROBLEM)


def test_a_prompt_that_is_too_long_is_refused_with_names_and_numbers(tokenizer):
    assert len(PromptCache(Chat.of(tokenizer), max_prompt_tokens=14).ids(CONTEXT, PROBLEM)) == 14
    with pytest.raises(
        UserError, match=rf"problem p1 with context {CONTEXT.id} has 14 .*max_prompt_tokens=13"
    ):
        PromptCache(Chat.of(tokenizer), max_prompt_tokens=13).ids(CONTEXT, PROBLEM)


def test_prompts_are_rendered_once_and_cannot_be_written_to(tokenizer, monkeypatch):
    calls: list[str] = []

    def spy(chat, context, problem):
        calls.append(problem.id)
        return prompt(chat, context, problem)

    prompt = Chat.prompt
    monkeypatch.setattr(Chat, "prompt", spy)
    cache = PromptCache(Chat.of(tokenizer), max_prompt_tokens=100, capacity=2)
    assert cache.ids(CONTEXT, PROBLEM) is cache.ids(CONTEXT, PROBLEM)
    cache.ids(CONTEXT, WITH_SYSTEM)
    assert calls == ["p1", "p2"]
    cache.ids(Context.of("use digits"), PROBLEM)  # the third: p1 with CONTEXT makes room
    cache.ids(CONTEXT, PROBLEM)
    assert calls == ["p1", "p2", "p1", "p1"]
    with pytest.raises(ValueError, match="read-only"):
        cache.ids(CONTEXT, PROBLEM)[0] = 1


def test_a_saved_tokenizer_is_loaded_and_a_broken_one_refused(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (
        render_prompt(loaded, CONTEXT, PROBLEM).tolist()
        == render_prompt(tokenizer, CONTEXT, PROBLEM).tolist()
    )


def test_a_saved_tokenizer_without_template_is_refused(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path)


def test_end_ids_are_those_of_tokenizer_and_generation_config(tokenizer):
    config = type("Config", (), {"eos_token_id": [2, WORDS.index("<end>")]})()
    assert end_ids(tokenizer, config) == (2, WORDS.index("<end>"))
    assert end_ids(tokenizer, None) == (WORDS.index("<end>"),)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no eos token"):
        end_ids(tokenizer, None)


def test_a_grader_reads_every_token_but_the_ones_that_end_the_response(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "<answer>"]})
    think, answer, end, two = tokenizer.convert_tokens_to_ids(["[THINK]", "<answer>", "<end>", "2"])
    ids = [think, two, end, answer, two, end, end]
    assert response_text(tokenizer, ids, {end}).split() == ["[THINK]", "2", "<end>", "<answer>", "2"]
    assert response_text(tokenizer, np.array([two, answer]), {end}).split() == ["2", "<answer>"]
    assert response_text(tokenizer, [end, end], {end}) == ""
