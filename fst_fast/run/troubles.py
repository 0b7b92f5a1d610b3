"""Troubles that a run names by itself, read from its last records: groups without a gradient, a KL that explodes, rollouts that are cut off.

`find` is a pure function of the records of one file (metrics.jsonl: step or cycle; timing.jsonl), so a resumed run and a reader of the folder
find what the unbroken run found. What it finds is a field of the newest record, `troubles`. KINDS is the list; docs/troubles.md explains each
kind and what to do. A number that was not measured (null) never makes a trouble.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Record = Mapping[str, Any]
Records = Sequence[Record]
Source = Literal["step", "cycle", "timing"]

SOURCES: dict[Source, str] = {"step": "metrics.jsonl", "cycle": "metrics.jsonl", "timing": "timing.jsonl"}
FEW, MANY = 8, 32  # steps that a trouble is read from; the reward's from MANY at either end
CYCLES, MIN_PROPOSALS = 3, 8
SOLVED = 0.9  # mean reward from which there is little left to gain
PAGE = "docs/troubles.md"


@dataclass(frozen=True)
class Kind:
    """One kind of trouble: it stands where `value` of the records is at least `limit` (at_most: at most).

    says: a sentence in which {value} and {limit} are replaced. value: None where there is too little to say."""

    title: str
    source: Source
    limit: float
    says: str
    value: Callable[[Records], float | None]
    at_most: bool = False

    @property
    def page(self) -> str:
        """Where to read about it."""
        return f"{PAGE}#{self.title.lower().replace(' ', '-')}"


def measured(records: Records, key: str, *, of: int) -> list[float]:
    """The numbers under `key` in the last `of` records, nulls left out; nothing where less than half of them are numbers, or in a step of
    distillation, which measures something else."""
    if len(records) < of or records[-1].get("distilled"):
        return []
    values = [float(r[key]) for r in records[-of:] if r.get(key) is not None]
    return values if 2 * len(values) >= of else []


def rise_of_reward(records: Records) -> float | None:
    """How many standard errors the mean reward of the last steps is above that of the first ones."""
    if len(records) < 2 * MANY:
        return None
    first, last = measured(records[:MANY], "reward", of=MANY), measured(records, "reward", of=MANY)
    if not first or not last or statistics.mean(last) >= SOLVED:
        return None
    rise = statistics.mean(last) - statistics.mean(first)
    error = math.sqrt(statistics.variance(first) / len(first) + statistics.variance(last) / len(last))
    return rise / error if error else 0.0 if rise <= 0 else None


def flat_groups(records: Records) -> float | None:
    """Share of groups whose rewards are all alike."""
    groups, kept = (sum(measured(records, key, of=FEW)) for key in ("groups", "groups_kept"))
    return 1 - kept / groups if groups else None


def kl_to_base(records: Records) -> float | None:
    values = measured(records, "kl", of=FEW)
    return statistics.median(values) if values else None


def fresh_mismatch(records: Records) -> float | None:
    """mismatch_kl of the last step without rollouts that were reused or sampled ahead, whose log-probs are those of earlier weights."""
    for before, now in reversed(list(zip([{}, *records], records, strict=False))[-FEW:]):
        if now.get("rollout_staleness"):
            continue
        if before.get("reused_rollouts", 0) == now["reused_rollouts"] and now["mismatch_kl"] is not None:
            return float(now["mismatch_kl"])
    return None


def timeouts(records: Records) -> float | None:
    """Time-outs for each rollout sampled."""
    if len(records) <= FEW:
        return None
    sampled = records[-1]["rollouts"] - records[-FEW - 1]["rollouts"]
    return sum(r["verify_timeouts"] for r in records[-FEW:]) / sampled if sampled else None


def truncated(records: Records) -> float | None:
    values = measured(records, "length_stopped", of=FEW)
    return statistics.mean(values) if values else None


def proposals(records: Records, lost: Callable[[Record], int]) -> float | None:
    """Share of the proposals of the last cycles that made any which `lost` counts."""
    asked = [r for r in records if r["proposed"]][-CYCLES:]
    total = sum(r["proposed"] for r in asked)
    enough = records[-1]["proposed"] and len(asked) == CYCLES and total >= MIN_PROPOSALS
    return sum(map(lost, asked)) / total if enough else None


def useless(records: Records) -> float | None:
    best = records[-1]["best_mean"]
    if best is not None and best >= SOLVED:
        return None
    return proposals(records, lambda r: sum(r["refused"].values()) if r["admitted"] else r["proposed"])


def too_long(records: Records) -> float | None:
    return proposals(records, lambda r: r["refused"].get("too_long", 0))


def memory(records: Records) -> float | None:
    values = measured(records, "memory_share", of=FEW // 2)
    return min(values) if values else None


def share_of_rollouts(records: Records) -> float | None:
    """Share of sampling in the time of the last optimiser steps; the fast phase and evaluations do not count."""
    sampling, *others = (sum(measured(records, key, of=FEW)) for key in ("rollout_s", "verify_s", "train_s"))
    return sampling / (sampling + sum(others)) if sampling else None


KINDS: dict[str, Kind] = {
    "reward_flat": Kind(
        "Reward does not rise", "step", 2.0, "the mean reward of the last 32 steps is {value:.1f} standard errors above that of the first 32, not "
        "more than {limit:g}", rise_of_reward, at_most=True,
    ),
    "groups_flat": Kind(
        "Groups are flat", "step", 0.9, "{value:.0%} of the groups of the last 8 steps have equal rewards and give no gradient (limit {limit:.0%})",
        flat_groups,
    ),
    "kl_high": Kind(
        "KL explodes", "step", 1.0, "the median KL to the base model over 8 steps is {value:.3g} nats per token (limit {limit:g})", kl_to_base
    ),
    "mismatch_high": Kind(
        "Mismatch is high", "step", 1e-2, "mismatch_kl={value:.3g} nats per token between rollout engine and trainer on rollouts of these very "
        "weights (slow.mismatch_warning={limit:g})", fresh_mismatch,
    ),
    "verify_timeouts": Kind(
        "Verifications time out", "step", 0.05, "{value:.1%} of the verifications of the last 8 steps timed out (limit {limit:.0%})", timeouts
    ),
    "responses_truncated": Kind(
        "Responses are truncated", "step", 0.2, "{value:.0%} of the responses of the last 8 steps were cut at rollout.max_response_tokens (limit "
        "{limit:.0%})", truncated,
    ),
    "reflector_useless": Kind(
        "Reflector is useless", "cycle", 0.95, "{value:.0%} of the contexts proposed in the last 3 fast phases were refused, or came in a phase that "
        "admitted none (limit {limit:.0%})", useless,
    ),
    "contexts_long": Kind(
        "Contexts are too long", "cycle", 0.5, "{value:.0%} of the contexts proposed in the last 3 fast phases were longer than "
        "fast.max_context_tokens (limit {limit:.0%})", too_long,
    ),
    "memory_high": Kind(
        "Memory is nearly full", "timing", 0.9, "{value:.0%} of the memory is in use (limit {limit:.0%})", memory
    ),
    "rollouts_slow": Kind(
        "Rollouts are slow", "timing", 0.8, "sampling took {value:.0%} of the time of the last 8 steps (limit {limit:.0%})", share_of_rollouts
    ),
}  # fmt: skip


def find(
    source: Source, records: Records, limits: Mapping[str, float] | None = None
) -> dict[str, dict[str, Any]]:
    """The troubles that stand after the last of `records`, all of one source: kind -> value, limit, count.

    count: records in a row, this one included, in which it has stood. limits: instead of those of KINDS."""
    found: dict[str, dict[str, Any]] = {}
    before = records[-2].get("troubles") or {} if len(records) > 1 else {}
    for name, kind in KINDS.items():
        if kind.source != source or (value := kind.value(records)) is None:
            continue
        limit = (limits or {}).get(name, kind.limit)
        if value <= limit if kind.at_most else value >= limit:
            count = before.get(name, {}).get("count", 0) + 1
            found[name] = {"value": value, "limit": limit, "count": count}
    return found


def sentence(name: str, trouble: Mapping[str, Any]) -> str:
    """What a trouble says, with its figures."""
    return KINDS[name].says.format(**trouble)


def news(before: Mapping[str, Any], now: Mapping[str, Any], unit: str) -> list[str]:
    """A line for each trouble that began or ended between two records of one source."""
    began = [
        f"trouble: {KINDS[name].title}: {sentence(name, trouble)}; see {KINDS[name].page}"
        for name, trouble in now.items()
        if name not in before
    ]
    over = [
        f"trouble over after {trouble['count']} {unit}{'s' * (trouble['count'] != 1)}: {KINDS[name].title}"
        for name, trouble in before.items()
        if name not in now
    ]
    return began + over


@dataclass
class Recent:
    """The records of one source of which `find` reads anything: the first MANY of the run or of the stage, and the last ones.

    `records` gives what the whole list would give."""

    first: list[Record] = field(default_factory=list)
    last: deque[Record] = field(default_factory=lambda: deque(maxlen=MANY + 1))

    @property
    def records(self) -> list[Record]:
        return [*self.first, *self.last]

    @property
    def newest(self) -> Record:
        return (self.last or self.first or [{}])[-1]

    def add(self, record: Record) -> None:
        if len(self.first) < MANY:
            self.first.append(record)
        else:
            self.last.append(record)


def read_back(run_dir: Path) -> dict[Source, Recent]:
    """What the files of a run hold of each source. A new stage begins anew; rows of evaluations are left out."""
    found: dict[Source, Recent] = {source: Recent() for source in SOURCES}
    for line in _lines(run_dir / "metrics.jsonl"):
        if line["kind"] == "stage":
            found["step"], found["cycle"] = Recent(), Recent()
        elif line["kind"] in found:
            found[line["kind"]].add(line)
    for line in _lines(run_dir / "timing.jsonl"):
        if "tokens_per_s" in line:
            found["timing"].add(line)
    return found


def _lines(path: Path) -> Any:
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)
