"""The attention operation alone: a forest by `tree_attention` and by its peers, in one run.

    python -m pytest benchmarks/tree_attention.py [--size CONTEXTS,CONTEXT,PROBLEMS,PROBLEM,SAMPLES,RESPONSE,HEADS,KV_HEADS,DIM]
                                                  [--rounds R] [--threads T] [--out benchmarks/results]

CONTEXTS contexts of CONTEXT tokens, under each PROBLEMS problems of PROBLEM tokens, under each SAMPLES responses of
RESPONSE tokens. Peers: `sdpa, unpacked` is causal attention over the whole sequences without sharing (on a CPU 8 at a
time); `sdpa, dense mask` has an N x N mask over the packed tokens; `flex_attention` has the same mask as a mask_mod,
with its block mask built outside or inside the timed call; `flash-attention 4` is FlexAttention with that backend;
`flash-attn varlen` is the unpacked batch again. `tree_attention, mask included` analyses the forest in every call; a
model does it once for all layers. FlexAttention has no backward on a CPU. A peer that cannot run is a row that says why.

TFLOP/s count visible pairs, 4 D operations each in the forward and 14 D with the backward (two and seven products); `of
floor` compares them with the rate of a large matrix product. For the unpacked peers these are the pairs that they must
compute, so computing more does not lower their TFLOP/s; their ms show it. Times: CUDA events on a GPU, CPU seconds of
all threads on a CPU (with wall-clock ms beside them). The last rows double the number of problems twice at the same
depth: the time should at most double, too.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import measure
from fst_kernels.tree_attention import TreeMask, tree_attention

Size = tuple[int, ...]
DEFAULT_SIZE = {"cpu": (4, 256, 8, 48, 4, 32, 8, 4, 32), "cuda": (1, 1536, 64, 300, 2, 512, 32, 8, 128)}
COLUMNS = (
    ("peer", "peer", ""),
    ("variant", "variant", ""),
    ("tokens", "tokens", ",d"),
    ("ms", "ms", ".2f"),
    ("cpu_ms", "CPU ms", ".2f"),
    ("tflop_per_s", "TFLOP/s", ".3f"),
    ("of_floor", "of floor", ".1%"),
    ("peak_mib", "peak MiB", ".0f"),
    ("times_before", "x the last", ".2f"),
)
VARIANTS = {"forward": 4, "forward + backward": 14}  # operations per pair and D
DENSE_LIMIT = 20_000  # tokens: beyond this, an N x N mask does not fit into memory


class Case(NamedTuple):
    """run() returns `out`, whose sum is differentiated in the variants with a backward."""

    inputs: tuple[Tensor, ...]
    run: Callable[[], Tensor]
    pairs: int
    tokens: int


def dtype() -> torch.dtype:
    return torch.bfloat16 if measure.device().type == "cuda" else torch.float32


def subtree_end(size: Size) -> Tensor:
    contexts, context, problems, problem, samples, response = size[:6]
    tree, ends = context + problems * (problem + samples * response), []
    for c in range(contexts):
        at = c * tree
        ends.append(torch.full((context,), at + tree))
        at += context
        for _ in range(problems):
            ends.append(torch.full((problem,), at + problem + samples * response))
            at += problem
            for _ in range(samples):
                at += response
                ends.append(torch.full((response,), at))
    return torch.cat(ends).to(torch.int32)


def qkv(size: Size, batch: int, n: int) -> tuple[Tensor, ...]:
    """In the memory layout that a transformers model produces: token-major."""
    heads, kv_heads, dim = size[6:]
    generator = torch.Generator(measure.device()).manual_seed(0)
    return tuple(
        torch.randn(batch, n, h, dim, device=measure.device(), dtype=dtype(), generator=generator)
        .transpose(1, 2)
        .requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )


def packed(size: Size) -> tuple[Tensor, tuple[Tensor, ...], int]:
    """subtree_end on the host, q, k, v, number of visible pairs."""
    end = subtree_end(size)
    return end, qkv(size, 1, len(end)), int((end - torch.arange(len(end))).sum())


def tree(size: Size, included: bool) -> Case:
    end, inputs, pairs = packed(size)
    mask = TreeMask.from_subtree_end(end, device=measure.device())

    def run() -> Tensor:
        of = TreeMask.from_subtree_end(end, device=measure.device()) if included else mask
        return tree_attention(*inputs, of)

    return Case(inputs, run, pairs, len(end))


def dense(size: Size) -> Case:
    end, inputs, pairs = packed(size)
    end, at = end.to(measure.device()), torch.arange(len(end), device=measure.device())
    seen = (at <= at[:, None]) & (at[:, None] < end)  # [query, key]
    return Case(
        inputs,
        lambda: scaled_dot_product_attention(*inputs, attn_mask=seen, enable_gqa=True),
        pairs,
        len(end),
    )


@cache
def compiled_flex() -> Any:
    return torch.compile(flex_attention)


def flex(size: Size, included: bool, options: dict[str, Any] | None = None) -> Case:
    end, inputs, pairs = packed(size)
    n, end = len(end), end.to(measure.device())
    if measure.device().type == "cpu":  # it refuses inputs that require a gradient
        inputs = tuple(x.detach() for x in inputs)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    make = torch.compile(create_block_mask) if measure.device().type == "cuda" else create_block_mask
    outside = None if included else make(visible, None, None, n, n, device=end.device)

    def run() -> Tensor:
        block_mask = make(visible, None, None, n, n, device=end.device) if outside is None else outside
        out: Tensor = compiled_flex()(*inputs, block_mask=block_mask, enable_gqa=True, kernel_options=options)
        return out

    return Case(inputs, run, pairs, n)


def unpacked(size: Size) -> Case:
    contexts, context, problems, problem, samples, response = size[:6]
    count, width = contexts * problems * samples, context + problem + response
    at_once = min(count, 8) if measure.device().type == "cpu" else count
    inputs, parts = qkv(size, at_once, width), -(-count // at_once)

    def run() -> Tensor:
        outs = [scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True) for _ in range(parts)]
        return torch.stack([out.sum() for out in outs]) if parts > 1 else outs[0]

    return Case(inputs, run, count * width * (width + 1) // 2, count * width)


def varlen(size: Size) -> Case:
    from flash_attn import flash_attn_varlen_func

    contexts, context, problems, problem, samples, response = size[:6]
    count, width = contexts * problems * samples, context + problem + response
    inputs = tuple(
        x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in qkv(size, 1, count * width)
    )
    bounds = torch.arange(count + 1, device=measure.device(), dtype=torch.int32) * width
    return Case(
        inputs,
        lambda: flash_attn_varlen_func(*inputs, bounds, bounds, width, width, causal=True),
        count * width * (width + 1) // 2,
        count * width,
    )


PEERS: dict[str, Callable[[Size], Case]] = {
    "tree_attention": lambda size: tree(size, included=False),
    "tree_attention, mask included": lambda size: tree(size, included=True),
    "sdpa, unpacked": unpacked,
    "sdpa, dense mask": dense,
    "flex_attention": lambda size: flex(size, included=False),
    "flex_attention, mask included": lambda size: flex(size, included=True),
    "flash-attention 4, mask_mod": lambda size: flex(size, False, {"BACKEND": "FLASH"}),
    "flash-attn varlen, unpacked": varlen,
}


def unable(peer: str, variant: str, size: Size) -> str | None:
    gpu = measure.device().type == "cuda"
    n = len(subtree_end(size))
    if peer.startswith("flash") and not gpu:
        return "it needs a CUDA device"
    if peer == "flash-attn varlen, unpacked" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    if peer.startswith("flash-attention 4") and (
        importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None
    ):
        return "flash_attn.cute is not installed"
    if peer == "sdpa, dense mask" and n > DENSE_LIMIT:
        return f"the mask alone would take {n * n / 2**30:.0f} GiB"
    if peer.startswith("flex") and not gpu and variant != "forward":
        return "FlexAttention has no backward on a CPU"
    return None


def call(case: Case, variant: str) -> Callable[[], object]:
    if variant == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return case.run()

        return forward
    return lambda: torch.autograd.grad(case.run().sum(), case.inputs)


def in_child(peer: str, variant: str, size: list[int]) -> tuple[measure.Run, measure.Run]:
    """For the peak memory: (warm-up on a small forest, the call)."""
    small = (1, 4, 1, 4, 1, 4, *size[6:])
    return call(PEERS[peer](small), variant), call(PEERS[peer](tuple(size)), variant)


@pytest.fixture(scope="module")
def floor(size: Size) -> float:
    """Operations per second of a large matrix product; on a CPU per CPU second."""
    return measure.matmul_rate(
        *((4096, 4096, 4096) if measure.device().type == "cuda" else (1024, 1024, 1024)), dtype()
    )


def measured(benchmark: Any, case: Case, variant: str, size: Size, floor: float, rounds: int) -> measure.Row:
    work, cpu = call(case, variant), []

    def timed() -> None:
        begin = time.process_time()
        work()
        cpu.append(time.process_time() - begin)

    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=2)
    seconds = statistics.median(benchmark.stats.stats.data)
    cpu_seconds = statistics.median(cpu[2:])
    trusted = seconds if measure.device().type == "cuda" else cpu_seconds
    rate = case.pairs * VARIANTS[variant] * size[6] * size[8] / trusted
    return {
        "variant": variant,
        "tokens": case.tokens,
        "pairs": case.pairs,
        "ms": seconds * 1e3,
        "cpu_ms": cpu_seconds * 1e3,
        "tflop_per_s": rate / 1e12,
        "of_floor": rate / floor,
    }


@pytest.mark.benchmark(timer=measure.clock)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("peer", PEERS)
def test_tree_attention(
    peer: str, variant: str, benchmark: Any, results: measure.Results, size: Size, rounds: int, floor: float
) -> None:
    reason = unable(peer, variant, size)
    if reason is None:
        try:
            case = PEERS[peer](size)
            row = measured(benchmark, case, variant, size, floor, rounds)
        except (torch.OutOfMemoryError, InductorError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if reason is not None:
        results.add({"peer": peer, "variant": variant, "skipped": reason})
        pytest.skip(f"{peer}: {reason}")
    if measure.device().type == "cuda":
        peak: int | None = measure.cuda_peak_bytes(call(case, variant))
    elif peer.startswith("flex"):
        peak = None  # the child would also measure the C++ compiler
    else:
        peak = measure.in_child("benchmarks.tree_attention", "in_child", peer, variant, size).peak_bytes
    results.add({"peer": peer, **row, "peak_mib": None if peak is None else peak / 2**20})


@pytest.mark.benchmark(timer=measure.clock)
def test_twice_the_problems_take_at_most_twice_the_time(
    benchmark: Any, results: measure.Results, size: Size, rounds: int, floor: float
) -> None:
    """The pytest-benchmark fixture times one function per test, so the three sizes alternate here, timed by the CPU's
    or the GPU's clock."""
    sizes = [(*size[:2], size[2] * times, *size[3:]) for times in (1, 2, 4)]
    cases = [tree(s, included=False) for s in sizes]
    works = [call(case, "forward + backward") for case in cases]
    tick = measure.clock if measure.device().type == "cuda" else time.process_time
    times: list[list[float]] = [[] for _ in cases]

    def turn() -> None:
        for own, work in zip(times, works, strict=True):
            begin = tick()
            work()
            own.append(tick() - begin)

    benchmark.pedantic(turn, rounds=rounds, warmup_rounds=1)
    before = None
    for case, own, s in zip(cases, times, sizes, strict=True):
        seconds = statistics.median(own[1:])
        rate = case.pairs * 14 * size[6] * size[8] / seconds
        results.add(
            {
                "peer": f"tree_attention, {s[2]} problems",
                "variant": "forward + backward",
                "tokens": case.tokens,
                "pairs": case.pairs,
                "ms" if tick is measure.clock else "cpu_ms": seconds * 1e3,
                "tflop_per_s": rate / 1e12,
                "of_floor": rate / floor,
                "times_before": None if before is None else seconds / before,
            }
        )
        before = seconds
