"""`fst export` and `fst push`: the model card, and what reaches the Hub, of which there is a stand-in here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from fst_fast import mini
from fst_fast.cli import main
from fst_fast.commands.export import export
from fst_fast.config import load as config_load
from fst_fast.contracts import Context
from fst_fast.fast.population import FastState
from fst_fast.run import checkpoint
from fst_fast.run.counters import Counters
from fst_fast.run.folder import open_run
from fst_fast.state import State

COMMIT = "a" * 40
CELL = {"mean": 0.25, "stderr": 0.0125, "pass_at_k": 0.5, "n": 64, "k": 4}
EVIL = "end with ``` and ````\n## not a heading <script>"


def make_run(folder: Path, cells: dict[str, Any] | None, **model: Any) -> Path:
    config = config_load.check({"model": model, "seed": 7})
    with open_run(
        folder,
        resume=False,
        config_yaml=config_load.dump(config),
        config_hash=config_load.config_hash(config),
    ):
        pass
    records: list[Any] = [
        {"kind": "eval", "step": 0, "k": 4, "channels": {"neither": {**CELL, "mean": 0.0}}},
        {"kind": "eval", "step": 20, "k": 4, "channels": cells},
        {"kind": "eval", "step": 40, "k": 4, "channels": {}},  # after the checkpoint
    ]
    lines = (
        [json.dumps(record) for record in records if record["channels"] is not None]
        if cells is not None
        else []
    )
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "ev']))
    tmp = checkpoint.begin(folder, 20)
    population = [Context.of("think first ."), Context.of(EVIL)]
    counters = Counters(rollouts=5000, fast_rollouts=1000)
    State(FastState.initial("a"), population, step=20, counters=counters, base_weights="b" * 64).save(
        tmp / "state.json"
    )
    shutil.copytree(mini.path(), tmp / "model")
    checkpoint.commit(
        folder, tmp, 20, keep_last=2, written_by={"versions": {"python": "3.11.7", "torch": "2.13.0"}}
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = {
        "neither": CELL,
        "context": CELL,
        "weights": {"n": 0},
        "both": {**CELL, "mean": 1.0, "stderr": None},
    }
    return make_run(tmp_path_factory.mktemp("runs") / "mine", cells, path="some-lab/Mini", revision=COMMIT)


def test_the_card_holds_the_cells_the_contexts_the_command_the_base_and_the_versions(
    run: Path, tmp_path: Path
) -> None:
    out = export(run, tmp_path / "out")
    card = (out / "README.md").read_text()
    for line in (
        "base_model: some-lab/Mini",
        "# mine",
        "| neither: base weights, seed context | 25.0 ± 1.2 % | 50.0 % | 64 |",
        "| weights: trained weights, seed context | not measured | | |",
        "| both: trained weights, evolved contexts | 100.0 % | 50.0 % | 64 |",
        "think first .",
        "fst train fst_config.yaml --run-dir runs/again",
        f"- base model: `some-lab/Mini` of the Hugging Face Hub, commit `{COMMIT}`; SHA-256 of its files `{'b' * 64}`",
        "- seed 7; 5,000 rollouts, of which 1,000 scored contexts",
        "- versions: python 3.11.7, torch 2.13.0",
    ):
        assert line in card.splitlines(), line
    assert "at step 20," in card
    assert f"\n`````text\n{EVIL}\n`````\n" in card  # the fence is longer than the text's
    config = config_load.load(out / "fst_config.yaml")
    assert (config.seed, config.model.revision) == (7, COMMIT)


def test_the_program_of_the_card_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export(run, tmp_path / "out")
    [program] = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    program = program.replace('snapshot_download("THIS_REPOSITORY")', repr(str(out))).replace("256)", "4)")
    exec(compile(program, "card", "exec"), {})
    assert "<|system|> think first . <|end|> <|user|>" in capsys.readouterr().out


def test_a_run_that_was_not_evaluated_from_a_folder_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", None, path="/home/me/secret/Qwen", system="user")
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "Not measured yet." in card
    assert "base_model" not in card
    assert "- base model: `Qwen`; SHA-256" in card
    assert "/home/me" not in card
    assert 'messages = [{"role": "user", "content": f"{context}\\n\\n{question}"}]' in card


class Hub:
    """In the place of HfApi: what was called, and the files as they were uploaded."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, private: bool = False, trouble: Exception | None = None
    ) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: set[str] = set()
        self._private, self._trouble = private, trouble
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def whoami(self) -> None:
        self.calls.append(("whoami", {}))
        if self._trouble:
            raise self._trouble

    def create_repo(self, repo_id: str, **how: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **how}))

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self._private)

    def create_branch(self, repo_id: str, **how: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **how}))

    def upload_folder(self, *, folder_path: Path, **how: Any) -> None:
        self.calls.append(("upload_folder", how))
        self.files = {file.name for file in folder_path.iterdir()}


def test_push_uploads_what_export_writes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.rglob("*"))
    hub = Hub(monkeypatch)
    assert main(["push", str(run), "me/mini"]) == 0
    assert capsys.readouterr().out == f"{constants.ENDPOINT}/me/mini\n"
    message = "fst-fast: mine, step-000020"
    assert hub.calls == [
        ("whoami", {}),
        ("create_repo", {"repo_id": "me/mini", "private": None, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/mini", "revision": None, "commit_message": message}),
    ]
    wanted = {
        "README.md",
        "contexts.json",
        "fst_config.yaml",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert wanted <= hub.files
    assert sorted(run.rglob("*")) == before


def test_push_makes_a_private_repository_and_a_branch(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(monkeypatch, private=True)
    assert main(["push", str(run), "me/mini", "--private", "--revision", "v1"]) == 0
    assert capsys.readouterr().out == f"{constants.ENDPOINT}/me/mini/tree/v1\n"
    assert ("create_branch", {"repo_id": "me/mini", "branch": "v1", "exist_ok": True}) in hub.calls
    assert hub.calls[1][1]["private"] is True
    assert hub.calls[-1][1]["revision"] == "v1"


@pytest.mark.parametrize(
    ("words", "trouble", "sentence"),
    [
        (["{run}", "no-name"], None, "REPO='no-name' is not the name of a repository of the Hub; it is written org/name"),
        (["{run}", "../x"], None, "is not the name of a repository"),
        (["{run}", "me/mini", "--revision", "../main"], None, "--revision '../main' is not the name of a branch"),
        (["{run}/checkpoints", "me/mini"], None, "checkpoints is not a run of fst"),
        (["{run}", "me/mini"], errors.LocalTokenNotFoundError("no token"), "needs a token of the Hub that may write: `hf auth login`"),
        (["{run}", "me/mini"], errors.OfflineModeIsEnabled("offline"), "fst push needs the network, which HF_HUB_OFFLINE forbids"),
        (["{run}", "me/mini"], RuntimeError("line one\nline two"), "the upload to me/mini failed: RuntimeError: line one; what is there already stays"),
        (["{run}", "me/mini", "--private"], None, "me/mini exists and is public, and --private changes no repository that exists"),
    ],
)  # fmt: skip
def test_what_cannot_be_pushed_is_one_sentence_and_nothing_is_uploaded(
    words: list[str], trouble: Exception | None, sentence: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    before = sorted(run.rglob("*"))
    hub = Hub(monkeypatch, trouble=trouble)
    assert main(["push", *(word.format(run=run) for word in words)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert "upload_folder" not in [name for name, _ in hub.calls]
    assert sorted(run.rglob("*")) == before
