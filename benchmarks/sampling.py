"""Sampling of next tokens: sample_tokens versus torch's multinomial, sort-based truncation and, if installed, FlashInfer.

[512, 151936] float32 and bf16 logits on a GPU, [32, 32000] float32 on the CPU. Reported: median ms (CUDA events; on the
CPU, CPU seconds of all threads), TB/s for reading the logits once, and the floor of that read (4.3 TB/s, on a GPU) as a share of the time.

    python -m benchmarks.sampling [--rounds 20] [--threads 1] [--out FOLDER]
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cascade_decode import BANDWIDTH, DEVICE, milliseconds, reached, shown, start, write
from fst_kernels import library, sample_tokens

RULES: dict[str, dict[str, float]] = {
    "temperature": {"temperature": 0.8},
    "top-k 50, top-p 0.95": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
}
ROTATED = 3  # batches of logits, so that none stays in a cache


def torch_multinomial(
    x: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The usual plain-torch implementation: softmax, sorted truncation, multinomial; ids and their log-probs."""
    p = (x.float() / temperature).softmax(-1)
    order = None
    if top_k is not None or top_p is not None:
        p, order = p.sort(-1, descending=True)
        if top_k is not None:
            p[:, int(top_k) :] = 0
        if top_p is not None:
            p[p.cumsum(-1) - p > top_p * p.sum(-1, keepdim=True)] = 0
    if min_p is not None:
        p[p < min_p * p.amax(-1, keepdim=True)] = 0
    ids = torch.multinomial(p, 1)
    p.gather(1, ids).div_(p.sum(-1, keepdim=True)).log_()
    return ids if order is None else order.gather(1, ids)


def flashinfer(
    x: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Returns ids only, no log-probs."""
    import flashinfer as peer  # optional peer

    scaled = x.float() / temperature
    if min_p is not None:
        ids = peer.sampling.min_p_sampling_from_probs(scaled.softmax(-1), min_p)
    elif top_k is not None:
        ids = peer.sampling.top_k_top_p_sampling_from_logits(scaled, int(top_k), top_p)
    elif top_p is not None:
        ids = peer.sampling.top_p_sampling_from_probs(scaled.softmax(-1), top_p)
    else:
        ids = peer.sampling.sampling_from_logits(scaled)
    found: Tensor = ids
    return found


def main() -> None:
    args = start(__doc__, "sampling")
    gpu = DEVICE.type == "cuda"
    rows, vocabulary = (512, 151936) if gpu else (32, 32000)
    seeds, positions = torch.arange(rows, device=DEVICE), torch.zeros(rows, dtype=torch.int64, device=DEVICE)

    def ours(backend: str) -> Callable[..., object]:
        return lambda x, **rules: sample_tokens(x, seeds=seeds, positions=positions, backend=backend, **rules)

    peers: dict[str, Callable[..., object]] = {
        "reference": ours("reference"),
        "torch multinomial": torch_multinomial,
    }
    skipped = {} if gpu else {"cuda": "it needs a GPU", "FlashInfer": "it needs a GPU"}
    backend = "cuda" if gpu else "cpu"
    reason = library.missing("cuda") if gpu else library.why_not_compiled("cpu")
    if reason is None:
        peers[backend] = ours(backend)
    else:
        skipped[backend] = reason
    if gpu and importlib.util.find_spec("flashinfer"):
        peers["FlashInfer"] = flashinfer
    elif gpu:
        skipped["FlashInfer"] = "flashinfer is not installed"
    found = []
    for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
        batches = [(3 * torch.randn(rows, vocabulary, device=DEVICE)).to(dtype) for _ in range(ROTATED)]
        size = batches[0].numel() * batches[0].element_size()
        for what, rules in RULES.items():
            times: dict[str, list[float]] = {name: [] for name in peers}
            for i in range(args.rounds + 2):  # two to warm up
                for name, run in peers.items():
                    x = batches[i % ROTATED]
                    times[name].append(milliseconds(partial(run, x, **rules)))
            for name in peers:
                ms = statistics.median(times[name][2:])
                short = str(dtype).removeprefix("torch.")
                row = reached(ms, size, size / BANDWIDTH * 1e3 if gpu else None)
                found.append({"rules": what, "dtype": short, "name": name, **row})
                print(f"{short:9s} {what:22s} {name:18s} {shown(row)}")
    for name, why in skipped.items():
        print(f"{name:18s} SKIPPED: {why}")
    if args.out:
        write(args, "sampling", shape=[rows, vocabulary], rows=found, skipped=skipped)


if __name__ == "__main__":
    main()
