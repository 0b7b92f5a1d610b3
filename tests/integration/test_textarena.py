"""A game of TextArena, which nobody here has written, is played through `verifiers:` as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fst_fast.contracts import Context, RolloutRequest
from fst_fast.rollout.sampler import Sampler
from fst_fast.tasks.registry import load_task
from tests.fst_fast.agents import Scripted, config_of, save_model

WORDS = ("apple", "grape", "lemon", "mango", "peach")
WORDLE = """
import nltk
nltk.data.path.insert(0, {data!r})
nltk.download = lambda *names, **how: True  # the data are there
import verifiers as vf
from verifiers.envs.integrations.textarena_env import TextArenaEnv

def right(parser, completion, answer):
    return float(parser.parse_answer(completion) == f"[{{answer}}]")

def load_environment():
    parser = vf.XMLParser(fields=["guess"], answer_field="guess")
    rubric = vf.Rubric(parser=parser)
    rubric.add_reward_func(right)
    return TextArenaEnv(game="Wordle-v0", num_train_examples=10, num_eval_examples=5, parser=parser, rubric=rubric, max_turns=6)
"""


@pytest.fixture
def wordle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The game as a module, with a corpus of five words."""
    words, tagger = (
        tmp_path / "nltk/corpora/words",
        tmp_path / "nltk/taggers/averaged_perceptron_tagger_eng",
    )
    for folder in (words, tagger):
        folder.mkdir(parents=True)
    for name in ("en", "en-basic", "README"):
        (words / name).write_text("\n".join(WORDS) + "\n")
    parts = {"weights": {}, "tagdict": dict.fromkeys(WORDS, "NN"), "classes": ["NN"]}
    for part, value in parts.items():
        (tagger / f"averaged_perceptron_tagger_eng.{part}.json").write_text(json.dumps(value))
    (tmp_path / "small_wordle.py").write_text(WORDLE.format(data=str(tmp_path / "nltk")))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "verifiers:small-wordle"


def test_a_game_of_textarena_is_played_to_its_end(wordle: str, tmp_path: Path) -> None:
    config = config_of(
        save_model(tmp_path / "model", "qwen"), wordle, verify={"memory_mib": 8192, "timeout_s": 60}
    )
    guesses = ["lemon", "mango", "grape", "apple", "peach"]
    with Sampler.open(config) as sampler:
        task = load_task(config.task, config.task_args)
        problems = task.problems("train")[:5]
        engine: Any = Scripted(
            sampler.tokenizer, lambda problem, turn, sample: f"<guess>[{guesses[turn]}]</guess>"
        )
        sampled = sampler.local(
            engine, [RolloutRequest(Context.of("win ."), p, 0) for p in problems], stream=("test",), policy_version=0, temperature=1.0
        )  # fmt: skip
    for problem, scored in zip(problems, sampled, strict=True):
        assert len(scored.rollout.turns) == guesses.index(problem.answer) + 1
        assert (scored.rollout.finish, scored.verdict.reward) == ("stop", 1.0)
        assert [m["role"] for m in scored.said[1::2]] == ["user"] * (len(scored.said) // 2)
