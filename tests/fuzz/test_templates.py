"""Any template, messages and text: one sentence or a prompt, and no special token arises from text."""

from __future__ import annotations

from datetime import datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.contracts import Context, Problem
from fst_fast.errors import UserError
from fst_fast.rollout.prompt import Chat
from fst_fast.rollout.template import open_chat
from tests.fst_fast.families import FAMILIES, make

FUZZ = settings.get_profile("fuzz")
DATE = datetime(2026, 3, 14, 9, 26)
TOKENIZERS = {name: make(name) for name in FAMILIES}
CHATS = {name: open_chat(tokenizer, date=DATE)[0] for name, tokenizer in TOKENIZERS.items()}
WORDS = sorted({word for chat in CHATS.values() for word in chat.special.words.values()})

pieces = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(WORDS).map(lambda word: word[: len(word) // 2]),
    st.sampled_from(WORDS).map(lambda word: word[len(word) // 2 :]),
    st.sampled_from(
        ["5", " ", "\n", "\n\n", "assistant", "<", "|>", "[", "system\n", "\u2028", "é", "😀", "\x00"]
    ),
    st.text(max_size=6),
)
texts = st.lists(pieces, max_size=6).map("".join)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool", "end"]), "content": texts}),
    max_size=4,
)  # fmt: skip

# fmt: off
expressions = st.sampled_from([
    "m['content']", "m.content", "m['role']", "m['role'] + m['content']", "m['content'] | trim", "m['content'] | upper", "m['content'][:9]",
    "m['content'].split('</think>')[-1]", "m['content'] | replace('<', '(')", "messages[0]['content']", "messages | length", "bos_token",
    "eos_token", "pad_token", "nothing", "nothing.more", "strftime_now('%d %b')", "raise_exception('no')", "tools", "m | tojson", "loop.index",
    "m.tool_calls", "enable_thinking", "'<|im_start|>'", "'<|im_' + 'start|>'", "1 / 0", "range(3) | list", "namespace(a=m).a", "m.items()",
    "(m['content'] ~ m['role']) | title", "m['content'] | length > 5", "[m] | map(attribute='content') | join", "messages[9]", "{}['a']['b']",
])
conditions = st.sampled_from([
    "m['role'] == 'system'", "m['role'] == 'user'", "loop.last", "add_generation_prompt", "tools", "bos_token is defined", "loop.index0 % 2 == 0",
    "'<' in m['content']", "m['content'].startswith('a')", "not enable_thinking", "nothing.more",
])
# fmt: on
blocks = st.recursive(
    st.one_of(
        expressions.map(lambda e: f"{{{{ {e} }}}}"),
        st.sampled_from(WORDS),
        st.sampled_from(
            [
                "\n",
                " ",
                "{% break %}",
                "{% set x = m %}",
                "{%- if x -%}",
                "{% endif %}",
                "{{",
                "%}",
                "{#",
                "#}",
                "{% macro f() %}",
            ]
        ),
    ),
    lambda inner: st.one_of(
        st.tuples(conditions, inner, inner).map(
            lambda t: f"{{% if {t[0]} %}}{t[1]}{{% else %}}{t[2]}{{% endif %}}"
        ),
        inner.map(lambda i: f"{{% for m in messages %}}{i}{{% endfor %}}"),
        st.tuples(inner, inner).map("".join),
        inner.map(lambda i: f"{{% generation %}}{i}{{% endgeneration %}}"),
    ),
    max_leaves=8,
)  # fmt: skip
templates = st.one_of(
    st.tuples(blocks, blocks).map(
        lambda t: f"{{% for m in messages %}}{t[0]}{{{{ m['content'] }}}}{t[1]}{{% endfor %}}"
    ),
    st.sampled_from([chat.template.source for chat in CHATS.values()]).flatmap(
        lambda source: st.integers(0, len(source)).flatmap(
            lambda at: blocks.map(lambda block: source[:at] + block + source[at:])
        )
    ),
    blocks,
)


def one_sentence(error: UserError) -> None:
    assert "\n" not in str(error)
    assert 10 < len(str(error)) < 800


def render(chat: Chat, context: Context, problem: Problem) -> list[int] | None:
    try:
        return [int(i) for i in chat.prompt(context, problem)]
    except UserError as error:
        one_sentence(error)
        return None


@settings(FUZZ)
@given(st.sampled_from(list(CHATS)), texts, messages)
def test_text_never_makes_a_special_token_in_any_family(bounded, family, context, chat_messages):
    chat = CHATS[family]
    problem = Problem("p", chat_messages, None)
    ids = bounded(lambda: render(chat, Context.of(context), problem))
    if ids is None:
        return
    harmless = Problem("p", [{**m, "content": "x" if m["content"] else ""} for m in chat_messages], None)
    plain = render(chat, Context.of("x" if context else ""), harmless)
    if plain is not None and not any(len(m["content"]) and not m["content"].strip() for m in chat_messages):
        assert chat.special.sequence(ids) == chat.special.sequence(plain)


@settings(FUZZ)
@given(st.sampled_from(list(CHATS)), texts)
def test_a_text_alone_has_no_special_token_and_is_read_back(bounded, family, text):
    chat = CHATS[family]
    ids = bounded(lambda: chat.special.encode_text(text))
    assert chat.special.sequence(ids) == []
    if family not in ("gemma", "mistral"):  # whose tokenizers write a space at the start
        assert (
            chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
        )


@settings(FUZZ)
@given(st.sampled_from(list(TOKENIZERS)), templates, texts, messages)
def test_any_template_is_refused_in_one_sentence_or_renders(
    bounded, family, template, context, chat_messages
):
    tokenizer = TOKENIZERS[family]
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        chat, findings = bounded(lambda: open_chat(tokenizer, date=DATE))
    except UserError as error:
        one_sentence(error)
        return
    finally:
        tokenizer.chat_template = before
    assert "\n" not in findings.line
    ids = bounded(lambda: render(chat, Context.of(context), Problem("p", chat_messages, None)))
    if ids is not None:
        assert ids == render(chat, Context.of(context), Problem("p", chat_messages, None))
