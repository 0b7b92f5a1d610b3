"""A run on a model of the Hub, of which there is a copy in a cache here: the commit is the run's, whatever becomes of the branch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fst_fast import mini
from fst_fast.cli import main
from fst_fast.config import load as config_load
from tests.fst_fast.model_hub import A, B, Cache
from tests.integration.launch import records
from tests.integration.test_text import WORDS

REPO = "some-lab/Mini-0.8M"


def test_a_run_keeps_the_commit_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, run, file = Cache(tmp_path / "cache", monkeypatch), tmp_path / "run", tmp_path / "c.yaml"
    cache.add(REPO, Path(mini.path()))
    file.write_text(f"model: {{path: {REPO}, dtype: auto}}\n")
    words = ["train", str(file), "--run-dir", str(run), *WORDS]
    assert main(words) == 0
    assert f"model {REPO}: commit {A} of main" in capsys.readouterr().out
    config = config_load.load(run / "config.yaml")
    assert (config.model.revision, config.model.dtype) == (A, "bfloat16")
    assert records(run, "start")[0]["revision"] == A
    assert json.loads((run / "summary.json").read_text())["revision"] == A
    whole = (run / "metrics.jsonl").read_bytes()

    other = Path(shutil.copytree(mini.path(), tmp_path / "other"))
    weights = {name: value + 1 for name, value in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    cache.add(REPO, other, B)  # main moves on
    shutil.rmtree(run / "checkpoints" / "step-000002")
    (run / "checkpoints" / "latest").write_text("step-000001\n")
    assert main([*words, "--resume"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert (
        f"model.path='{REPO}' ({B}) holds other weights than the base model that the run in {run} began with"
        in line
    )
    assert f"name the run's commit, which {run}/config.yaml holds, by --model.revision" in line
    assert main(["eval", str(run), "--problems=2", "--samples=1"]) == 0
    assert main(["eval", str(run), "--problems=2", "--samples=1", "--model.revision=main"]) == 2
    assert main(["train", "--run-dir", str(run), "--resume"]) == 0
    assert (run / "metrics.jsonl").read_bytes() == whole

    # The base may be taken from elsewhere, as long as its weights are the same.
    shutil.rmtree(cache.root)
    capsys.readouterr()
    assert main(["eval", str(run)]) == 2
    assert "if it was moved, name its new folder by --model.path" in capsys.readouterr().err
    assert main(["train", "--run-dir", str(run), "--resume", f"--model.path={mini.path()}"]) == 0
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
