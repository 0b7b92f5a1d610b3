"""The benchmarks run at a tiny size, write what they measured, and say what they left out and why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.conftest import chosen_size

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parents[2]


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    environment.pop("PYTEST_ADDOPTS", None)
    for name in [
        n for n in environment if n.startswith("PYTEST_XDIST")
    ]:  # with which pytest-benchmark measures nothing
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its numbers are those of a CPU")
def test_a_row_holds_its_figures_and_a_peer_that_cannot_run_says_why(tmp_path):
    done = run(
        "benchmarks/linear_logprob.py", "--size", "20,16,300", "--rounds", "2", "--out", str(tmp_path),
        "-k", "forward and (cut or reference)",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    result = json.loads((tmp_path / "linear_logprob_cpu.json").read_text())
    assert result["size"] == [20, 16, 300]
    assert str(tmp_path) not in json.dumps(result)
    assert "load_average" in result["hardware"]
    assert result["versions"]["torch"] == torch.__version__
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {
        "ours, reference",
        "cut-cross-entropy",
        "cut-cross-entropy, no filter",
    }
    row = rows["ours, reference"]
    assert row["skipped"] is None
    assert len(row["rounds_ms"]) == 2
    assert row["floor_ms"] == pytest.approx(2 * 20 * 16 * 300 / result["matmul_tflop_per_s"] / 1e12 * 1e3)
    assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["cpu_ms"])
    assert 0 < row["logprob_mean"] <= row["logprob_max"] < 1e-4  # fp32 against fp64
    assert row["entropy_max"] < 1e-4
    assert row["peak_mb"] is None or row["peak_mb"] >= 0
    for name in ("cut-cross-entropy", "cut-cross-entropy, no filter"):
        assert "not installed" in rows[name]["skipped"] or "need a GPU" in rows[name]["skipped"]
        assert rows[name]["skipped"] in done.stdout


@pytest.mark.parametrize("given", ["20,16", "20,16,x", "20,16,0", ""])
def test_a_size_that_does_not_fit_is_refused(given):
    with pytest.raises(pytest.UsageError, match=f"--size={given}; allowed: 3 integers >= 1, such as 5,6,7"):
        chosen_size(given, (5, 6, 7))
    assert chosen_size("1,2,3", (5, 6, 7)) == (1, 2, 3)
    assert chosen_size(None, (5, 6, 7)) == (5, 6, 7)


def test_the_decode_step_of_the_engine_is_timed_on_every_side(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    command = [sys.executable, "-m", "benchmarks.decode_step", "--steps", "3", "--rounds", "1"]  # fmt: skip
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = json.loads((tmp_path / f"decode_step_{device}.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["shared", "unshared"]
    assert all(row["step_ms"] > 0 and row["prefill_s"] > 0 for row in result["rows"])
    assert (result["rows"][0]["times_floor"] is None) == (device == "cpu")
