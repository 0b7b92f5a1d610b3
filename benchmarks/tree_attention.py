"""The attention operation alone, forward + backward: a forest against a dense mask over the forest and against the padded batch.

4 contexts x 256 tokens, 8 problems x 48, 4 samples x 32 for every (context, problem), 8 query and 4 key heads of 32, float32, on the CPU.
`dense mask` is scaled-dot-product attention with an N x N mask over the same packed tokens; `padded` is causal attention over the 128
whole sequences, 8 at a time. Reported: median CPU seconds of alternated rounds (all threads), and GFLOP/s over the pairs each must compute.

    python benchmarks/tree_attention.py [--threads 2] [--rounds 5] [--write]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from training_step import HEAD_DIM, HEADS, KV_HEADS, RESULTS, cpu_name, make_leaves

from fst_fast.forest import pack
from fst_kernels.tree_attention import TreeMask, tree_attention


def inputs(batch: int, n: int) -> list[Tensor]:
    """q, k, v in the layout that a transformers model gives: token-major underneath."""
    return [
        torch.randn(batch, n, h, HEAD_DIM).transpose(1, 2).requires_grad_()
        for h in (HEADS, KV_HEADS, KV_HEADS)
    ]


def cpu_seconds(run: Callable[[], Tensor]) -> float:
    begin = time.process_time()
    run().sum().backward()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/tree_attention.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    leaves = make_leaves(4, 256, 8, 48, 4, 32)
    forest = pack(leaves)
    end = torch.from_numpy(forest.subtree_end)
    n, width = len(end), len(leaves[0])
    at = torch.arange(n)
    dense = (at <= at[:, None]) & (at[:, None] < end)  # [query, key]
    mask = TreeMask.from_subtree_end(end)
    packed, whole = inputs(1, n), inputs(8, width)

    def padded() -> Tensor:
        calls = [
            scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
            for _ in range(len(leaves) // 8)
        ]
        return torch.stack([out.sum() for out in calls])

    runs: dict[str, Callable[[], Tensor]] = {
        "tree_attention": lambda: tree_attention(*packed, mask),
        "dense mask": lambda: scaled_dot_product_attention(*packed, attn_mask=dense, enable_gqa=True),
        "padded": padded,
    }
    pairs = {
        "tree_attention": int((forest.depth.astype(int) + 1).sum()),
        "dense mask": n * n,
        "padded": len(leaves) * width * (width + 1) // 2,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds + 1):  # the first is the warm-up
        for name, run in runs.items():
            times[name].append(cpu_seconds(run))
    rows = {}
    for name, seconds in times.items():
        median = statistics.median(seconds[1:])
        flops = pairs[name] * HEADS * HEAD_DIM * 4 * 3.5  # two products forward, five backward
        rows[name] = {"median_cpu_s": median, "pairs": pairs[name], "gflop_per_s": flops / median / 1e9}
        print(
            f"{name:16s} {median * 1e3:9.1f} CPU ms  {pairs[name]:12,d} pairs  {flops / median / 1e9:6.1f} GFLOP/s"
        )
    if args.write:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        result = {
            "benchmark": "tree_attention",
            "cpu": cpu_name(),
            "threads": args.threads,
            "versions": versions,
            "rows": rows,
        }
        Path(RESULTS).mkdir(exist_ok=True)
        (RESULTS / "tree_attention.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
