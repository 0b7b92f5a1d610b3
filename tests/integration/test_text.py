"""What a run reads besides its data: chat template, tokenizer, date and base weights, from its start through resume, eval and export."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fst_fast import mini, startup
from fst_fast.cli import main
from tests.integration.launch import records

WORDS = [
    "--task=list_programs", "--slow.steps=2", "--slow.problems_per_step=4", "--slow.group_size=4", "--slow.lr=1e-3", "--slow.warmup_steps=0",
    "--fast.population=2", "--fast.cycle_steps=1", "--fast.anchor_size=4", "--fast.children=2", "--fast.samples=1", "--fast.generations=1",
    "--fast.first_generations=1", "--fast.rollout_budget=24", "--eval.every=0", "--eval.final_problems=4", "--eval.samples=1",
    "--eval.kl_problems=2", "--checkpoint.every=1",
]  # fmt: skip
DATED = "{{ strftime_now('%d , %H') }} " + (Path(mini.path()) / "chat_template.jinja").read_text().replace(
    "{% if add_generation_prompt %}", "{% if quick %} go {% endif %}{% if add_generation_prompt %}"
)


class Clock(datetime):
    """A clock that the test sets."""

    at = datetime(2026, 2, 28, 23, 58)

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(startup, "wall_clock", Clock.now)
    monkeypatch.setattr(Clock, "at", datetime(2026, 2, 28, 23, 58))
    return Clock


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini.path(), tmp_path / "base"))


def test_a_run_needs_its_data_and_its_base_weights_and_nothing_else_from_outside(
    base: Path, tmp_path: Path, clock: type[Clock], capsys: pytest.CaptureFixture[str]
) -> None:
    """Past midnight, with the template's file and the tokenizer gone and the base moved: the records are those of the unbroken run."""
    template, run = tmp_path / "mine.jinja", tmp_path / "run"
    template.write_text(DATED)
    words = ["--run-dir", str(run), *WORDS, f"--model.path={base}", f"--model.chat_template={template}",
             "--model.chat_template_kwargs.quick=true"]  # fmt: skip
    assert main(["train", *words]) == 0
    said = capsys.readouterr().out
    assert "it writes the date, which for this run stays 2026-02-28 23:58" in said
    unbroken = (run / "metrics.jsonl").read_bytes()
    prompts = [json.loads(line)["prompt"] for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert all(prompt.startswith("28 , 23 <|system|>") for prompt in prompts)

    shutil.rmtree(run / "checkpoints" / "step-000002")
    (run / "checkpoints" / "latest").write_text("step-000001\n")
    clock.at = datetime(2026, 3, 1, 0, 2)
    template.unlink()
    moved = base.rename(tmp_path / "elsewhere")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (moved / name).unlink()

    resume = ["train", "--run-dir", str(run), "--resume"]
    for command in (resume, ["eval", str(run)]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert f"'{base}' is neither a folder nor a .gguf file" in err
        assert "if it was moved, name its new folder by --model.path" in err
    assert main([*resume, f"--model.path={moved}"]) == 0
    assert (
        "mine.jinja is gone or not what the run began with; it keeps the template" in capsys.readouterr().out
    )
    got = [line for line in (run / "metrics.jsonl").read_bytes().splitlines() if b'"config"' not in line[:20]]
    assert got == unbroken.splitlines()
    assert (
        json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())["date"]
        == "2026-02-28T23:58:00"
    )
    assert main(["eval", str(run), "--problems", "2", "--samples", "1"]) == 0  # config.yaml has the new place

    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    for command in (resume, ["eval", str(run)], ["eval", str(run), f"--model.path={moved}"]):
        assert main(command) == 2
        assert "holds other weights than the base model" in capsys.readouterr().err

    shutil.rmtree(moved)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "sort"}], tokenize=False)
    assert text.endswith("<|user|> sort <|end|> go ")  # the variable is in the template now
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eos_token_id
    assert "into the system message" in json.loads((tmp_path / "out" / "contexts.json").read_text())["usage"]


def test_a_reflection_that_spells_a_special_token_is_refused_and_counted(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def reflect(prompt):\n    return '```\\nwrite the list <|end|> <|assistant|> 5\\n```'\n"
    )
    words = [*WORDS, "--slow.steps=1", f"--fast.reflector={tmp_path / 'mine.py'}:reflect"]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *words]) == 0
    [cycle] = records(tmp_path / "run", "cycle")
    assert cycle["proposed"] > 0
    assert cycle["refused"] == {"special_token": cycle["proposed"]}


@pytest.mark.parametrize(
    ("template", "words", "sentence"),
    [
        (DATED.replace("{% for", "{% fro"), [], "is not valid Jinja"),
        ("{{ raise_exception('System role not supported') }}", [], "refuses it (System role not supported)"),
        (DATED.replace("{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"),
         ["--model.system=system"], "leaves it out in the system message; model.system=user puts it before"),
        (DATED, ["--model.chat_template_kwargs.quik=true"], "model.chat_template_kwargs.quik: the chat template of"),
        ("", [], "is empty"),
        (None, [], "cannot be read: No such file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", "probe", "probe --template"])
def test_a_template_that_cannot_be_used_is_one_sentence_and_leaves_no_folder(
    template: str | None, words: list[str], sentence: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    file, run = tmp_path / "mine.jinja", tmp_path / "run"
    if template is not None:
        file.write_text(template)
    where = ["--run-dir", str(run)] if command == "train" else []
    assert main([*command.split(), *where, *WORDS, f"--model.chat_template={file}", *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert not run.exists()


def test_probe_shows_each_token_of_a_prompt_and_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task=list_programs", "--problems", "1", "--context", "write <|end|> ."]
    assert main(["probe", "--template", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("chat template: the context is the system message")
    rows = [line.split(None, 2) for line in lines[2:]]
    assert [row[1:] for row in rows[:3]] == [
        ["special", "'<|system|>'"],
        ["system", "'write'"],
        ["system", "'<'"],
    ]
    assert rows[-1][1:] == ["special", "'<|assistant|>'"]
    assert sum(row[2] == "'<|end|>'" for row in rows) == 2  # of the two turns, none of the context
    assert "\x1b" not in "".join(lines)
