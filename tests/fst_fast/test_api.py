"""The public names: what `import fst_fast` costs, what `fst_fast.train` takes and gives back, what callbacks see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fst_fast
from fst_fast.commands.train import resolve_config
from fst_fast.run import callbacks as events
from fst_fast.run.metrics_schema import check_record

TINY: dict[str, Any] = {
    "slow": {"steps": 2, "problems_per_step": 4},
    "fast": {"anchor_size": 4, "cycle_steps": 1, "rollout_budget": 40, "samples": 1, "children": 2},
    "eval": {"every": 1, "problems": 2, "final_problems": 2, "samples": 1, "kl_problems": 1},
    "checkpoint": {"every": 1},
}
TASK = """
from fst_fast import Problem, Verdict

class Digits:
    def problems(self, split):
        return [Problem(f"{split}{i}", [{"role": "user", "content": f"path from {i} to 2 ?"}], None) for i in range(8)]

    def verify(self, problem, response):
        return Verdict(float(len(response) % 2), "an even number of characters")
"""


class Recorder(fst_fast.Callback):
    """Keeps every event, in order."""

    def __init__(self) -> None:
        self.seen: list[events.Event] = []


for _name in events.METHODS.values():
    setattr(Recorder, _name, lambda self, event: self.seen.append(event))


def test_importing_the_package_loads_neither_torch_nor_anything_slow() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import fst_fast; s = time.perf_counter() - t; "
        "print(sorted(m for m in ('torch', 'numpy', 'transformers', 'pydantic', 'deepspeed') if m in sys.modules), s)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] "), done.stdout


def test_every_public_name_is_there_and_an_unknown_one_is_an_attribute_error() -> None:
    for name in fst_fast.__all__:
        assert getattr(fst_fast, name) is not None
        assert name in dir(fst_fast)
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        fst_fast.tarin  # noqa: B018


def test_a_run_from_python_gives_summary_contexts_metrics_and_events(tmp_path: Path) -> None:
    recorder = Recorder()
    result = fst_fast.train(run_dir=tmp_path / "run", callbacks=[recorder], **TINY)
    assert result.run_dir == tmp_path / "run"
    assert result.summary is not None
    assert result.summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        check_record(json.loads(line))
    assert len(result.contexts) == 4
    assert {c.id for c in result.contexts} <= set(result.lineage)
    assert result.metrics["step"]["step"].tolist() == [1, 2]
    assert np.isfinite(result.metrics["step"]["reward"]).all()
    assert result.metrics["eval"]["channels/both/mean"].dtype == np.float64

    kinds = [type(event).__name__ for event in recorder.seen]
    assert kinds[0] == "RunStart"
    assert kinds[-1] == "RunEnd"
    outline = [kind for kind in kinds if kind not in ("Proposal", "Admission")]
    cycle = ["CycleStart", "CycleEnd", "Step"]
    assert outline == [
        "RunStart", "Evaluation", *cycle, "Evaluation", "CheckpointWritten", *cycle, "CheckpointWritten", "Evaluation", "RunEnd",
    ]  # fmt: skip
    proposed = [e for e in recorder.seen if isinstance(e, events.Proposal) and e.context is not None]
    tested = [e for e in recorder.seen if isinstance(e, events.Admission)]
    assert proposed
    assert [e.context for e in proposed] == [e.context for e in tested]
    ends = [e for e in recorder.seen if isinstance(e, events.CycleEnd)]
    assert sum(e.record["admitted"] for e in ends) == sum(e.admitted for e in tested)
    steps = [e for e in recorder.seen if isinstance(e, events.Step)]
    assert [e.record["reward"] for e in steps] == result.metrics["step"]["reward"].tolist()
    written = [e for e in recorder.seen if isinstance(e, events.CheckpointWritten)]
    assert all((e.path / "manifest.json").is_file() for e in written)
    assert all(e.is_main for e in recorder.seen)


def test_a_run_that_has_ended_is_shown_and_not_repeated_unless_steps_are_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    first = fst_fast.train(run_dir=folder, **TINY)
    table = capsys.readouterr().out.split("Reward on the validation problems")[1]
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    recorder = Recorder()
    again = fst_fast.train(run_dir=folder, resume=True, callbacks=[recorder], **TINY)
    assert again.summary == first.summary
    assert [type(event).__name__ for event in recorder.seen] == ["RunStart", "RunEnd"]
    said = capsys.readouterr().out
    assert f"the run in {folder} has ended; --slow.steps=N --allow-config-change adds steps" in said
    assert said.split("Reward on the validation problems")[1] == table
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files

    class Gone(fst_fast.Callback):
        def on_step(self, event: events.Step) -> None:
            assert not (folder / "summary.json").exists(), "the summary is of the run that had ended"

    more = {**TINY, "slow": {**TINY["slow"], "steps": 3}}
    longer = fst_fast.train(run_dir=folder, resume=True, allow_config_change=True, callbacks=[Gone()], **more)
    assert longer.summary is not None
    assert longer.summary["steps"] == 3
    assert longer.metrics["step"]["step"].tolist() == [1, 2, 3]


def test_a_callback_that_raises_ends_the_run_with_its_name_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    class Fussy(fst_fast.Callback):
        def on_step(self, event: events.Step) -> None:
            if event.step == 2:
                raise KeyError("budget")

    with pytest.raises(
        fst_fast.UserError, match=r"the callback Fussy.on_step raised KeyError: 'budget' \(step 2\)"
    ):
        fst_fast.train(run_dir=tmp_path / "run", callbacks=[Fussy()], **TINY)
    assert (tmp_path / "run" / "checkpoints" / "step-000001" / "manifest.json").is_file()


def test_what_is_no_callback_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(fst_fast.UserError, match=r"must be an object of a subclass of fst_fast\.Callback"):
        fst_fast.train(run_dir=tmp_path / "run", callbacks=[print], **TINY)  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()


def test_keywords_change_keys_and_leave_their_neighbours() -> None:
    config = resolve_config(None, changes={"seed": 3, "slow": {"steps": 7}}, model="models/mine")
    assert (config.seed, config.slow.steps, config.model.path) == (3, 7, "models/mine")
    assert config.slow.lr == resolve_config(None).slow.lr == 3e-4
    assert resolve_config(config) == config
    assert resolve_config({"method": "rl"}).method == "rl"


def test_another_task_leaves_the_old_task_s_arguments_behind() -> None:
    assert resolve_config(None, task="list_programs").task_args == {}
    assert resolve_config(None, task="star_graph").task_args == resolve_config(None).task_args != {}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"slow": {"stpes": 2}}, "unknown key slow.stpes; did you mean slow.steps?"),
        ({"tsak": "x"}, "unknown key tsak; did you mean task?"),
        ({"slow": 3}, "slow=3 is refused"),
        ({"slow": {"lr": float("nan")}}, "slow.lr=nan is refused"),
    ],
)
def test_a_wrong_keyword_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(fst_fast.UserError, match=sentence.replace("?", r"\?")):
        resolve_config(None, changes=changes)


def test_a_task_may_be_a_class_of_a_file_and_no_other_object(tmp_path: Path) -> None:
    from fst_fast.tasks.user import load_module

    (tmp_path / "digits.py").write_text(TASK)
    digits = load_module(tmp_path / "digits.py", "test").Digits
    assert resolve_config(None, task=digits).task == f"{tmp_path / 'digits.py'}:Digits"
    namespace: dict[str, Any] = {}
    exec("class Nowhere: pass", namespace)
    for wrong in (namespace["Nowhere"], digits(), 3):
        with pytest.raises(
            fst_fast.UserError, match=r"a task is a name, a text such as my_task\.py:MyTask, or a class"
        ):
            resolve_config(None, task=wrong)  # type: ignore[arg-type]


def test_rollouts_of_the_only_fast_phase_are_reused_in_its_own_cycle_alone(tmp_path: Path) -> None:
    """Ten of the seed context on each problem, eight in a group: two are left, and the second step has the same problems."""
    fast = {"phases": "first", "samples": 10, "rollout_budget": 200, "first_generations": 1, "population": 2}
    result = fst_fast.train(
        run_dir=tmp_path / "run",
        task_args={"form": "mini", "arms": 5, "path": 4, "ids": 40, "train": 4, "validation": 4},
        slow=TINY["slow"] | {"group_size": 8},
        fast=TINY["fast"] | fast,
        eval=TINY["eval"] | {"every": 0},
    )
    assert result.metrics["cycle"]["fast_rollouts"][0] >= 40
    first, second = result.metrics["step"]["reused_rollouts"]
    assert first == second > 0
