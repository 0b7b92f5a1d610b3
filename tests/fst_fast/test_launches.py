"""What a decode step and a micro-batch ask of a GPU, counted without one: kernels launched, and waits of the host (tests/launches.py)."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("triton")

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fst_fast.policy import head
from fst_fast.policy.attention import NAME
from fst_fast.policy.gpu_forward import GpuForward
from fst_fast.rollout.cascade import DecodePlan
from fst_fast.rollout.decode import ForestDecoder, transformers_forward
from fst_fast.rollout.kv_pool import KVPool
from fst_fast.rollout.logits import float32_logits
from fst_fast.rollout.prefixes import PrefixCache
from fst_fast.rollout.responses import Responses, Sampling
from fst_kernels import CascadePlan, PolicyObjective, TreeMask, gpu, linear_policy_loss
from fst_kernels.cascade_decode.plan import Work
from fst_kernels.tree_attention import triton as tree_attention
from tests.launches import DEVICE, Launches, on_a_gpu, stand_in

SLOTS, HEADS, KV_HEADS, DIM, VOCABULARY = 6, 8, 2, 64, 512
GOAL = 12  # launches of a layer of a decode step, outside a graph
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FST_CHECK", raising=False)
    monkeypatch.delenv("FST_KERNELS", raising=False)


def model_of(kind: str, layers: int) -> Any:
    with DEVICE:
        if kind == "qwen2":
            model: Any = Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_hidden_layers=layers))  # type: ignore[arg-type]
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_hidden_layers=layers, head_dim=DIM))  # type: ignore[arg-type]
    model.set_attn_implementation(NAME)
    return model.bfloat16().eval()


def host_work() -> CascadePlan:
    """Six sequences below two contexts and three problems, with tiles of both sizes."""
    paths = [[0, 2]] * 3 + [[0, 3]] * 2 + [[1, 4]]
    work = CascadePlan.build(
        paths, node_slots=[0, 700, 1400, 1440, 1480], node_lengths=[700, 600, 40, 40, 30],
        suffix_slots=torch.arange(SLOTS) * 64 + 1600, suffix_lengths=torch.full((SLOTS,), 5, dtype=torch.int32), suffix_capacity=64,
    )  # fmt: skip
    work.parts()
    work.work(HEADS // KV_HEADS, (16, 64))
    return work


def device_work(work: CascadePlan) -> CascadePlan:
    prepared: dict[Any, Any] = {"parts": tuple(map(stand_in, work.parts()))}
    key = ("work", HEADS // KV_HEADS, (16, 64))
    prepared[key] = [
        Work(w.rows, stand_in(w.items), stand_in(w.above), w.suffixes) for w in work.prepared[key]
    ]
    names = ("ranked", "past", "node_slots", "suffix_slots", "suffix_lengths")
    return replace(work, prepared=prepared, **{name: stand_in(getattr(work, name)) for name in names})


class Step:
    """A decode step's plan over stand-ins."""

    windows = True
    attend = DecodePlan.attend

    def __init__(self, work: CascadePlan) -> None:
        self.pool, self.rows, self.backend = (
            KVPool(),
            torch.zeros(SLOTS, dtype=torch.int64, device=DEVICE),
            "triton",
        )
        self.pool.slots, self.work = 2000, device_work(work)

    def tokens(self, *given: Any) -> Tensor:
        return DecodePlan.tokens(self, *given)  # type: ignore[arg-type]


def step_launches(
    kind: str, forward_of: Callable[[Any], Any], layers: int, change: Callable[[Step], None] = lambda _: None
) -> Launches:
    work, model = host_work(), model_of(kind, layers)
    with on_a_gpu() as counter:
        plan = Step(work)
        ids = torch.zeros(SLOTS, dtype=torch.int64, device=DEVICE)
        change(plan)
        with float32_logits(model), torch.inference_mode():
            forward = forward_of(model)
            forward(ids, ids, plan, None)  # lets the pool have its tensors
            counter.launches.clear()
            counter.waits.clear()
            logits = forward(ids, ids, plan, None)
        assert logits.shape == (SLOTS, VOCABULARY)
        assert logits.dtype == torch.float32
    return counter


def per_layer(kind: str, forward_of: Callable[[Any], Any]) -> float:
    one, three = (step_launches(kind, forward_of, n) for n in (1, 3))
    assert (three.total - one.total) % 2 == 0
    return (three.total - one.total) / 2


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_a_layer_of_a_decode_step_is_at_most_twelve_launches(kind: str) -> None:
    assert per_layer(kind, GpuForward) <= GOAL
    counted = step_launches(kind, GpuForward, 2)
    assert counted.waits == []
    assert counted.launches["part_kernel"] == 2 * 2, "tiles of 16 and of 64 rows"
    assert counted.total <= 2 * GOAL + 20, "embedding, rotary embedding, last norm and head"


def rollout_waits(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[ForestDecoder, Tensor], Tensor] = lambda _, logits: logits,
) -> list[tuple[bool, list[str]]]:
    """For each decode step of a rollout of four sequences: whether it built a work list, and what the host waited for. Every token drawn is 0."""
    model = model_of("qwen3", 1)
    prompts = [np.arange(40), np.concatenate([np.arange(30), np.arange(9)])] * 2
    responses = Responses([0, 1, 2, 3], limit=20, eos_ids=(), sampling=Sampling(1.0, None, None), name=str)
    found: list[tuple[bool, list[str]]] = []
    step = ForestDecoder._step
    with on_a_gpu() as counter:
        monkeypatch.setattr(
            "fst_fast.rollout.decode.to_device", lambda host, _: stand_in(host)
        )  # it pins what it sends
        forward = GpuForward(model)

        def noted(self: ForestDecoder, slots: Any, suffixes: Any, plan: DecodePlan) -> None:
            before, work = len(counter.waits), plan.work
            step(self, slots, suffixes, plan)
            found.append((plan.work is not work, counter.waits[before:]))

        monkeypatch.setattr(ForestDecoder, "_step", noted)
        decoder = ForestDecoder(
            lambda *given: change(decoder, forward(*given)), prompts, responses, layers=1, dtype=torch.bfloat16, device=DEVICE, max_batch=4,
            prefill_tokens=64, kv_tokens=10_000, logits_tokens=1, prefixes=PrefixCache(), pool=KVPool(),
        )  # fmt: skip
        with float32_logits(model), torch.inference_mode():
            decoder.run()
    assert (responses.length == 20).all()
    assert len(found) == 19
    return found


def test_the_host_waits_once_in_a_decode_step_to_read_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rollout_waits(monkeypatch)
    assert [waits for built, waits in found if not built] == [["_to_copy"]] * 18


def test_a_number_asked_for_in_a_decode_step_is_one_wait_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(decoder: ForestDecoder, logits: Tensor) -> Tensor:
        assert not logits.amax().cpu()
        return logits

    found = rollout_waits(monkeypatch, asks)
    assert [waits for built, waits in found if not built] == [["_to_copy"] * 2] * 18


def test_eager_layers_are_several_times_as_many() -> None:
    assert per_layer("qwen3", transformers_forward) > 3 * GOAL


def test_an_operation_that_is_not_fused_and_a_wait_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfused(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return torch.nn.functional.silu(left) * right

    def asks(plan: Step) -> None:
        tokens = plan.tokens
        plan.tokens = lambda layer, q, *rest: tokens(layer, q * int(q[0, 0, 0] > 0), *rest)  # type: ignore[method-assign]

    with pytest.raises(Exception, match="item"):  # a stand-in has no number to give
        step_launches("qwen3", GpuForward, 1, asks)
    monkeypatch.setattr(gpu, "gate", unfused)
    assert per_layer("qwen3", GpuForward) == GOAL + 1


# ------------------------------------------------------------------------------------------------------------------- a micro-batch


class Through:
    """A plan whose attention returns the queries: tree attention is counted by itself below."""

    windows = True

    def attend(self, layer: int, q: Tensor, *_: Any) -> Tensor:
        return q.transpose(1, 2)


@pytest.fixture
def plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss as a function, whose operations the counter sees."""
    op = importlib.import_module("fst_kernels.linear_policy_loss.op").linear_policy_loss_op
    api = importlib.import_module("fst_kernels.linear_policy_loss.api")

    def plain(*given: Any, **named: Any) -> Any:
        with torch.no_grad():
            return op._init_fn(*given, **named)

    monkeypatch.setattr(api, "linear_policy_loss_op", plain)


def micro_batch(rows_device: torch.device | str, kl: str | None) -> Launches:
    """A forward and the head's loss over 96 labelled rows with two labels each, in chunks of 32 rows; what the host has waited for."""
    model = model_of("qwen3", 1).train()
    with on_a_gpu((8, 0)) as counter:
        ids = torch.zeros(1, 128, dtype=torch.int64, device=DEVICE)
        head.install(model)
        counter.waits.clear()
        numbers = torch.zeros(192, device=DEVICE)
        rows = (torch.arange(192) % 96).to(rows_device, non_blocking=True)
        labels = torch.zeros(192, dtype=torch.int64, device=DEVICE)

        def job(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            leaves = hidden[:96].requires_grad_(), weight.requires_grad_()
            with torch.enable_grad():  # the operator's own operations are without
                return loss_of(*leaves)

        def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
            loss, _ = linear_policy_loss(
                hidden, weight, labels, numbers, objective=PolicyObjective("cispo", kl=kl, kl_coef=0.1 if kl else 0.0),  # type: ignore[arg-type]
                token_weight=numbers, rows=rows, old_logprob=numbers,
                ref_logprob=numbers if kl else None, chunk_rows=32,
            )  # fmt: skip
            return loss

        with head.running(model, job), torch.no_grad():
            model(input_ids=ids, position_ids=ids, plan=Through(), use_cache=False)
    return counter


@pytest.mark.usefixtures("plain_operators")
@pytest.mark.parametrize("kl", [None, "k3"])
def test_the_host_waits_for_nothing_in_a_micro_batch(kl: str | None) -> None:
    counted = micro_batch("cpu", kl)
    assert counted.waits == []
    assert counted.launches["head_statistics_kernel"] == 3
    assert counted.launches["logits_gradient_kernel"] == 3


@pytest.mark.usefixtures("plain_operators")
def test_rows_that_only_the_device_knows_would_be_waited_for() -> None:
    with pytest.raises(Exception, match="nonzero"):
        micro_batch(DEVICE, None)


@pytest.mark.parametrize("window", [None, 16])
def test_tree_attention_waits_for_nothing_forward_or_backward(window: int | None) -> None:
    on_host = TreeMask.shared_prefixes([(100, [60, 70, 20]), (30, [9])])
    n = on_host.subtree_end.shape[1]
    with on_a_gpu((8, 0)) as counter:
        mask = copy.copy(on_host)
        for name in ("subtree_end", "depth"):
            object.__setattr__(mask, name, stand_in(getattr(on_host, name)))
        object.__setattr__(mask, "prepared", {})
        q = torch.empty(1, HEADS, n, DIM, dtype=torch.bfloat16, device=DEVICE)
        k = torch.empty(1, KV_HEADS, n, DIM, dtype=torch.bfloat16, device=DEVICE)
        out, lse2 = tree_attention.forward(q, k, k, mask, 1.0, window)
        tree_attention.backward(q, q, k, k, out, lse2, mask, 1.0, window)
    assert counter.waits == []
    assert counter.launches["forward_kernel"] == counter.launches["dq_kernel"] == 1
