"""A run folder as typed data.

Only files are read: metrics.jsonl (required), timing.jsonl, summary.json, contexts.json, problems.json, rollouts.jsonl and
config.yaml. The run may
still be going: what is not there yet is None or empty, and a torn last line is left out and said. Anything else that is not as the
trainer writes it is refused with file and line, since a report drawn from damaged data looks as good as a right one.
Keys and kinds of line that this page does not show are ignored.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fst_fast.errors import UserError
from fst_fast.run.folder import MARKER
from fst_fast.run.metrics_schema import VERSION

EDGE_ROLLOUTS = 64  # rollouts kept from each end of each phase: examples come from these


OF_TRAINED_TOKENS = ("kl", "entropy", "grad_norm", "ratio_mean", "clipped_fraction", "mismatch_kl")


class Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Cell(Record):
    """One of the four combinations of weights and context: mean reward, its standard error, pass@k, problems."""

    mean: float | None = None
    stderr: float | None = None
    pass_at_k: float | None = None
    n: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_judged(cls, value: Any) -> Any:
        """A mean over no problems is not a reward of 0."""
        return {"n": 0} if isinstance(value, dict) and value.get("n") == 0 else value


class Counters(Record):
    """Cumulative counts. `rollouts` includes the fast phase."""

    rollouts: int | None = None
    fast_rollouts: int | None = None
    reused_rollouts: int | None = None
    tokens_computed: int | None = None
    tokens_unshared: int | None = None


class Marker(Record):
    """fst-run.json. metrics: version of run/metrics_schema.py."""

    metrics: int = VERSION


class Start(Record):
    method: str
    seed: int
    task: str
    model: str
    config_hash: str | None = None
    versions: dict[str, Any] = Field(default_factory=dict)
    hardware: Any = None


class Trouble(Record):
    """A trouble that stood after a record (run/troubles.py)."""

    value: float
    limit: float
    count: int


Troubles = dict[str, Trouble]


class Step(Counters):
    step: int
    cycle: int | None = None
    reward: float | None = None
    kl: float | None = None
    entropy: float | None = None
    grad_norm: float | None = None
    ratio_mean: float | None = None
    clipped_fraction: float | None = None
    mismatch_kl: float | None = None
    response_tokens: float | None = None
    groups: int | None = None
    groups_kept: int | None = None
    troubles: Troubles = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _nothing_trained(cls, value: Any) -> Any:
        """Earlier versions wrote 0 for what a step without a kept group had not measured."""
        if not isinstance(value, dict) or value.get("groups_kept") != 0:
            return value
        return {**value, **dict.fromkeys(OF_TRAINED_TOKENS)}


class FailureShown(Record):
    problem_id: str
    feedback: str = ""


class Scored(Record):
    """A context as a line of metrics.jsonl tells it: its score is the one of that cycle's policy."""

    id: str
    text: str
    parent: str | None = None
    born: int = 0
    mean: float | None = None
    n: int | None = None


class Born(Scored):
    admitted: bool | None = None
    failures: list[FailureShown] = Field(default_factory=list)
    reflection: str | None = None


class Cycle(Record):
    cycle: int
    step: int
    population: list[Scored]
    contexts: list[Born] = Field(default_factory=list)
    proposed: int | None = None
    admitted: int | None = None
    refused: dict[str, int] = Field(default_factory=dict)
    fast_rollouts: int | None = None
    best_mean: float | None = None
    seed_mean: float | None = None
    troubles: Troubles = Field(default_factory=dict)


class Eval(Counters):
    step: int
    channels: dict[str, Cell]
    final: bool = False
    k: int | None = None
    kl_seed: float | None = None
    kl_evolved: float | None = None


class Timing(Record):
    """Seconds since the start (over all resumes), and seconds spent in each phase since the row before. A step has a row for its
    training and another for its evaluation. reflect_s is a part of fast_s."""

    step: int
    seconds: float
    rollout_s: float | None = None
    verify_s: float | None = None
    score_s: float | None = None
    train_s: float | None = None
    fast_s: float | None = None
    reflect_s: float | None = None
    eval_s: float | None = None
    troubles: Troubles = Field(default_factory=dict)


class Summary(Counters):
    channels: dict[str, Cell]
    k: int | None = None
    seconds: float | None = None
    kl_seed: float | None = None
    kl_evolved: float | None = None
    peak_memory_bytes: int | None = None
    hardware: Any = None


class Kept(Record):
    text: str
    parent: str | None = None
    born: int = 0


class Contexts(Record):
    population: list[str]
    contexts: dict[str, Kept]


class Example(Record):
    step: int
    phase: str
    problem_id: str
    context_id: str | None = None
    sample: int | None = None
    reward: float | None = None
    advantage: float | None = None
    finish: str | None = None
    prompt: str = ""
    response: str = ""
    feedback: str | None = ""


class Answer(Record):
    """A cell's samples of one problem: their rewards, and the first of them."""

    rewards: list[float | None]
    reward: float | None = None
    context_id: str | None = None
    response: str | None = None
    feedback: str | None = None

    @property
    def mean(self) -> float | None:
        judged = [reward for reward in self.rewards if reward is not None]
        return sum(judged) / len(judged) if judged else None


class Posed(Record):
    question: str
    cells: dict[str, Answer]


class Problems(Record):
    """problems.json: the last evaluation."""

    step: int
    final: bool = False
    problems: dict[str, Posed]


R = TypeVar("R", bound=Record)
S = TypeVar("S", Step, Eval)


@dataclass(frozen=True)
class Run:
    """All that the page knows of one run. `examples` holds (first rollouts, last rollouts) of each phase."""

    path: Path
    label: str
    start: Start
    steps: list[Step]
    cycles: list[Cycle]
    evals: list[Eval]
    ended: bool
    timing: list[Timing]
    summary: Summary | None
    contexts: Contexts | None
    examples: dict[str, tuple[list[Example], list[Example]]]
    problems: Problems | None
    config: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.ended and self.summary is not None

    @property
    def last_step(self) -> int:
        lines: list[Step | Eval | Cycle] = [*self.steps, *self.evals, *self.cycles]
        return max((line.step for line in lines), default=0)


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the run folders; each gets a label that tells it from the others.

    Raises UserError for an empty list, a folder given twice, a folder that is not a run, and damaged files (file:line).
    """
    if not paths:
        raise UserError("no run folder given; a report needs at least one folder that holds metrics.jsonl")
    folders = [Path(path).resolve() for path in paths]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise UserError(f"run folder {paths[i]} is given twice; give each run once")
    return [_load(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folder's name, with as many parents as it takes to be unique."""
    depth = 1
    while True:
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
        depth += 1


def _load(folder: Path, label: str) -> Run:
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        what = "has no metrics.jsonl" if folder.is_dir() else "does not exist"
        raise UserError(
            f"run folder {folder} {what}; a report reads the folders that `fst train --run-dir` writes"
        )
    _check_version(folder / MARKER)
    notes: list[str] = []
    starts: list[Start] = []
    steps: list[Step] = []
    cycles: list[Cycle] = []
    evals: list[Eval] = []
    ended = False
    for number, line in _json_lines(metrics, notes):
        match line.get("kind"):
            case "start":
                starts.append(_parse(Start, line, metrics, number))
            case "step":
                steps.append(_parse(Step, line, metrics, number))
            case "cycle":
                cycles.append(_parse(Cycle, line, metrics, number))
            case "eval":
                evals.append(_parse(Eval, line, metrics, number))
            case "end":
                ended = True
            case None:
                _refuse(metrics, number, 'the key "kind" is missing')
    if not starts:
        raise UserError(
            f"{metrics} has no line of kind start; either the run has not begun or the file is damaged"
        )
    timing = [
        _parse(Timing, line, folder / "timing.jsonl", n)
        for n, line in _json_lines(folder / "timing.jsonl", notes)
    ]
    return Run(
        path=folder,
        label=label,
        start=starts[-1],
        steps=sorted(_last_of_each_step(steps).values(), key=lambda line: line.step),
        cycles=cycles,
        evals=sorted(_last_of_each_step(evals).values(), key=lambda line: line.step),
        ended=ended,
        timing=_without_repeated(timing),
        summary=_whole(Summary, folder / "summary.json"),
        contexts=_whole(Contexts, folder / "contexts.json"),
        examples=_edges(folder / "rollouts.jsonl", notes),
        problems=_whole(Problems, folder / "problems.json"),
        config=_text(folder / "config.yaml"),
        notes=notes,
    )


def _check_version(marker: Path) -> None:
    """Refuse metrics that a later version of the program wrote. A folder without the marker, such as a copied one, is taken as it is."""
    found = _whole(Marker, marker)
    if found and found.metrics > VERSION:
        raise UserError(
            f"{marker} says that the metrics are of version {found.metrics}; this version of fst reads up to {VERSION}"
        )


def _last_of_each_step(lines: Sequence[S]) -> dict[int, S]:
    """A step repeated after a resume counts as it was done last; the final evaluation replaces the periodic one of its step."""
    return {line.step: line for line in lines}


def _without_repeated(rows: Sequence[Timing]) -> list[Timing]:
    """Without rows of steps that a resume has done again: where the steps go back."""
    kept: list[Timing] = []
    for row in rows:
        if kept and row.step < kept[-1].step:
            kept = [old for old in kept if old.step < row.step]
        kept.append(row)
    return kept


def _edges(path: Path, notes: list[str]) -> dict[str, tuple[list[Example], list[Example]]]:
    """The first and the last rollouts of each phase: the file can be far larger than what a page shows."""
    first: dict[str, list[Example]] = {}
    last: dict[str, deque[Example]] = {}
    for number, line in _json_lines(path, notes):
        example = _parse(Example, line, path, number)
        head = first.setdefault(example.phase, [])
        if len(head) < EDGE_ROLLOUTS:
            head.append(example)
        last.setdefault(example.phase, deque(maxlen=EDGE_ROLLOUTS)).append(example)
    return {phase: (first[phase], list(last[phase])) for phase in first}


def _json_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file; nothing if it is not there. A torn last line is skipped with a note."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                line = _read_json(raw)
            except ValueError as error:
                if not raw.endswith(b"\n"):  # only a last line can be without one: it was being written
                    notes.append(f"{path.name}:{number} was cut off while being written and is left out")
                    return
                _refuse(path, number, f"not valid JSON ({error})")
            if not isinstance(line, dict):
                _refuse(path, number, f"a JSON {type(line).__name__} instead of an object")
            yield number, line


def _read_json(text: str | bytes) -> Any:
    """Raises ValueError where it is not JSON, or nested deeper than anything that the trainer writes."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested without end") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse(kind: type[R], line: Any, path: Path, number: int) -> R:
    try:
        return kind.model_validate(line)
    except ValidationError as error:
        _refuse(path, number, _first(error))


def _first(error: ValidationError) -> str:
    detail = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        return f'the key "{key}" is missing'
    return f"{key}={str(detail['input'])[:80]!r}: {detail['msg'].lower()}"


def _refuse(path: Path, number: int, why: str) -> NoReturn:
    raise UserError(f"{path}:{number}: {why}; the file is damaged or was not written by fst train")


def _whole(kind: type[R], path: Path) -> R | None:
    """A JSON file that is written at once, or None where the run has not written it yet."""
    text = _text(path)
    if text is None:
        return None
    try:
        return kind.model_validate(_read_json(text))
    except json.JSONDecodeError as error:
        _refuse(path, error.lineno, f"not valid JSON ({error.msg})")
    except ValidationError as error:
        _refuse(path, 1, _first(error))
    except ValueError as error:
        _refuse(path, 1, str(error))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); the file is damaged"
        ) from error
