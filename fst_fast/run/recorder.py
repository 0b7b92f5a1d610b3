"""Records what happens: metrics.jsonl, timing.jsonl, rollouts.jsonl, contexts.json, summary.json, the console and the callbacks.

metrics.jsonl holds no wall-clock, so that a resumed run can be compared with an unbroken one bit by bit; times are in timing.jsonl.
Methods that gather from several processes must be called on all of them; rank 0 writes.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args

from fst_fast import distributed
from fst_fast.contracts import REWARD_ROUNDING, Context, Finish, Judged, Problem, Rollout, ScoredRollout
from fst_fast.run import callbacks as events
from fst_fast.run.callbacks import Callbacks
from fst_fast.run.console import Console
from fst_fast.run.counters import Counters, Stopwatch
from fst_fast.run.faults import reach
from fst_fast.run.folder import write_json
from fst_fast.run.liveness import Liveness
from fst_fast.run.memory import memory_share
from fst_fast.run.metrics import METRICS, MetricsWriter
from fst_fast.run.metrics_schema import Channels
from fst_fast.run.problems import write_problems
from fst_fast.run.randomness import seed_globals
from fst_fast.run.troubles import SOURCES, Recent, Source, find, news

T = TypeVar("T")

SUMMARY = "summary.json"
SPIKE = 10.0  # times the median of the steps before
SPIKE_STEPS = 32  # of which the median is taken; at least SPIKE_STEPS / 4 of them

PromptText = Callable[[Rollout], str]
"""The prompt of a rollout as text, special tokens shown."""


@dataclass(frozen=True)
class StepReport:
    """What one slow step did on this process. `advantages` holds one number per rollout, 0 in a group without variance."""

    rollouts: list[ScoredRollout]
    advantages: list[float]
    groups: int
    groups_kept: int
    refill_rounds: int  # of slow.dynamic_sampling, over all processes
    refill_groups: int
    shaped_rewards: list[float]  # what the advantages are made of, where that is not the verdicts' rewards
    skipped: bool  # the update was left out (on_nonfinite=skip)
    numbers: dict[str, Any]  # of slow.update.optimise
    reused: int  # over all processes
    reused_tokens: int  # of their responses
    seconds: float
    prompt_text: PromptText


@dataclass
class Recorder:
    """Fields marked [rank 0] are None elsewhere. stage_ends: the records of the last stage that ended."""

    run_dir: Path
    seed: int
    rollouts_per_step: int
    max_grad_norm: float
    console: Console
    callbacks: Callbacks
    stopwatch: Stopwatch
    liveness: Liveness
    # of troubles, where they are not the usual ones
    limits: Mapping[str, float] = field(default_factory=dict)
    metrics: MetricsWriter | None = None  # [rank 0]
    recent: dict[Source, Recent] = field(default_factory=lambda: {source: Recent() for source in SOURCES})
    grad_norms: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_STEPS))
    stage_ends: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, phase: str, step: int) -> None:
        """Announce a phase on the console and in the liveness file, and seed the global generators for it."""
        seed_globals(self.seed, phase, step, distributed.rank())
        self.console.phase(phase)
        self.liveness.report(f"step {step}, {phase}")

    def note(self, text: str) -> None:
        """Print a line for a person to read."""
        self.console.note(text)

    def step(
        self,
        report: StepReport,
        *,
        step: int,
        cycle: int,
        counters: Counters,
        unverified: Mapping[str, int],
        served: Mapping[str, float | int | None] = MappingProxyType({}),
    ) -> None:
        """Count and write one slow step. served: what there is to say of sampling servers. All processes call it."""
        rollouts, numbers = report.rollouts, dict(report.numbers)
        rewards = [x.verdict.reward for x in rollouts if x.verdict.reward is not None]
        local = [
            len(rollouts), len(rewards), sum(rewards), sum(r * r for r in rewards), report.groups, report.groups_kept,
            sum(len(x.rollout.response_ids) for x in rollouts), sum(x.rollout.finish == "length" for x in rollouts),
            numbers.pop("tokens"), numbers.pop("unshared"), sum(report.shaped_rewards), len(report.shaped_rewards),
            *episode_counts([x.rollout for x in rollouts]),
        ]  # fmt: skip
        n, judged, total, squares, groups, kept, *rest = distributed.all_reduce_sum(local)
        tokens, cut, computed, unshared, shaped, shaped_n, *episodes = rest
        counters.rollouts += int(n) - report.reused
        counters.reused_rollouts += report.reused
        counters.skipped_steps += report.skipped
        counters.add_tokens(int(computed), int(unshared))
        spike = grad_norm_spike(self.grad_norms, numbers["grad_norm"])
        record = {
            "step": step,
            "cycle": cycle,
            "reward": total / judged if judged else None,
            "reward_std": deviation(judged, total, squares),
            "shaped_reward": shaped / shaped_n if shaped_n else None,
            "groups": int(groups),
            "groups_kept": int(kept),
            "refill_rounds": report.refill_rounds,
            "refill_groups": report.refill_groups,
            **numbers,
            "response_tokens": tokens / n if n else None,
            "length_stopped": cut / n if n else None,
            "unjudged": int(n - judged),
            **unverified,
            **served,
            "verdict_metrics": mean_metrics([x.verdict.metrics for x in rollouts]),
            **episode_fields(episodes),
            "grad_norm_spike": spike,
            **asdict(counters),
        }
        passed = tokens - report.reused_tokens + computed  # sampled or trained on in this step
        timing = {
            "step": step,
            "seconds": self.stopwatch.total(),
            **self.stopwatch.take(),
            "tokens_per_s": passed / max(report.seconds, 1e-9) if passed else None,
            "memory_share": memory_share(),
        }
        if spike:
            self.note(
                f"step {step}: the gradient norm {numbers['grad_norm']:.3g} is {spike:.0f} times the median of the "
                f"{len(self.grad_norms)} steps before (clipped at slow.max_grad_norm={self.max_grad_norm:g})"
            )
        if numbers["grad_norm"]:
            self.grad_norms.append(numbers["grad_norm"])
        self._find_troubles("step", record, step)
        self._find_troubles("timing", timing, step)
        if self.metrics:
            self.metrics.write("step", **record)
            self.metrics.write_timing(**timing)
            pairs = list(zip(rollouts, report.advantages, strict=True))
            for scored, advantage in _evenly_spaced(pairs, self.rollouts_per_step):
                self._write_rollout(scored, "slow", advantage, step, report.prompt_text)
        self.console.step(record, timing)
        self.callbacks.send(events.Step, step=step, record=record, timing=timing)

    def cycle(
        self,
        record: Mapping[str, Any],
        sampled: Sequence[ScoredRollout],
        population: Sequence[Context],
        lineage: Mapping[str, Mapping[str, Any]],
        *,
        step: int,
        cycle: int,
        prompt_text: PromptText,
    ) -> None:
        """Write one fast phase, and contexts.json. lineage: of every context so far, by id."""
        full = {"cycle": cycle, "step": step, **record}
        self._find_troubles("cycle", full, step)
        if self.metrics:
            self.metrics.write("cycle", **full)
            for scored in _evenly_spaced(sampled, self.rollouts_per_step):
                self._write_rollout(scored, "fast", None, step, prompt_text)
            contexts = {"population": [c.id for c in population], "contexts": dict(lineage)}
            write_json(self.run_dir / "contexts.json", contexts)
        self.console.cycle(full)
        self.callbacks.send(events.CycleEnd, step=step, cycle=cycle, population=population, record=full)

    def evaluation(
        self,
        result: Mapping[str, Any],
        problems: Sequence[Problem],
        seen: Mapping[str, Sequence[Judged]],
        *,
        step: int,
        final: bool,
        counters: Counters,
        stage_fields: Mapping[str, Any],
    ) -> None:
        """Write one evaluation, and problems.json. seen: what was judged, by cell. stage_fields: number and task of the stage, {} in a run of one task."""
        record = {"step": step, "final": final, **stage_fields, **result, **asdict(counters)}
        if self.metrics:
            self.metrics.write("eval", **record)
            write_problems(self.run_dir, problems, seen, step=step, final=final)
            self.metrics.write_timing(step=step, seconds=self.stopwatch.total(), **self.stopwatch.take())
        self.console.evaluation(record)
        self.callbacks.send(events.Evaluation, step=step, record=record)

    def stage_end(
        self, result: Mapping[str, Any], *, step: int, after_stage: int, stage: int, task: str
    ) -> None:
        """Write the four cells on the task of `stage` as they are at the end of the stage `after_stage`."""
        record = {"step": step, "after_stage": after_stage, "stage": stage, "task": task, **result}
        self.stage_ends = [r for r in self.stage_ends if r["after_stage"] == after_stage] + [record]
        self.recent |= {"step": Recent(), "cycle": Recent()}  # the rewards of another task
        if self.metrics:
            self.metrics.write("stage", **record)

    def summary(self, summary: Mapping[str, Any], *, step: int) -> None:
        """Write the closing record and summary.json, and print the final table."""
        if self.metrics:
            self.metrics.write("end", step=step)
            reach("summary")
            write_json(self.run_dir / SUMMARY, summary)
        self.console.final_table(summary["channels"])

    def close(self) -> None:
        """Close the console and the files. May be called twice."""
        self.console.close()
        if self.metrics:
            self.metrics.close()

    def _find_troubles(self, source: Source, record: dict[str, Any], step: int) -> None:
        """Add the troubles that stand to the record of this source, and say which of them are new or over."""
        recent = self.recent[source]
        before = recent.newest.get("troubles", {})
        recent.add(record)
        found = find(source, recent.records, self.limits)
        if found:
            record["troubles"] = found
        for line in news(before, found, "fast phase" if source == "cycle" else "step"):
            self.note(f"step {step}: {line}")

    def _write_rollout(
        self, x: ScoredRollout, phase: str, advantage: float | None, step: int, prompt_text: PromptText
    ) -> None:
        assert self.metrics is not None
        r = x.rollout
        self.metrics.write_rollout(
            step=step,
            phase=phase,
            problem_id=r.problem_id,
            context_id=r.context_id,
            sample=r.sample,
            reward=x.verdict.reward,
            advantage=advantage,
            finish=r.finish,
            policy_version=r.policy_version,
            **({"turns": [[len(turn.added), turn.length] for turn in r.turns]} if r.turns else {}),
            prompt=prompt_text(r),
            response=x.response,
            feedback=x.verdict.feedback,
        )


def deviation(count: float, total: float, squares: float) -> float | None:
    """Population standard deviation of `count` rewards from their sum and the sum of their squares; None of none.

    0 where it is what rounding leaves of the difference of two equal numbers: contracts.REWARD_ROUNDING of their root mean square."""
    if not count:
        return None
    mean, second = total / count, squares / count
    variance = second - mean * mean
    return math.sqrt(variance) if variance > REWARD_ROUNDING**2 * second else 0.0


def grad_norm_spike(before: Sequence[float], norm: float | None) -> float | None:
    """How many times the median of `before` a gradient norm is, if that is SPIKE or more; else None, and where the median is 0."""
    if norm is None or len(before) < SPIKE_STEPS // 4:
        return None
    median = statistics.median(before)
    times = norm / median if median else 0.0
    return times if SPIKE <= times < math.inf else None


def last_grad_norms(run_dir: Path) -> deque[float]:
    """Those of the last steps in metrics.jsonl: a resumed run judges spikes as an unbroken one. A step without gradient has none."""
    norms: deque[float] = deque(maxlen=SPIKE_STEPS)
    with open(run_dir / METRICS, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["kind"] == "step" and record["grad_norm"]:
                norms.append(record["grad_norm"])
    return norms


def read_summary(run_dir: Path, config_hash: str) -> dict[str, Any] | None:
    """What summary.json holds; None where there is none of this configuration, or a damaged one."""
    try:
        summary: dict[str, Any] = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
        Channels.model_validate(summary["channels"])
        return summary if summary["config_hash"] == config_hash else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def mean_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every number that verdicts carry, over all processes and over the verdicts that carry it. All processes call it."""
    sums: dict[str, tuple[float, int]] = {}
    for everywhere in distributed.all_gather([dict(m) for m in metrics]):
        for verdict in everywhere:
            for name, value in verdict.items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + float(value), count + 1)
    return {name: total / count for name, (total, count) in sorted(sums.items())}


def episode_counts(rollouts: Sequence[Rollout]) -> list[int]:
    """Episodes of several turns, their turns, the tokens they read after their prompts, and how many of them ended in each way."""
    episodes = [r for r in rollouts if r.turns]
    turns = sum(turn.length > 0 for r in episodes for turn in r.turns)
    read = sum(len(turn.added) for r in episodes for turn in r.turns[1:])
    return [len(episodes), turns, read, *(sum(r.finish == how for r in episodes) for how in get_args(Finish))]


def episode_fields(counts: Sequence[float]) -> dict[str, Any]:
    """The fields of a step's record that only episodes have, from the sums of `episode_counts`; {} without any."""
    episodes, turns, read, *ended = counts
    if not episodes:
        return {}
    finishes = {how: int(n) for how, n in zip(get_args(Finish), ended, strict=True) if n}
    return {"turns": turns / episodes, "observed_tokens": read / episodes, "finishes": finishes}


def _evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    chosen = min(count, len(items))
    return [items[i * len(items) // chosen] for i in range(chosen)]
