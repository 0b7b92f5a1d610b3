"""Every public operation on the head and on its logits, on every backend that runs here, computes from tensors of any layout what the reference
computes from contiguous copies of them: values and gradients, whichever of the tensors require a gradient. And for all operations: no tensor
may lie on another device. Attention is in test_attention_layouts.py, how tensors are laid out in layouts.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fst_kernels import (
    CascadePlan,
    PolicyObjective,
    TreeMask,
    cascade_decode_attention,
    linear_logprob,
    linear_policy_loss,
    policy_loss,
    policy_terms,
    sample_tokens,
    tree_attention,
)
from fst_kernels.backends import IMPLEMENTED
from fst_kernels.sampling import SampleOutput
from fst_kernels.sampling.reference import uniform
from tests.kernels.layouts import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    MORE,
    SIZE,
    assert_layouts_do_not_matter,
    draws,
    floats,
    lay,
    on_each_backend,
    outer,
    skip_where_it_cannot_run,
)
from tests.kernels.test_sample_tokens_kernel import numbers
from tests.kernels.test_sampling import truncated


def head_case(data: st.DataObject, backend: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    dtype = data.draw(st.sampled_from(DTYPES[backend]))
    seed = data.draw(st.integers(0, 10**6))
    n, h, v = data.draw(SIZE), data.draw(MORE), data.draw(MORE)
    several = data.draw(st.booleans())
    m = data.draw(SIZE) if several and n else n
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "hidden": floats(n, h, dtype=dtype, seed=seed),
        "weight": floats(v, h, dtype=dtype, seed=seed + 1),
    }
    labels = torch.randint(0, v, (m,), generator=g)
    tensors["labels"] = torch.where(torch.rand(m, generator=g) < 0.2, -100, labels)
    wide = F64 if dtype == F64 else F32
    if several:
        kind = data.draw(st.sampled_from([torch.int32, torch.int64]))
        tensors["rows"] = torch.randint(0, max(n, 1), (m,), generator=g).to(kind)
    if data.draw(st.booleans()):
        tensors["bias"] = floats(v, dtype=data.draw(st.sampled_from([F32, BF16, wide])), seed=seed + 2)
    if data.draw(st.booleans()):
        tensors["temperature"] = torch.rand(n, generator=g) + 0.5
    reference = data.draw(st.sampled_from([None, "own head", "another head"]))
    if reference == "own head":
        tensors["ref_hidden"] = floats(n, h, dtype=dtype, seed=seed + 3)
    elif reference == "another head":
        other = (
            F64
            if dtype == F64
            else data.draw(st.sampled_from([F32, BF16] if backend == "reference" else [F32]))
        )
        width = data.draw(MORE)
        tensors["ref_hidden"] = floats(n, width, dtype=other, seed=seed + 3)
        tensors["ref_weight"] = floats(v, width, dtype=other, seed=seed + 4)
        if data.draw(st.booleans()):
            tensors["ref_bias"] = floats(v, seed=seed + 5)
    numbers_ = {
        "softcap": data.draw(st.sampled_from([None, 3.0])),
        "chunk_rows": data.draw(st.sampled_from([None, 1, 4])),
    }
    return tensors, numbers_


HEAD = ("rows", "bias", "temperature", "ref_hidden", "ref_weight", "ref_bias")


@on_each_backend("linear_logprob")
@draws
@given(st.data())
def test_linear_logprob(backend: str, data: st.DataObject) -> None:
    skip_where_it_cannot_run(backend)
    tensors, numbers_ = head_case(data, backend)
    kl = data.draw(st.sampled_from([None, "reverse", "forward"])) if "ref_hidden" in tensors else None
    wide = F64 if tensors["hidden"].dtype == F64 else F32
    for name, like in (("logprob", "labels"), ("entropy", "hidden"), ("kl", "hidden")):
        tensors[f"d_{name}"] = floats(len(tensors[like]), dtype=wide, seed=len(name))

    def run(x: dict[str, Tensor], on: str) -> dict[str, Tensor | None]:
        given_ = {name: x[name] for name in HEAD if name in x}
        out = linear_logprob(x["hidden"], x["weight"], x["labels"], kl=kl, backend=on, **given_, **numbers_)
        return out._asdict()

    assert_layouts_do_not_matter(data, backend, tensors, run)


def objectives(data: st.DataObject, kinds: tuple[str, ...], reference: bool) -> PolicyObjective:
    kl = data.draw(st.sampled_from([None, "k3", "reverse", "forward"])) if reference else None
    return PolicyObjective(
        data.draw(st.sampled_from(kinds)), ratio_cap=1.2, kl=kl, kl_coef=0.3, entropy_coef=data.draw(st.sampled_from([0.0, 0.1]))
    )  # fmt: skip


def per_label(
    data: st.DataObject, tensors: dict[str, Tensor], names: tuple[str, ...], like: str = "labels"
) -> None:
    for at, name in enumerate(names):
        dtype = data.draw(st.sampled_from([F32, F64, BF16]))
        needed = name in ("advantages", "token_weight")
        if needed or data.draw(st.booleans()):
            x = (
                floats(len(tensors[like]), seed=at + 40).abs()
                if "weight" in name
                else floats(len(tensors[like]), seed=at + 40)
            )
            tensors[name] = x.to(dtype)


PER_LABEL = ("advantages", "token_weight", "old_logprob", "rollout_weight")


@on_each_backend("linear_policy_loss")
@draws
@given(st.data())
def test_linear_policy_loss(backend: str, data: st.DataObject) -> None:
    skip_where_it_cannot_run(backend)
    tensors, numbers_ = head_case(data, backend)
    objective = objectives(data, ("cispo", "grpo", "reinforce"), "ref_hidden" in tensors)
    per_label(data, tensors, PER_LABEL)
    tensors["d_loss"] = torch.tensor(-1.7, dtype=F64 if tensors["hidden"].dtype == F64 else F32)

    def run(x: dict[str, Tensor], on: str) -> dict[str, Tensor | None]:
        given_ = {name: x[name] for name in (*HEAD, *PER_LABEL) if name in x}
        loss, stats = linear_policy_loss(
            x["hidden"], x["weight"], x["labels"], objective=objective, backend=on, **given_, **numbers_
        )  # fmt: skip
        return {"loss": loss, "sums": stats.sums.float()}

    assert_layouts_do_not_matter(data, backend, tensors, run)


@outer
@draws
@given(st.data())
def test_policy_loss_on_the_output_of_linear_logprob(data: st.DataObject) -> None:
    tensors, numbers_ = head_case(data, "reference")
    objective = objectives(data, ("cispo", "grpo", "reinforce", "gspo"), "ref_hidden" in tensors)
    per_label(data, tensors, PER_LABEL)
    tensors["d_loss"] = torch.tensor(0.6, dtype=F64 if tensors["hidden"].dtype == F64 else F32)
    tensors["sequence"] = torch.arange(len(tensors["labels"])) // 3

    def run(x: dict[str, Tensor], on: str) -> dict[str, Tensor | None]:
        given_ = {name: x[name] for name in HEAD if name in x}
        out = linear_logprob(
            x["hidden"], x["weight"], x["labels"], kl=objective.exact_kl, backend=on, **given_, **numbers_
        )
        of_label = {name: x[name] for name in (*PER_LABEL, "rows", "sequence") if name in x}
        loss, stats = policy_loss(out, x["labels"], objective=objective, **of_label)
        return {"loss": loss, "sums": stats.sums.float()}

    assert_layouts_do_not_matter(data, "reference", tensors, run)


@outer
@draws
@given(st.data())
def test_policy_terms(data: st.DataObject) -> None:
    tensors = {"logprob": floats(data.draw(SIZE), seed=1)}
    per_label(data, tensors, (*PER_LABEL, "ref_logprob"), like="logprob")
    tensors["sequence"] = torch.arange(len(tensors["logprob"])) // 2
    objective = objectives(data, ("cispo", "grpo", "reinforce", "gspo"), False)

    def run(x: dict[str, Tensor], on: str) -> dict[str, Tensor | None]:
        return policy_terms(objective=objective, **x)._asdict()

    assert_layouts_do_not_matter(data, "reference", tensors, run)


# ---------------------------------------------------------------------------------------------------------------- sampling


@outer
@on_each_backend("sample_tokens")
@draws
@given(st.data())
def test_sample_tokens(backend: str, data: st.DataObject) -> None:
    skip_where_it_cannot_run(backend)
    rows, vocabulary = data.draw(SIZE), data.draw(MORE)
    seeds, positions = numbers(rows)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = (3 * torch.randn(rows, vocabulary, generator=g)).to(
        data.draw(st.sampled_from([F32, BF16, F16, F64]))
    )
    tensors = {"logits": logits, "seeds": seeds, "positions": positions}
    kinds = {"temperature": (0.7, None), "top_k": (None, 2), "top_p": (None, 0.6), "min_p": (None, 0.1)}
    rules: dict[str, Any] = {}
    for name, numbers_ in kinds.items():
        of_all = data.draw(st.sampled_from([*numbers_, "per row"]))
        if of_all == "per row" and name == "top_k":
            tensors[name] = torch.randint(1, 9, (rows,), generator=g).to(
                data.draw(st.sampled_from([torch.int32, torch.int64]))
            )
        elif of_all == "per row":
            tensors[name] = (0.1 + 0.9 * torch.rand(rows, generator=g)).to(
                data.draw(st.sampled_from([F32, F64, BF16]))
            )
        elif of_all is not None:
            rules[name] = of_all
    layouts = st.sampled_from(LAYOUTS)
    laid = {name: lay(x, data.draw(layouts), data.draw(st.integers(0, 1))) for name, x in tensors.items()}
    plain = {name: x.clone(memory_format=torch.contiguous_format) for name, x in laid.items()}
    for x in laid.values():
        if x.is_floating_point():
            x.requires_grad_(data.draw(st.booleans()))
    got = sample_tokens(**laid, **rules, backend=backend)
    want = sample_tokens(**plain, **rules, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not any(x.requires_grad for x in got)
    assert_draws_of_the_reference(plain, rules, got)


def assert_draws_of_the_reference(
    tensors: dict[str, Tensor], rules: dict[str, Any], got: SampleOutput
) -> None:
    """But for rounding: a token may differ where the random number falls within 1e-6 of the boundary between two of them."""
    want = sample_tokens(**tensors, **rules, backend="reference")
    same = got.ids == want.ids
    for row in (~same).nonzero().flatten().tolist():
        own = rules | {
            n: x[row].item() for n, x in tensors.items() if n not in ("logits", "seeds", "positions")
        }
        cumulative = truncated(tensors["logits"][row].float(), **own).cumsum(0)
        u = uniform(tensors["seeds"][row : row + 1], tensors["positions"][row : row + 1])
        assert (cumulative - u).abs().min() < 1e-6, row
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a[same], b[same], rtol=2e-6, atol=4e-6)


# ---------------------------------------------------------------------------------------------------------------- devices


def a_call_of(op: str) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Any]]:
    """Every tensor that the operation takes, and the call."""
    m = torch.rand(3) + 0.5
    head = {
        "hidden": floats(3, 4, seed=1), "weight": floats(5, 4, seed=2), "labels": torch.tensor([0, 4, -100]),
        "rows": torch.tensor([2, 0, 1]), "bias": floats(5, seed=3), "temperature": torch.ones(3),
        "ref_hidden": floats(3, 2, seed=4), "ref_weight": floats(5, 2, seed=5), "ref_bias": floats(5, seed=6),
    }  # fmt: skip
    label = {
        "advantages": m,
        "token_weight": m.clone(),
        "old_logprob": -m,
        "rollout_weight": m.clone(),
        "ref_logprob": -m,
    }
    match op:
        case "linear_logprob":
            return head, lambda x: linear_logprob(**x)
        case "linear_policy_loss":
            return head | label, lambda x: linear_policy_loss(**x, objective=PolicyObjective(kl="k3"))
        case "policy_loss":
            out = linear_logprob(head["hidden"], head["weight"], head["labels"])
            given_ = label | {
                "labels": head["labels"],
                "rows": head["rows"],
                "sequence": head["rows"].clone(),
            }
            return given_, lambda x: policy_loss(out, **x, objective=PolicyObjective(kl="k3"))
        case "policy_terms":
            given_ = label | {"sequence": head["rows"]}
            return given_, lambda x: policy_terms(-m, **x, objective=PolicyObjective(kl="k3"))
        case "tree_attention":
            given_ = {name: floats(1, 1, 3, 2, seed=i) for i, name in enumerate("qkv")}
            mask = TreeMask.causal(3)
            return given_, lambda x: tree_attention(**x, subtree_end=mask)
        case "cascade_decode_attention":
            plan = CascadePlan.build(
                [[0]], node_slots=[0], node_lengths=[5], suffix_slots=torch.tensor([7]), suffix_capacity=2,
                suffix_lengths=torch.ones(1, dtype=torch.int32),
            )  # fmt: skip
            given_ = {
                "q": floats(1, 2, 4, seed=1),
                "k_pool": floats(9, 1, 4, seed=2),
                "v_pool": floats(9, 1, 4, seed=3),
            }
            return given_, lambda x: cascade_decode_attention(**x, plan=plan)
        case _:
            given_ = {
                "seeds": torch.arange(3),
                "positions": torch.arange(3),
                "temperature": m,
                "top_k": torch.arange(3) + 1,
            }
            return given_ | {"top_p": m / 2, "min_p": m / 3}, lambda x: sample_tokens(
                floats(3, 5, seed=1), **x
            )


@outer
@pytest.mark.parametrize("op", [*IMPLEMENTED, "policy_loss", "policy_terms"])
def test_a_tensor_on_another_device_is_refused_in_one_sentence_that_names_it(op: str) -> None:
    tensors, call = a_call_of(op)
    call(tensors)
    for name, x in tensors.items():
        elsewhere = tensors | {name: x.to("meta")}
        with pytest.raises(ValueError, match=r" is on (meta|cpu)") as refused:
            call(elsewhere)
        words = str(refused.value)
        assert "meta" in words
        assert "\n" not in words
        # The first tensor's device is the one that the others must be on.
        assert name == "hidden" or words.startswith(f"{name} is on meta"), words


# ---------------------------------------------------------------------------------------------------------------- Triton


@outer
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_every_claim_about_triton_holds_in_its_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    files = [__file__, str(Path(__file__).with_name("test_attention_layouts.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
