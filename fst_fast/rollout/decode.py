"""Forest decoding: prefill what is needed next, decode a batch of slots, let finished sequences leave and waiting ones enter.

The model is any unmodified transformers model whose attention is "fst" (fst_fast.policy.attention): it is called without a cache, and the
plan given along does the attention and keeps the keys and values. One token per slot is a batch [slots, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fst_fast.rollout.kv_tree import DecodePlan, PrefillPlan, Suffixes, TreeCache
from fst_fast.rollout.prompt_tree import Ints, prompt_tree
from fst_fast.rollout.responses import Responses
from fst_fast.rollout.scheduler import Slots


class ForestDecoder:
    """Decodes one list of prompts into `responses`. tokens_computed: positions that went through the model so far, idle slots included."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Ints],
        responses: Responses,
        *,
        max_batch: int,
        prefill_tokens: int,
    ) -> None:
        weight = model.get_output_embeddings().weight
        self.model, self.responses, self.prefill_tokens = model, responses, prefill_tokens
        self.device, self.dtype, self.layers = (
            weight.device,
            weight.dtype,
            model.config.get_text_config().num_hidden_layers,
        )
        self.max_batch = max_batch
        self.prompt_length = np.array([len(p) for p in prompts], dtype=np.int64)
        self.tree = prompt_tree(prompts, max_node_tokens=prefill_tokens)
        self.cache = TreeCache(self.tree)
        order = np.argsort(self.tree.leaf, kind="stable")
        self.by_leaf, self.leaves = order, self.tree.leaf[order]
        self.slots = Slots(order, max_batch)
        self.suffixes = Suffixes(self.layers, len(self.slots.who), max(responses.limit - 1, 1))
        self.tokens_computed = 0

    def run(self) -> None:
        token = np.zeros(len(self.slots.who), dtype=np.int64)  # the last token of each slot
        while True:
            if self.slots.time_to_change():
                stay, fresh = self.slots.change(self._ready)
                who = self.slots.who
                if not len(who):
                    return
                if len(stay) < len(token):
                    self.suffixes.keep(torch.as_tensor(stay, device=self.device))
                token = token[stay]
                token[fresh] = self.responses.ids[who[fresh], 0]
                self._forget()
                plan = DecodePlan(
                    self.cache, self.tree.path[who], self.suffixes, layers=self.layers, device=self.device
                )
            token = self._step(plan, token)
            self.slots.live &= ~self.responses.ended(self.slots.who)

    def _ready(self, sequence: int) -> bool:
        """Prefill up to this sequence's prompt; does it go on after its first token?"""
        while self.tree.leaf[sequence] >= self.cache.filled:
            self._prefill()
        return not self.responses.ended(np.array([sequence]))[0]

    def _prefill(self) -> None:
        """Compute the next window of nodes, as many as fit, and draw the first token of every sequence whose prompt ends in it."""
        tree, first = self.tree, self.cache.filled
        upto = max(
            first + 1, int(np.searchsorted(tree.end, tree.start[first] + self.prefill_tokens, side="right"))
        )
        lo, hi = np.searchsorted(self.leaves, [first, upto])
        sequences = self.by_leaf[lo:hi]
        ends, row = np.unique(tree.end[tree.leaf[sequences]] - 1, return_inverse=True)
        plan = PrefillPlan(self.cache, upto, device=self.device, dtype=self.dtype)
        window = slice(plan.begin, plan.stop)
        keep = (
            ends - plan.begin if len(ends) else np.zeros(1, dtype=np.int64)
        )  # a piece of a long node ends no prompt
        logits = self.model(
            input_ids=torch.as_tensor(tree.token_ids[window], device=self.device)[None],
            position_ids=torch.as_tensor(tree.depth[window], device=self.device)[None],
            plan=plan,
            use_cache=False,
            logits_to_keep=torch.as_tensor(keep, device=self.device),
        ).logits[0]
        self.cache.add(plan.blocks, upto)
        self.tokens_computed += plan.stop - plan.begin
        for begin in range(0, len(sequences), self.max_batch):
            some = slice(begin, begin + self.max_batch)
            here = logits.index_select(0, torch.as_tensor(row[some], device=self.device))
            self.responses.draw(here, sequences[some], np.ones(len(sequences[some]), dtype=bool))

    def _forget(self) -> None:
        """Free the nodes that no unfinished sequence stands under."""
        unfinished = np.flatnonzero(self.responses.finish == "")
        nodes = np.unique(self.tree.path[unfinished])
        self.cache.keep_only(nodes[nodes >= 0])

    def _step(self, plan: DecodePlan, token: Ints) -> Ints:
        """Feed each slot's last token, draw its next one."""
        who, live = self.slots.who, self.slots.live
        seen = self.responses.length[
            who
        ]  # suffix tokens after this one is fed; an idle slot feeds its last one again
        seen = np.where(live, seen, np.maximum(seen - 1, 1))
        self.suffixes.grow(int(seen.max()))
        rows = np.arange(len(who)) * self.suffixes.capacity + seen - 1
        numbers = np.stack([token, self.prompt_length[who] + seen - 1, rows])
        ids, positions, row = torch.as_tensor(numbers).to(self.device)
        plan.step(row, seen, self.dtype)
        logits = self.model(
            input_ids=ids[:, None],
            position_ids=positions[:, None],
            plan=plan,
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
        self.tokens_computed += len(who)
        return self.responses.draw(logits, who, live)
