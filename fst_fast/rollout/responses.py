"""Sample one token per sequence and record it, identically for every way to compute the logits.

A token depends only on its sequence's seed, its offset in the response and the logits, so a rollout is reproducible in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fst_fast.run.faults import reach
from fst_kernels import sample_tokens
from fst_kernels.sampling.api import SampleOutput

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters."""

    temperature: float
    top_p: float | None
    top_k: int | None


def _on_host(drawn: SampleOutput) -> tuple[Ints, NDArray[np.float32], NDArray[np.float32]]:
    """ids, log-probs and untruncated log-probs. Exact, and a GPU is waited for once: float64 holds all of them."""
    if not drawn.ids.is_cuda:
        return drawn.ids.numpy(), drawn.logprob.numpy(), drawn.untruncated_logprob.numpy()
    ids, logprob, untruncated = torch.stack([x.double() for x in drawn]).cpu().numpy()
    return ids.astype(np.int64), logprob.astype(np.float32), untruncated.astype(np.float32)


class Responses:
    """The responses sampled so far. stop(ids [n]): whether a response ends after `ids` for a reason other than an eos token. watch(ended, self) is
    called after every draw with the sequences that have ended in it.

    ids int64 and logprobs float32 [sequences, limit], length [sequences], finish [sequences] ("" while running)."""

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        limit: int,
        eos_ids: Sequence[int],
        sampling: Sampling,
        name: Callable[[int], str],
        stop: Callable[[Ints], bool] | None = None,
        watch: Callable[[Ints, Responses], None] | None = None,
    ) -> None:
        self.seeds = np.asarray(seeds, dtype=np.int64)
        self.ids = np.zeros((len(seeds), limit), dtype=np.int64)
        self.logprobs = np.zeros((len(seeds), limit), dtype=np.float32)
        self.length = np.zeros(len(seeds), dtype=np.int64)
        self.finish = np.full(len(seeds), "", dtype="<U6")
        self.eos = np.asarray(list(eos_ids), dtype=np.int64)
        self.limit, self.sampling, self.name = limit, sampling, name
        self.stop, self.watch = stop, watch

    def streams(self, sequences: Ints) -> Ints:
        """[2, S], of each sequence's next token: the seed and the offset that determine its random number."""
        return np.stack([self.seeds[sequences], self.length[sequences]])

    def draw(
        self, logits: Tensor, sequences: Ints, live: NDArray[np.bool_], streams: Tensor | None = None
    ) -> Ints:
        """Sample and record the next token of each sequence from logits [S, V]. Rows that are not live are sampled and discarded. streams: what the
        method gives, where the logits lie; None: send it there, for which a GPU is waited for.

        Returns the ids [S]. Raises FloatingPointError if a live row's logits contain NaN or Inf."""
        reach("rollout")
        offset = self.length[sequences]
        where = torch.as_tensor(self.streams(sequences)).to(logits.device) if streams is None else streams
        how = self.sampling
        try:
            drawn = sample_tokens(
                logits,
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                seeds=where[0],
                positions=where[1],
            )
        except ValueError:
            self._check(torch.logsumexp(logits.float(), -1).cpu().numpy(), sequences, live)
            raise
        ids, logprobs, untruncated = _on_host(drawn)
        self._check(untruncated, sequences, live)
        who, at, new = sequences[live], offset[live], ids[live]
        self.ids[who, at] = new
        self.logprobs[who, at] = logprobs[live]
        self.length[who] = at + 1
        stopped = np.isin(new, self.eos)
        if self.stop is not None:
            stopped |= [self.stop(self.ids[i, : n + 1]) for i, n in zip(who, at, strict=True)]
        self.finish[who[stopped]] = "stop"
        self.finish[who[~stopped & (at + 1 == self.limit)]] = "length"
        if self.watch is not None:
            self.watch(who[stopped | (at + 1 == self.limit)], self)
        return ids

    def _check(self, per_row: NDArray[np.float32], sequences: Ints, live: NDArray[np.bool_]) -> None:
        bad = np.flatnonzero(live & ~np.isfinite(per_row))
        if len(bad):
            first = int(sequences[bad[0]])
            raise FloatingPointError(
                f"the model gave NaN or Inf logits for response token {self.length[first]} of {self.name(first)} "
                f"(and {len(bad) - 1} more of the {int(live.sum())} sequences in this step)"
            )

    def ended(self, sequences: Ints) -> NDArray[np.bool_]:
        ended: NDArray[np.bool_] = self.finish[sequences] != ""
        return ended
