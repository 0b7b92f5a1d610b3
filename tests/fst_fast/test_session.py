"""What a session refuses before anything is written, and the account of rollouts that RL groups may claim."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fst_fast import trainer
from fst_fast.cli import main
from fst_fast.config import Config
from fst_fast.contracts import Context, Problem, Rollout, Sampled, Verdict
from fst_fast.rollout.sampler import Sampler
from fst_fast.session import Session

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
        (["--fast.reflector=foo"], "fast.reflector=foo is unknown; allowed: mini, self, openai, or file.py:function"),
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
        (["--rollout.backend=openai"], "rollout.backend_args.model: Field required; allowed keys: model, base_url"),
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
    assert "not usable" in err
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


def sampled(context: Context, problem: str, reward: float | None, sample: int = 0) -> Sampled:
    rollout = Rollout(problem, context.id, sample, np.array([1]), np.zeros(1, np.float32), "stop", 0, 1.0)
    return Sampled(rollout, Verdict(reward), "")


def test_a_rollout_is_claimed_once_and_only_under_its_own_context_and_problem() -> None:
    a, b, gone = Context.of("a"), Context.of("b"), Context.of("gone")
    problem = Problem("p", [{"role": "user", "content": "?"}], None)
    offered = [
        sampled(a, "p", 1.0, 0),
        sampled(a, "p", 0.0, 1),
        sampled(b, "q", 1.0),
        sampled(gone, "p", 1.0),
        sampled(a, "p", None),
    ]
    session: Any = types.SimpleNamespace(
        config=Config(), state=types.SimpleNamespace(population=[a, b], reusable=[])
    )
    session.state.reusable = Session.reusable(session, offered)
    assert session.state.reusable == offered[:3]  # judged, and under a context that was kept
    plan = [(a, problem, 0), (a, problem, 1), (a, problem, 2), (b, problem, 0)]
    assert Session.claim(session, plan) == [offered[0], offered[1], None, None]
    assert session.state.reusable == [offered[2]]
    assert Session.claim(session, plan) == [None] * 4


def test_a_context_that_leaves_no_room_for_the_longest_problem_does_not_fit() -> None:
    from fst_fast import mini
    from fst_fast.rollout.prompt import PromptCache, load_tokenizer

    tokenizer = load_tokenizer(mini.path())
    short, long = (Problem(str(n), [{"role": "user", "content": "1 " * n}], None) for n in (5, 30))
    seed = Context.of("solve the problem .")
    room = len(PromptCache(tokenizer, max_prompt_tokens=999).ids(seed, long)) + 1
    config = Config.model_validate({"rollout": {"max_prompt_tokens": room}})
    session: Any = types.SimpleNamespace(
        config=config, stage=types.SimpleNamespace(validation=[]), seed_context=seed
    )
    session.sampler = types.SimpleNamespace(
        tokenizer=tokenizer, prompts=PromptCache(tokenizer, max_prompt_tokens=room)
    )
    assert Session.fits(session, Context.of("solve the problem . ."), [short, long])
    assert not Session.fits(session, Context.of("solve the problem . . ."), [short, long])


def test_a_kernel_path_that_cannot_run_here_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FST_KERNELS", "cuda")
    assert main(["train", "--run-dir", str(tmp_path / "run"), *SHORT]) == 2
    assert "FST_KERNELS" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_mismatch_beyond_the_band_is_said_on_fresh_rollouts_only() -> None:
    notes: list[str] = []
    s: Any = types.SimpleNamespace(
        config=Config(), state=types.SimpleNamespace(step=7), console=types.SimpleNamespace(note=notes.append)
    )
    for value, reused in ((0.009, 0), (None, 0), (0.5, 3)):
        Session.warn_of_mismatch(s, value, reused)
    assert notes == []
    Session.warn_of_mismatch(s, 0.0123, 0)
    assert notes == [
        "warning, step 7: mismatch_kl=0.0123 nats per token between rollout engine and trainer on rollouts of these very weights; "
        "slow.mismatch_warning=0.01"
    ]


def test_while_a_step_is_computed_no_engine_holds_what_sampling_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, held = [], []
    engine_of, optimise = Sampler.engine, trainer.optimise

    def engine(*args: Any) -> Any:
        made.append(engine_of(*args))
        return made[-1]

    def step(*args: Any, **how: Any) -> Any:
        held.extend((e._prefixes.tokens, e._forward) for e in made if e.tokens_computed)
        return optimise(*args, **how)

    monkeypatch.setattr(Sampler, "engine", engine)
    monkeypatch.setattr(trainer, "optimise", step)
    assert main(["train", "--run-dir", str(tmp_path / "run"), *SHORT]) == 0
    assert held
    assert set(held) == {(0, None)}
