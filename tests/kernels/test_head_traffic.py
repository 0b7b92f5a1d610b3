"""Bytes that the head's products move, from their index maps and loops: nothing is measured here."""

from __future__ import annotations

import importlib
from collections import OrderedDict

import pytest
import torch

pytest.importorskip("triton")

from fst_kernels.linear_logprob import rows as shared
from fst_kernels.linear_logprob import triton as head
from fst_kernels.linear_logprob.triton_kernels import place

N, H, V = 16_384, 4_096, 151_936
MULTIPROCESSORS, L2 = 132, 50 * 10**6  # of an H100 or H200


@pytest.mark.parametrize(
    ("row_tiles", "splits", "group"), [(1, 1, 1), (7, 5, 3), (7, 5, 7), (6, 4, 2), (3, 9, 100)]
)
def test_every_tile_of_rows_meets_every_split_once(row_tiles, splits, group):
    places = [place.fn(program, row_tiles, splits, group) for program in range(row_tiles * splits)]
    assert sorted(places) == [(r, s) for r in range(row_tiles) for s in range(splits)]


def streamed(group: int) -> tuple[float, float]:
    """Bytes of hidden states and of weights that miss a least-recently-used L2 cache, programs running in waves of one per multiprocessor."""
    tiles = head.HOPPER
    row_tiles, splits, passes = N // tiles.rows, -(-V // tiles.split), tiles.split // tiles.columns
    size = {"hidden": tiles.rows * H * 2, "weight": tiles.columns * H * 2}
    missed, cache, held = {"hidden": 0, "weight": 0}, OrderedDict(), 0
    for first in range(0, row_tiles * splits, MULTIPROCESSORS):
        wave = range(first, min(first + MULTIPROCESSORS, row_tiles * splits))
        places = [place.fn(program, row_tiles, splits, group) for program in wave]
        for column in range(passes):
            read = dict.fromkeys(("hidden", row) for row, _ in places)
            read |= dict.fromkeys(("weight", split * passes + column) for _, split in places)
            for tile in read:
                if tile in cache:
                    cache.move_to_end(tile)
                    continue
                missed[tile[0]] += size[tile[0]]
                cache[tile] = size[tile[0]]
                held += size[tile[0]]
                while held > L2:
                    held -= cache.popitem(last=False)[1]
    return missed["hidden"], missed["weight"]


def test_grouped_rows_stay_in_the_cache_and_the_weight_streams_once_per_group():
    tiles = head.HOPPER
    row_tiles, column_tiles = N // tiles.rows, -(-V // tiles.columns)
    group = head.row_group(H * 2, tiles.rows)
    assert group == 15
    hidden, weight = N * H * 2, V * H * 2
    before = streamed(row_tiles)  # rows fastest over the whole batch
    assert before[0] == pytest.approx(hidden * column_tiles, rel=0.04)
    assert before[1] <= 2 * weight
    after = streamed(group)
    assert after[0] <= 3 * hidden  # at the seams of groups
    assert after[1] == pytest.approx(weight * -(-row_tiles // group), rel=0.02)
    assert sum(before) / sum(after) > 6.5  # 80 GB and 11.6 GB


def test_a_group_is_never_empty():
    assert head.row_group(10**9, 128) == 1


def test_the_sum_for_the_weight_is_rewritten_once_in_8k_rows():
    """Bytes per row: 2 x 4 V H / rows gathered, read and written in float32."""
    weight = torch.empty(V, H, dtype=torch.bfloat16, device="meta")
    step = head.default_chunk_rows(V, 1)
    most = shared.GATHERED_BYTES // (weight.element_size() * V)
    gathered = min(
        max(most, step), shared.GATHERED_CHUNKS * step, N
    )  # what gathered_rows gives on tensor cores
    assert gathered == 8_192
    assert 2 * 4 * V * H / gathered == pytest.approx(0.61e6, rel=0.01)  # 1.9 MB with 2,632 rows
    assert gathered * V * 2 <= shared.GATHERED_BYTES


@pytest.mark.parametrize(("gathered", "products"), [(0, 6), (4, 3), (8, 2), (12, 1)])
def test_chunks_of_two_rows_are_multiplied_when_the_room_is_full(monkeypatch, gathered, products):
    done = []
    multiply = shared.Gradients._multiply
    monkeypatch.setattr(
        shared.Gradients,
        "_multiply",
        lambda self, rows, d, h: (done.append(len(h)), multiply(self, rows, d, h)),
    )
    hidden, weight = torch.randn(12, 3), torch.randn(5, 3)
    out = shared.Gradients(
        hidden, weight, need_hidden=True, need_weight=True, need_bias=False, gathered_rows=gathered
    )
    d_logits = torch.randn(12, 5)
    for at in range(0, 12, 2):
        rows = slice(at, at + 2)
        room = out.room(2)
        d = d_logits[rows] if room is None else room.copy_(d_logits[rows])
        out.add(rows, d, hidden[rows])
    out.flush()
    assert len(done) == products
    torch.testing.assert_close(out.weight, d_logits.T @ hidden)


def test_the_rows_that_drop_out_are_found_once_for_all_chunks():
    op = importlib.import_module("fst_kernels.linear_policy_loss.op")
    label_rows = torch.tensor([0, 0, 1, 2, 4, 5, 6])
    advantages = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0, 0.0, -1.0])
    chunks = [x.tolist() for x in op.rows_with_advantages(label_rows, advantages, 7, 3)]
    assert chunks == [[0, 2], [], [0]]
    assert list(op.rows_with_advantages(label_rows[:0], advantages[:0], 0, 3)) == []
