"""What happened, as records: one line of metrics.jsonl per step, cycle and evaluation, a line of timing.jsonl per step, some rollouts to read.

metrics.jsonl holds no wall-clock, so that a resumed run can be compared with an unbroken one bit by bit; times are in timing.jsonl.
Functions that gather from several processes must be called on all of them; rank 0 writes.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_fast import distributed
from fst_fast.contracts import Sampled
from fst_fast.run.metrics import METRICS
from fst_fast.slow.groups import Group

if TYPE_CHECKING:
    from fst_fast.data.stages import Stage
    from fst_fast.session import Session

SPIKE = 10.0  # times the median of the steps before
SPIKE_STEPS = 32  # of which the median is taken; at least SPIKE_STEPS / 4 of them


def step(
    s: Session,
    sampled: Sequence[Sampled],
    groups: Sequence[Group],
    numbers: dict[str, Any],
    reused: int,
    *,
    seconds: float,
) -> None:
    """Count and write one slow step. `numbers` is what slow.step.optimise returned on this process."""
    rewards = [x.verdict.reward for x in sampled if x.verdict.reward is not None]
    local = [
        len(sampled), len(rewards), sum(rewards), sum(r * r for r in rewards), len(groups),
        sum(g.advantages is not None for g in groups), sum(len(x.rollout.response_ids) for x in sampled),
        sum(x.rollout.finish == "length" for x in sampled), numbers.pop("tokens"), numbers.pop("unshared"),
    ]  # fmt: skip
    n, judged, total, squares, all_groups, kept, tokens, cut, computed, unshared = distributed.total(local)
    counters = s.state.counters
    counters.rollouts += int(n) - reused
    counters.reused_rollouts += reused
    s.count_tokens_computed(int(computed), int(unshared))
    mean = total / max(judged, 1)
    record = {
        "step": s.state.step,
        "cycle": max(s.state.cycle - 1, 0),  # the one it belongs to; state.cycle counts those begun
        "reward": mean,
        "reward_std": math.sqrt(max(squares / max(judged, 1) - mean * mean, 0.0)),
        "groups": int(all_groups),
        "groups_kept": int(kept),
        **numbers,
        "response_tokens": tokens / max(n, 1),
        "length_stopped": cut / max(n, 1),
        "unjudged": int(n - judged),
        **s.sampler.unverified(),
        "verdict_metrics": _means([x.verdict.metrics for x in sampled]),
        "grad_norm_spike": spike(s.grad_norms, numbers["grad_norm"]),
        **asdict(counters),
    }
    timing = {
        "step": s.state.step,
        "seconds": s.seconds(),
        **s.spent_since_last_record(),
        "tokens_per_s": (tokens + computed) / max(seconds, 1e-9),
    }
    if record["grad_norm_spike"]:
        s.console.note(
            f"step {s.state.step}: the gradient norm {numbers['grad_norm']:.3g} is {record['grad_norm_spike']:.0f} times the median of the "
            f"{len(s.grad_norms)} steps before (clipped at slow.max_grad_norm={s.config.slow.max_grad_norm:g})"
        )
    if numbers["grad_norm"]:
        s.grad_norms.append(numbers["grad_norm"])
    if s.metrics:
        s.metrics.write("step", **record)
        s.metrics.write_timing(**timing)
        advantages = {id(m): float(a) for g in groups if g.advantages is not None for m, a in zip(g.sampled, g.advantages, strict=True)}  # fmt: skip
        for x in _spread(sampled, s.config.track.rollouts_per_step):
            s.metrics.write_rollout(**_readable(s, x, "slow", advantages.get(id(x), 0.0)))
    s.console.step(record, timing)


def cycle(s: Session, record: dict[str, Any], sampled: Sequence[Sampled]) -> None:
    """Write one fast phase."""
    full = {"cycle": s.state.cycle, "step": s.state.step, **record}
    if s.metrics and s.folder:
        s.metrics.write("cycle", **full)
        for x in _spread(sampled, s.config.track.rollouts_per_step):
            s.metrics.write_rollout(**_readable(s, x, "fast", None))
        s.write_contexts()
    s.console.cycle(full)


def evaluation(s: Session, result: dict[str, Any], *, final: bool) -> None:
    """Write one evaluation of the four cells."""
    stage = {"stage": s.stage.number, "task": s.stage.task} if s.config.stages else {}
    record = {"step": s.state.step, "final": final, **stage, **result, **asdict(s.state.counters)}
    if s.metrics:
        s.metrics.write("eval", **record)
        s.metrics.write_timing(step=s.state.step, seconds=s.seconds(), **s.spent_since_last_record())
    s.console.evaluation(record)


def stage_end(s: Session, stage: Stage, result: dict[str, Any]) -> None:
    """Write the four cells on one stage's task as they are at the end of a stage, its own or a later one."""
    record = {
        "step": s.state.step,
        "after_stage": s.stage.number,
        "stage": stage.number,
        "task": stage.task,
        **result,
    }
    s.stage_ends = [r for r in s.stage_ends if r["after_stage"] == s.stage.number] + [record]
    if s.metrics:
        s.metrics.write("stage", **record)


def spike(before: Sequence[float], norm: float | None) -> float | None:
    """How many times the median of `before` a gradient norm is, if that is SPIKE or more; else None."""
    if norm is None or len(before) < SPIKE_STEPS // 4:
        return None
    times = norm / statistics.median(before)
    return times if times >= SPIKE else None


def grad_norms(run_dir: Path) -> deque[float]:
    """Those of the last steps in metrics.jsonl: a resumed run judges spikes as an unbroken one. A step without gradient has none."""
    norms: deque[float] = deque(maxlen=SPIKE_STEPS)
    with open(run_dir / METRICS, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["kind"] == "step" and record["grad_norm"]:
                norms.append(record["grad_norm"])
    return norms


def _means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every number that verdicts carry, over all processes and over the verdicts that carry it."""
    sums: dict[str, tuple[float, int]] = {}
    for everywhere in distributed.all_gather([dict(m) for m in metrics]):
        for verdict in everywhere:
            for name, value in verdict.items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + float(value), count + 1)
    return {name: total / count for name, (total, count) in sorted(sums.items())}


def _spread(sampled: Sequence[Sampled], count: int) -> list[Sampled]:
    """`count` of them, evenly spaced."""
    if not count or not sampled:
        return []
    stride = max(len(sampled) // count, 1)
    return list(sampled[::stride][:count])


def _readable(s: Session, x: Sampled, phase: str, advantage: float | None) -> dict[str, Any]:
    r = x.rollout
    return {
        "step": s.state.step,
        "phase": phase,
        "problem_id": r.problem_id,
        "context_id": r.context_id,
        "sample": r.sample,
        "reward": x.verdict.reward,
        "advantage": advantage,
        "finish": r.finish,
        "prompt": s.prompt_text(r),
        "response": x.response,
        "feedback": x.verdict.feedback,
    }
