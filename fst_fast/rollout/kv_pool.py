"""One pool of keys and values per layer, in which blocks of prompt nodes and the suffixes of running sequences are ranges of slots.

What `fst_kernels.cascade_decode_attention` reads is a pool: one tensor a layer, a slot a token. A range is given back when nobody holds it any
more. Where no gap is wide enough, the ranges are moved together, into a larger pool if need be, layer by layer, so that it takes the memory of one
layer more for a moment; whoever reads the pool by slots asks for them anew after a range was taken.
"""

from __future__ import annotations

from weakref import WeakSet

from torch import Tensor

from fst_kernels import cpu
from fst_kernels.backends import choose_backend

GROWTH = 1.25  # of what is held, when a pool has to grow, as long as its limit allows


class Span:
    """`tokens` slots of a pool, from `first` on."""

    def __init__(self, pool: KVPool, first: int, tokens: int) -> None:
        self.pool, self.first, self.tokens = pool, first, tokens

    def kv(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, Hkv, D], views."""
        k, v = self.pool.k[layer], self.pool.v[layer]
        return k[self.first : self.first + self.tokens], v[self.first : self.first + self.tokens]

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [tokens, Hkv, D]"""
        self.pool.want(layer, k)
        for mine, new in zip(self.kv(layer), (k, v), strict=True):
            mine.copy_(new)

    def keep(self, slots: Tensor) -> None:
        """Hold only these slots of it, [n] counted from its first, in this order."""
        for layer in range(len(self.pool.k)):
            for mine in self.kv(layer):
                mine[: len(slots)] = mine.index_select(0, slots)
        self.tokens = len(slots)


class KVPool:
    """k, v: per layer [slots, Hkv, D], a head's keys side by side in memory, finite everywhere; empty before the first keys. limit: more slots than these it has only while they are held."""

    def __init__(self) -> None:
        self.limit = 0
        self.slots = 0
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self._spans: WeakSet[Span] = WeakSet()
        self._kernels = ""  # the backend that writes and reads it

    @property
    def tokens(self) -> int:
        """Slots that somebody holds."""
        return sum(span.tokens for span in self._spans)

    @property
    def bytes(self) -> int:
        """That the tensors take."""
        return sum(x.numel() * x.element_size() for x in (*self.k, *self.v))

    def take(self, tokens: int) -> Span:
        """A range of so many slots; moves others where it has to."""
        first = self._gap(tokens)
        if first is None or self.slots > self.limit:
            held = self.tokens + tokens
            self.resize(max(held, min(self.limit, int(GROWTH * held)), min(self.slots, self.limit)))
            first = self._gap(tokens)
            assert first is not None
        span = Span(self, first, tokens)
        self._spans.add(span)
        return span

    def want(self, layer: int, like: Tensor) -> None:
        """Let there be tensors for this layer, of the heads, head size, type and device of `like` [N, Hkv, D]."""
        if layer == len(self.k):
            self._kernels = choose_backend("cascade_decode_attention", None, like.device, like.dtype)
            self.k.append(_zeros(like, self.slots))
            self.v.append(_zeros(like, self.slots))
        assert layer < len(self.k), f"layer {layer} came after {len(self.k)} layers"

    def write(self, layer: int, at: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [N, Hkv, D] into the slots at [N]."""
        self.want(layer, k)
        if self._kernels == "triton":
            from fst_kernels import gpu  # only here: it needs triton

            gpu.scatter(k, v, self.k[layer], self.v[layer], at)
            return
        for mine, new in ((self.k[layer], k), (self.v[layer], v)):
            if self._kernels == "cpu":
                cpu.scatter(new, mine, at)
            else:
                mine.index_copy_(0, at, new)

    def resize(self, slots: int) -> None:
        """Move all ranges together in a pool of so many slots, of those that are held at least."""
        spans = sorted(self._spans, key=lambda span: span.first)
        slots = max(slots, self.tokens)
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                new, first = _zeros(old, slots), 0
                for span in spans:
                    new[first : first + span.tokens] = old[span.first : span.first + span.tokens]
                    first += span.tokens
                tensors[layer] = new
        first = 0
        for span in spans:
            span.first, first = first, first + span.tokens
        self.slots = slots

    def _gap(self, tokens: int) -> int | None:
        first = 0
        for span in sorted(self._spans, key=lambda span: span.first):
            if span.first - first >= tokens:
                return first
            first = span.first + span.tokens
        return first if self.slots - first >= tokens else None


def _zeros(like: Tensor, slots: int) -> Tensor:
    _, heads, dim = like.shape
    return like.new_zeros(heads, slots, dim).transpose(0, 1)
