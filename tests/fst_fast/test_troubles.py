"""Troubles: each stands at its limit and beyond, never below, never from what was not measured, and the same after a resume."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.run.metrics_schema import check_record
from fst_fast.run.troubles import KINDS, MANY, SOURCES, Recent, find, news, read_back, sentence

ROOT = Path(__file__).parents[2]
STEP: dict[str, Any] = {
    "kind": "step", "step": 1, "cycle": 0, "reward": 0.5, "reward_std": 0.5, "groups": 100, "groups_kept": 100, "grad_norm": 1.0, "lr": 1e-3,
    "loss": 0.1, "kl": 0.01, "entropy": 1.0, "ratio_mean": 1.0, "clipped_fraction": 0.0, "mismatch_kl": 1e-9, "response_tokens": 9.0,
    "length_stopped": 0.0, "unjudged": 0, "verify_timeouts": 0, "verify_failures": 0, "verdict_metrics": {}, "grad_norm_spike": None,
    "rollouts": 0, "fast_rollouts": 0, "reused_rollouts": 0, "tokens_computed": 0, "tokens_unshared": 0, "skipped_steps": 0,
}  # fmt: skip
CYCLE: dict[str, Any] = {"kind": "cycle", "proposed": 10, "admitted": 5, "refused": {}, "best_mean": 0.5}
TIMING: dict[str, Any] = {
    "seconds": 1.0, "rollout_s": 1.0, "verify_s": 0.0, "train_s": 1.0, "tokens_per_s": 1.0, "memory_share": 0.1
}  # fmt: skip


def steps(n: int = 9, **fields: Any) -> list[dict[str, Any]]:
    """n steps of 100 rollouts each."""
    return [{**STEP, "step": i, "rollouts": 100 * i, **fields} for i in range(n)]


def rewards(rise: float, *, last: float = 0.0) -> list[dict[str, Any]]:
    """64 steps whose second half is `rise` standard errors better than the first."""
    found = steps(2 * MANY)
    spread = 0.1 * (MANY / (MANY - 1)) ** 0.5  # standard deviation of +-0.1 taking turns
    error = spread * (2 / MANY) ** 0.5
    for i, record in enumerate(found):
        record["reward"] = 0.3 + last + (0.1 if i % 2 else -0.1) + (rise * error if i >= MANY else 0.0)
    return found


MAKERS: dict[str, tuple[Callable[[float], list[dict[str, Any]]], float]] = {  # kind -> records that have a value, and a small difference
    "reward_flat": (rewards, 1e-6),
    "groups_flat": (lambda share: steps(groups_kept=round(100 * (1 - share))), 0.01),
    "kl_high": (lambda kl: steps(kl=kl), 1e-6),
    "mismatch_high": (lambda kl: steps(mismatch_kl=kl), 1e-6),
    "verify_timeouts": (lambda share: steps(verify_timeouts=round(100 * share)), 0.01),
    "responses_truncated": (lambda share: steps(length_stopped=share), 1e-6),
    "reflector_useless": (lambda share: [{**CYCLE, "proposed": 100, "admitted": 1, "refused": {"empty": round(100 * share)}}] * 3, 0.01),
    "contexts_long": (lambda share: [{**CYCLE, "refused": {"too_long": round(10 * share)}}] * 3, 0.1),
    "memory_high": (lambda share: [{**TIMING, "memory_share": share}] * 4, 1e-6),
    "rollouts_slow": (lambda share: [{**TIMING, "rollout_s": share, "verify_s": 0.1, "train_s": 0.9 - share}] * 8, 1e-6),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_trouble_stands_at_its_limit_and_beyond_and_not_before(name: str) -> None:
    kind, (make, little) = KINDS[name], MAKERS[name]
    worse = -little if kind.at_most else little
    at, beyond, before = (find(kind.source, make(kind.limit + d)) for d in (1e-12 * worse, worse, -worse))
    assert list(at) == list(beyond) == [name]
    assert before == {}
    assert beyond[name]["value"] == pytest.approx(kind.limit + worse)
    assert beyond[name]["count"] == 1
    assert sentence(name, beyond[name])


@pytest.mark.parametrize("name", KINDS)
def test_what_was_not_measured_and_too_few_records_are_no_trouble(name: str) -> None:
    kind, (make, _) = KINDS[name], MAKERS[name]
    bad = make(kind.limit)
    if name != "mismatch_high":  # which one record shows
        assert find(kind.source, bad[: len(bad) // 2]) == {}
    keys = ("reward", "kl", "mismatch_kl", "length_stopped", "memory_share", "rollout_s", "best_mean")
    blank = {"groups_kept": 100, "verify_timeouts": 0, "admitted": 5, "refused": {}, "proposed": 0}
    empty = [{key: None if key in keys else blank.get(key, value) for key, value in r.items()} for r in bad]
    assert find(kind.source, empty) == {}


def test_half_of_a_window_is_enough_and_less_is_not() -> None:
    bad = steps(kl=5.0)
    for record in bad[-4:]:
        record["kl"] = None
    assert find("step", bad)["kl_high"]["value"] == 5.0
    bad[-5]["kl"] = None
    assert find("step", bad) == {}


def test_a_rise_without_noise_is_a_rise_and_a_solved_task_need_not_rise() -> None:
    still = steps(2 * MANY)
    assert find("step", still)["reward_flat"]["value"] == 0.0
    for record in still[MANY:]:
        record["reward"] = 0.6
    assert find("step", still) == {}
    assert find("step", rewards(0.0, last=0.59))["reward_flat"]
    assert find("step", rewards(0.0, last=0.61)) == {}
    solved = [{**CYCLE, "admitted": 0, "best_mean": best} for best in (0.5, 0.5, 0.9)]
    assert find("cycle", solved) == {}
    assert find("cycle", [*solved[:2], solved[0]])["reflector_useless"]
    rare = {"proposed": 2, "admitted": 0}
    assert find("cycle", [{**CYCLE, **rare}] * 3) == {}, "too few proposals to tell"
    rest = {"proposed": 0, "admitted": 0, "best_mean": None}
    assert find("cycle", [*solved[:2], solved[0], {**CYCLE, **rest}]) == {}, "a fast phase that was skipped"


def test_the_mismatch_of_reused_rollouts_is_none_and_its_limit_can_be_set() -> None:
    bad = steps(mismatch_kl=0.5)
    for i, record in enumerate(bad):
        record["reused_rollouts"] = 1 + i
    assert find("step", bad) == {}
    bad[-1]["reused_rollouts"] = bad[-2]["reused_rollouts"]
    assert find("step", bad)["mismatch_high"]["limit"] == 0.01
    assert find("step", bad, {"mismatch_high": 0.6}) == {}


def test_a_step_of_distillation_has_no_trouble_with_what_it_does_not_measure() -> None:
    assert list(find("step", steps(kl=5.0, groups_kept=0))) == ["groups_flat", "kl_high"]
    assert (
        find("step", [*steps(kl=5.0, groups_kept=0), *steps(1, kl=5.0, groups_kept=0, distilled=True)]) == {}
    )


def test_a_trouble_is_said_once_counted_and_said_to_be_over() -> None:
    recent, said = Recent(), []
    for i in range(14):
        record = {**STEP, "step": i, "rollouts": 100 * i, "kl": 2.0 if i < 10 else 0.0}
        before = recent.newest.get("troubles", {})
        recent.add(record)
        record["troubles"] = find("step", recent.records)
        check_record(record)
        said += [f"{i} {line}" for line in news(before, record["troubles"], "step")]
    assert said == [
        "7 trouble: KL explodes: the median KL to the base model over 8 steps is 2 nats per token (limit 1); see docs/troubles.md#kl-explodes",
    ]
    assert record["troubles"]["kl_high"]["count"] == 7
    assert news({"kl_high": {"count": 1}}, {}, "step") == ["trouble over after 1 step: KL explodes"]
    assert news({"kl_high": {"count": 3}}, {}, "step") == ["trouble over after 3 steps: KL explodes"]


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 2.0]), st.booleans(), st.integers(0, 3)), max_size=150))
def test_the_records_that_are_kept_tell_what_all_of_them_would(drawn: list[tuple[float, bool, int]]) -> None:
    recent, all_of_them, total = Recent(), [], 0
    for kl, reused, late in drawn:
        total += reused
        record = {
            **STEP,
            "kl": kl,
            "reward": kl / 2,
            "mismatch_kl": kl,
            "reused_rollouts": total,
            "verify_timeouts": late,
        }
        record["rollouts"] = 10 * len(all_of_them)
        all_of_them.append(record)
        recent.add(record)
        assert find("step", recent.records) == find("step", all_of_them)


def test_a_resumed_run_reads_back_what_it_knew_and_a_stage_begins_anew(tmp_path: Path) -> None:
    lines = [{"kind": "start"}, *steps(40, kl=2.0), {"kind": "stage"}, *steps(3), CYCLE, {"kind": "eval"}]
    timing = [TIMING, {"step": 1, "eval_s": 3.0, "seconds": 2.0}, {**TIMING, "memory_share": 0.95}]
    for name, records in (("metrics", lines), ("timing", timing)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    found = read_back(tmp_path)
    assert found["step"].records == steps(3)
    assert found["cycle"].records == [CYCLE]
    assert [r["memory_share"] for r in found["timing"].records] == [0.1, 0.95]
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "timing.jsonl").write_text("")
    assert all(not recent.records for recent in read_back(tmp_path).values())


def test_the_page_has_a_row_with_the_limit_and_a_heading_for_every_kind() -> None:
    page = (ROOT / "docs/troubles.md").read_text()
    rows = dict(re.findall(r"(?m)^\| \[`(\w+)`\]\((#[\w-]+)\)", page))
    assert rows.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        assert kind.page == f"docs/troubles.md{rows[name]}"
        assert f"\n## {kind.title}\n" in page
        row = next(line for line in page.splitlines() if line.startswith(f"| [`{name}`]"))
        assert re.search(rf"\| (`[\w.]+`, )?{kind.limit:g} \|", row), row
    assert {kind.source for kind in KINDS.values()} == set(SOURCES)
