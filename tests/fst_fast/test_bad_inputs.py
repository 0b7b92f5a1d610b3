"""Everything that people get wrong, through the command line: exit code 2, one sentence that names the thing and what is allowed, no traceback,
and not a file more or less than before."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fst_fast import mini
from fst_fast.cli import main
from fst_fast.config import Config
from fst_fast.config import load as config_load
from fst_fast.contracts import Context
from fst_fast.fast.population import FastState
from fst_fast.run import checkpoint
from fst_fast.run.folder import open_run
from fst_fast.state import State

SMALL = [
    "--slow.steps=1",
    "--slow.problems_per_step=4",
    "--fast.anchor_size=4",
    "--fast.cycle_steps=1",
    "--eval.every=0",
]
SMALL += ["--slow.tokens_per_micro_batch=4096", "--verify.timeout_s=60"]
ROW = {"prompt": "path from 1 to 2 ?", "answer": "3"}
GRADER = """
import json, os, sys, time
def right(problem, response): return response == problem.answer
def wrong(problem, response): return {"reward": 0.0, "feedback": "never right"}
def two(problem, response): return 2.0
def nan(problem, response): return float("nan")
def text(problem, response): return "good"
def nothing(problem, response): pass
def keys(problem, response): return {"score": 1.0}
def raises(problem, response): return problem.answer["x"]
def leaves(problem, response): sys.exit(1)
def dies(problem, response): os._exit(1)
def hangs(problem, response): time.sleep(600)
def feedback(problem, response): return {"reward": 1.0, "feedback": ["a"]}
def metrics(problem, response): return {"reward": 1.0, "metrics": {"a": "b"}}
number = 3
"""
TASK = """
from fst_fast.contracts import Problem, Verdict
class Task:
    def problems(self, split): return PROBLEMS
    def verify(self, problem, response): return Verdict(0.0)
class NoVerify:
    def problems(self, split): return []
class Needs:
    def __init__(self, size): pass
    def problems(self, split): return []
    def verify(self, problem, response): return Verdict(0.0)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every input that the table names, made once."""
    here = tmp_path_factory.mktemp("inputs")
    (here / "grader.py").write_text(GRADER)
    rows = [{**ROW, "split": "train"}] * 4 + [{**ROW, "split": "validation"}] * 2
    (here / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = {
        "cut": '{"prompt": "?", ', "list": "[1]", "noanswer": {"prompt": "?"}, "noprompt": {"answer": 1}, "nan": '{"prompt": "?", "answer": NaN}',
        "role": {"messages": [{"role": "human", "content": "?"}], "answer": 1}, "key": {**ROW, "anwser": 1}, "id": {**ROW, "id": 7},
        "empty": {**ROW, "prompt": " "}, "meta": {**ROW, "meta": 3}, "split": {**ROW, "split": "train"}, "nomessages": {"messages": [], "answer": 1},
    }  # fmt: skip
    for name, line in lines.items():
        text = line if isinstance(line, str) else json.dumps(line)
        (here / f"{name}.jsonl").write_text(json.dumps(ROW) + "\n" + text + "\n")
    (here / "nothing.jsonl").write_text("\n")
    (here / "one.jsonl").write_text(json.dumps(ROW))
    (here / "bytes.jsonl").write_bytes(b'{"prompt": "\xff", "answer": 1}')
    for name, problems in {
        "task": "[]", "strings": "['a', 'b']", "number": "3", "badid": "[Problem('', [{'role': 'user', 'content': '?'}], 1)]",
        "same": "[Problem('a', [{'role': 'user', 'content': '?'}], 1)] * 2", "raises": "1 // 0", "long": "[Problem(f'{split}{i}', [{'role': 'user', 'content': '1 ' * 400}], 1) for i in range(8)]",
    }.items():  # fmt: skip
        (here / f"{name}.py").write_text(TASK.replace("PROBLEMS", problems))
    (here / "syntax.py").write_text("def f(:\n")
    (here / "imports.py").write_text("import no_such_module\n")
    (here / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (here / "file").write_text("")
    (here / "strange").mkdir()
    (here / "strange" / "thesis.doc").write_text("")
    for name, text in {
        "key.yaml": "slow: {lrr: 1}", "twice.yaml": "seed: 1\nseed: 2", "list.yaml": "- a", "open.yaml": "slow: [1", "type.yaml": "slow: {lr: '3'}",
        "python.yaml": "task_args: {x: !!python/object/apply:os.system [true]}", "tab.yaml": "slow:\n\tlr: 1",
        "itself.yaml": "seed: 1\ntask_args: &a {x: [*a]}", "nested.yaml": "[" * 3000, "void.yaml": "\n", "binary.yaml": "x: !!binary aGVsbG8=",
        "half.yaml": 'fast: {seed_context: "\\ude00"}', "line.yaml": "fast: {seed_context: a\u2028b}",
    }.items():  # fmt: skip
        (here / name).write_text(text)
    (here / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    shutil.copytree(mini.path(), here / "model")
    (here / "cutmodel").mkdir()
    shutil.copytree(here / "model", here / "cutmodel", dirs_exist_ok=True)
    weights = here / "cutmodel" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    shutil.copytree(here / "model", here / "badconfig")
    (here / "badconfig" / "config.json").write_text("{")
    shutil.copytree(here / "model", here / "mamba")
    (here / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    shutil.copytree(here / "model", here / "notokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (here / "notokenizer" / name).unlink()
    runs(here)
    return here


def runs(here: Path) -> None:
    """A run folder with one checkpoint, and the ways in which it can be wrong."""
    args = {"form": "mini", "arms": 2, "path": 3, "ids": 20, "train": 64, "validation": 8}
    config = config_load.check(
        {
            "method": "fst",
            "task_args": args,
            "model": {"path": str(here / "model")},
            "slow": {"problems_per_step": 4},
            "fast": {"anchor_size": 4},
            "eval": {"final_problems": 4},
        }
    )
    with open_run(
        here / "run",
        resume=False,
        config_yaml=config_load.dump(config),
        config_hash=config_load.config_hash(config),
    ):
        pass  # fmt: skip
    for name in ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl"):
        (here / "run" / name).write_text("")
    tmp = checkpoint.begin(here / "run", 1)
    State(fast=FastState.initial("a"), population=[Context.of("a")], step=1).save(tmp / "state.json")
    shutil.copytree(here / "model", tmp / "model")
    checkpoint.commit(here / "run", tmp, 1, keep_last=2)
    (here / "run" / "dumps" / "step-000001").mkdir(parents=True)
    (here / "run" / "dumps" / "step-000001" / "dump.json").write_text("{}")

    dump = here / "run" / "dumps" / "step-000002"
    dump.mkdir()
    (dump / "dump.json").write_text('{"format": 1, "losses": [["0.0"]]}')
    (dump / "rank-0.safetensors").write_text("no tensors")

    def variant(name: str, change: Callable[[Path], object]) -> None:
        shutil.copytree(here / "run", here / name)
        change(here / name / "checkpoints" / "step-000001")

    def rewrite(file: str, text: str) -> Callable[[Path], None]:
        def change(step: Path) -> None:
            (step / file).write_text(text)
            manifest = json.loads((step / "manifest.json").read_text())
            data = (step / file).read_bytes()
            manifest["files"][file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (step / "manifest.json").write_text(json.dumps(manifest))

        return change

    def old_format(step: Path) -> None:
        manifest = json.loads((step / "manifest.json").read_text())
        (step / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))

    variant("run-empty", lambda step: shutil.rmtree(step.parent))
    variant("run-old", old_format)
    variant("run-cut", lambda step: (step / "state.json").write_text("{"))
    variant("run-state", rewrite("state.json", "[]"))
    variant("run-statefmt", rewrite("state.json", '{"format": 0}'))
    variant("run-weights", rewrite("model/model.safetensors", "not weights"))
    variant("run-marker", lambda step: (step.parents[1] / "fst-run.json").write_text("{"))
    variant(
        "run-marker9",
        lambda step: (step.parents[1] / "fst-run.json").write_text('{"format": 9, "config_hash": ""}'),
    )
    variant("run-yaml", lambda step: (step.parents[1] / "config.yaml").write_text("a: [1"))
    variant(
        "run-line",
        lambda step: (step.parents[1] / "metrics.jsonl").write_text('{"kind": 1}\n{"kind": "step"}\n'),
    )
    variant("run-pointer", lambda step: (step.parent / "latest").write_text("../../../../etc"))


NEW = ["--run-dir", "{here}/new"]
OWN = ["train", *NEW, *SMALL]
TRAIN = [*OWN, "--task_args.train=200", "--task_args.validation=8"]
JSONL = "--task_args.verify={here}/grader.py:right"


def task(spec: str, *more: str) -> list[str]:
    return [*OWN, f"--task={{here}}/{spec}", *more]


def graded(function: str) -> list[str]:
    return task("good.jsonl", f"--task_args.verify={{here}}/grader.py:{function}", "--verify.timeout_s=1")


def reflected(**args: object) -> list[str]:
    text = json.dumps(args).replace("{", "{{").replace("}", "}}")
    return [*TRAIN, "--fast.reflector=openai", f"--fast.reflector_args={text}"]


QUICK: list[tuple[list[str], str]] = [
    # arguments and configuration
    (["tarin"], "invalid choice: 'tarin'"),
    (["train"], "--run-dir is missing"),
    (["train", "{here}/none.yaml", *NEW], "config file {here}/none.yaml does not exist"),
    (["train", "{here}", *NEW], "config file {here} is a folder"),
    (["train", "{here}/bytes.yaml", *NEW], "config file {here}/bytes.yaml cannot be read"),
    (["train", "{here}/key.yaml", *NEW], "unknown key slow.lrr; did you mean slow.lr?"),
    (["train", "{here}/twice.yaml", *NEW], "line 2: the key seed was already given on line 1"),
    (["train", "{here}/list.yaml", *NEW], "holds a list; it must hold keys"),
    (["train", "{here}/open.yaml", *NEW], "is not valid YAML: line 1"),
    (["train", "{here}/tab.yaml", *NEW], "is not valid YAML: line 2"),
    (["train", "{here}/type.yaml", *NEW], 'slow.lr="3" is refused; allowed: a number > 0'),
    (["train", "{here}/python.yaml", *NEW], "could not determine a constructor"),
    (["train", "{here}/itself.yaml", *NEW], "is not valid YAML: line 2: the alias *a is inside its own anchor"),
    (["train", "{here}/nested.yaml", *NEW], "is not valid YAML: line 1: lists and keys are nested deeper than 50 levels"),
    (["train", "{here}/void.yaml", *NEW], "{here}/void.yaml is empty; it must hold keys such as `method: fst`, or a comment"),
    (["train", "{here}/binary.yaml", *NEW], "line 1: could not determine a constructor for the tag '!!binary'; allowed are text, numbers"),
    (["train", "{here}/half.yaml", *NEW], "{here}/half.yaml: fast.seed_context holds U+DE00, which is half a character"),
    (["train", "{here}/line.yaml", *NEW], "line 1: the character U+2028 is refused; write it as"),
    ([*TRAIN, "--seed=" + "4" * 5000], "a whole number of 5,000 digits; at most 100 are taken"),
    ([*TRAIN, "--task_args.x=" + "[" * 3000], "nested deeper than 50 levels"),
    ([*TRAIN, "--eval.cells=all"], '--eval.cells="all" is refused; allowed: one or more of neither, context, weights, both'),
    ([*TRAIN, "--policy.lora=16"], "--policy.lora=16 is refused; allowed: null or a section with the keys rank, alpha, targets"),
    ([*TRAIN, "--fast.seed_context=caf\udce9"], "--fast.seed_context holds U+DCE9, which is half a character; allowed: text in UTF-8"),
    ([*TRAIN, "--task_args.x=1e999"], "--task_args.x=inf is refused; allowed: a finite number"),
    (["train", *NEW, "two\nlines.yaml", "more\nlines"], "unrecognized arguments: more\\nlines"),
    (["probe", "--context", "caf\udce9"], "is refused; allowed: text in UTF-8"),
    (["eval", "{here}/run", "--problems", "9" * 5000], "a text of 5,000 characters is refused; allowed: a whole number >= 1"),
    ([*TRAIN, "--slow.lr=1e300"], "--slow.lr=1e+300 is refused; allowed: a number > 0 and <= 1"),
    ([*TRAIN, "--slow.lr=.nan"], "--slow.lr=nan is refused; allowed: a finite number"),
    ([*TRAIN, "--method=sft"], '--method="sft" is refused; allowed: fst or rl or gepa'),
    ([*TRAIN, "--slow.group_size=7"], "slow.group_size=7 is not a multiple of fast.population=4; try 8"),
    ([*TRAIN, "--policy.zero_stage=4"], "--policy.zero_stage=4 is refused; allowed: 0 or 1 or 2 or 3"),
    ([*TRAIN, "--policy.packing=padded"], "policy.attention=tree does not go with policy.packing=padded"),
    ([*TRAIN, "--checkpoint.keep_last=1"], "--checkpoint.keep_last=1 is refused; allowed: a whole number >= 2"),
    ([*TRAIN, "--verify.memory_mib=1"], "--verify.memory_mib=1 is refused; allowed: a whole number >= 64"),
    ([*TRAIN, "--verify.isolation=yes"], '--verify.isolation="yes" is refused; allowed: available or required'),
    ([*TRAIN, "--on_nonfinite=ignore"], '--on_nonfinite="ignore" is refused; allowed: stop or skip'),
    ([*TRAIN, "--fast.anchor_size=97"], "fast.anchor_size=97 is larger than the lookahead of 4 problems"),
    ([*TRAIN, "--policy.offload_optimizer=true"], "needs policy.zero_stage >= 1, which is 0"),
    # the forest: a sequence must fit a micro-batch
    ([*TRAIN, "--slow.tokens_per_micro_batch=60"], "tokens_per_micro_batch=60 does not hold the longest sequence, 288 tokens"),
    # tasks
    ([*OWN, "--task=star_grap"], "task='star_grap' is not known; did you mean star_graph?"),
    ([*OWN, "--task=poker"], "allowed are star_graph"),
    (task("gone.py:Task"), "there is no file {here}/gone.py"),
    (task("task.py"), "the name after {here}/task.py is missing"),
    (task("task.py:Tusk"), "has no 'Tusk'; it defines Task"),
    (task("task.py:NoVerify"), "the class has no method verify(problem, response)"),
    (task("task.py:Needs"), "task_args={{}} do not fit (missing a required argument: 'size'); allowed are: size"),
    (task("task.py:Task", "--task_args.size=3"), "task_args={{'size': 3}} do not fit"),
    (task("grader.py:right"), "is a function; it must be a class"),
    (task("syntax.py:Task"), "SyntaxError: invalid syntax"),
    (task("imports.py:Task"), "ModuleNotFoundError: No module named 'no_such_module' (imports.py:1)"),
    (task("exits.py:Task"), "SystemExit: 3 (exits.py:2)"),
    # JSONL
    (task("gone.jsonl", JSONL), "{here}/gone.jsonl cannot be read: No such file or directory"),
    (task("good.jsonl"), "needs a grader: set task_args.verify to grader.py:function"),
    (task("good.jsonl", "--task_args.verify=grader"), "task_args.verify=grader is not known; allowed: exact"),
    (task("good.jsonl", "--task_args.verify={here}/grader.py:rihgt"), "has no 'rihgt'; it defines right"),
    (task("good.jsonl", "--task_args.verify={here}/grader.py:number"), "is a int; it must be a function of (problem, response)"),
    (task("good.jsonl", JSONL, "--task_args.fraction=0.1"), "task_args.fraction is not known; allowed are validation, verify"),
    (task("good.jsonl", JSONL, "--task_args.validation_fraction=2"), "validation_fraction=2 must be a number between 0 and 1"),
    (task("good.jsonl", JSONL, "--task_args.gold=3"), "task_args.gold=3 must be a text"),
    (task("cut.jsonl", JSONL), "{here}/cut.jsonl:2: is not JSON"),
    (task("list.jsonl", JSONL), "{here}/list.jsonl:2: is a JSON list; it must be an object"),
    (task("noanswer.jsonl", JSONL), "{here}/noanswer.jsonl:2: the key 'answer' is missing"),
    (task("noprompt.jsonl", JSONL), "{here}/noprompt.jsonl:2: exactly one of 'messages' and 'prompt' is needed"),
    (task("nomessages.jsonl", JSONL), "{here}/nomessages.jsonl:2: messages=[] must be a list that is not empty"),
    (task("role.jsonl", JSONL), "{here}/role.jsonl:2: messages[0].role='human' is not known; allowed are system"),
    (task("key.jsonl", JSONL), "{here}/key.jsonl:2: unknown key 'anwser'; allowed are id"),
    (task("id.jsonl", JSONL), "{here}/id.jsonl:2: id=7 must be a text that is not empty"),
    (task("empty.jsonl", JSONL), "{here}/empty.jsonl:2: prompt=' ' must be a text that is not empty"),
    (task("meta.jsonl", JSONL), "{here}/meta.jsonl:2: meta=3 must be an object"),
    (task("split.jsonl", JSONL), "{here}/split.jsonl:2: has a split, but {here}/split.jsonl:1 has none"),
    (task("nan.jsonl", JSONL), "{here}/nan.jsonl:2: holds NaN"),
    (task("bytes.jsonl", JSONL), "{here}/bytes.jsonl:1: is not UTF-8"),
    (task("nothing.jsonl", JSONL), "has no problems: there are no rows"),
    (task("one.jsonl", JSONL), "has one problem; without a validation split at least 2 are needed"),
    # folders
    (["train", "--run-dir", "{here}/run", "--resume", "--seed=1"], "seed was 0, is 1; --allow-config-change continues with the new one"),
    (["train", "--run-dir", "{here}/run-yaml", "--resume"], "config file {here}/run-yaml/config.yaml is not valid YAML"),
    (["eval", "{here}/none"], "{here}/none is not a run of fst; it has no fst-run.json"),
    (["eval", "{here}/run-empty"], "{here}/run-empty has no whole checkpoint yet"),
    (["eval", "{here}/run-old"], "manifest.json has format 0, this version of fst reads"),
    (["eval", "{here}/run-cut"], "state.json has 1 bytes instead of"),
    (["eval", "{here}/run-pointer", "--problems", "many"], "'many' is refused; allowed: a whole number >= 1"),
    (["eval", "{here}/run-yaml"], "config file {here}/run-yaml/config.yaml is not valid YAML"),
    (["export", "{here}/run-statefmt", "{here}/out"], "state.json has format 0; this version reads"),
    (["export", "{here}/run-state", "{here}/out"], "state.json is not the state of a run"),
    (["export", "{here}/run", "{here}/strange"], "{here}/strange exists and is not empty; choose a new folder"),
    (["export", "{here}/run", "{here}/file/out"], "{here}/file/out cannot be written: File exists"),
    (["report", "{here}/strange"], "{here}/strange"),
    (["report", "{here}/run-line"], "metrics.jsonl:2: the key \"step\" is missing"),
    (["replay", "{here}/run"], "{here}/run is not a whole dump of a step"),
    (["replay", "{here}/run/dumps/step-000001"], "is not a whole dump of a step, such as RUN/dumps/step-000012"),
    (["replay", "{here}/run/dumps/step-000002"], "is not a whole dump of a step, such as RUN/dumps/step-000012 (Error while deserializing"),
    (["probe", "--samples", "-1"], "'-1' is refused; allowed: a whole number >= 1"),
    (["probe", "--model.path={here}/gone"], "{here}/gone"),
    (["probe", "--model.path={here}/badconfig"], "config.json"),
    (["base", "build", "--out", "{here}/strange"], "{here}/strange"),
]  # fmt: skip

SLOW: list[tuple[list[str], str]] = [  # each starts a verifying child, some load the model
    (graded("wrong"), "the grader fails its own gold: it gives the gold response '3' of problem 'good/1' reward 0 instead of 1, saying: never right"),
    (graded("two"), "cannot judge the gold response '3' of problem 'good/1', saying: verify returned reward=2.0; it must be in [0, 1]"),
    (graded("nan"), "verify returned reward=nan; it must be in [0, 1]"),
    (graded("text"), "verify raised TypeError: the grader returned a str; allowed are Verdict, a number, a bool"),
    (graded("nothing"), "verify raised TypeError: the grader returned a NoneType"),
    (graded("keys"), "the grader returned the keys ['score']; allowed are reward (needed), feedback, metrics"),
    (graded("raises"), "verify raised TypeError: string indices must be integers"),
    (graded("leaves"), "verify raised SystemExit: 1 (grader.py:"),
    (graded("dies"), "the verifying process died (exit code 1)"),
    (graded("hangs"), "verification timed out after 1 s"),
    (graded("feedback"), "verify returned feedback of type list; it must be a text"),
    (graded("metrics"), "verify returned metrics['a']='b'; it must be a finite number"),
    (task("task.py:Task"), "the split 'train' of the task is empty"),
    (task("strings.py:Task"), "problem 0 of 'train' is a str; it must be a fst_fast.contracts.Problem"),
    (task("number.py:Task"), "problems('train') of the task returned a int; it must be a sequence of Problem"),
    (task("badid.py:Task"), "problem 0 of 'train' has the id ''; it must be a text that is not empty"),
    (task("same.py:Task"), "problem 1 of 'train' has the id 'a', which problem 0 of 'train' already has"),
    (task("raises.py:Task"), "problems('train') of the task failed: ZeroDivisionError"),
    (task("long.py:Task"), "prompt tokens; rollout.max_prompt_tokens=256 allows at most 256"),
    ([*TRAIN, "--model.path={here}/gone"], "{here}/gone"),
    ([*TRAIN, "--model.path={here}/cutmodel"], "cannot be loaded"),
    ([*TRAIN, "--model.path={here}/mamba"], "mamba"),
    ([*TRAIN, "--model.path={here}/notokenizer"], "its tokenizer makes no token of a text; is tokenizer.json missing?"),
    (["eval", "{here}/run-weights", "--problems", "1"], "cannot be loaded"),
    ([*TRAIN, "--fast.reflector=oracle"], "fast.reflector=oracle is unknown; allowed: mini, self, openai, given, or file.py:function"),
    ([*TRAIN, "--fast.reflector={here}/grader.py:sage"], "has no function 'sage'; it offers"),
    ([*TRAIN, "--fast.reflector_args.model=m"], "but fast.reflector=mini takes no arguments; openai, given and classes do"),
    (reflected(), "fast.reflector_args.model is missing"),
    (reflected(model="m", speed=1), "fast.reflector_args has no speed; allowed: model, base_url"),
    (reflected(model="m", timeout_s=0), "fast.reflector_args.timeout_s=0: Input should be greater than 0"),
    (reflected(model="m", base_url="ftp://x"), "base_url must be http(s)://host/path without user name, password or query"),
    (reflected(model="m"), "needs the environment variable OPENAI_API_KEY, which is not set"),
    (["train", "--run-dir", "{here}/strange", *SMALL], "--run-dir {here}/strange is not empty and not a run of fst (it holds thesis.doc)"),
    (["train", "--run-dir", "{here}/run", *SMALL], "--run-dir {here}/run already holds a run; continue it with --resume"),
    (["train", "--run-dir", "{here}/file", *SMALL], "--run-dir {here}/file is a file; it must be a folder or not exist"),
    (["train", "--run-dir", "{here}/none", "--resume", *SMALL], "--resume: there is no run in {here}/none"),
    (["train", "--run-dir", "{here}/run-marker", "--resume"], "fst-run.json or {here}/run-marker/config.yaml is damaged"),
    (["train", "--run-dir", "{here}/run-marker9", "--resume"], "was written in format 9 with metrics of version"),
    (["train", "--run-dir", "{here}/run-statefmt", "--resume"], "state.json has format 0; this version reads"),
    ([*TRAIN, "--slow.problems_per_step=100000", "--task_args.train=8"], "slow.problems_per_step=100000 is more than the"),
    ([*TRAIN, "--rollout.max_response_tokens=1000"], "are 1256 tokens; the model has 512 positions"),
]  # fmt: skip


def listing(here: Path) -> list[tuple[str, int]]:
    paths = sorted(path for path in here.rglob("*") if "__pycache__" not in path.parts)
    return [(str(path), path.stat().st_size if path.is_file() else -1) for path in paths]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("DS_ACCELERATOR", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("words", "said"),
    [*QUICK, *SLOW],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_it_is_one_sentence_and_nothing_is_touched(
    words: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(place)
    code = main([word.format(here=place) for word in words])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("fst: ")]
    assert code == 2, out + err
    assert len(lines) == 1
    assert said.format(here=place) in lines[0]
    assert lines[0] == err.splitlines()[-1]
    assert len(lines[0]) < 800
    assert "Traceback" not in out + err
    assert listing(place) == before


def test_the_table_is_as_large_as_it_claims() -> None:
    assert len(QUICK) + len(SLOW) >= 60


def test_a_port_that_nobody_listens_at_is_a_reply_with_an_error_not_the_end() -> None:
    from fst_fast.fast.reflection import Failure, ReflectionPrompt
    from fst_fast.fast.reflectors import make_reflector

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = {"model": "m", "base_url": f"http://127.0.0.1:{port}/v1", "retries": 0}
    [reply] = make_reflector("openai", args, generate=None)(
        [ReflectionPrompt("a", [Failure("?", "b", "no", 0.0)])], seeds=[0]
    )
    assert (reply.text, reply.error) == (None, "APIConnectionError: Connection error.")


def test_the_defaults_are_not_among_the_bad_inputs() -> None:
    assert config_load.check({}) == Config()
