"""The request to a reflector: episodes turn by turn, what it is told of each kind of component, and templates of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fst_fast.config import FastConfig
from fst_fast.errors import UserError
from fst_fast.fast.reflection import Failure, ReflectionPrompt, Refusal, Reply, extract
from fst_fast.fast.reflectors import REFLECTORS, make_reflector
from fst_fast.fast.request import KINDS, SHOWN_CHARS, SHOWN_MESSAGES, load_templates, template_for

TURNS = (
    {"role": "assistant", "content": "call search"},
    {"role": "tool", "name": "search", "content": "nothing found"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "too large"},
)


def episode(turns: Any = TURNS) -> ReflectionPrompt:
    return ReflectionPrompt("be good", [Failure("guess", "<raw>", "wrong", 0.0, turns)])


def test_a_failed_episode_is_shown_turn_by_turn() -> None:
    text = episode().render()
    assert (
        "<episode>\n[turn 1, the model]\ncall search\n[turn 1, tool search]\nnothing found\n[turn 2, the model]\n42\n"
        "[turn 2, the environment]\ntoo large\n</episode>"
    ) in text
    assert "<raw>" not in text
    assert "what it and its environment said in every turn" in text


def test_a_long_episode_is_cut_in_the_middle_and_the_request_stays_bounded() -> None:
    text = episode([{"role": "assistant", "content": f"{i}:" + "x" * 9000} for i in range(100)]).render()
    assert len(text) < 4 * SHOWN_CHARS
    assert "\n0:x" in text
    assert "\n99:x" in text
    assert "\n50:x" not in text
    assert f"[... {100 - SHOWN_MESSAGES} messages left out ...]" in text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind])
def test_each_kind_of_component_has_a_request_of_its_own(kind: str) -> None:
    name = f"{kind}:units" if kind in ("tool", "skill") else kind
    prompt = ReflectionPrompt("text", episode().failures, component=name, whole="<<all>>")
    what, how = KINDS[kind]
    assert f"You revise {what}, {name}, and nothing else" in prompt.render()
    assert how in prompt.render()
    assert how not in episode().render()


def test_a_template_of_the_user_replaces_the_request(tmp_path: Path) -> None:
    file = tmp_path / "tool.txt"
    file.write_text("Tool {component} is {context} in {whole}.\n{failures}\nNot a slot: {answer}")
    templates = load_templates({"tool": str(file)})
    assert template_for(templates, "tool:search") == file.read_text()
    assert template_for(templates, "system") == template_for(templates, "") == ""
    prompt = ReflectionPrompt(
        "{whole}", episode().failures, component="tool:search", whole="W", template=templates["tool"]
    )
    text = prompt.render()
    assert text.startswith(
        "Tool tool:search is {whole} in W.\n## Failure 1\n"
    )  # what fills a slot is not read for slots
    assert text.endswith("Not a slot: {answer}")
    everywhere = {"context": "c {context}{failures}", "skill": "s", "skill:a": "a"}
    assert [template_for(everywhere, name)[0] for name in ("skill:a", "skill:b", "protocol", "")] == [*"ascc"]


@pytest.mark.parametrize(
    ("text", "said"), [("{context} only", "does not hold {failures}"), (None, "cannot be read")]
)
def test_a_template_that_cannot_be_is_one_sentence(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "t.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"fast.reflection_templates.context=.*{said}"):
        load_templates({"context": str(file)})
    with pytest.raises(ValueError, match="should match pattern"):
        FastConfig.model_validate({"reflection_templates": {"sytem": str(file)}})


def taken(reply: Reply) -> str | Refusal:
    return extract(reply, known_texts=["old"], count_tokens=len, max_tokens=40)


def test_a_proposal_is_taken_as_it_is_and_refused_like_any_other() -> None:
    assert taken(Reply.proposal(" use ```code``` here ")) == "use ```code``` here"
    assert taken(Reply.proposal("old")) == Refusal("duplicate")
    assert taken(Reply.proposal(" ")) == Refusal("empty")
    assert taken(Reply.proposal("x" * 41)) == Refusal("too_long")
    assert taken(Reply("old text without a fence", "stop")) == Refusal("unfenced")


MINE = """
from fst_fast.fast.reflection import Reply

class Adds:
    def __init__(self, word, times=1):
        self.word = " ".join([word] * times)
    def __call__(self, prompts, *, seeds):
        return [Reply.proposal(f"{p.context} {self.word}") for p in prompts]

class Fixed:
    pass

class Broken:
    def __init__(self):
        raise KeyError("no key")
"""


def test_a_class_of_the_user_gets_its_arguments_and_the_batch(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    args = {"word": "now", "times": 2}
    reflect = make_reflector(f"{tmp_path}/mine.py:Adds", args, generate=None)
    replies = reflect([ReflectionPrompt("go", []), ReflectionPrompt("stop", [])], seeds=[1, 2])
    assert [taken(reply) for reply in replies] == ["go now now", "stop now now"]
    for name, more, said in (
        ("Adds", {}, "do not fit .*missing a required argument: 'word'"),
        ("Adds", {"word": "x", "tims": 2}, "unexpected keyword argument 'tims'"),
        ("Fixed", {}, "its objects cannot be called"),
        ("Broken", {}, "cannot be made with .*KeyError: 'no key'"),
    ):
        with pytest.raises(UserError, match=said):
            make_reflector(f"{tmp_path}/mine.py:{name}", more, generate=None)


def test_a_registered_proposer_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(args: Any, generate: Any, style: str) -> Any:
        return lambda prompts, *, seeds: [Reply.proposal(f"{args['word']} {s}") for s in seeds]

    monkeypatch.setitem(REFLECTORS, "mine", make)
    reflect = make_reflector("mine", {"word": "hi"}, generate=None)
    assert [taken(reply) for reply in reflect([ReflectionPrompt("go", [])], seeds=[7])] == ["hi 7"]
