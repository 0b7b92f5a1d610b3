"""What is refused before a run begins, and what its parts hold while it goes on."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from fst_fast.cli import main
from fst_fast.config import Config
from fst_fast.contracts import Context, Problem
from fst_fast.rollout.sampler import Sampler
from fst_fast.slow import slow_phase

SHORT = [
    "--slow.steps=1",
    "--slow.problems_per_step=4",
    "--fast.anchor_size=4",
    "--fast.cycle_steps=1",
    "--eval.every=0",
]
TASK = """
from fst_fast.contracts import Problem, Verdict

class Small:
    def problems(self, split):
        return [Problem(f"{split}{i}", [{"role": "user", "content": "path from 1 to 2 ?"}], None) for i in range(8)]

    def verify(self, problem, response):
        return Verdict(0.0)
"""


def mini_with_a_window(folder: Path) -> Path:
    from fst_fast import mini

    made = shutil.copytree(mini.path(), folder / "window")
    config = json.loads((made / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 40, "layer_types": ["sliding_attention"] * 4}
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--fast.reflector=foo"], "fast.reflector=foo is unknown; allowed: mini, self, openai, given, or file.py:function"),
        (["--fast.reflector=nofile.py:f"], "nofile.py"),
        (["--fast.reflector=openai"], "model"),
        (["--track.wandb=x"], "track.wandb needs a package that is not installed"),
        (["--task={task}", "--task_args={{}}", "--slow.problems_per_step=9", "--method=rl"], "problems_per_step=9 is more than the 8"),
        (["--rollout.max_prompt_tokens=20"], "prompt tokens; rollout.max_prompt_tokens=20 allows at most 20"),
        (["--rollout.max_response_tokens=1000"], "are 1256 tokens; the model has 512 positions"),
        (["--slow.betas=[0.9,1.5]"], "slow.betas=[0.9, 1.5]; each must be at least 0 and below 1"),
        (["--slow.tokens_per_micro_batch=60"], "tokens_per_micro_batch=60 does not hold the longest sequence, 288 tokens"),
        (["--policy.offload_optimizer=true"], "needs policy.zero_stage >= 1, which is 0"),
        (["--slow.lr=1e300"], "slow.lr"),
        (["--rollout.backend=openai"], "rollout.backend_args.model is missing, but rollout.backend=openai needs it; allowed: model, base_url"),
        (["--rollout.backend=openai", "--rollout.backend_args.model=m", "--rollout.backend_args.retries=0",
          "--rollout.backend_args.base_url=http://127.0.0.1:9/v1"],
         "rollout.backend=openai: problem probe, context , sample 0 at http://127.0.0.1:9/v1: APIConnectionError"),
        (["--rollout.kv_memory_bytes=1000"], "rollout.kv_memory_bytes allows 1000"),
        pytest.param(
            ["--policy.liger=true"], "policy.liger=true needs a GPU, and this process has none; policy.liger=false computes the same function",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_no_folder(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.py").write_text(TASK)
    run = tmp_path / "run"
    words = [word.format(task=f"{tmp_path / 'small.py'}:Small") for word in words]
    many = ["--slow.tokens_per_micro_batch=4096"] if "max_response" in words[0] else []
    assert main(["train", "--run-dir", str(run), *SHORT, *many, *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert "Traceback" not in err
    assert not run.exists()


def test_a_model_whose_windows_slide_trains_on_forests_and_samples_what_it_trains_on(tmp_path: Path) -> None:
    task = TASK.replace("path from 1 to 2 ?", "path from 1 to 2 ? " * 15).replace(
        "0.0", "float(len(response) % 2)"
    )
    (tmp_path / "small.py").write_text(task)
    words = [
        f"--model.path={mini_with_a_window(tmp_path)}",
        f"--task={tmp_path / 'small.py'}:Small",
        "--task_args={}",
    ]
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(tmp_path / "run"),
                *SHORT,
                *words,
                "--eval.final_problems=1",
                "--method=rl",
            ]
        )
        == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [step] = [line for line in lines if line["kind"] == "step"]
    assert step["groups_kept"] > 0
    assert abs(step["mismatch_kl"]) < 1e-7, "prompts of 90 tokens are longer than the window of 40"


def test_isolation_that_is_required_and_not_there_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fst_fast.verify.run_code.missing_layers", lambda: "Landlock: not here")
    assert main(["train", "--run-dir", str(tmp_path / "run"), *SHORT, "--verify.isolation=required"]) == 2
    assert capsys.readouterr().err.endswith(
        "fst: verify.isolation=required, but this system cannot isolate a program: Landlock: not here; allowed here is available\n"
    )
    assert not (tmp_path / "run").exists()


def test_how_programs_are_isolated_is_said_once_where_a_task_runs_any(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(TASK)
    (tmp_path / "runs.py").write_text(TASK + "\nfrom fst_fast.verify.run_code import run_code\n")
    said: dict[str, list[str]] = {"small": [], "runs": []}
    for name, lines in said.items():
        with Sampler.open(Config(task=f"{tmp_path / name}.py:Small"), lines.append):
            pass
    assert said["small"] == []
    assert [line.partition(":")[0] for line in said["runs"]] == ["programs run by run_code"]


def test_weights_with_nan_end_the_run_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fst_fast import mini

    model = AutoModelForCausalLM.from_pretrained(mini.path(), dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(mini.path()).save_pretrained(tmp_path / "model")
    assert (
        main(["train", "--run-dir", str(tmp_path / "run"), *SHORT, f"--model.path={tmp_path / 'model'}"]) == 2
    )
    err = capsys.readouterr().err
    assert "these weights are not usable" in err
    assert f"model.path={tmp_path / 'model'}" in err
    assert "Traceback" not in err


def test_damaged_weights_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    from fst_fast import mini

    shutil.copytree(mini.path(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert (
        main(["train", "--run-dir", str(tmp_path / "run"), *SHORT, f"--model.path={tmp_path / 'model'}"]) == 2
    )
    assert "cannot be loaded" in capsys.readouterr().err


def test_a_context_that_leaves_no_room_for_the_longest_problem_does_not_fit() -> None:
    from fst_fast import mini
    from fst_fast.fast.fast_phase import leaves_room
    from fst_fast.rollout.prompt import Chat, PromptCache, load_tokenizer

    tokenizer = load_tokenizer(mini.path())
    short, long = (Problem(str(n), [{"role": "user", "content": "1 " * n}], None) for n in (5, 30))
    seed = Context.of("solve the problem .")
    room = len(PromptCache(Chat.of(tokenizer), max_prompt_tokens=999).ids(seed, long)) + 1
    sampler: Any = types.SimpleNamespace(
        tokenizer=tokenizer, prompts=PromptCache(Chat.of(tokenizer), max_prompt_tokens=room)
    )
    assert leaves_room(Context.of("solve the problem . ."), seed, [short, long], sampler)
    assert not leaves_room(Context.of("solve the problem . . ."), seed, [short, long], sampler)


def test_a_kernel_path_that_cannot_run_here_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FST_KERNELS", "cuda")
    assert main(["train", "--run-dir", str(tmp_path / "run"), *SHORT]) == 2
    assert "FST_KERNELS" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_while_a_step_is_computed_no_engine_holds_what_sampling_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, held = [], []
    engine_of, optimise = Sampler.engine, slow_phase.optimise

    def engine(*args: Any) -> Any:
        made.append(engine_of(*args))
        return made[-1]

    def step(*args: Any, **how: Any) -> Any:
        held.extend((e._prefixes.tokens, e._forward) for e in made if e.tokens_computed)
        return optimise(*args, **how)

    monkeypatch.setattr(Sampler, "engine", engine)
    monkeypatch.setattr(slow_phase, "optimise", step)
    assert main(["train", "--run-dir", str(tmp_path / "run"), *SHORT]) == 0
    assert held
    assert set(held) == {(0, None)}
