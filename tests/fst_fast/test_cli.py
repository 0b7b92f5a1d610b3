"""The commands are called in this process (torch is loaded once); two subprocesses show what a shell and a launcher see."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fst_fast import cli
from fst_fast.errors import UserError
from fst_fast.run import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _environment_is_restored(monkeypatch):
    for name in (
        "OMP_NUM_THREADS",
        "RANK",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "DS_ACCELERATOR",
        "TRANSFORMERS_VERBOSITY",
    ):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)


def refused(capsys, *argv: str) -> str:
    """The one line on stderr of a command that is refused."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fst: ")
    assert err.count("\n") == 1
    return err.strip()


def replace_train(monkeypatch, function) -> None:
    """Put `function` in the trainer's place, without loading the real one."""
    trainer = types.ModuleType("fst_fast.trainer")
    trainer.train = function
    monkeypatch.setitem(sys.modules, "fst_fast.trainer", trainer)


def test_help_names_every_command_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for command in ("train", "eval", "probe", "report", "export", "base", "doctor"):
        assert f"    {command} " in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "--run-dir is missing"),
        (["train", "--run-dir", "x", "--allow-config-change"], "--allow-config-change goes with --resume"),
        (["train", "--run-dir", "x", "--allow-data-change"], "--allow-data-change goes with --resume"),
        (["train", "none.yaml", "--dry-run"], "config file none.yaml does not exist"),
        (["train", "a.yaml", "b.yaml"], "unrecognized arguments: b.yaml"),
        (["train", "--dry-run", "--slow.lrr=1"], "unknown key --slow.lrr; did you mean slow.lr?"),
        (["train", "--dry-run", "--slow.lr", "--seed=1"], "--slow.lr has no value"),
        (["train", "--dri-run"], "--dri-run has no value"),
        (
            ["train", "--dry-run", "--slow.group_size=7", "--fast.population=4"],
            "is not a multiple of fast.population=4; try 8",
        ),
        (
            ["train", "--dry-run", "--slow.ratio_cap=0.9"],
            "--slow.ratio_cap=0.9 is refused; allowed: a number >= 1",
        ),
        (["eval"], "required: RUN"),
        (["eval", "run", "--problems", "0"], "'0' is refused; allowed: a whole number >= 1"),
        (["report"], "required: RUN"),
        (["export", "run"], "required: OUT"),
        (["base", "destroy", "--out", "x"], "invalid choice: 'destroy'"),
        (["base", "build"], "required: --out"),
        (["doctor", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_dry_run_prints_the_resolved_tree_and_its_numbers_and_touches_nothing(capsys, tmp_path):
    run = tmp_path / "run"
    code = cli.main(
        [
            "train",
            "--dry-run",
            "--run-dir",
            str(run),
            "--slow.lr",
            "2e-4",
            "--fast.seed_context=go .",
            "--slow.steps=12",
        ]
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "  lr: 0.0002\n" in out
    assert "  seed_context: go .\n" in out
    assert "# steps: 12\n" in out
    assert not run.exists()


def test_what_a_dry_run_prints_is_a_config_file(capsys, tmp_path):
    cli.main(["train", "--dry-run", "--seed=9"])
    first = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(first)
    assert cli.main(["train", str(tmp_path / "printed.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == first


def test_a_dry_run_prints_its_numbers_and_refuses_arguments_of_the_task_that_cannot_be_right(capsys):
    argv = ["train", "--dry-run", "--task=hf:some/where", "--task_args.verify=exact", "--task_args.fitler=a"]
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(
        "fst: task=hf:some/where: task_args.fitler is not known; allowed are config, train"
    )
    assert cli.main([*argv[:-1], "--task_args.filter=a"]) == 0
    assert "# rollouts per step: " in capsys.readouterr().out
    assert cli.main(["train", "--dry-run", "--task=hf:some/where", "--task_args.verify=gone.py:grade"]) == 0


def test_without_a_config_file_the_mini_star_graph_is_trained(capsys):
    cli.main(["train", "--dry-run"])
    default = capsys.readouterr().out
    cli.main(["train", str(ROOT / "configs/mini/star_graph.yaml"), "--dry-run"])
    assert capsys.readouterr().out == default


def test_train_gets_the_config_the_folder_and_resume(monkeypatch, tmp_path):
    seen = []
    replace_train(
        monkeypatch,
        lambda config, run_dir, *, resume, allow_config_change, allow_data_change: seen.append(
            (config.slow.lr, config.method, run_dir, resume, allow_config_change, allow_data_change)
        ),
    )
    assert (
        cli.main(
            [
                "train",
                "--run-dir",
                str(tmp_path / "run"),
                "--slow.lr=5e-4",
                "--local_rank=0",
                "--method",
                "rl",
                "--resume",
                "--allow-config-change",
                "--allow-data-change",
            ]
        )
        == 0
    )
    assert seen == [(5e-4, "rl", tmp_path / "run", True, True, True)]


def test_resume_without_a_config_takes_the_run_s_own(monkeypatch, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 41\n")
    seen = []
    replace_train(monkeypatch, lambda config, *_, **__: seen.append(config.seed))
    cli.main(["train", "--run-dir", str(tmp_path), "--resume"])
    assert seen == [41]


def fail_with(error: BaseException):
    def train(*_args, **_kwargs):
        raise error

    return train


def test_a_user_error_of_the_run_is_one_line_and_debug_shows_the_traceback(monkeypatch, capsys, tmp_path):
    replace_train(monkeypatch, fail_with(UserError("model.path=nowhere is not a folder")))
    argv = ["train", "--run-dir", str(tmp_path / "run")]
    assert refused(capsys, *argv) == "fst: model.path=nowhere is not a folder"
    assert cli.main([*argv, "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_full_disk_is_one_line(monkeypatch, capsys, tmp_path):
    replace_train(monkeypatch, fail_with(OSError(28, "No space left on device", "runs/x/state.json")))
    assert (
        refused(capsys, "train", "--run-dir", str(tmp_path))
        == "fst: runs/x/state.json: No space left on device"
    )


def test_a_defect_of_the_program_is_not_dressed_up_as_bad_input(monkeypatch, tmp_path):
    replace_train(monkeypatch, fail_with(AssertionError("broken")))
    with pytest.raises(AssertionError, match="broken"):
        cli.main(["train", "--run-dir", str(tmp_path)])


def test_an_interrupt_is_one_line_and_exit_code_130(monkeypatch, capsys, tmp_path):
    replace_train(monkeypatch, fail_with(KeyboardInterrupt()))
    assert cli.main(["train", "--run-dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("fst: interrupted")


def test_other_processes_leave_the_line_to_the_first_and_speak_only_if_it_lives_on(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    assert cli.main(["train", "--dry-run", "--slow.lr=0"]) == 2
    assert waits == []
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "--dry-run", "--slow.lr=0"]) == 2
    assert waits == [cli.PATIENCE_S]
    assert capsys.readouterr().err.startswith("fst: process 1: --slow.lr=0 is refused")


def test_only_the_first_process_prints_the_dry_run(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


def test_processes_of_one_machine_share_its_cores_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(environment, "usable_cores", lambda: 12)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    environment.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_command_s_own_options_are_told_from_overrides():
    own, overrides = cli.split_overrides(
        ["train", "--resume", "c.yaml", "--slow.entropy_coef", "-1", "--run-dir", "d", "--seed=1"]
    )
    assert own == ["train", "--resume", "c.yaml", "--run-dir", "d"]
    assert overrides == ["--slow.entropy_coef", "-1", "--seed=1"]


def test_the_launcher_s_script_refuses_in_one_line_without_loading_torch():
    code = "import sys, runpy; sys.argv = ['train.py', '--slow.lr=x']\ntry: runpy.run_path('train.py', run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert answer.stdout == "False\n"
    assert answer.stderr == 'fst: --slow.lr="x" is refused; allowed: a number > 0 and <= 1\n'
