"""The mini world's tokenizer: one token per word, number or sign, with a chat template.

It is a real `PreTrainedTokenizerFast`, so no other module needs to know that the model is small. The vocabulary is
closed: special tokens, the numbers below 40, signs, and the words of the questions and of the instruction catalogue.
Text is lower-cased; anything else becomes <unk>. Decoding puts a space between tokens ("\\boxed{ 3 , 7 }"), which the verifier accepts.
"""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fst_fast.mini import world
from fst_fast.tasks import hidden_facts
from fst_fast.tasks.formula_choice import FORMULAS, LETTERS
from fst_fast.tasks.linked_facts import RELATIONS
from fst_fast.tasks.list_programs import OPERATIONS, PICKS
from fst_fast.tasks.star_graph import MINI_IDS

PAD, UNK, END = "<pad>", "<unk>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, UNK, SYSTEM, USER, ASSISTANT, END)
SIGNS = (",", ".", ":", "?", "<", "\\boxed{", "}", "=", "*", "+")
QUESTION_WORDS = frozenset(
    {"edges", "path", "from", "to", "list", "facts", *OPERATIONS, *PICKS, *RELATIONS, *LETTERS, *FORMULAS}
    | {quantity for first, _, second in FORMULAS.values() for quantity in (first, second)}
)

# One word, one number, "\boxed{" or one sign; white space is a separator and is dropped.
_PIECE = r"\\boxed\{|[a-z]+|[0-9]+|[^\sa-z0-9]"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }} {{ message['content'] }} {{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# The base `mini_tools`: besides, calls in the Hermes syntax, whose names are one token each, with quotes and colon.
TOOLS, TOOL = "<|tools|>", "<|tool|>"
_TOOL_PIECE = rf'</?tool_call>|"[a-z]+":?|\}}\}}|{_PIECE}'
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}"
    "{{ '<|tools|> ' + tool['function']['name'] + ' : ' + tool['function']['description'] + '<|end|>' }}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call> ' + call['function'] | tojson + ' </tool_call>' }}{% endfor %}"
    "{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def vocabulary() -> dict[str, int]:
    words = {w for i in world.CATALOGUE for w in re.findall(_PIECE, i.text)} | QUESTION_WORDS
    tokens = [*SPECIAL, *SIGNS, *(str(n) for n in range(MINI_IDS)), *sorted(words - set(SIGNS))]
    return {token: i for i, token in enumerate(tokens)}


def tool_vocabulary() -> dict[str, int]:
    texts = [
        *(i.text for i in world.TOOL_CATALOGUE),
        *(hidden_facts.call_text(0, relation) for relation in RELATIONS),
        f"find {' '.join(RELATIONS)} : ? , \\boxed{{ }} {hidden_facts.TOOL} {hidden_facts.NOTHING}",
        "error : the argument of what : field required",  # what is said of an invalid call
    ]
    words = {w for text in texts for w in re.findall(_TOOL_PIECE, text)}
    numbers = [str(n) for n in range(MINI_IDS)]
    tokens = [*SPECIAL, TOOLS, TOOL, *numbers, *sorted(words - set(numbers))]
    return {token: i for i, token in enumerate(tokens)}


def make_tokenizer(tools: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of the base `mini`, or of `mini_tools`."""
    backend = Tokenizer(models.WordLevel(tool_vocabulary() if tools else vocabulary(), unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    piece = Regex(_TOOL_PIECE if tools else _PIECE)
    backend.pre_tokenizer = pre_tokenizers.Split(piece, behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, *((TOOLS, TOOL) if tools else ())],
        chat_template=TOOL_TEMPLATE if tools else CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )
