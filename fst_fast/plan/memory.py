"""The memory of one process in every phase of a slow step, item by item, in bytes.

What a tensor costs is read off the code that allocates it: rollout/engine.py and kv_pool.py (sampling), policy/cpu_forward.py (the copies of
the layers' weights), the layers of transformers (what autograd keeps), fst_kernels' head (chunks of logits, the gradient of its weight) and
DeepSpeed 0.19 (what each ZeRO stage partitions, and its buffers). Peaks are those of the phase's largest moment. What a process has besides
tensors (libraries, the CUDA context, fragmentation) is not counted; a machine's `reserve` stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fst_fast.config import Config
from fst_fast.plan.shapes import Shape
from fst_fast.plan.workload import MicroBatch, Work

PHASES = ("sampling", "scoring", "forward and backward", "optimiser step", "hand-over")
BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, elements
SUB_GROUP = 1_000_000_000  # sub_group_size of ZeRO-3, elements that a step takes at a time
LIVE = 1_000_000_000  # stage3_max_live_parameters, elements
# model types that policy/cpu_forward.py, cpu_layers.py and gpu_forward.py know
FUSED_TYPES = ("llama", "qwen2", "qwen3")
PERSISTENT = 100_000  # stage3_param_persistence_threshold: smaller tensors are not partitioned
GATHER_BUCKET = 64 * 2**20  # of policy/trained.py
PREFILL = 8192  # rollout/engine.py: prompt tokens of one forward
CPU_CHUNK = 1024  # policy/cpu_forward.py: rows of one product
GATHERED_BYTES, GATHERED_CHUNKS = 2500 * 10**6, 16  # fst_kernels, linear_logprob/rows.py


@dataclass
class Phase:
    """Bytes by item; `host`: in CPU memory instead (offload)."""

    name: str
    items: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True)
class Setting:
    """What a prediction needs to know: the model, the keys that matter, and where it runs."""

    shape: Shape
    config: Config
    processes: int
    gpu: bool

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return 4 if self.config.model.dtype == "float32" else 2

    @property
    def stage(self) -> int:
        return self.config.policy.zero_stage

    @property
    def summed(self) -> int:
        """Bytes of an element of the gradient that DeepSpeed adds up over micro-batches."""
        given = self.config.policy.deepspeed.get("data_types")
        less = isinstance(given, dict) and given.get("grad_accum_dtype") in ("bf16", "bfloat16")
        return 4 if self.stage and not less else self.element

    @property
    def whole_sums(self) -> bool:
        """Whether DeepSpeed's BF16_Optimizer runs: ZeRO-1 whose float32 gradients are not partitioned, and always there."""
        return self.stage == 1 and self.summed > self.element and not self.config.policy.offload_optimizer

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        lora = self.config.policy.lora
        return (
            self.shape.parameters if lora is None else self.shape.adapter_parameters(lora.rank, lora.targets)
        )

    @property
    def partitioned(self) -> int:
        """Parameters that ZeRO-3 has to gather: not those of small tensors, in all but tiny models the norms and biases."""
        x = self.shape
        return x.parameters - x.layers * x.small - x.hidden if x.hidden**2 > PERSISTENT else 0

    @property
    def fused(self) -> bool:
        """Whether the CPU's own forward samples and scores."""
        return not self.gpu and self.element == 4 and self._known

    @property
    def one_pass_layers(self) -> bool:
        """Whether the layers of the model in training are those of policy/cpu_layers.py."""
        return not self.gpu and self.element == 4 and self.shape.model_type in FUSED_TYPES

    @property
    def lean(self) -> bool:
        """Whether a fused forward samples: the CPU's, or the GPU's."""
        return self.fused or (self.gpu and self._known and self.config.policy.lora is None)

    @property
    def _known(self) -> bool:
        return self.shape.model_type in FUSED_TYPES and self.config.policy.packing == "forest"

    @property
    def graphs(self) -> bool:
        """Whether decode steps are CUDA graphs."""
        wanted = self.config.rollout.cuda_graphs
        return self.gpu and (self.lean if wanted == "auto" else wanted is True)

    @property
    def layer_copies(self) -> int:
        """Bytes of the weights that the CPU's forward lays out anew."""
        return 4 * self.shape.layers * self.shape.layer_weights if self.fused else 0


def held(s: Setting) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that a process holds through all phases, by item: on the device, and on the host."""
    e, shape, policy, n = s.element, s.shape, s.config.policy, s.processes
    everything, trained = shape.parameters, s.trained
    device: dict[str, int] = {}
    host: dict[str, int] = {}
    if s.stage == 3:
        whole = everything - s.partitioned  # these have a partition, too
        device["weights"] = e * (everything // n + whole + (trained if policy.lora else 0))
        device["replica"] = 0 if policy.lora else e * everything
    else:
        device["weights"] = e * (trained if policy.lora else everything)
    if policy.offload_parameters:
        host["weights"] = device.pop("weights")
    device["reference"] = e * everything
    if s.config.slow.reference.every is not None:  # the policy of some steps ago, beside the base model
        device["refreshed reference"] = e * everything
    share = trained // n if s.stage else trained
    master = 4 * share if s.stage or e < 4 else 0  # ZeRO-3 clones float32 weights, too
    if s.stage == 3:  # both are allocated at the start and stay
        device["gradients"] = s.summed * share
        device["buckets"] = e * (BUCKET if s.gpu else min(BUCKET, trained))
    if s.whole_sums:
        device["gradients"] = 4 * trained
    (host if policy.offload_optimizer else device)["optimiser"] = 8 * share + master
    return device, host


def gradients(s: Setting, micro_batches: int) -> int:
    """Bytes of the gradients once all are there."""
    whole = s.element * s.trained
    if s.whole_sums:  # each gradient is freed once it is added
        return 4 * s.trained
    if s.stage < 2:
        aside = 4 * s.trained if not s.stage and s.element == 2 and micro_batches > 2 else 0
        return (4 * s.trained if s.summed > s.element else whole) + aside
    if s.summed > s.element:
        return 4 * s.trained // s.processes
    accumulated = 2 if s.stage == 2 and micro_batches > 1 else 1
    return accumulated * whole // s.processes


def buckets(s: Setting) -> int:
    """Bytes of the buffer that ZeRO-1 and 2 communicate gradients through in a backward. On a CPU memory that is never written takes no room."""
    return s.element * (BUCKET if s.gpu else min(BUCKET, s.trained)) if s.stage in (1, 2) else 0


def layer_activations(s: Setting) -> int:
    """Bytes per token that autograd keeps of one layer."""
    e, x = s.element, s.shape
    frozen = s.config.policy.lora is not None  # frozen norms do not keep their normalised input
    mlp = x.active * (4 * e * x.inner + (e * x.hidden if x.experts > 1 else 0))
    norm = x.hidden * (4 + (e if frozen else 2 * e))
    qk_norm = (x.q_width + x.kv_width) * (4 + (0 if frozen else e)) if x.qk_norm else 0
    # each norm keeps its input, SwiGLU its two inputs and its result
    if s.config.policy.liger or s.one_pass_layers:
        norm, qk_norm, mlp = 2 * e * x.hidden, e * (x.q_width + x.kv_width) if x.qk_norm else 0, mlp * 3 // 4
    attention = 2 * e * (x.q_width + x.kv_width) + 4 * x.heads
    lora = s.config.policy.lora
    adapters = e * lora.rank * len(lora.targets) if lora else 0
    return x.norms * norm + qk_norm + attention + mlp + adapters


def activations(s: Setting, tokens: int) -> tuple[int, int]:
    """Bytes that the forward of `tokens` leaves behind, and those when the backward is inside the last layer's MLP, its largest moment.

    By then the last norm has been freed, and the MLP has three gradients of its inner width beside three kept tensors."""
    x, e = s.shape, s.element
    ends, rotary = x.hidden * (4 + 2 * e), 8 * x.dim
    layer, workspace = layer_activations(s), e * (2 * x.active * x.inner + x.hidden)
    if s.config.policy.activation_checkpointing:
        kept = x.layers * e * x.hidden + rotary
        return tokens * (kept + ends), tokens * (kept + layer - e * x.hidden + workspace)
    kept = x.layers * layer + rotary
    return tokens * (kept + ends), tokens * (kept + workspace)


def head(s: Setting, rows: int, *, gradient: bool) -> tuple[int, int]:
    """Bytes of the head: chunks of logits, which go when the operator returns, and hidden states with their gradient, which stay."""
    e, v, h = s.element, s.shape.vocabulary, s.shape.hidden
    chunk = min(s.config.slow.head_chunk_rows, -(-rows // 64) * 64)
    exact = s.config.slow.kl in ("reverse", "forward") and s.config.slow.kl_coef > 0 and gradient
    if s.gpu:
        logits = 4 * chunk * v * (2 if exact else 1)
        most = min(max(GATHERED_BYTES // (2 * v), chunk), GATHERED_CHUNKS * chunk, rows)
        logits += e * v * (most if gradient and s.element == 2 else chunk if gradient else 0)
    else:
        logits = 4 * chunk * v * (2 + (2 if exact else 0))
        logits += 4 * v * h if e < 4 else 0  # the weight in float32
    return logits, e * rows * h * (1 + gradient)


def kv_pool(s: Setting, work: Work) -> int:
    """Bytes of keys and values if all that a process samples at a time is to have room."""
    slots = min(s.config.rollout.max_batch, work.sequences)
    tokens = work.prompt_tokens + slots * max(work.longest - 1, 1)
    return int(s.element * s.shape.kv_elements() * tokens)


def sampling(s: Setting, work: Work) -> dict[str, int]:
    """The largest moment: of the prefill, or of decoding. On a CPU the pool's memory is there once it is written."""
    x, e = s.shape, s.element
    slots = min(s.config.rollout.max_batch, work.sequences)
    kept = e * work.prompts * x.vocabulary if work.shared else 0  # the logits at the ends of prompts
    pool = kv_pool(s, work)

    def forward(tokens: int) -> int:
        rows = min(CPU_CHUNK, tokens) if s.fused else tokens
        return e * tokens * (x.hidden + 2 * x.q_width + 2 * x.kv_width) + e * rows * (3 * x.inner + x.hidden)

    prefill = {
        "keys and values": pool if s.gpu else e * x.kv_elements() * work.prompt_tokens,
        "logits": kept,
        "activations": forward(min(PREFILL, work.prompt_tokens) if work.shared else slots * work.prompt),
    }
    decoding = {
        "keys and values": pool,
        "logits": kept + slots * x.vocabulary * (4 if s.gpu else 20),
        "activations": forward(slots),
    }
    return {
        "layer copies": s.layer_copies,
        **(prefill if sum(prefill.values()) > sum(decoding.values()) else decoding),
    }


def scoring(s: Setting, micro: list[MicroBatch]) -> dict[str, int]:
    x, e = s.shape, s.element
    kl = s.config.slow.kl if s.config.slow.kl_coef else "none"
    if kl == "none" or not micro:
        return {}
    tokens, rows = max(m.tokens for m in micro), max(m.rows for m in micro)
    chunk = min(CPU_CHUNK, tokens) if s.fused else tokens
    forward = e * tokens * (2 * x.hidden + 2 * x.q_width + 2 * x.kv_width) + e * chunk * 3 * x.inner
    logits, states = head(s, rows, gradient=False)
    if kl != "k3":
        return {
            "layer copies": s.layer_copies,
            "activations": forward + e * x.hidden * sum(m.rows for m in micro),
        }
    if forward > logits:
        return {"layer copies": s.layer_copies, "activations": forward + states}
    return {"layer copies": s.layer_copies, "logits": logits, "activations": states}


def forward_backward(s: Setting, micro: list[MicroBatch]) -> dict[str, int]:
    if not micro:
        return {}
    x, e = s.shape, s.element
    whole = gradients(s, len(micro))
    before = whole if len(micro) > 1 or s.stage == 3 else 0
    one = e * x.embedding if s.config.policy.lora is None else 0
    live = e * min(s.partitioned, LIVE) if s.stage == 3 and s.processes > 1 else 0
    # The gradient of the head's weight, as the operator leaves it and in the type of the weight.
    dw, tied = (4 * x.embedding, one) if one else (0, 0)
    sent = buckets(s)
    late = {"buckets": sent} if sent else {}
    early = late if s.gpu else {}  # on a CPU they fill up as gradients come
    moments: list[dict[str, int]] = []
    for m in micro:
        forward, backward = activations(s, m.tokens)
        logits, states = head(s, m.rows, gradient=True)
        moments += [
            # the forward's end; the backward's begin; inside the last layer
            {"activations": forward + states, "logits": logits + dw, "gradients": before},
            {"activations": forward + states, "gradients": before + dw + tied, **early},
            {"activations": backward, "gradients": before + tied, **early},
        ]
    last = max(whole, e * s.trained if s.stage < 2 else 0) + one * (2 if x.tied else 1)
    moments.append({"gradients": last, **late})
    worst: dict[str, int] = max(moments, key=lambda items: sum(items.values()))
    return {"gathered weights": live, **worst}


def optimiser_step(s: Setting, micro_batches: int) -> dict[str, int]:
    own = gradients(s, micro_batches)
    if s.config.policy.offload_optimizer:
        return {"gradients": own}
    share = s.trained // s.processes if s.stage else s.trained
    largest = s.shape.embedding if s.config.policy.lora is None else s.shape.hidden * 64
    temporary = 4 * share if s.gpu else 8 * (share if s.stage else min(largest, share))
    if s.config.policy.optimizer == "fused_adam" or (s.gpu and s.config.policy.optimizer == "auto"):
        temporary = 0
    if s.whole_sums:
        return {"temporaries": temporary}
    if not s.stage and s.element == 4:
        return {"gradients": own, "temporaries": temporary}
    if s.stage == 3:
        group = min(1.0, SUB_GROUP / share)
        return {"gradients": own + int(4 * share * group), "temporaries": int(temporary * group)}
    if s.stage and own > temporary:  # both copies are there until the one in fp32 is whole
        return {"gradients": own + 4 * share}
    return {"gradients": 4 * share, "temporaries": temporary}


def hand_over(s: Setting) -> dict[str, int]:
    bucket = s.element * min(GATHER_BUCKET + s.shape.embedding, s.trained) if s.stage == 3 else 0
    return {"gathered weights": bucket}


def memory(s: Setting, work: Work) -> list[Phase]:
    """The phases of PHASES. Under method=gepa nothing is trained: sampling alone."""
    micro = work.micro_batches(s.config.slow.tokens_per_micro_batch)
    device, host = held(s)
    if s.config.method == "gepa":
        return [Phase("sampling", {"weights": device["reference"], **sampling(s, work)})]
    # released while nothing samples
    idle = {name: size for name, size in device.items() if name != "replica"}
    parts = [
        sampling(s, work), scoring(s, micro), forward_backward(s, micro), optimiser_step(s, len(micro)), hand_over(s),
    ]  # fmt: skip
    return [
        Phase(
            name,
            {k: v for k, v in ({**(idle if 0 < i < 4 else device), **part}).items() if v},
            host,
        )
        for i, (name, part) in enumerate(zip(PHASES, parts, strict=True))
    ]
