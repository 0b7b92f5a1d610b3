"""Small tokenizers with chat templates in the style of model families, written for these tests.

A byte-level BPE without merges, so every character of a text is a token (or several), plus the family's special tokens. `Metaspace` families
(Gemma, Mistral) have a Unigram-like pre-tokenizer instead, which puts a mark in front of words.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

LLAMA_DATED = (
    """{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}"""
    """{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}{{ bos_token }}"""
    """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"""
    """{%- else %}{%- set system = "" %}{%- endif %}"""
    """{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" + system + "<|eot_id|>" }}"""
    """{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"""
    """{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
)

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + m['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model
' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}{% else %}\
{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}[INST] \
{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"""

QWEN = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content.split('</think>')[-1].lstrip('\n') if '</think>' in m.content else m.content %}
        {{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% elif m['role'] == 'user' %}\
{{ '<｜User｜>' + m['content'] }}{% else %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"""

PHI = """{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

SKIPS_SYSTEM = """{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

NO_TURN = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}"""

CHATML_TOKENS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
LLAMA_TOKENS = ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")

# name -> (template, special tokens with the end first, further added tokens, bos, word pieces instead of bytes)
FAMILIES: dict[str, tuple[str, tuple[str, ...], tuple[AddedToken, ...], str | None, bool]] = {
    "chatml": (CHATML, CHATML_TOKENS, (), None, False),
    "llama3": (LLAMA, LLAMA_TOKENS, (), "<|begin_of_text|>", False),
    "dated": (LLAMA_DATED, LLAMA_TOKENS, (), "<|begin_of_text|>", False),
    "gemma": (
        GEMMA,
        ("<end_of_turn>", "<bos>", "<start_of_turn>"),
        (AddedToken("\n\n", normalized=False),),
        "<bos>",
        True,
    ),
    "mistral": (MISTRAL, ("</s>", "<s>", "[INST]", "[/INST]"), (), "<s>", True),
    "qwen3": (
        QWEN,
        CHATML_TOKENS,
        tuple(
            AddedToken(word, normalized=False)
            for word in ("<think>", "</think>", "<tool_response>", "</tool_response>")
        ),
        None,
        False,
    ),
    "deepseek": (
        DEEPSEEK,
        ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
        tuple(AddedToken(word) for word in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")),
        "<｜begin▁of▁sentence｜>",
        False,
    ),
    "phi": (
        PHI,
        ("<|endoftext|>",),
        tuple(
            AddedToken(f"<|{word}|>", special=True, rstrip=True)
            for word in ("system", "user", "assistant", "end")
        ),
        None,
        False,
    ),
    "skips_system": (SKIPS_SYSTEM, CHATML_TOKENS, (), None, False),
    "no_turn": (NO_TURN, CHATML_TOKENS, (), None, False),
}


def make(family: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """The family's tokenizer, with its template or another."""
    own, special, added, bos, pieces = FAMILIES[family]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if pieces:
        # As a sentencepiece model: spaces are marked, and the vocabulary holds the special tokens as pieces.
        alphabet = ["<unk>", *special, *(t.content for t in added), "▁", *map(chr, range(33, 127)), "\n"]
        byte = [f"<0x{b:02X}>" for b in range(256)]
        vocabulary = [(piece, 0.0 if i <= len(special) else -5.0) for i, piece in enumerate(alphabet + byte)]
        backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])
    names = {"bos_token": bos} if bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0], **names)
    tokenizer.chat_template = own if template is None else template
    return tokenizer
