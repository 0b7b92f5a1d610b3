"""The time of a slow step, phase by phase: operations, bytes, launches and messages, over the rates of a machine.

A GPU works through its kernels while the host launches them, so a phase takes the longer of the two, and a product the longer of its operations
and its bytes; a CPU does one after the other, so everything adds up. Sampling is played through: sequences of the lengths drawn occupy slots as in
rollout/scheduler.py, on every process, and the slowest process ends the phase.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from fst_fast.plan.machines import Machine
from fst_fast.plan.memory import PREFILL, Setting, kv_pool
from fst_fast.plan.workload import Ints, MicroBatch, Work
from fst_fast.run.cores import MOST_SPARE_CORES, spare_cores

PAGE, EXPECTED = 64, 4  # as in rollout/room.py, with which a test compares them
SAMPLER_LAUNCHES = 100  # of a decode step: random numbers in plain PyTorch, what is drawn, slots and lengths


@dataclass(frozen=True)
class Cost:
    """What a phase asks of one device."""

    products: float = 0.0  # FLOP of matrix products
    product_bytes: float = 0.0  # their operands and results
    attention: float = 0.0  # FLOP
    attention_backward: float = 0.0
    stream: float = 0.0  # bytes of everything else
    exps: float = 0.0
    launches: float = 0.0
    waits: float = 0.0  # seconds that nothing shortens: verdicts
    sent: float = 0.0  # bytes that one device sends to its neighbours
    messages: float = 0.0

    def __mul__(self, n: float) -> Cost:
        return Cost(*(getattr(self, f.name) * n for f in fields(self)))


Costs = list[Cost]
"""Kinds of kernels that follow each other: the product of one does not hide behind the memory of another."""


@dataclass(frozen=True)
class Timed:
    """A phase: seconds, what they are made of, and what it asks of the process that is timed."""

    name: str
    seconds: float
    parts: dict[str, float]
    cost: Cost

    @property
    def bound(self) -> str:
        return max(self.parts, key=lambda part: self.parts[part]) if any(self.parts.values()) else "nothing"


def total(costs: Costs) -> Cost:
    return Cost(*(sum(getattr(c, f.name) for c in costs) for f in fields(Cost)))


def parts_of(costs: Costs, m: Machine, s: Setting) -> dict[str, float]:
    """Seconds by cause, as if each were alone."""
    rate = m.product32 if s.element == 4 else m.product
    products = memory = 0.0
    for c in costs:
        product, moved = c.products / rate, c.product_bytes / m.operands
        if m.gpu:  # a kernel loads while it multiplies
            product, moved = (product, 0.0) if product >= moved else (0.0, moved)
        products, memory = products + product, memory + moved
    whole = total(costs)
    return {
        "products": products,
        "memory": memory + whole.stream / m.bandwidth,
        "attention": whole.attention / m.attention + whole.attention_backward / m.attention_backward,
        "exponentials": whole.exps / m.exps if m.exps else 0.0,
        "launches": whole.launches * m.launch,
        "communication": communication(whole, m, s.processes),
        "waiting": whole.waits,
    }


def communication(cost: Cost, m: Machine, processes: int) -> float:
    if processes == 1 or not cost.sent:
        return 0.0
    rate = m.link if processes <= m.per_node else min(m.link, m.network)
    return cost.sent / rate + cost.messages * m.message * math.log2(processes)


def seconds(parts: dict[str, float], m: Machine, *, overlapped: bool = False) -> float:
    """overlapped: communication goes on beside the computation."""
    if not m.gpu:
        return sum(parts.values())
    device = sum(parts[name] for name in ("products", "memory", "attention", "exponentials"))
    computing = max(device, parts["launches"])
    sent = parts["communication"]
    return (max(computing, sent) if overlapped else computing + sent) + parts["waiting"]


# ---------------------------------------------------------------------------------------------------------------- costs


def layers_forward(s: Setting, tokens: float, pairs: float, *, calls: float, own: bool) -> Cost:
    """All layers over `tokens` in `calls` forwards. own: the CPU's own forward, or layers fused in a GPU's; else eager transformers."""
    x, e = s.shape, s.element
    q, kv, h, i = x.q_width, x.kv_width, x.hidden, x.active * x.inner
    read = x.layer_weights if tokens / max(calls, 1) * x.active >= x.experts else x.token_weights
    ends = 6 * h + 2 * q + 2 * kv + 3 * i  # what the products of a token read and write
    if own:
        passes, launches = 4 * x.norms * h + 4 * (q + kv) + 3 * i + 2 * h, 12
    else:
        norms = 7 * (x.norms * h + (q + kv if x.qk_norm else 0))
        passes, launches = norms + 10 * (q + kv) + 5 * i + 6 * h, 60 if x.qk_norm else 48
        if s.config.policy.liger:
            passes, launches = 2 * x.norms * h + 4 * (q + kv) + 3 * i + 6 * h, launches // 2
    return Cost(
        products=2.0 * tokens * x.layers * x.token_weights,
        product_bytes=e * x.layers * (tokens * ends + calls * read),
        attention=4.0 * x.layers * q * pairs,
        stream=e * tokens * x.layers * passes,
        launches=calls * x.layers * launches,
    )


def layers_backward(s: Setting, tokens: float, pairs: float, *, calls: float) -> Costs:
    """Twice the forward's products (once where the weights are frozen), and the forward again with checkpointing."""
    forward = layers_forward(s, tokens, pairs, calls=calls, own=False)
    products = 1 if s.config.policy.lora else 2
    once = Cost(
        products=products * forward.products,
        product_bytes=products * forward.product_bytes,
        attention_backward=2.5 * forward.attention,
        stream=2 * forward.stream,
        launches=2 * forward.launches,
    )
    return [once, forward] if s.config.policy.activation_checkpointing else [once]


def adapters(s: Setting, tokens: float, calls: float) -> Cost:
    """What adapters add to a forward of eager layers."""
    lora, x = s.config.policy.lora, s.shape
    if lora is None:
        return Cost()
    n = len(lora.targets)
    return Cost(
        products=2.0 * tokens * s.trained,
        stream=s.element * tokens * x.layers * n * 3 * (x.hidden + x.inner) / 2,
        launches=calls * x.layers * 5 * n,
    )


def head_rows(s: Setting, rows: float, *, products: int, passes: int, exps: int, chunk: float) -> Cost:
    """The head over `rows`: products of [rows, H] x [H, V], passes over float32 logits, and their exponentials."""
    v, h = s.shape.vocabulary, s.shape.hidden
    chunks = -(-rows // max(chunk, 1))
    return Cost(
        products=2.0 * products * rows * v * h,
        product_bytes=products * (4.0 * rows * v + chunks * 4.0 * v * h),
        stream=4.0 * passes * rows * v,
        exps=exps * rows * v,
        launches=chunks * (20 + 10 * products),
    )


def prefill(s: Setting, work: Work) -> Costs:
    return [
        layers_forward(
            s, work.prompt_tokens, work.prompt_pairs, calls=-(-work.prompt_tokens // PREFILL), own=s.lean
        ),
        layer_copies(s),
        Cost(
            stream=s.element * s.shape.parameters * (1 if s.gpu else 5)
        ),  # the sums that tell whether weights changed
        head_rows(s, work.prompts, products=1, passes=2, exps=0, chunk=work.prompts),
    ]


def layer_copies(s: Setting) -> Cost:
    """What CpuForward makes of a model before its first token."""
    return Cost(stream=3.0 * s.layer_copies, launches=40 * s.shape.layers) if s.fused else Cost()


def decode_step(s: Setting, slots: int, suffix: float, work: Work) -> Costs:
    """One decode step of `slots` sequences, each `suffix` tokens into its response."""
    layers = layers_forward(s, slots, slots * (work.prompt + suffix), calls=1, own=s.lean)
    extra = Cost() if s.lean else adapters(s, slots, 1)
    if s.gpu:  # attention reads what is shared once
        shared = min(work.prompt_tokens, slots * work.prompt) + slots * suffix
        stream = layers.stream + s.element * s.shape.kv_elements() * shared
        layers = replace(layers, attention=0.0, stream=stream)
        if s.graphs:
            layers, extra = replace(layers, launches=12.0), replace(extra, launches=0.0)
    head = head_rows(s, slots, products=1, passes=3 if s.gpu else 9, exps=2, chunk=slots)
    return [layers, head, extra, Cost(launches=SAMPLER_LAUNCHES)]


class Segment(NamedTuple):
    steps: int
    width: int  # slots that are computed
    suffix: float  # tokens of a response so far, on average over the steps


def play(responses: Ints, slots: int) -> list[Segment]:
    """The decode steps of sequences of these lengths, in order: `slots` at a time, refilled once an eighth is idle, and shrunk, when none waits,
    once a quarter is."""
    queue = responses[::-1].tolist()
    clock = width = 0
    running: list[tuple[int, int]] = []  # (end, begin) of each live slot
    out: list[Segment] = []
    while True:
        idle = width - len(running)
        if not width or (idle and (8 if queue else 4) * idle >= width):
            while queue and len(running) < (width or slots):
                length = queue.pop()
                if length > 1:  # the first token comes from the prefill
                    heapq.heappush(running, (clock + length - 1, clock))
            width = len(running)
            if not width:
                return out
        end = running[0][0]
        age = clock - sum(begin for _, begin in running) / len(running)
        out.append(Segment(end - clock, width, age + (end - clock) / 2))
        clock = end
        while running and running[0][0] <= clock:
            heapq.heappop(running)


class Decoded(NamedTuple):
    seconds: float
    parts: dict[str, float]
    cost: Cost


class StepRates(NamedTuple):
    """Parts and cost of a decode step: at the begin of the responses, and what every token further on adds."""

    parts: dict[str, float]
    parts_per_token: dict[str, float]
    cost: Cost
    cost_per_token: Cost


def step_rates(s: Setting, slots: int, work: Work, m: Machine) -> StepRates:
    first, later = decode_step(s, slots, 0.0, work), decode_step(s, slots, 1.0, work)
    parts, then = parts_of(first, m, s), parts_of(later, m, s)
    slope = total([total(later), total(first) * -1.0])
    return StepRates(parts, {name: then[name] - parts[name] for name in parts}, total(first), slope)


def decode(s: Setting, work: Work, m: Machine, room: int, known: dict[Any, StepRates]) -> Decoded:
    """All decode steps of one process. room: bytes for keys and values; known: rates of widths that were met."""
    each = s.element * s.shape.kv_elements()
    slots = min(s.config.rollout.max_batch, work.sequences)
    if kv_pool(s, work) > room:
        tokens_left = room // each - work.prompt_tokens
        fits = tokens_left // max(work.longest - 1, 1)
        most = -(-(work.longest - 1) // PAGE)
        if most >= 2 * EXPECTED:  # in pages, as many as these hold when all responses are whole
            in_pages = min(
                tokens_left // (-(-most // EXPECTED) * PAGE),
                tokens_left * work.sequences // work.response_tokens,
            )
            fits = max(fits, in_pages)
        slots = int(max(1, min(slots, fits)))
    took, parts, tokens = 0.0, dict[str, float](), Counter[tuple[int, int]]()
    steps = Counter[tuple[int, int]]()
    for segment in play(work.responses, slots):
        key = (segment.width, work.prompt_tokens)
        if key not in known:
            known[key] = step_rates(s, segment.width, work, m)
        rates, n = known[key], segment.steps
        now = {
            name: value + segment.suffix * rates.parts_per_token[name] for name, value in rates.parts.items()
        }
        took += n * seconds(now, m)
        parts = {name: parts.get(name, 0.0) + n * value for name, value in now.items()}
        steps[key] += n
        tokens[key] += int(n * segment.suffix)
    costs = [known[key].cost * n for key, n in steps.items()]
    costs += [known[key].cost_per_token * n for key, n in tokens.items()]
    return Decoded(took, parts, total(costs))


def score(s: Setting, micro: list[MicroBatch]) -> Costs:
    """The reference's log-probs (k3) or hidden states (exact KL)."""
    kl = s.config.slow.kl if s.config.slow.kl_coef else "none"
    out: Costs = []
    for m in micro if kl != "none" else []:
        out += [layers_forward(s, m.tokens, m.pairs, calls=1, own=s.fused), layer_copies(s)]
        if kl == "k3":
            out.append(
                head_rows(s, m.rows, products=1, passes=8, exps=1, chunk=s.config.slow.head_chunk_rows)
            )
    return out


def forward(s: Setting, micro: list[MicroBatch]) -> Costs:
    """The head computes its gradient in the forward."""
    exact = s.config.slow.kl in ("reverse", "forward") and s.config.slow.kl_coef > 0
    products = (3 if s.config.policy.lora is None else 2) + exact
    chunk = s.config.slow.head_chunk_rows
    out: Costs = []
    for m in micro:
        out += [layers_forward(s, m.tokens, m.pairs, calls=1, own=False), adapters(s, m.tokens, 1)]
        out.append(
            head_rows(
                s, m.rows, products=products, passes=20 if exact else 12, exps=3 if exact else 2, chunk=chunk
            )
        )
        if s.stage == 3:
            out.append(Cost(sent=gathered(s), messages=s.shape.layers))
    return out


def backward(s: Setting, micro: list[MicroBatch]) -> Costs:
    out: Costs = []
    size = s.element * s.trained
    share = (s.processes - 1) / s.processes
    head = 16.0 * s.shape.embedding if s.config.policy.lora is None else 0.0
    for m in micro:
        out += layers_backward(s, m.tokens, m.pairs, calls=1)
        out += [adapters(s, m.tokens, 1) * 2, Cost(stream=head + 2.0 * size)]
        if s.stage == 3:
            out.append(Cost(sent=gathered(s), messages=s.shape.layers))
        if s.stage >= 2:
            out.append(Cost(sent=share * size, messages=s.shape.layers))
    if s.stage < 2:  # once, at the last micro-batch; stage 1 sends what it partitions
        out.append(Cost(sent=(2 if s.stage == 0 else 1) * share * size, messages=s.shape.layers))
    return out


def gathered(s: Setting) -> float:
    """Bytes that one process receives to have all weights."""
    return s.element * s.shape.parameters * (s.processes - 1) / s.processes


def optimiser_step(s: Setting, m: Machine) -> Costs:
    share = s.trained / s.processes if s.stage else s.trained
    lora = s.config.policy.lora
    tensors = s.shape.layers * (2 * len(lora.targets) if lora else 9)
    out = [Cost(stream=80.0 * share, launches=20 if s.stage else 16 * tensors)]
    if s.config.policy.offload_optimizer:
        out = [Cost(waits=(16.0 + 2 * s.element) * share / m.host)]
    if s.stage in (1, 2):
        out.append(Cost(sent=gathered(s), messages=1))
    return out


def hand_over(s: Setting) -> Costs:
    weights = s.element * s.shape.parameters
    out = [Cost(stream=weights * (1 if s.gpu else 5), launches=27.0 * s.shape.layers)]
    if s.stage == 3:
        out.append(Cost(sent=gathered(s), messages=s.trained / 2**26 + 1, stream=3.0 * weights))
    return out


# ---------------------------------------------------------------------------------------------------------------- a step


@dataclass(frozen=True)
class StepTime:
    """trained_tokens: what is shared counted once; idle: share of sampling that the average process waits for the slowest."""

    phases: list[Timed]
    trained_tokens: int
    response_tokens: int
    idle: float

    @property
    def seconds(self) -> float:
        return sum(p.seconds for p in self.phases)


def verifiers(s: Setting) -> int:
    """Verifying children of a process; a node of GPUs has cores for all of them."""
    return s.config.verify.workers or (MOST_SPARE_CORES if s.gpu else spare_cores())


def sampling(
    s: Setting, work: Work, m: Machine, *, room: int, verify_s: float, known: dict[Any, StepRates]
) -> list[Timed]:
    """Prefill, decode and verdicts of one process."""
    if not work.sequences:
        return []
    first = prefill(s, work)
    parts = parts_of(first, m, s)
    judged, decoded = work.sequences * verify_s / verifiers(s), decode(s, work, m, room, known)
    if m.gpu:  # responses are judged while others are sampled, on cores that have nothing else to do
        judged = max(verify_s, judged - decoded.seconds)
    return [
        Timed("prefill", seconds(parts, m), parts, total(first)),
        Timed("decode", *decoded),
        Timed("verify", judged, {"waiting": judged}, Cost(waits=judged)),
    ]


def step_time(s: Setting, shares: list[Work], m: Machine, *, room: int, verify_s: float) -> StepTime:
    """A slow step. shares: of every process; room: bytes for keys and values of one process."""
    known: dict[Any, StepRates] = {}
    sampled = [sampling(s, work, m, room=room, verify_s=verify_s, known=known) for work in shares]
    took = [sum(phase.seconds for phase in phases) for phases in sampled]
    phases = sampled[took.index(max(took))]
    if s.config.method != "gepa":
        micro = balanced(shares).micro_batches(s.config.slow.tokens_per_micro_batch)
        for name, costs in (
            ("score", score(s, micro)), ("forward", forward(s, micro)), ("backward", backward(s, micro)),
            ("optimiser", optimiser_step(s, m)), ("hand-over", hand_over(s)),
        ):  # fmt: skip
            parts = parts_of(costs, m, s)
            beside = s.stage == 3 and name in ("forward", "backward")
            phases = [*phases, Timed(name, seconds(parts, m, overlapped=beside), parts, total(costs))]
    return StepTime(
        phases,
        trained_tokens=sum(w.prompt_tokens + w.response_tokens for w in shares if w.sequences),
        response_tokens=sum(w.response_tokens for w in shares),
        idle=1 - sum(took) / len(took) / max(took) if any(took) else 0.0,
    )


def balanced(shares: list[Work]) -> Work:
    """An update is dealt out evenly: a process with the mean number of response tokens, and problems rounded up."""
    if len(shares) == 1:
        return shares[0]
    most = max(shares, key=lambda w: w.problems)
    scale = sum(w.response_tokens for w in shares) / len(shares) / max(most.response_tokens, 1)
    lengths = np.maximum(1, np.rint(most.responses * min(scale, 1.0))).astype(np.int64)
    return replace(most, responses=lengths)
