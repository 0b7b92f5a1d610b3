"""The wheel where nothing else is installed: what it holds, and that what it asks for is enough for fst_kernels and `fst doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
EXTRAS = ("accelerate", "deepspeed", "flash-attn", "gguf", "openai", "peft", "triton")

# Hides the modules named in argv[1], as if they were not installed.
PROGRAM = """
import sys
from importlib.machinery import PathFinder
hidden = set(sys.argv[1].split(","))
class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
import torch
import fst_kernels
out = fst_kernels.linear_logprob(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1]))
print("log-probs", [round(x, 4) for x in out.logprob.tolist()])
from fst_fast.cli import main
print("fst_kernels from", fst_kernels.__file__)
print("doctor", main(["doctor"]))
print("train", main(["train", "--run-dir", sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("scikit_build_core", reason="the build backend is not installed (extra test)")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [file] = out.glob("*.whl")
    return file


def requirements(lines: list[str]) -> set[str]:
    """Names of the packages that are asked for without any extra."""
    found = map(Requirement, lines)
    return {canonicalize_name(r.name) for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


def asked_for(wheel: Path) -> set[str]:
    """What an installation of the wheel alone brings along, as far as it is installed here."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    waiting = requirements(
        [
            line.removeprefix("Requires-Dist: ")
            for line in metadata.splitlines()
            if line.startswith("Requires-Dist: ")
        ]
    )
    whole: set[str] = set()
    while waiting:
        name = waiting.pop()
        whole.add(name)
        try:
            waiting |= requirements(importlib.metadata.requires(name) or []) - whole
        except importlib.metadata.PackageNotFoundError:
            assert name not in ("torch", "transformers"), name
    return whole


def test_the_wheel_is_for_every_machine_and_holds_both_packages_and_their_data(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")  # nothing is compiled, torch is no build requirement
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, package in (
        ("fst_fast", "fst_fast"),
        ("kernels/fst_kernels", "fst_kernels"),
        ("csrc", "fst_kernels/csrc"),
    ):
        files = {
            f
            for f in (ROOT / folder).rglob("*")
            if f.is_file() and "__pycache__" not in f.parts and f.suffix != ".so"
        }
        assert {f"{package}/{file.relative_to(ROOT / folder)}" for file in files} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fst_fast", "fst_kernels"}


def test_without_an_extra_it_asks_for_no_compiler_and_no_trainer(wheel: Path) -> None:
    assert {"torch", "transformers"} <= asked_for(wheel)
    assert not asked_for(wheel) & {*EXTRAS, "nvidia-cuda-nvcc", "ninja"} - (
        {"triton"} if _torch_brings_triton() else set()
    )


def _torch_brings_triton() -> bool:
    return "triton" in requirements(importlib.metadata.requires("torch") or [])


def test_kernels_and_doctor_run_with_what_it_asks_for_and_train_names_the_extra(
    wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    asked = asked_for(wheel)
    hidden = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & asked and not module.startswith("fst_")
    }
    hidden |= {name.replace("-", "_") for name in EXTRAS}
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FST_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(sorted(hidden)), str(tmp_path / "run")],
        env={**environment, "PYTHONPATH": str(tmp_path / "site"), "PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "log-probs [-1.0986, -1.0986]",
        f"fst_kernels from {tmp_path / 'site' / 'fst_kernels' / '__init__.py'}",
        "  nvcc not found (not needed, unless you build csrc/)",
        "    not triton: the package triton is not installed",
        "doctor 0",
        "train 2",
    ):
        assert line in done.stdout.splitlines(), done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == (
        "fst: training and fst eval need the package deepspeed: pip install --no-build-isolation 'fst-fast[train]', after torch (docs/install.md)"
    )
    assert not (tmp_path / "run").exists()
