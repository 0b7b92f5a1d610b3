"""The command line: `fst train | eval | probe | plan | report | watch | export | push | replay | experiment | base build | doctor`.

Bad input is one line on stderr (`fst: ...`) and exit code 2, from rank 0 only; `--debug` adds the traceback. Modules that load torch
are imported by the command that needs them, so that `fst --help` and `--dry-run` answer at once.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fst_fast import mini
from fst_fast.commands import arguments
from fst_fast.errors import UserError, one_line
from fst_fast.run.cores import usable_cores
from fst_fast.run.environment import prepare_environment

KEYED = ("train", "probe", "plan")
"""The commands that take dotted keys: every `--word` there that none of them knows as an option is an override."""
PATIENCE_S = 20.0


class _Parser(argparse.ArgumentParser):
    commands: dict[str, _Parser]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run() -> NoReturn:
    """The console script `fst`."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    debug = "--debug" in argv
    try:
        own, overrides = split_overrides(argv)
        args = _parser().parse_args(own)
        args.overrides = overrides
        command: Callable[[argparse.Namespace], None] = args.run
        command(args)
    except UserError as error:
        return _refuse(str(error), debug)
    except FloatingPointError as error:  # sampling, outside a run
        return _refuse(f"{error}; these weights are not usable", debug)
    except BrokenPipeError:  # the reader of our output has gone, as in `fst ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{place}{error.strerror}", debug)
    except KeyboardInterrupt:
        if _is_first():
            print("fst: interrupted; a run goes on from its last checkpoint with --resume", file=sys.stderr)
        return 130
    return 0


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are the command's own, and those that are `--dotted.key value` pairs for the configuration."""
    own: list[str] = []
    overrides: list[str] = []
    commands = _parser().commands
    known = [action for name in KEYED for action in commands[name]._actions]
    takes_value = {option: action.nargs != 0 for action in known for option in action.option_strings}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if argv[0] not in KEYED or not name.startswith("--"):
            own.append(word)
            continue
        target = own if name in takes_value else overrides
        target.append(word)
        if takes_value.get(name, True) and not equals and words and not words[0].startswith("--"):
            target.append(words.pop(0))
    return own, overrides


def _parser() -> _Parser:
    parser = _Parser(prog="fst", description="Fast-Slow Training of language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fst-fast {_version()}")
    parser.commands = {}
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(
        name: str, function: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        parser.commands[name] = sub
        sub.set_defaults(run=function)
        sub.add_argument("--debug", action="store_true", help="show the traceback of a refusal")
        if name in KEYED:
            default = "default: the mini star graph"
            sub.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help=default)
        return sub

    train = command(
        "train",
        _train,
        "train weights and contexts; any key of the configuration can follow as --dotted.key=value",
    )
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of the run")
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in DIR, with its own configuration unless CONFIG is given",
    )
    train.add_argument(
        "--allow-config-change",
        action="store_true",
        help="with --resume: continue although CONFIG or overrides differ from the run's own configuration",
    )
    train.add_argument(
        "--allow-data-change",
        action="store_true",
        help="with --resume: continue although the task gives other problems than the run has met; what was measured on the old ones is dropped",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration and its batch numbers, do nothing",
    )
    # appended by the deepspeed launcher; the rank itself comes from the environment
    train.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    evaluate = command("eval", _eval, "measure the four cells of a run's last checkpoint")
    evaluate.add_argument("run_dir", type=Path, metavar="RUN")
    evaluate.add_argument(
        "--problems", type=arguments.count, metavar="N", help="at most so many; default: as configured"
    )
    evaluate.add_argument(
        "--samples", type=arguments.count, metavar="K", help="samples of each problem; default: as configured"
    )
    evaluate.add_argument(
        "--split", default="validation", metavar="NAME", help="of the task's problems; default: validation"
    )
    evaluate.add_argument(
        "--model.path", dest="model", metavar="MODEL", help="where the base model is now, if it was moved"
    )
    evaluate.add_argument(
        "--model.revision", dest="revision", metavar="COMMIT", help="of a base model of the Hub"
    )
    evaluate.add_argument(
        "--out", type=Path, metavar="FILE", help="where the figures are written, as JSON; default: nowhere"
    )

    probe = command("probe", _probe, "show what the model answers under one context")
    probe.add_argument("--context", type=arguments.text, metavar="TEXT", help="default: fast.seed_context")
    probe.add_argument("--problems", type=arguments.count, default=3, metavar="N", help="default: 3")
    probe.add_argument("--samples", type=arguments.count, default=2, metavar="K", help="default: 2")
    probe.add_argument("--split", default="validation", metavar="NAME", help="default: validation")
    probe.add_argument(
        "--template",
        action="store_true",
        help="sample nothing: show the prompts' token ids, their pieces and whose text they are",
    )

    plan = command(
        "plan",
        _plan,
        "predict memory and time of a step, say whether it fits and what to change; keys can follow as --dotted.key=value",
    )
    plan.add_argument(
        "--gpus", type=arguments.count, metavar="N", help="devices (processes); default: WORLD_SIZE, or 1"
    )
    plan.add_argument(
        "--machine", metavar="NAME", help="A100, H100, H200, B200 or cpu; default: this machine"
    )
    plan.add_argument("--memory", metavar="SIZE", help="of one device, such as 80GB; default: the machine's")
    for what, default in (
        ("context", "as long as allowed"),
        ("problem", "half of what contexts leave of a prompt"),
        ("response", "half of the longest"),
    ):
        plan.add_argument(
            f"--{what}-tokens", type=arguments.count, metavar="N", help=f"mean length; default: {default}"
        )
    plan.add_argument(
        "--spread",
        type=arguments.not_negative,
        metavar="X",
        help="standard deviation of the logarithm of a response's length",
    )
    plan.add_argument(
        "--verify-ms", type=arguments.not_negative, metavar="X", help="one verdict takes; default: 5"
    )
    plan.add_argument("--scale", action="store_true", help="also from 1 to 1,024 devices")
    plan.add_argument("--json", action="store_true", help="print numbers (bytes, seconds) as JSON")

    report = command(
        "report",
        _report,
        "curves, the four cells and the contexts' lineage of one or more runs, as one HTML file",
    )
    report.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN")
    report.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: RUN/report, or report/ beside the first of several runs",
    )

    watch = command("watch", _watch, "show a run as a live page in the browser, on this machine only")
    watch.add_argument("run_dir", type=Path, metavar="RUN")
    watch.add_argument("--port", type=arguments.port, default=0, metavar="N", help="default: a free one")
    watch.add_argument("--host", default="127.0.0.1", metavar="HOST", help="127.0.0.1 or localhost")

    export = command(
        "export", _export, "write a run's weights and contexts as a Hugging Face folder plus contexts.json"
    )
    export.add_argument("run_dir", type=Path, metavar="RUN")
    export.add_argument("out", type=Path, metavar="OUT")

    push = command("push", _push, "upload what `fst export` writes to the Hugging Face Hub")
    push.add_argument("run_dir", type=Path, metavar="RUN")
    push.add_argument("repo", metavar="REPO", help="org/name; made if it is not there")
    push.add_argument("--private", action="store_true", help="make a private repository")
    push.add_argument("--revision", metavar="BRANCH", help="default: main")

    replay = command("replay", _replay, "repeat a step that gave NaN or Inf from what the run dumped of it")
    replay.add_argument("dump", type=Path, metavar="DUMP", help="such as RUN/dumps/step-000012")

    experiment = command(
        "experiment", _experiment, "the paper's experiments on the mini world, with seeds and intervals"
    )
    experiment.add_argument(
        "name", metavar="NAME", help="all, efficiency, drift, channels, plasticity, ...; several with commas"
    )
    experiment.add_argument(
        "--out", type=Path, default=Path("experiments"), metavar="DIR", help="default: experiments"
    )
    experiment.add_argument("--quick", action="store_true", help="two seeds, two families, half the steps")
    experiment.add_argument("--seeds", type=arguments.count, metavar="N", help="default: 5, with --quick 2")
    experiment.add_argument("--families", metavar="A,B", help="default: all four, with --quick the first two")
    experiment.add_argument(
        "--workers", type=arguments.count, metavar="N", help="runs at a time; default: the cores"
    )
    experiment.add_argument(
        "--rl-settings", type=Path, metavar="FILE", help="results.json of a suite with efficiency or rivals: its settings of RL, no sweep"
    )  # fmt: skip
    experiment.add_argument("--dry-run", action="store_true", help="name the runs, make none")

    base = command("base", _base, "the base models of the mini world")
    base.add_argument("action", choices=["build"], help="build: train it from scratch")
    base.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder that the model is written to"
    )
    base.add_argument("--base", choices=list(mini.BASES), default="mini", help="default: mini")
    base.add_argument("--seed", type=int, default=0, help="default: 0")

    command("doctor", _doctor, "say what this machine can do and which kernel path is taken, and why")
    return parser


def _train(args: argparse.Namespace) -> None:
    from fst_fast.config import load as config_load
    from fst_fast.config.derived import derived
    from fst_fast.tasks.registry import check_task_args

    if args.allow_config_change and not args.resume:
        raise UserError("--allow-config-change goes with --resume")
    if args.allow_data_change and not args.resume:
        raise UserError("--allow-data-change goes with --resume")
    saved = args.run_dir / "config.yaml" if args.run_dir else None
    if args.config is None and args.resume and saved and saved.is_file():
        args.config = saved
    config = config_load.load(args.config or mini.default_config(), args.overrides)
    if args.dry_run:
        from fst_fast.commands.plan import dry_run_lines

        check_task_args(config)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        numbers = [f"{name}: {number}" for name, number in derived(config, processes).items()]
        predicted = dry_run_lines(config, processes)
        if _is_first():
            print(config_load.dump(config), end="")
            print("\n# what follows from it")
            for line in [
                *numbers,
                *predicted,
                "not looked at: the rows of data sets, the model, the endpoints",
            ]:
                print(f"# {line}".rstrip())
        return
    if args.run_dir is None:
        raise UserError("--run-dir is missing; name the folder of the run, such as --run-dir runs/mini")
    prepare_environment()
    from fst_fast import distributed
    from fst_fast.trainer import train

    ended = train(
        config,
        args.run_dir,
        resume=args.resume,
        allow_config_change=args.allow_config_change,
        allow_data_change=args.allow_data_change,
    )
    if ended is not None and _is_first():
        print(f"fst report {args.run_dir} draws it; fst export {args.run_dir} OUT writes the model")
    distributed.shut_down()


def _eval(args: argparse.Namespace) -> None:
    prepare_environment()
    from fst_fast.commands.evaluate import evaluate_run
    from fst_fast.run.console import Console
    from fst_fast.run.folder import disk_errors, write_atomic

    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: the folder {args.out.parent} is not there")
    result = evaluate_run(
        args.run_dir,
        problems=args.problems,
        samples=args.samples,
        split=args.split,
        model=args.model,
        revision=args.revision,
    )
    if args.out and _is_first():
        with disk_errors(f"{args.out} cannot be written"):
            write_atomic(args.out, (json.dumps({"split": args.split, **result}, indent=1) + "\n").encode())
    with Console(total_steps=0, enabled=_is_first()) as console:
        console.final_table(result["channels"])


def _probe(args: argparse.Namespace) -> None:
    from fst_fast.config import load as config_load

    config = config_load.load(args.config or mini.default_config(), args.overrides)
    prepare_environment()
    from fst_fast.commands.probe import probe, show_prompts

    if args.template:
        from rich.console import Console

        console = Console(soft_wrap=True, highlight=False)
        for row in show_prompts(config, context=args.context, problems=args.problems, split=args.split):
            console.print(row)
        return
    for line in probe(
        config, context=args.context, problems=args.problems, samples=args.samples, split=args.split
    ):
        print(line)


def _plan(args: argparse.Namespace) -> None:
    from fst_fast.commands.plan import run
    from fst_fast.config import load as config_load

    for line in run(config_load.load(args.config or mini.default_config(), args.overrides), args):
        print(line)


def _report(args: argparse.Namespace) -> None:
    from fst_fast.report import write_report

    runs = args.run_dirs
    out = args.out or (runs[0] / "report" if len(runs) == 1 else runs[0].parent / "report")
    print(write_report(runs, out))


def _watch(args: argparse.Namespace) -> None:
    from fst_fast.commands.watch import watch

    watch(args.run_dir, host=args.host, port=args.port, say=functools.partial(print, flush=True))


def _export(args: argparse.Namespace) -> None:
    prepare_environment()
    from fst_fast.commands.export import export

    export(args.run_dir, args.out)
    print(args.out)


def _push(args: argparse.Namespace) -> None:
    prepare_environment()
    from fst_fast.commands.push import push

    print(push(args.run_dir, args.repo, private=args.private, revision=args.revision))


def _replay(args: argparse.Namespace) -> None:
    prepare_environment()
    from fst_fast.commands.replay import replay

    replay(args.dump, print)


def _experiment(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from fst_fast.experiments.experiments import EXPERIMENTS
    from fst_fast.experiments.methods import rl_settings
    from fst_fast.experiments.page import QUESTIONS, markdown, run
    from fst_fast.experiments.runner import Runner
    from fst_fast.experiments.runs import FAMILIES, FULL, QUICK

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs end after their step
    budget = QUICK if args.quick else FULL
    if args.seeds:
        budget = replace(budget, seeds=args.seeds)
    families = args.families.split(",") if args.families else list(FAMILIES[: 2 if args.quick else None])
    for family in families:
        if family not in FAMILIES:
            raise UserError(f"--families: {family!r} is not known; allowed are {', '.join(FAMILIES)}")
    names = list(EXPERIMENTS) if args.name == "all" else args.name.split(",")
    runner = Runner(args.out, budget, families, args.workers or usable_cores(), dry_run=args.dry_run)
    if args.rl_settings:
        runner.rl_settings = rl_settings(args.rl_settings, families)
    results = run(names, runner)
    if args.dry_run:
        for planned in runner.planned:
            print(planned.name)
        return
    for name, result in results.items():
        print(f"\n## {name}\n{QUESTIONS[name]}\n\n{markdown(result)}")
    print(f"\n{args.out / 'report.html'}")


def _base(args: argparse.Namespace) -> None:
    prepare_environment()
    from fst_fast.mini.build import build_base

    build_base(args.out, args.base, seed=args.seed)
    print(args.out)


def _doctor(args: argparse.Namespace) -> None:
    prepare_environment()
    from fst_fast.commands.doctor import findings

    for line in findings():
        print(line)


def _refuse(sentence: str, debug: bool) -> int:
    """One line on stderr. All processes of a run mostly meet the same mistake: the others leave the line to the first one, whose end
    makes the launcher end them, and speak up only if that does not happen."""
    if not _is_first():
        time.sleep(PATIENCE_S)
        sentence = f"process {os.environ['RANK']}: {sentence}"
    if debug:
        traceback.print_exc()
    print(f"fst: {one_line(sentence)}", file=sys.stderr, flush=True)
    return 2


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _version() -> str:
    from fst_fast import __version__

    return __version__


if __name__ == "__main__":
    run()
