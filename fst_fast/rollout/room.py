"""How many sequences run at a time, and how their responses share the memory that their prompts leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fst_fast.rollout.prompt_tree import Ints, PromptTree

PAGE = 64
"""Tokens of a page of a response's keys and values: a multiple of every tile of keys of the kernels, so that none crosses a page, and little against
a long response, of whose last page half is empty on average."""

EXPECTED = 4
"""With pages as many sequences run as have room for a quarter of the longest response each: responses seldom take half of what is allowed on
average, and those that run at a moment are half done on average."""


def shared_tokens(tree: PromptTree, order: Ints) -> Callable[[int], int]:
    """The most tokens that the prompts of so many sequences, consecutive in `order`, have, each shared part once."""
    length = tree.end - tree.start
    path = tree.path[order]
    sizes = np.where(path >= 0, length[path], 0)
    whole = sizes.sum(1)
    # tokens that the sequence before does not have
    new = np.where(path[1:] != path[:-1], sizes[1:], 0).sum(1)
    behind = np.concatenate([[0], np.cumsum(new)])

    def tokens(n: int) -> int:
        return int((whole[: len(order) - n + 1] + behind[n - 1 :] - behind[: len(order) - n + 1]).max())

    return tokens


class Room(NamedTuple):
    """slots: sequences that run at a time. pages, of `page` tokens each: for their responses together, the longest of which takes `most`."""

    slots: int
    page: int
    most: int
    pages: int


def room_for(tree: PromptTree, order: Ints, *, response_tokens: int, kv_tokens: int, slots: int) -> Room:
    """How at most `slots` sequences, consecutive in `order`, share `kv_tokens` with their prompts, each shared part of these once.

    Where not all of them have room for a whole response, and that is long, responses are kept in pages."""
    prompts, slots = shared_tokens(tree, order), min(slots, len(order))

    def fit(each: int, together: int) -> int:
        low, high = 0, slots
        while low < high:
            n = (low + high + 1) // 2
            low, high = (n, high) if prompts(n) + max(n * each, together) <= kv_tokens else (low, n - 1)
        return low

    whole, most = fit(response_tokens, 0), -(-response_tokens // PAGE)
    if whole < slots and most >= 2 * EXPECTED:
        paged = fit(-(-most // EXPECTED) * PAGE, most * PAGE)
        if paged > whole:
            return Room(paged, PAGE, most, min((kv_tokens - prompts(paged)) // PAGE, paged * most))
    return Room(whole, response_tokens, 1, whole)
