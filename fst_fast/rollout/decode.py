"""Forest decoding: prefill what is needed next, decode a batch of slots, let finished sequences leave and waiting ones enter.

The forward is the transformers one of any model whose attention is "fst" (fst_fast.policy.attention), called without a cache: the plan given along
does the attention and keeps the keys and values in a pool (prefill.py, cascade.py, kv_pool.py). On the CPU the fused forward takes its
place where it can (policy/cpu_forward.py).

All memory that grows with the prompts and responses is counted in tokens of keys and values and stays within `kv_tokens`: first responses are
kept in pages (room.py) and slots taken away, then windows become smaller, then sequences wait, those that are least far last of all. What nobody
needs any more is held for later calls while there is plenty of room.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fst_fast.policy.packing import to_device
from fst_fast.rollout.cascade import DecodePlan, Suffixes
from fst_fast.rollout.graphs import StepGraph
from fst_fast.rollout.kv_pool import KVPool
from fst_fast.rollout.kv_tree import Block, TreeCache, group_blocks
from fst_fast.rollout.prefill import PrefillPlan
from fst_fast.rollout.prefixes import PrefixCache, adopt
from fst_fast.rollout.prompt_tree import JOIN_TOKENS, Ints, forest_of, prompt_tree
from fst_fast.rollout.responses import Responses
from fst_fast.rollout.room import room_for
from fst_fast.rollout.scheduler import Slots

Forward = Callable[[Tensor, Tensor, Any, Tensor | None], Tensor]
"""(ids [N], positions [N], plan, rows [R] or None for all) -> logits [R, V]"""

KEPT_FRACTION = 4
"""What no running sequence needs is held while all that is held stays below a quarter of the memory."""


def transformers_forward(model: Any) -> Forward:
    def forward(ids: Tensor, positions: Tensor, plan: Any, rows: Tensor | None) -> Tensor:
        decoding = rows is None  # one token per sequence: a batch; else one row of tokens
        logits: Tensor = model(
            input_ids=ids[:, None] if decoding else ids[None],
            position_ids=positions[:, None] if decoding else positions[None],
            plan=plan,
            use_cache=False,
            logits_to_keep=1 if rows is None or not len(rows) else rows,
        ).logits
        return logits[:, -1] if decoding else logits[0]

    return forward


class ForestDecoder:
    """Decodes one list of prompts into `responses`.

    layers, dtype, device: of the model. kv_tokens: what may be held at a time, of prompts and responses together; every prompt with a whole
    response must fit alone. logits_tokens: as many take the memory of the logits at one prompt's end. prefixes: what earlier calls left, and
    where this one leaves its own. pool: where keys and values lie, those of `prefixes` too; graph: what runs the decode steps.
    keep_responses: leave what was computed of the responses, too, for the next turns of episodes.
    tokens_computed: positions that went through the model so far, idle slots included; tokens_reused: prompt tokens taken from earlier calls.
    """

    def __init__(
        self,
        forward: Forward,
        prompts: Sequence[Ints],
        responses: Responses,
        *,
        layers: int,
        dtype: torch.dtype,
        device: torch.device,
        max_batch: int,
        prefill_tokens: int,
        kv_tokens: int,
        logits_tokens: int,
        prefixes: PrefixCache,
        pool: KVPool,
        join_tokens: int = JOIN_TOKENS,
        graph: StepGraph | None = None,
        keep_responses: bool = False,
    ) -> None:
        self.keep_responses = keep_responses
        self._kept: list[tuple[Ints, Block]] = []  # of responses that have ended: which, and a row for each
        self.forward, self.responses, self.prefixes = forward, responses, prefixes
        self.layers, self.dtype, self.device = layers, dtype, device
        self.prefill_tokens, self.kv_tokens, self.logits_tokens = prefill_tokens, kv_tokens, logits_tokens
        self.prompt_length = np.array([len(p) for p in prompts], dtype=np.int64)
        forest = forest_of(prompts, join_tokens=join_tokens)
        found = prefixes.find(forest)
        self.tree = prompt_tree(forest, max_node_tokens=prefill_tokens, cuts=found.cuts)
        self.cache = TreeCache(self.tree, pool)
        self.pool, self.graph = pool, graph
        self.logits = adopt(self.cache, forest, found, layers=layers)
        self.tokens_reused = int(found.cuts.sum())
        self.order = np.argsort(self.tree.leaf, kind="stable")
        self.leaves = self.tree.leaf[self.order]
        self.response_tokens = max(responses.limit - 1, 1)  # the last token is never fed
        self.room = room_for(
            self.tree, self.order, response_tokens=self.response_tokens, kv_tokens=kv_tokens, slots=max_batch
        )
        self.max_batch = self.room.slots
        assert self.max_batch, "a sequence that does not fit alone"
        self.fed = np.zeros(len(prompts), dtype=np.int64)  # tokens of each response whose keys are there
        self.restarted = 0  # responses that gave their pages back and were fed again
        wanted = pool.tokens + len(self.tree.token_ids) + self.room.pages * self.room.page
        pool.limit = kv_tokens
        pool.resize(min(kv_tokens, wanted))
        self.tokens_computed = 0
        self.most_tokens = 0  # ever held at a time
        self._suffix_tokens = 0
        self._free = self._running = 0  # pages left, and sequences that run, while slots are refilled
        # nodes before _next are in the cache or were; this call has computed none from _ahead on
        self._next = self._ahead = 0

    def run(self) -> None:
        if self.logits:  # of prompts that an earlier call has ended
            leaves = np.array(sorted(self.logits))
            self._first_tokens_at(leaves, torch.stack([self.logits[leaf] for leaf in leaves.tolist()]))
        waiting = self.order
        while len(waiting):
            slots = Slots(waiting, self.max_batch, regrow=self.room.most > 1)
            self._decode(slots)
            waiting = slots.order[slots.next :]
        self._give_back()
        self.prefixes.keep(self._with_responses(), self.logits)
        self.pool.resize(0)  # to what is held for later calls

    def _decode(self, slots: Slots) -> None:
        """Until no slot is left; sequences that have found no room by then still wait."""
        page, most = self.room.page, self.room.most
        pages = min(self.room.pages, slots.limit * most)
        self._suffix_tokens = pages * page
        if self._held() + pages * page > self.kv_tokens:
            self.prefixes.forget()
        if self._held() + pages * page > self.kv_tokens:
            self._make_room()
        suffixes = Suffixes(self.pool, slots.limit, page=page, most=most, pages=pages)
        plan: DecodePlan | None = None
        while True:
            while slots.should_refill() or not self._grow(slots, suffixes):
                if slots.live.all():  # too few pages, and none that somebody has done with
                    self._put_back(slots, suffixes)
                if not self._refill(slots, suffixes):
                    return
                plan = None
            if plan is None:
                self._give_back()
                plan = DecodePlan(self.cache, self.tree.path[slots.sequence], suffixes, device=self.device)
            self._step(slots, suffixes, plan)
            slots.live &= ~self.responses.ended(slots.sequence)

    def _refill(self, slots: Slots, suffixes: Suffixes) -> bool:
        """Let waiting sequences take the place of those that have ended; False if no slot is left."""
        if self.keep_responses:
            self._keep_ended(slots, suffixes)
        suffixes.drop(np.flatnonzero(~slots.live))
        self._free, self._running = len(suffixes.free), int(slots.live.sum())
        stay, fresh = slots.refill(self._ready)
        if not len(stay):
            return False
        # Before slots move: whole responses then stay side by side.
        suffixes.grow(stay[fresh], self.responses.length[slots.sequence[fresh]])
        suffixes.keep(stay, slots.limit, self.device)
        self._suffix_tokens = suffixes.span.tokens
        return True

    def _grow(self, slots: Slots, suffixes: Suffixes) -> bool:
        """Let each response have room for its next token; False if there is none for all of them."""
        live = np.flatnonzero(slots.live)
        return suffixes.grow(live, self.fed[slots.sequence[live]] + 1)

    def _put_back(self, slots: Slots, suffixes: Suffixes) -> None:
        """Let the sequences that are least far wait again, and give up their keys, until the others have a page each."""
        free, others = len(suffixes.free), len(slots.sequence)
        behind = np.argsort(self.fed[slots.sequence], kind="stable")
        count = 0
        while free < others and others > 1:
            free, others, count = free + int(suffixes.held[behind[count]]), others - 1, count + 1
        self.fed[slots.sequence[behind[:count]]] = 0
        self.restarted += count
        slots.put_back(behind[:count])

    def _ready(self, sequence: int) -> bool | None:
        """Prefill up to this sequence's prompt. Does it go on after its first token? None: there is no room for it now."""
        pages = -(-max(int(self.responses.length[sequence]), 1) // self.room.page)
        others = self._running + 1 if self.room.most > 1 else 0  # each of which may soon need a page
        if self._running and self._free < pages + others:
            return None
        while self._next <= self.tree.leaf[sequence]:
            if self.cache.filled[self._next]:
                self._next += 1
            elif not self._prefill():
                return None
        if self.responses.ended(np.array([sequence]))[0]:
            return False
        self._free, self._running = self._free - pages, self._running + 1
        return True

    def _window(self) -> Ints:
        """The next nodes to compute, as many as `prefill_tokens` and the memory left allow."""
        missing, tokens, count = self._missing()
        if self._taken(missing[:count]) > self._room():
            self._make_room()
            missing, tokens, count = self._missing()
            room = self._room()
            fitting = bisect_right(range(1, count + 1), room, key=lambda n: self._taken(missing[:n]))
            count = fitting or int(tokens[0] <= room)
        window: Ints = missing[:count]
        return window

    def _taken(self, nodes: Ints) -> int:
        """Tokens that these nodes take once they are computed: with the padding of their blocks and the logits at the ends of prompts."""
        lengths = self.tree.end[nodes] - self.tree.start[nodes]
        blocks = group_blocks(self.tree.level[nodes], lengths)
        ends = np.isin(nodes, self.leaves).sum()
        return sum(len(own) * int(lengths[own].max()) for own in blocks) + self.logits_tokens * int(ends)

    def _missing(self) -> tuple[Ints, Ints, int]:
        """The nodes that are to be computed, their tokens summed up, and how many of them make one forward."""
        missing = self._next + np.flatnonzero(~self.cache.filled[self._next :])
        tokens = np.cumsum(self.tree.end[missing] - self.tree.start[missing])
        return missing, tokens, max(1, int(np.searchsorted(tokens, self.prefill_tokens, side="right")))

    def _room(self) -> int:
        return self.kv_tokens - self._suffix_tokens - self._prompt_tokens()

    def _prompt_tokens(self) -> int:
        kept = sum(block.tokens for _, block in self._kept)
        return self.cache.tokens + self.prefixes.tokens + kept + self.logits_tokens * len(self.logits)

    def _held(self) -> int:
        """Tokens of everything that is held, of the responses too."""
        return self.pool.tokens + self.logits_tokens * len(self.logits)

    def _prefill(self) -> bool:
        """Compute a window of nodes and draw the first token of every sequence whose prompt ends in it; False: there was no room."""
        tree, nodes = self.tree, self._window()
        if not len(nodes):
            return False
        read = np.intersect1d(nodes, self.leaves)
        plan = PrefillPlan(self.cache, nodes, read, device=self.device, dtype=self.dtype)
        self.most_tokens = max(self.most_tokens, self.kv_tokens - self._room())
        ids, positions = (
            torch.as_tensor(x[plan.tokens_of], device=self.device) for x in (tree.token_ids, tree.depth)
        )
        logits = self.forward(ids, positions, plan, torch.as_tensor(plan.read_rows, device=self.device))
        self.tokens_computed += len(ids)
        self._ahead = int(nodes[-1]) + 1
        if len(read):
            self.logits |= dict(zip(read.tolist(), logits, strict=True))
            self._first_tokens_at(read, logits)
        return True

    def _first_tokens_at(self, leaves: Ints, logits: Tensor) -> None:
        """Draw the first token of every sequence whose prompt ends at one of `leaves`, ascending, unless it has one. logits [leaves, V]."""
        at = np.minimum(np.searchsorted(leaves, self.leaves), len(leaves) - 1)
        ended = np.flatnonzero(leaves[at] == self.leaves)
        ended = ended[self.responses.length[self.order[ended]] == 0]
        sequences, row = self.order[ended], at[ended]
        for begin in range(0, len(sequences), self.max_batch):
            some = slice(begin, begin + self.max_batch)
            here = logits.index_select(0, torch.as_tensor(row[some], device=self.device))
            self.responses.draw(here, sequences[some], np.ones(len(sequences[some]), dtype=bool))

    def _needed(self) -> Ints:
        """The nodes that an unfinished sequence stands under, of those that are there."""
        nodes = np.unique(self.tree.path[self.responses.finish == ""])
        needed: Ints = nodes[(nodes >= 0) & self.cache.filled[nodes]]
        return needed

    def _give_back(self) -> None:
        """Hold what nobody needs only while memory is plenty."""
        if KEPT_FRACTION * self._prompt_tokens() > self.kv_tokens:
            self.prefixes.forget()
            self._kept.clear()
            self.cache.keep_only(self._needed())
            self.logits.clear()

    def _make_room(self) -> None:
        """Hold only what has to be: rows of blocks too, and nothing of an earlier call that is not its turn yet."""
        self.prefixes.forget()
        self._kept.clear()
        self.logits.clear()
        self.cache.filled[self._next :] &= np.arange(self._next, len(self.cache.filled)) < self._ahead
        self.cache.keep_only(self._needed(), compact=True)

    def _keep_ended(self, slots: Slots, suffixes: Suffixes) -> None:
        """Copy the keys and values of responses that have ended out of their slots, while memory is plenty. The last token is not fed."""
        fed = np.where(self.responses.ended(slots.sequence), self.fed[slots.sequence], 0)
        ended = np.flatnonzero((slots.sequence >= 0) & ~slots.live & (fed > 0))
        if not len(ended):
            return
        longest = int(fed[ended].max())
        tokens = len(ended) * longest
        many = KEPT_FRACTION * (self._prompt_tokens() + tokens) > self.kv_tokens
        if many or self._held() + tokens > self.kv_tokens:
            return
        block = Block(fed[ended], self.pool.take(tokens))
        rows = torch.as_tensor(
            suffixes.rows(ended[:, None], np.arange(longest)[None]).ravel(), device=self.device
        )
        for layer in range(len(self.pool.k)):
            block.span.put(layer, *(x[layer].index_select(0, rows) for x in (self.pool.k, self.pool.v)))
        self._kept.append((slots.sequence[ended], block))

    def _with_responses(self) -> TreeCache:
        """The cache, the kept responses as children of their prompts' ends."""
        if not self._kept:
            return self.cache
        tree, count = self.tree, len(self.tree.start)
        who = np.concatenate([sequences for sequences, _ in self._kept])
        fed = self.responses.length[who] - 1
        ids = [self.responses.ids[i, :n] for i, n in zip(who, fed, strict=True)]
        end = len(tree.token_ids) + np.cumsum(fed)
        grown = replace(
            tree,
            token_ids=np.concatenate([tree.token_ids, *ids]),
            start=np.concatenate([tree.start, end - fed]),
            end=np.concatenate([tree.end, end]),
            parent=np.concatenate([tree.parent, tree.leaf[who]]),
        )
        cache = TreeCache(grown, self.pool)
        for number, block in self.cache.blocks.items():
            nodes = np.flatnonzero(self.cache.block_of == number)
            cache.add(block, nodes, self.cache.row_of[nodes])
        for sequences, block in self._kept:
            nodes = count + np.arange(len(sequences))
            cache.add(block, nodes, np.arange(len(sequences)))
            count += len(sequences)
        return cache

    def _step(self, slots: Slots, suffixes: Suffixes, plan: DecodePlan) -> None:
        """Feed each slot's next token and draw what follows its last one. An idle slot feeds the last one again that it has fed, so that its keys stay
        what they are; a response that has been put back feeds its tokens one a step and draws none until it has fed all."""
        who, live = slots.sequence, slots.live
        seen = self.fed[who] + live  # suffix tokens after this one is fed
        token = self.responses.ids[who, seen - 1]
        number, at = np.divmod(seen - 1, suffixes.page)
        page = suffixes.first(suffixes.table[np.arange(len(who)), number])
        depth = self.prompt_length[who] + seen - 1
        given = np.stack([token, depth, page + at, seen, number, page, *self.responses.streams(who)])
        sent = to_device(torch.as_tensor(given), self.device)  # one copy, for which the host does not wait
        ids, positions, row, lengths, *pages = sent[:6]
        plan.step(row, lengths, pages, int(seen.max()), self.dtype)
        if self.graph is None:
            logits = self.forward(ids, positions, plan, None)
        else:
            logits = self.graph.run(self.forward, ids, positions, plan)
        self.tokens_computed += len(who)
        self.fed[who] = seen
        drawn = live & (seen == self.responses.length[who])
        if drawn.any():
            self.responses.draw(logits, who, drawn, sent[6:])
