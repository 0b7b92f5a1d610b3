"""Any metrics file is read as the run that it tells of, or refused in one sentence with file and line; what is read is drawn."""

import json
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.errors import UserError
from fst_fast.report import curves
from fst_fast.report.load import load_runs

FUZZ = settings.get_profile("fuzz")

number = st.one_of(st.none(), st.floats(0, 1), st.integers(0, 3), st.sampled_from([0.0, 1.0, -1.0, 1e300]))
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10**20),
    st.floats(),
    st.text(max_size=3),
    st.builds(list),
    st.builds(dict),
    st.just("\ud83d"),
)
count = st.integers(0, 60)
cell = st.fixed_dictionaries(
    {"mean": number, "stderr": number, "pass_at_k": number, "n": st.integers(0, 5), "k": st.just(4)}
)
channels = st.dictionaries(
    st.sampled_from(["neither", "context", "weights", "both", "other"]), cell, max_size=4
)
counters = {
    name: count
    for name in ("rollouts", "fast_rollouts", "reused_rollouts", "tokens_computed", "tokens_unshared")
}
scored = st.fixed_dictionaries(
    {
        "id": st.sampled_from("abc"),
        "text": st.text(max_size=3),
        "parent": st.sampled_from([None, "a"]),
        "born": count,
        "mean": number,
        "n": count,
    }
)
start = st.fixed_dictionaries(
    {
        "kind": st.just("start"),
        "method": st.sampled_from(["fst", "rl", "gepa"]),
        "seed": count,
        "task": st.text(max_size=3),
        "model": st.just("m"),
    }
)
step = st.fixed_dictionaries(
    {
        "kind": st.just("step"),
        "step": count,
        "cycle": count,
        "groups": count,
        "groups_kept": count,
        **counters,
    }
    | {
        name: number
        for name in (
            "reward",
            "kl",
            "entropy",
            "grad_norm",
            "ratio_mean",
            "clipped_fraction",
            "mismatch_kl",
            "response_tokens",
        )
    }
)
cycle = st.fixed_dictionaries(
    {
        "kind": st.just("cycle"),
        "cycle": count,
        "step": count,
        "population": st.lists(scored, max_size=2),
        "best_mean": number,
        "seed_mean": number,
    }
)
evaluation = st.fixed_dictionaries(
    {
        "kind": st.just("eval"),
        "step": count,
        "final": st.booleans(),
        "channels": channels,
        "k": count,
        "kl_seed": number,
        "kl_evolved": number,
        **counters,
    }
)
records = st.one_of(
    start,
    step,
    step,
    cycle,
    evaluation,
    evaluation,
    st.just({"kind": "end", "step": 3}),
    st.just({"kind": "stage"}),
)


@st.composite
def lines(draw):
    """A record, mostly whole; sometimes a field of it is odd or gone, or its bytes are."""
    record = dict(draw(records))
    damage = draw(st.sampled_from(["none"] * 12 + ["odd", "gone", "cut", "bytes"]))
    if damage in ("odd", "gone") and record:
        name = draw(st.sampled_from(sorted(record)))
        record[name] = draw(odd)
        if damage == "gone":
            del record[name]
    data = json.dumps(record, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if damage == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    if damage == "bytes":
        at = draw(st.integers(0, len(data)))
        data = (
            data[:at]
            + draw(
                st.sampled_from([b"\x00", b"\xff", b"NaN", b"[" * 3000, b"9" * 5000, b"1e999", b"\n", b'"'])
            )
            + data[at:]
        )
    return data


files = st.tuples(start, st.lists(lines(), max_size=14), st.sampled_from([b"\n", b"\n", b""])).map(
    lambda made: b"\n".join([json.dumps(made[0]).encode(), *made[1]]) + made[2]
)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@settings(FUZZ)
@given(data=files)
def test_a_metrics_file_is_read_and_drawn_or_refused_in_one_sentence(folder, bounded, data):
    path = folder / "metrics.jsonl"
    path.write_bytes(data)
    try:
        [run] = bounded(lambda: load_runs([folder]))
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < 600 + len(str(path))
        said.encode()
        assert re.search(rf"{re.escape(str(path.resolve()))}(:\d+: | has no line of kind start)", said), said
        return
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", RuntimeWarning
        )  # a mean of nothing, an invalid value: something was not measured and used
        for axis in curves.AXES:
            for series in (curves.training(run, axis), curves.validation(run, "both", axis)):
                check(series)
                check_smooth(series)
            assert curves.fit(run, axis)
        for name in ("kl", "entropy", "grad_norm", "kept"):
            check(curves.diagnostic(run, name))
        check(curves.kl_against_reward(run, "weights"))
        curves.cost_to_reach([run], 0.5)


def check(series):
    assert len(series.x) == len(series.y) == len(series.error)
    assert np.isfinite(series.x).all()
    assert not np.isinf(series.y).any()
    assert not len(series) or np.isfinite(series.y).any()


def check_smooth(series):
    smooth = curves.smooth(series.y, 5)
    assert (np.isnan(smooth) == np.isnan(series.y)).all(), "a gap stays a gap, and there is no other"
    known = series.measured().y
    if len(known):
        assert np.nanmin(smooth) >= known.min() - 1e-9 * abs(known).max()
        assert np.nanmax(smooth) <= known.max() + 1e-9 * abs(known).max()
