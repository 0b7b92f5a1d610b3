"""Whether a response that has just got a token ends with it, by a text (rollout.stop).

Decoding the end of every response at every step would cost more than the sampling of its tokens. A stop text can only be completed by a token that brings
its last character or a part of it, and that is known of a token once and for all: most tokens are dismissed by looking them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
REPLACEMENT = "\ufffd"  # what bytes decode to that are no whole character


class StopTexts:
    """decode(ids) gives the text of tokens. Calling it with the ids [n] of a response so far says whether its last token completes one of `texts`."""

    def __init__(self, texts: Sequence[str], decode: Callable[[Ints], str]) -> None:
        self.texts, self.decode = tuple(texts), decode
        self.tail = max(len(text.encode()) for text in self.texts) + 1  # a token is at least one byte of text
        self._last = {text[-1] for text in self.texts}
        # Decoders leave out a blank in front of the first token, so a token alone does not tell whether it brings one.
        self._always = any(character.isspace() for character in self._last)
        self._may_end: dict[int, bool] = {}

    def __call__(self, ids: Ints) -> bool:
        if not self._always and not self._may_complete(int(ids[-1])):
            return False
        text = self.decode(ids[-self.tail :])
        return any(stop in text for stop in self.texts)

    def _may_complete(self, token: int) -> bool:
        """Whether the token has the last character of a stop text in it, or bytes of a character that others complete."""
        known = self._may_end.get(token)
        if known is None:
            text = self.decode(np.array([token], dtype=np.int64))
            known = REPLACEMENT in text or not self._last.isdisjoint(text)
            self._may_end[token] = known
        return known
