"""Mode B over csrc/policy_rows.cu: one matrix product makes a chunk of logits, one row kernel turns it into statistics and dLoss/dlogits
in its own memory, two matrix products take that to the hidden states and the weight.

The kernel is reached through its C interface with ctypes (pointers, sizes, stream): no torch headers, nothing to rebuild for another
torch. backend="cuda" is the library that CMake builds with nvcc; backend="host" is the same source compiled with g++ at its first
use, where CPU threads play the CUDA threads: for tests, far too slow for work. Loss, statistics and gradients leave through the same
functions as the reference's; see docs/kernels/csrc.md.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fst_kernels.library import LibraryName, load_kernel
from fst_kernels.linear_logprob.reference import ROW_BLOCK, Head, make_heads, pad_rows
from fst_kernels.linear_logprob.rows import Heads, Rows, RowValues, matmul
from fst_kernels.linear_policy_loss.objective import PolicyObjective
from fst_kernels.linear_policy_loss.program import (
    INPUTS,
    MAX_INSTRUCTIONS,
    Instruction,
    coefficient_program,
)

DEVICE_CHUNK_BYTES = 768 * 2**20


# ------------------------------------------------------------------------------------------------------------------- the interface


class _Instruction(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("op", "a", "b", "c")),
        ("constant", ctypes.c_float),
    ]


class _PolicyRows(ctypes.Structure):
    """FstPolicyRows of csrc/policy_rows.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary")),
        *((name, ctypes.c_void_p) for name in ("logits", "ref", "d_logits")),
        *((name, ctypes.c_int64) for name in ("logits_stride", "ref_stride", "d_stride")),
        *((name, ctypes.c_void_p) for name in ("temperature", "label_start", "labels")),
        ("inputs", ctypes.c_void_p * len(INPUTS)),
        *((name, ctypes.c_void_p) for name in ("logprob", "ref_logprob", "coefficient", "label_logit")),
        *((name, ctypes.c_void_p) for name in ("lse", "entropy", "kl")),
        *((name, ctypes.c_float) for name in ("softcap", "kl_coef", "entropy_coef")),
        *((name, ctypes.c_int32) for name in ("kl_kind", "d_is_bf16", "threads", "cluster", "resident")),
        ("instructions", ctypes.c_int32),
        ("program", _Instruction * MAX_INSTRUCTIONS),
    ]


@functools.cache
def _library(name: LibraryName) -> ctypes.CDLL:
    return load_kernel(name, "fst_policy_rows", _PolicyRows)


# ------------------------------------------------------------------------------------------------------------------- the kernel


class Launch(NamedTuple):
    """How the kernel runs; 0 and -1 leave it to the kernel, which decides by the vocabulary and the device alone."""

    threads: int = 0
    cluster: int = 0
    resident: int = -1  # 1: the row stays in shared memory; 0: it is read twice


CHOOSE = Launch()


class RowOutput(NamedTuple):
    """fp32."""

    lse: Tensor  # [R]
    entropy: Tensor  # [R]
    kl: Tensor | None  # [R]
    logprob: Tensor  # [L]
    ref_logprob: Tensor | None  # [L]
    coefficient: Tensor | None  # [L] dLoss/dlogprob; None: statistics only


def policy_rows(
    logits: Tensor,  # [R, V] fp32: h W^T + bias, before soft-cap and temperature
    temperature: Tensor,  # [R]
    label_rows: Tensor,  # [L] ascending
    labels: Tensor,  # [L] int64
    *,
    ref: Tensor | None = None,  # [R, V] fp32
    kl: Literal["reverse", "forward"] | None = None,
    softcap: float | None = None,
    d_logits: Tensor
    | None = None,  # [R, V] fp32 or bf16, written: dLoss/dlogits; may share the memory of logits. None: statistics only
    inputs: dict[str, Tensor] | None = None,  # of INPUTS, [L]; token_weight is needed with d_logits
    program: tuple[Instruction, ...] = (),
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    library_name: LibraryName = "cuda",
    launch: Launch = CHOOSE,
) -> RowOutput:
    """One call of the row kernel on the current stream. Rows of logits, ref and d_logits may lie apart, elements may not."""
    wanted = "cuda" if library_name == "cuda" else "cpu"
    if logits.device.type != wanted:
        raise ValueError(f"logits is on {logits.device}; backend={library_name} works on {wanted} tensors")
    lib = _library(library_name)
    (rows, vocabulary), count = logits.shape, labels.shape[0]
    for x in (logits, ref, d_logits):
        assert x is None or (x.shape == logits.shape and (x.stride(1) == 1 or vocabulary == 1))
    assert logits.dtype == torch.float32
    assert ref is None or ref.dtype == torch.float32
    assert d_logits is None or d_logits.dtype in (torch.float32, torch.bfloat16)

    def empty(n: int) -> Tensor:
        return torch.empty(n, dtype=torch.float32, device=logits.device)

    edges = torch.arange(rows + 1, device=logits.device, dtype=label_rows.dtype)
    start = torch.searchsorted(label_rows.contiguous(), edges).int()
    temperature, labels = temperature.float().contiguous(), labels.contiguous()
    given = {name: x.float().contiguous() for name, x in (inputs or {}).items()}
    lse, entropy, logprob = empty(rows), empty(rows), empty(count)
    divergence = None if kl is None else empty(rows)
    ref_logprob = None if ref is None else empty(count)
    coefficient, label_logit = (None, None) if d_logits is None else (empty(count), empty(count))

    def pointer(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    arguments = _PolicyRows(
        rows=rows,
        vocabulary=vocabulary,
        logits=pointer(logits),
        ref=pointer(ref),
        d_logits=pointer(d_logits),
        logits_stride=logits.stride(0),
        ref_stride=0 if ref is None else ref.stride(0),
        d_stride=0 if d_logits is None else d_logits.stride(0),
        temperature=pointer(temperature),
        label_start=pointer(start),
        labels=pointer(labels),
        inputs=(ctypes.c_void_p * len(INPUTS))(*(pointer(given.get(name)) for name in INPUTS)),
        logprob=pointer(logprob),
        ref_logprob=pointer(ref_logprob),
        coefficient=pointer(coefficient),
        label_logit=pointer(label_logit),
        lse=pointer(lse),
        entropy=pointer(entropy),
        kl=pointer(divergence),
        softcap=softcap or 0.0,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        kl_kind=(None, "reverse", "forward").index(kl),
        d_is_bf16=int(d_logits is not None and d_logits.dtype == torch.bfloat16),
        threads=launch.threads,
        cluster=launch.cluster,
        resident=launch.resident,
        instructions=len(program),
        program=(_Instruction * MAX_INSTRUCTIONS)(*(_Instruction(*i) for i in program)),
    )
    if logits.is_cuda:
        with torch.cuda.device(logits.device):
            error = lib.fst_policy_rows(
                ctypes.byref(arguments), torch.cuda.current_stream(logits.device).cuda_stream
            )
    else:
        error = lib.fst_policy_rows(ctypes.byref(arguments), None)
    if error:
        raise RuntimeError(
            f"policy_rows on [{rows}, {vocabulary}] with {launch}: {lib.fst_error(error).decode()} (code {error})"
        )
    return RowOutput(lse, entropy, divergence, logprob, ref_logprob, coefficient)


# ------------------------------------------------------------------------------------------------------------------- mode B


class RowKernel:
    """HeadRows over the kernel. Evaluation and gradient are one launch, so the objective must be known before: it becomes a program."""

    def __init__(self, heads: Heads, objective: PolicyObjective, library_name: LibraryName) -> None:
        self.head, self.ref_head = make_heads(heads)
        self.softcap, self.kl = heads.softcap, objective.exact_kl
        self.objective, self.library_name = objective, library_name

    def evaluate(self, rows: Rows, *, keep: bool) -> RowValues:
        assert rows.inputs is not None
        n = rows.hidden.shape[0]
        z = _raw_logits(self.head, rows.hidden)
        r = None if rows.ref_hidden is None else _raw_logits(self.ref_head, rows.ref_hidden)
        d_logits = None
        if keep:  # in place: bf16 where the next products take it, in the first half of each row
            in_bf16 = self.head.weight.dtype == torch.bfloat16
            d_logits = z.view(torch.bfloat16)[:, : z.shape[1]] if in_bf16 else z
        t = rows.temperature
        given = frozenset(rows.inputs) | ({"ref_logprob"} if self.objective.kl == "k3" else frozenset())
        found = policy_rows(
            z,
            t if isinstance(t, Tensor) else z.new_full((n,), t),
            rows.label_rows,
            rows.labels,
            ref=r,
            kl=self.kl,
            softcap=self.softcap,
            d_logits=d_logits,
            inputs=rows.inputs,
            program=coefficient_program(self.objective, given),
            kl_coef=self.objective.kl_coef,
            entropy_coef=self.objective.entropy_coef,
            library_name=self.library_name,
        )
        self.last = d_logits
        return RowValues(
            found.logprob,
            found.entropy,
            found.lse,
            found.ref_logprob,
            found.kl,
            coefficient=found.coefficient,
        )

    def gradient(
        self,
        coefficient: Tensor,
        d_entropy: Tensor | None,
        d_kl: Tensor | None,
        acting: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        d_logits, self.last = self.last, None
        assert d_logits is not None
        d_logits = d_logits if acting is None else d_logits[acting]
        return d_logits if out is None else out.copy_(d_logits)


def device_chunk_rows(vocabulary: int, matrices: int) -> int:
    """Rows whose fp32 logits (of the policy; and of the reference: matrices=2) take 768 MiB: enough for the products to run at speed."""
    return max(ROW_BLOCK, DEVICE_CHUNK_BYTES // (4 * max(vocabulary, 1) * matrices) // ROW_BLOCK * ROW_BLOCK)


def _raw_logits(head: Head, hidden: Tensor) -> Tensor:  # [n, H] -> [n, V]: what the kernel takes
    z = matmul(pad_rows(hidden), head.weight.t())[: hidden.shape[0]]
    return z if head.bias is None else z.add_(head.bias)
