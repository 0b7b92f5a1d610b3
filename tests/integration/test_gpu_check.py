"""scripts/gpu_check.sh without a GPU: what it refuses, how it goes through its parts, and that GPU tests need few packages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import table
from fst_fast.plan.machines import machine

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
PARTS = ["build", "tests", "linear_policy_loss", "tree_attention", "decode_step", "sampling", "step", "linear_logprob", "training_step", "cascade_decode"]  # fmt: skip

# Packages that a machine with a GPU need not have.
ABSENT = ["accelerate", "cut_cross_entropy", "datasets", "deepspeed", "flash_attn", "gepa", "hypothesis", "liger_kernel", "matplotlib",
    "openai", "psutil", "pydantic", "rich", "ruamel", "scipy", "transformers", "trl", "yaml"]  # fmt: skip

SITECUSTOMIZE = """
import importlib.util, sys

ABSENT, find = set({absent!r}), importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in ABSENT else find(name, package)

class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker)
"""

# Stands in for Python on a machine with a GPU: `-c` describes it, `-m pytest` does what the folder's files say of the part.
PYTHON = """#!/usr/bin/env bash
[[ $1 == -c && $2 == *xdist* ]] && exit 1
[[ $1 == -c ]] && { printf '90a\\tNVIDIA Test, torch 2.11.0\\n'; exit 0; }
echo "ran $*"
[[ $* == *linear_logprob.py* ]] && { echo "1 failed in 3.20s"; exit 1; }
echo "7 passed in 1.00s"
"""


def check(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=os.environ | environment, check=False
    )  # fmt: skip


def test_list_names_every_part_and_all_of_them_take_under_ten_minutes():
    done = check("--list")
    found = re.findall(r"^(\w+)  at most (\d+) s$", done.stdout, re.MULTILINE)
    assert [name for name, _ in found] == PARTS
    assert sum(int(seconds) for _, seconds in found) < 10 * 60
    assert done.returncode == 0


def test_a_dry_run_says_what_would_run_and_which_files_there_are():
    done = check("--dry-run", PYTHON="some-python")
    assert done.returncode == 0
    lines = {re.split(r"[ :]", line)[0]: line for line in done.stdout.splitlines()}
    assert list(lines) == PARTS
    assert "libfst_cuda.so" in lines["build"]
    assert "some-python -m pytest" in lines["tests"]
    for part in PARTS[2:]:
        there = (ROOT / "benchmarks" / f"{part}.py").exists()
        assert (f"there is no benchmarks/{part}.py" in done.stdout) is not there


def test_what_it_does_not_know_is_refused_by_name():
    done = check("build", "linear_lopgrob")
    assert done.returncode == 2
    assert done.stderr == f"gpu_check: linear_lopgrob is not a part; allowed: {' '.join(PARTS)}\n"
    assert "--lsit is not an option" in check("--lsit").stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops_with_one_sentence(tmp_path):
    done = check(PYTHON=sys.executable, OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"gpu_check: torch {torch.__version__} finds no CUDA device; nothing was run\n"


@pytest.fixture
def python(tmp_path):
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return str(path)


def test_every_part_runs_and_the_summary_names_the_one_that_failed(tmp_path, python):
    out = tmp_path / "out folder"
    done = check("tests", "linear_logprob", "linear_policy_loss", PYTHON=python, OUT=str(out))
    assert done.returncode == 1
    summary = (out / "summary.txt").read_text().splitlines()
    assert summary[0] == "NVIDIA Test, torch 2.11.0"
    assert [line.split()[:2] for line in summary[1:]] == [
        ["tests", "passed"], ["linear_logprob", "failed"], ["linear_policy_loss", "passed"],
    ]  # fmt: skip
    assert summary[2].endswith("1 failed in 3.20s")
    assert done.stdout.endswith("\n".join(summary) + "\n")
    log = (out / "log.txt").read_text()
    assert "-m gpu tests/kernels" in log
    assert (
        f"ran -m pytest -p no:cacheprovider -q --tb=short benchmarks/linear_policy_loss.py --out {out}" in log
    )


def test_it_succeeds_where_no_part_fails(tmp_path, python):
    done = check("linear_policy_loss", PYTHON=python, OUT=str(tmp_path / "out"))
    assert done.returncode == 0
    assert "failed" not in done.stdout


def test_what_was_cut_off_is_continued_and_what_passed_is_not_run_again(tmp_path, python):
    out = tmp_path / "out"
    first = check("tests", "sampling", PYTHON=python, OUT=str(out))
    assert first.returncode == 0
    rest = check("tests", "sampling", "decode_step", PYTHON=python, OUT=str(out))
    said = {line.split()[0]: line for line in (out / "summary.txt").read_text().splitlines()[1:]}
    assert [name for name, line in said.items() if line.endswith("before, with this code")] == [
        "tests",
        "sampling",
    ]
    assert said["decode_step"].split()[1] == "passed"
    assert rest.stdout.count("== ") == 1
    again = check("--again", "tests", "sampling", PYTHON=python, OUT=str(out))
    assert again.stdout.count("== ") == 2


def test_the_table_holds_what_was_measured_against_what_the_plan_assumes(tmp_path):
    rows = [
        {"name": "ours, triton", "variant": "step", "ms": 90.0, "tflop_per_s": 371.0},
        {"name": "a peer", "variant": "step", "skipped": "not installed"},
    ]
    (tmp_path / "linear_policy_loss_cuda.json").write_text(json.dumps({"rows": rows}))
    rows = [{"name": "step", "seconds": 2.0, "predicted": 1.0, "ratio": 2.0}]
    (tmp_path / "step_cuda.json").write_text(json.dumps({"rows": rows}))
    found = table.lines(tmp_path, machine("H200"))
    assert re.search(r"linear_policy_loss +ours, triton, step +90.00 +0.50$", found[1])
    assert re.search(r"a peer, step +skipped", found[2])
    assert re.search(r"step +step +2000.00 +0.50$", found[3])


def test_a_folder_of_wheels_that_is_not_there_is_refused(tmp_path, python):
    done = check("tests", PYTHON=python, OUT=str(tmp_path / "out"), WHEELS=str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr == f"gpu_check: WHEELS={tmp_path / 'none'} is not a folder\n"


def test_the_gpu_tests_and_benchmarks_load_where_most_packages_are_missing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE.format(absent=ABSENT))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT), str(ROOT / "kernels")))
    }
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:xdist"]  # fmt: skip
    command += ["--collect-only", "-m", "gpu or not gpu", "tests/kernels", "tests/fst_fast/test_kv_pool.py", "tests/fst_fast/test_graphs.py", "benchmarks/linear_logprob.py", "benchmarks/linear_policy_loss.py"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for name in ("test_linear_bf16.py", "test_linear_logprob_triton.py", "test_tree_attention_triton.py"):  # fmt: skip
        marked = "mark.gpu" in (ROOT / "tests" / "kernels" / name).read_text()
        assert marked
        assert f"tests/kernels/{name}::" in done.stdout
    assert "test_linear_policy_loss.py::" in done.stdout
    missing = "import hypothesis; raise SystemExit(0)"
    blocked = subprocess.run([sys.executable, "-c", missing], env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert "No module named 'hypothesis'" in blocked.stderr  # the blocker works


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_script_is_clean_for_shellcheck():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("part", PARTS[2:])
def test_every_benchmark_takes_the_folder_that_the_script_gives_it(part):
    source = (ROOT / "benchmarks" / f"{part}.py").read_text()
    if "\ndef test_" in source:
        return  # pytest's own option, of benchmarks/conftest.py
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    command = [sys.executable, "-m", f"benchmarks.{part}", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout
