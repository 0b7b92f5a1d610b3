"""policy.liger: Liger's layers compute the same as transformers' own: loss, gradients and rollouts.

Liger's kernels use Triton: this file runs itself again in a process with TRITON_INTERPRET=1, which Triton reads at
import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.policy import liger
from fst_fast.policy.attention import NAME
from fst_fast.policy.cpu_forward import unsupported_reason
from fst_fast.policy.packing import forest_batch
from fst_fast.policy.trained import TrainedPolicy, load
from tests.fst_fast.test_kv_pool import assert_same, forest, make_model, padded, requests_of, sample
from tests.fst_fast.test_packing import gradients, random_leaves, tiny_config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1")


@pytest.mark.skipif(INTERPRETED, reason="the outer process runs this file")
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{len(liger.TYPES) + 4} passed" in done.stdout


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="needs a process without a GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(UserError, match=r"needs a GPU.*policy.liger=false"):
        liger.check()


@pytest.fixture(autouse=True)
def what_the_interpreter_lacks(monkeypatch):
    """Compiled kernels convert a Python float to their float32, which has `.to`, and support CUDA's libdevice;
    interpreted ones do not."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # looked up while a kernel runs

    convert = interpreter._implicit_cvt

    def converted(arg):
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
        return convert(arg)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)


def assert_same_layers(kind: str, device: str) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation=NAME).to(device)
    fused = AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation=NAME).to(device)
    fused.load_state_dict(plain.state_dict())
    batch = forest_batch(random_leaves(3), share="all", device=device)
    weights = torch.rand(len(batch.labels))
    batch.labels, weights = batch.labels.to(device), weights.to(device)
    loss, grads = gradients(plain, batch, weights)  # before Liger replaces the rotary embedding for all
    liger.install(fused)
    fused_loss, fused_grads = gradients(fused, batch, weights)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert set(fused_grads) == set(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@inside
@pytest.mark.parametrize("kind", liger.TYPES)
def test_layers_compute_the_same(kind):
    assert_same_layers(kind, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", liger.TYPES)
def test_layers_compute_the_same_on_a_gpu(kind):
    pytest.importorskip("liger_kernel")
    assert_same_layers(kind, "cuda")


@inside
def test_rollouts_are_the_same(monkeypatch):
    monkeypatch.setenv("FST_KERNELS", "reference")  # only Liger's kernels are tried here
    requests = requests_of(contexts=(9, 4), problems=(3, 5), samples=1)
    said = sample(padded(make_model(attention="sdpa")), requests, 4)  # before Liger replaces rotary embedding
    model = make_model()
    liger.install(model)
    assert_same(sample(forest(model, max_batch=4, prefill_tokens=16), requests, 4), said)


@inside
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_every_model_of_a_run_uses_ligers_layers(lora):
    distributed.init()
    config = Config.model_validate({"policy": {"liger": True, "lora": lora}})
    for model in (load(config), TrainedPolicy(config).module):
        assert "another forward" in str(unsupported_reason(model))


@inside
def test_an_untested_model_type_is_refused():
    model = AutoModelForCausalLM.from_config(tiny_config("gemma3_text"), attn_implementation=NAME)
    with pytest.raises(UserError, match="not tested for gemma3_text; tested are llama"):
        liger.install(model)
