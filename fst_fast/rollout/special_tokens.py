"""Special tokens come from the chat template alone: text that spells one is encoded as text.

A tokenizer cuts its added tokens out of any string, whoever wrote it. So the user's, the data's and the models' text can open a turn, end a
response or start a thought. Here such a token is found by its place in the string, and the characters that spell it are encoded once more by a
copy of the tokenizer that does not know these tokens. All other ids stay as they are, so text that spells no special token keeps its ids.
`split_special_tokens` of transformers leaves out added tokens that are not marked as special, such as Qwen3's <think>.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from fst_fast.errors import UserError

Span = tuple[int, int]


class SpecialTokens:
    """The control tokens of a tokenizer.

    words: id -> text. They are the tokens marked as special, and the added tokens that are no pieces of the model's own vocabulary or that the
    chat template writes. Gemma's added "\\n\\n" or <table> is thus ordinary text, Qwen3's <think> is not.
    """

    def __init__(self, tokenizer: Any, template: str = "") -> None:
        self.tokenizer = tokenizer
        self.backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        own = self.backend.get_vocab(with_added_tokens=False) if self.backend is not None else {}
        self.words: dict[int, str] = dict(
            zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        )
        for number, token in tokenizer.added_tokens_decoder.items():
            word = str(token.content)
            if word.strip() and (token.special or word not in own or word in template):
                self.words[int(number)] = word
        ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        # the id of any word that is not in the vocabulary
        self.unknown: int | None = tokenizer.unk_token_id if tokenizer.unk_token_id not in ends else None
        self._heads = {word[:n] for word in self.words.values() for n in range(1, len(word))}
        self._tails = {word[n:] for word in self.words.values() for n in range(1, len(word))}
        self._longest = max((len(word) for word in self.words.values()), default=0)
        self._known: dict[str, str | None] = {}

    def spelt(self, text: str) -> str | None:
        """The first special token that arises where `text` is encoded as a whole, or None."""
        if text not in self._known:
            if len(self._known) > 65536:
                self._known.clear()
            found = [
                self.words[i] for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]
                if i in self.words and (i != self.unknown or self.words[i] in text)
            ]  # fmt: skip
            self._known[text] = found[0] if found else None
        return self._known[text]

    def touches(self, text: str) -> bool:
        """Whether `text` spells a special token or could be a part of one that reaches beyond its ends."""
        if self.spelt(text) is not None:
            return True
        inner = text.strip()
        return any(
            part[-n:] in self._heads or part[:n] in self._tails
            for part in (text, inner)
            for n in range(1, min(self._longest, len(part) + 1))
        )

    def sequence(self, ids: Sequence[int]) -> list[int]:
        """The special tokens among `ids`, in order."""
        return [i for i in ids if i in self.words and i != self.unknown]

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text that nobody but a user, a data file, an environment or a model has written: no special token is among them.

        Raises UserError where the tokenizer cannot do that."""
        word = self.spelt(text)
        if word is not None and self.backend is None:
            raise UserError(
                f"the text {text[:60]!r} spells the special token {word!r}, and a tokenizer of the class {type(self.tokenizer).__name__} "
                "cannot encode it as text; use one with a tokenizer.json"
            )
        return self.encode(text, [] if word is None else [(0, len(text))])

    def encode(self, text: str, spans: Sequence[Span]) -> list[int]:
        """The ids of `text`, where special tokens that touch one of `spans` (character positions) are encoded as text. Spans need a tokenizer
        with a tokenizer.json (`backend`)."""
        if not spans:
            return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        return [number for number, _, _ in self.locate(text, spans)]

    def locate(self, text: str, spans: Sequence[Span]) -> list[tuple[int, int, int]]:
        """As `encode`, with the place of each id in the text: (id, start, end)."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        located: list[tuple[int, int, int]] = []
        for number, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            word = self.words.get(number)
            at = -1 if word is None else text.find(word, start, end)
            # A special token may take the white space beside it along.
            first, last = (start, end) if word is None or at < 0 else (at, at + len(word))
            if word is None or not any(first < b and a < last for a, b in spans):
                located.append((int(number), start, end))
                continue
            plain = self._plain.encode(text[start:end], add_special_tokens=False)
            located += [(i, start + a, start + b) for i, (a, b) in zip(plain.ids, plain.offsets, strict=True)]
        return located

    @cached_property
    def _plain(self) -> Tokenizer:
        """A copy of the tokenizer that knows no special token: neither as an added token nor as a piece of its vocabulary, and that puts
        nothing before a text."""
        assert self.backend is not None
        tree = json.loads(self.backend.to_str())
        words = set(self.words.values())
        tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] not in words]
        tree.update(post_processor=None, truncation=None, padding=None)
        tree["normalizer"] = _without_prefix(tree["normalizer"])
        tree["pre_tokenizer"] = _without_prefix(tree["pre_tokenizer"])
        _hide(tree["model"], words)
        return Tokenizer.from_str(json.dumps(tree))


def _without_prefix(step: Any) -> Any:
    """A normalizer or pre-tokenizer, as in tokenizer.json, that puts no space before the text."""
    if step is None:
        return None
    kind = step["type"]
    if kind == "Sequence":
        key = next(key for key in ("normalizers", "pretokenizers") if key in step)
        steps = [inner for inner in map(_without_prefix, step[key]) if inner is not None]
        return {**step, key: steps} if steps else None
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step


def _hide(model: dict[str, Any], words: set[str]) -> None:
    """Rename the words in a model's vocabulary, so that no text can be encoded to them. Changes the tree of tokenizer.json in place."""

    def hidden(word: str) -> str:
        return f"\U0010fffd{word}"

    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        for word in words & set(vocabulary):
            vocabulary[hidden(word)] = vocabulary.pop(word)
        if model.get("unk_token") in words:
            model["unk_token"] = hidden(model["unk_token"])
    else:  # Unigram: [piece, score] in the order of ids
        for entry in vocabulary:
            if entry[0] in words:
                entry[0] = hidden(entry[0])
    if "merges" in model:
        pairs = [(m, m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        model["merges"] = [m for m, pair in pairs if not words & {*pair, "".join(pair)}]
