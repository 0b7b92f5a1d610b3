"""`sample_tokens` over csrc/sample_tokens.cu, or csrc/cpu/sample_tokens.cpp, reached through their one C interface with ctypes.

backend="cuda" is the library that CMake builds with nvcc; backend="host" is the same source compiled with g++ at its first use, where CPU
threads play the CUDA threads: for tests; backend="cpu" is C++ for the CPU. Registered as the torch operation fst_kernels::sample_tokens, whose fake kernel lets torch.compile trace it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fst_kernels.library import LibraryName, load_kernel
from fst_kernels.sampling import reference

LARGEST_VOCABULARY = 1 << 22
NAMES: tuple[LibraryName, ...] = ("cuda", "host", "cpu")


class _SampleTokens(ctypes.Structure):
    """FstSampleTokens of csrc/sample_tokens.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary")),
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("temperature", "seeds", "positions")),
        *((name, ctypes.c_void_p) for name in ("row_top_k", "row_top_p", "row_log_min_p")),
        *((name, ctypes.c_void_p) for name in ("ids", "logprob", "untruncated")),
        ("top_p", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("log_min_p", "temperature_of_all")),
        *((name, ctypes.c_int32) for name in ("top_k", "logits_are_bf16", "threads", "cluster", "resident")),
    ]


@functools.cache
def _library(name: LibraryName) -> ctypes.CDLL:
    return load_kernel(name, "fst_sample_tokens", _SampleTokens)


class Launch(NamedTuple):
    """How the kernel runs; 0 and -1 leave it to the kernel, which decides by the vocabulary and the device alone. No result depends on it."""

    threads: int = 0
    cluster: int = 0
    resident: int = -1  # 1: the row stays in shared memory; 0: it is read again for every pass


CHOOSE = Launch()


def launch_kernel(
    logits: Tensor,  # [S, V] fp32 or bf16; rows may lie apart, elements may not
    temperature: float | Tensor,  # [S] fp32
    top_k: int | Tensor | None,  # [S] int
    top_p: float | Tensor | None,  # [S]
    min_p: float | Tensor | None,  # [S]
    seeds: Tensor,  # [S] int64
    positions: Tensor,  # [S] int64
    library_name: LibraryName = "cuda",
    launch: Launch = CHOOSE,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, logprob, untruncated_logprob, each [S]; both log-probs are NaN where a row is unusable. One kernel on the current stream."""
    lib = _library(library_name)
    rows, vocabulary = logits.shape
    assert logits.dtype in (torch.float32, torch.bfloat16)
    assert logits.stride(1) == 1 or vocabulary == 1 or not rows
    per_row = temperature if isinstance(temperature, Tensor) else None
    for x, dtype in ((seeds, torch.int64), (positions, torch.int64), (per_row, torch.float32)):
        assert x is None or (x.dtype == dtype and x.is_contiguous() and x.device == logits.device)
    # Tensors are named, so that they live as long as the call.
    row_top_k = (
        torch.where(top_k >= vocabulary, 0, top_k).int().contiguous() if isinstance(top_k, Tensor) else None
    )
    row_top_p = top_p.double().contiguous() if isinstance(top_p, Tensor) else None
    row_log_min_p = reference.log_min_p(min_p).contiguous() if isinstance(min_p, Tensor) else None
    log_min_p = -math.inf
    if min_p is not None and not isinstance(min_p, Tensor):
        log_min_p = float(reference.log_min_p(min_p))

    def pointer(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob, untruncated = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    arguments = _SampleTokens(
        rows=rows,
        vocabulary=vocabulary,
        logits=logits.data_ptr(),
        stride=logits.stride(0),
        temperature=pointer(per_row),
        row_top_k=pointer(row_top_k),
        row_top_p=pointer(row_top_p),
        row_log_min_p=pointer(row_log_min_p),
        seeds=seeds.data_ptr(),
        positions=positions.data_ptr(),
        ids=ids.data_ptr(),
        logprob=logprob.data_ptr(),
        untruncated=untruncated.data_ptr(),
        top_p=1.0 if top_p is None or isinstance(top_p, Tensor) else top_p,
        log_min_p=log_min_p,
        temperature_of_all=1.0 if isinstance(temperature, Tensor) else temperature,
        top_k=0 if top_k is None or isinstance(top_k, Tensor) else top_k,
        logits_are_bf16=int(logits.dtype == torch.bfloat16),
        threads=launch.threads,
        cluster=launch.cluster,
        resident=launch.resident,
    )
    if logits.is_cuda:
        with torch.cuda.device(logits.device):
            stream = torch.cuda.current_stream(logits.device).cuda_stream
            error = lib.fst_sample_tokens(ctypes.byref(arguments), stream)
    else:
        error = lib.fst_sample_tokens(ctypes.byref(arguments), None)
    if error:
        raise RuntimeError(
            f"sample_tokens on [{rows}, {vocabulary}] with {launch}: {lib.fst_error(error).decode()} (code {error})"
        )
    return ids, logprob, untruncated


@torch.library.custom_op("fst_kernels::sample_tokens", mutates_args=())
def sample_tokens_op(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    row_temperature: Tensor | None,
    row_top_k: Tensor | None,
    row_top_p: Tensor | None,
    row_min_p: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    library_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each rule is one number for all rows, or a tensor [S]."""
    name = next(name for name in NAMES if name == library_name)
    if logits.dtype != torch.float32 and (name == "cpu" or logits.dtype != torch.bfloat16):
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    return launch_kernel(
        logits,
        temperature if row_temperature is None else row_temperature.float().contiguous(),
        top_k if row_top_k is None else row_top_k,
        top_p if row_top_p is None else row_top_p,
        min_p if row_min_p is None else row_min_p,
        seeds.contiguous(),
        positions.contiguous(),
        name,
    )


@sample_tokens_op.register_fake
def _(
    logits: Tensor,
    *_: Tensor | float | str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
    )
