"""The pool of keys and values: ranges are allocated, freed and moved, and keep their contents."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")  # scripts/gpu_check.sh loads this file on machines that may lack it

from fst_fast.rollout import cascade, prefill
from fst_fast.rollout.kv_pool import KVPool, Span
from fst_kernels import cascade_decode_attention
from fst_kernels.tree_attention import tree_attention
from tests.fst_fast.test_rollout import assert_same, forest, make_model, padded, requests_of, sample

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAYERS = 2


def fill(span: Span, number: float) -> Span:
    for layer in range(LAYERS):
        k = torch.full((span.tokens, 2, 3), number + layer)
        span.put(layer, k, -k)
    return span


def assert_holds(span: Span, number: float) -> None:
    for layer in range(LAYERS):
        k, v = span.kv(layer)
        assert k.shape == (span.tokens, 2, 3)
        assert (k == number + layer).all()
        assert (v == -number - layer).all()


def test_ranges_keep_what_they_hold_whatever_comes_goes_and_moves():
    rng = np.random.default_rng(0)
    pool, held = KVPool(), {}
    pool.limit = 60
    for number in range(200):
        if held and (len(held) > 4 or rng.random() < 0.3):
            held.pop(rng.choice(list(held)))
        held[number] = fill(pool.take(int(rng.integers(1, 12))), 10.0 * number)
        if rng.random() < 0.1:
            pool.resize(0)
            assert pool.slots == pool.tokens
        assert pool.tokens == sum(span.tokens for span in held.values())
        assert all(len(x) == pool.slots for x in [*pool.k, *pool.v])
        places = sorted((span.first, span.first + span.tokens) for span in held.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
        assert places[-1][1] <= pool.slots <= 60
        for n in held:
            assert_holds(held[n], 10.0 * n)
    held.clear()
    gc.collect()
    assert pool.tokens == 0


def test_the_limit_is_passed_only_for_what_is_held():
    pool = KVPool()
    pool.limit = 10
    first, second = fill(pool.take(8), 1.0), fill(pool.take(8), 5.0)
    assert pool.slots == 16
    del first
    third = fill(pool.take(2), 9.0)
    assert pool.slots == 10
    assert_holds(second, 5.0)
    assert_holds(third, 9.0)


def test_a_range_cut_to_some_of_its_slots_holds_these_in_their_order():
    pool = KVPool()
    span = pool.take(5)
    k = torch.arange(30.0).view(5, 2, 3)
    span.put(0, k, 2 * k)
    span.keep(torch.tensor([4, 1]))
    assert span.tokens == 2
    assert torch.equal(span.kv(0)[0], k[[4, 1]])
    assert torch.equal(span.kv(0)[1], 2 * k[[4, 1]])


@pytest.mark.emulated
@pytest.mark.skipif(INTERPRETED, reason="the outer process runs this file")
def test_by_the_triton_kernels_it_is_the_same_in_the_interpreter():
    """Triton reads TRITON_INTERPRET at import, so this file runs again in its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "inside_the_interpreter", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout


@pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_inside_the_interpreter(kind, monkeypatch):
    calls = []

    def counted(op, *args, **how):
        calls.append(op)
        return op(*args, **how | {"backend": "triton"})

    for module in (cascade, prefill):
        monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")  # as on a GPU
        monkeypatch.setattr(module, "cascade_decode_attention", partial(counted, cascade_decode_attention))
    monkeypatch.setattr(prefill, "tree_attention", partial(counted, tree_attention))
    requests = requests_of(contexts=(18, 7), problems=(3, 9), samples=1)
    said = sample(padded(make_model(kind, "sdpa")), requests, 4)
    engine = forest(make_model(kind), max_batch=4, prefill_tokens=16)
    assert_same(sample(engine, requests, 4), said)
    assert {cascade_decode_attention, tree_attention} == set(calls)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_on_a_gpu_the_engine_takes_the_kernels_and_gives_the_same_rollouts(kind):
    requests = requests_of()
    said = sample(padded(make_model(kind, "sdpa")), requests)
    engine = forest(make_model(kind).cuda(), prefill_tokens=17, max_batch=4)
    assert_same(sample(engine, requests), said)
    assert engine._pool.k[0].is_cuda
