"""One decode step of attention over a tree of keys and values: reading every shared segment once, versus every sequence
reading its whole past.

The tree has contexts, problems per context, samples per (context, problem), each with a generated suffix. On a GPU: 4
contexts x 1536, 64 problems x 300 under each, 2 samples, 256 generated tokens, 32 query and 8 KV heads of 128, bf16. On
the CPU: a small tree in float32. Peers: scaled-dot-product attention over copies of each whole past (batched, with
copies made outside the timed region; per sequence, one call each), and FlashInfer's cascade if installed. Reported:
median ms (CUDA events; on the CPU, CPU seconds of all threads), TB/s of what the peer must read, and the floor (unique
bytes at 4.3 TB/s, on a GPU) as a share of the time.

    python -m benchmarks.cascade_decode [--rounds 20] [--threads 1] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import measure
from fst_kernels import CascadePlan, backends, cascade_decode_attention

BANDWIDTH = 4.3e12  # bytes/s of an H200, measured
PAGE = 16  # FlashInfer's page size, in tokens
DEVICE = measure.device()
SIZES = {
    "cuda": {"contexts": 4, "context": 1536, "problems": 64, "problem": 300, "samples": 2, "suffix": 256, "heads": 32, "kv_heads": 8, "dim": 128},
    "cpu": {"contexts": 4, "context": 256, "problems": 16, "problem": 48, "samples": 4, "suffix": 32, "heads": 8, "kv_heads": 4, "dim": 64},
}  # fmt: skip


def tree(s: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Returns paths [S, 2] and node lengths."""
    contexts, pairs = s["contexts"], s["contexts"] * s["problems"]
    pair = torch.arange(pairs).repeat_interleave(s["samples"])
    lengths = torch.tensor([s["context"]] * contexts + [s["problem"]] * pairs)
    return torch.stack([pair // s["problems"], contexts + pair], 1), lengths


def flashinfer(s: dict[str, int], q: Tensor, paths: Tensor, lengths: Tensor) -> Callable[[], object]:
    """FlashInfer's multi-level cascade over its own pages, with random contents."""
    import flashinfer as library  # optional peer

    sequences = len(paths)
    segments = [lengths[: s["contexts"]], lengths[s["contexts"] :], torch.full((sequences,), s["suffix"])]
    below = [sequences // s["contexts"], s["samples"], 1]
    indptr, indices, last, queries, used = [], [], [], [], 0
    for length, width in zip(segments, below, strict=True):
        pages = -(-length // PAGE)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), pages.cumsum(0)])
        indptr.append(ends.int().to(q.device))
        indices.append(torch.arange(used, used + int(ends[-1])).int().to(q.device))
        last.append(((length - 1) % PAGE + 1).int().to(q.device))
        queries.append((torch.arange(len(length) + 1) * width).int().to(q.device))
        used += int(ends[-1])
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=q.device)
    wrapper = library.MultiLevelCascadeAttentionWrapper(3, workspace, "NHD")
    wrapper.plan(
        queries,
        indptr,
        indices,
        last,
        s["heads"],
        s["kv_heads"],
        s["dim"],
        PAGE,
        causal=False,
        q_data_type=q.dtype,
    )
    cache = torch.randn(used, 2, PAGE, s["kv_heads"], s["dim"], dtype=q.dtype, device=q.device)
    return lambda: wrapper.run(q, cache)


def milliseconds(run: Callable[[], object]) -> float:
    if DEVICE.type == "cpu":
        begin = time.process_time()
        run()
        return (time.process_time() - begin) * 1e3
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event)


def start(about: str | None, name: str) -> argparse.Namespace:
    """The options of this benchmark and of sampling.py, and threads and seed by them."""
    parser = measure.arguments(about)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help=f"folder for {name}_cpu.json or {name}_cuda.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def reached(ms: float, size: int, floor_ms: float | None) -> dict[str, float | None]:
    """What a row says of its time. size: bytes that the peer must read."""
    share = None if floor_ms is None else floor_ms / ms
    return {"median_ms": ms, "tb_per_s": size / ms / 1e9, "of_byte_floor": share}


def shown(row: dict[str, Any]) -> str:
    share = "" if row["of_byte_floor"] is None else f"{row['of_byte_floor']:6.1%} of the floor"
    return f"{row['median_ms']:9.3f} ms {row['tb_per_s']:8.4f} TB/s {share}"


def write(args: argparse.Namespace, name: str, **result: Any) -> None:
    gpu = DEVICE.type == "cuda"
    about = {
        "benchmark": name,
        "device": torch.cuda.get_device_name() if gpu else measure.cpu_name(),
        "threads": args.threads,
        "clock": "CUDA events" if gpu else "CPU seconds of all threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    measure.write(args.out / f"{name}_{DEVICE.type}.json", about | result)


def main() -> None:
    args = start(__doc__, "cascade_decode")
    s = SIZES[DEVICE.type]
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    paths, lengths = tree(s)
    sequences, kv_heads, dim = len(paths), s["kv_heads"], s["dim"]
    starts = lengths.cumsum(0) - lengths
    behind = int(lengths.sum())
    q = torch.randn(sequences, s["heads"], dim, dtype=dtype, device=DEVICE)
    # Stored by head, so that a node's keys of one head are contiguous.
    k, v = (
        torch.randn(kv_heads, behind + sequences * s["suffix"], dim, dtype=dtype, device=DEVICE).transpose(
            0, 1
        )
        for _ in range(2)
    )
    own = torch.arange(sequences) * s["suffix"] + behind
    plan = CascadePlan.build(
        paths, node_slots=starts, node_lengths=lengths, suffix_slots=own.to(DEVICE), suffix_capacity=s["suffix"],
        suffix_lengths=torch.full((sequences,), s["suffix"], dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    context, problem, suffix = (torch.arange(s[name]) for name in ("context", "problem", "suffix"))
    past = torch.cat(
        [starts[paths[:, :1]] + context, starts[paths[:, 1:]] + problem, own[:, None] + suffix], 1
    ).to(DEVICE)
    copies = [
        x.transpose(0, 1)[:, past.flatten()].view(kv_heads, *past.shape, dim).transpose(0, 1).contiguous()
        for x in (k, v)
    ]

    def batched() -> Tensor:
        return scaled_dot_product_attention(q[:, :, None], *copies, enable_gqa=True)[:, :, 0]

    def one_by_one() -> Tensor:
        parts = [
            scaled_dot_product_attention(
                q[i : i + 1, :, None], copies[0][i : i + 1], copies[1][i : i + 1], enable_gqa=True
            )
            for i in range(sequences)
        ]
        return torch.cat(parts)[:, :, 0]

    volume = plan.kv_bytes(query_heads=s["heads"], kv_heads=kv_heads, head_dim=dim, itemsize=q.element_size())
    taken = [backends()["cascade_decode_attention"]["taken"]]
    if DEVICE.type == "cpu" and "reference" not in taken:
        taken.append("reference")
    runs: dict[str, tuple[Callable[[], object], int]] = {
        **{
            f"cascade_decode_attention ({name})": (
                partial(cascade_decode_attention, q, k, v, plan, backend=name),
                volume.unique,
            )
            for name in taken
        },
        "SDPA over copies, batched": (batched, volume.unshared),
        "SDPA over copies, per sequence": (one_by_one, volume.unshared),
    }
    torch.testing.assert_close(
        cascade_decode_attention(q, k, v, plan),
        batched(),
        rtol=2e-2,
        atol=2e-2 if dtype == torch.bfloat16 else 1e-4,
    )
    skipped = {}
    if DEVICE.type == "cuda" and importlib.util.find_spec("flashinfer"):
        runs["FlashInfer cascade"] = flashinfer(s, q, paths, lengths), volume.unique
    else:
        skipped["FlashInfer cascade"] = (
            "flashinfer is not installed" if DEVICE.type == "cuda" else "it needs a GPU"
        )
    times: dict[str, list[float]] = {name: [] for name in runs}
    flush = torch.empty(256 * 2**20 if DEVICE.type == "cuda" else 0, dtype=torch.uint8, device=DEVICE)
    for _ in range(args.rounds + 3):  # three to warm up
        for name, (run, _) in runs.items():
            flush.zero_()
            times[name].append(milliseconds(run))
    floor_ms = volume.unique / BANDWIDTH * 1e3 if DEVICE.type == "cuda" else None
    rows = {}
    for name, (_, required) in runs.items():
        rows[name] = reached(statistics.median(times[name][3:]), required, floor_ms)
        print(f"{name:48s} {shown(rows[name])}")
    for name, why in skipped.items():
        print(f"{name:48s} SKIPPED: {why}")
    print(f"bytes: unique {volume.unique:,}, read by tiles {volume.read:,}, unshared {volume.unshared:,}")
    if args.out:
        name = str(dtype).removeprefix("torch.")
        write(args, "cascade_decode", dtype=name, sizes=s, bytes=volume._asdict(), floor_ms=floor_ms, rows=rows, skipped=skipped)  # fmt: skip


if __name__ == "__main__":
    main()
