"""Any data set of reasoning-gym as a task: `task: reasoning_gym:chain_sum`, or a composite of several (package reasoning-gym, extra `gym`).

    task: reasoning_gym:composite
    task_args: {datasets: [{name: chain_sum, weight: 1, config: {max_terms: 3}}, {name: leg_counting, weight: 2}]}

    task: reasoning_gym:chain_sum
    task_args: {curriculum: {num_terms: 3}, max_digits: 2}     a level of the set's own curriculum, or one for all its attributes: 3

The package draws an item from (seed, index). Validation items are drawn with another seed than training items; a training item whose
question is also in the validation split, or was drawn before, is left out, so no problem occurs twice.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.boxed import NoBoxedAnswer
from fst_fast.tasks.graders.text import answer_part, quoted
from fst_fast.tasks.readers import import_package, said
from fst_fast.tasks.rows import check_count

PREFIX = "reasoning_gym:"
READ = ("last_line", "all", "box", "tag")
PART = {"name", "weight", "config"}


class ReasoningGym:
    """train, validation: items of each split at most (fewer where the set repeats itself). read: the part of a response that is the answer:
    its last line, all of it, the last \\boxed{}, or what is between <answer> and </answer>. longest: items whose question has more characters
    are left out. config: arguments of the data set, or `curriculum`: a level of its curriculum, or {attribute: level}.

    The reward is the package's own score, in [0, 1]. Raises UserError."""

    def __init__(
        self,
        name: str,
        *,
        train: int = 1000,
        validation: int = 100,
        seed: int = 0,
        read: str = "last_line",
        longest: int | None = None,
        **config: Any,
    ) -> None:
        for key, value in (("train", train), ("validation", validation), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int) or value < (key != "seed"):
                raise UserError(
                    f"task_args.{key}={value!r} must be a whole number of at least {int(key != 'seed')}"
                )
        if read not in READ:
            raise UserError(f"task_args.read={read!r} is refused; allowed: {', '.join(READ)}")
        check_count("longest", longest, 1)
        self.name, self._read, self._longest = name, read, longest or sys.maxsize
        self._sizes = {"validation": validation, "train": train}
        self._sets = {
            split: _create(name, size=size, seed=2 * seed + (split == "train"), config=config)
            for split, size in self._sizes.items()
        }
        self._problems: dict[str, list[Problem]] = {}

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of "train" or "validation", in the order of the data set."""
        if not self._problems:
            seen: set[str] = set()
            drawn = _draw(self.name, self._sets, self._sizes)
            for part, items in drawn.items():  # validation first: training problems give way
                self._problems[part] = []
                for index, item in enumerate(items):
                    if item["question"] in seen or len(item["question"]) > self._longest:
                        continue
                    seen.add(item["question"])
                    message = {"role": "user", "content": item["question"]}
                    problem = Problem(
                        f"{self.name}/{part}/{index}", [message], item["answer"], {"item": item}
                    )
                    self._problems[part].append(problem)
            if self._read == "last_line" and all("\n" in str(p.answer) for p in self._problems["validation"]):
                raise UserError(
                    f"task_args.read=last_line reads one line, but answers of {self.name} have several; set it to all, box or tag"
                )
        return self._problems.get(split, [])

    def verify(self, problem: Problem, response: str) -> Verdict:
        """The package's score of the answer, with the right answer as feedback."""
        try:
            given = self._answer(response)
        except NoBoxedAnswer as error:
            return Verdict(0.0, str(error))
        right = "" if problem.answer is None else f" A right answer is {quoted(str(problem.answer))}."
        try:
            reward = float(self._sets["train"].score_answer(given, problem.meta["item"]))
        except Exception as error:  # noqa: BLE001 - some sets read only what has the form of an answer
            return Verdict(0.0, f"the answer {quoted(given)} cannot be read: {said(error)}.{right}")
        if reward >= 1:
            return Verdict(1.0)
        return Verdict(max(reward, 0.0), f"the answer {quoted(given)} scores {reward:g} of 1.{right}")

    def gold(self, problem: Problem) -> str | None:
        """The item's own answer, in the form that is read; None where it has none or the package does not give it the full score."""
        if not isinstance(problem.answer, str) or (self._read == "last_line" and "\n" in problem.answer):
            return None
        if self._sets["train"].score_answer(problem.answer, problem.meta["item"]) < 1:
            return None
        forms = {"box": f"\\boxed{{{problem.answer}}}", "tag": f"<answer>{problem.answer}</answer>"}
        return forms.get(self._read, problem.answer)

    def _answer(self, response: str) -> str:
        if self._read != "tag":
            return answer_part(response, self._read)
        found = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
        if not found:
            raise NoBoxedAnswer(
                "there is no <answer>...</answer> in the response: the answer must be inside these tags."
            )
        return str(found[-1]).strip()


def _draw(name: str, sets: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Iterable[Any]]:
    if name != "codeio":
        return {part: map(items.__getitem__, range(sizes[part])) for part, items in sets.items()}
    drawn = _draw_apart([{**vars(items.config), "size": sizes[part]} for part, items in sets.items()])
    return dict(zip(sets, drawn, strict=True))


def _draw_apart(configs: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Items of codeio, which are made by running its programs, in a process of its own: with the same hash and random seeds each time, without
    the trainer's environment, in a folder that goes with the files that programs write. Programs that would still give something else in
    another process are left out. Raises UserError."""
    path = os.pathsep.join(filter(None, sys.path))
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, json.dumps(configs)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder, check=False,
            env={"PYTHONPATH": path, "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore", "PYTHONUTF8": "1"},
        )  # fmt: skip
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(
            f"task={PREFIX}codeio: the process that makes its items ended with {done.returncode}: {why[:300]}"
        )
    return list(json.loads(done.stdout))


_PROGRAM = """
import json, os, random, re, sys
import numpy
from reasoning_gym import create_dataset

out = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # programs print
changing = re.compile(  # what another process gives otherwise: times, random numbers of its own, addresses and what is ordered by them
    r"datetime|date\\.today|time\\.|uuid|urandom|secrets|getpid|\\bid\\(|default_rng\\(\\)|random\\.seed|SystemRandom|\\bset\\(|tempfile|/tmp/|\\bat 0x"
)
drawn = []
for config in json.loads(sys.argv[1]):
    items = create_dataset("codeio", **config)
    drawn.append([])
    for index in range(len(items)):
        random.seed(index)
        numpy.random.seed(index)
        item = items[index]
        if item["metadata"].pop("input_data") and not changing.search(item["question"] + item["answer"]):  # no input: it failed
            del item["metadata"]["output_data"]
            drawn[-1].append(item)
json.dump(drawn, out)
out.flush()
os._exit(0)  # whatever threads are left
"""


def _create(name: str, *, size: int, seed: int, config: Mapping[str, Any]) -> Any:
    reasoning_gym = import_package("reasoning_gym", f"task={PREFIX}{name}", "gym")
    from reasoning_gym.composite import DatasetSpec

    try:
        _check_names(name, config)
        if name != "composite":
            return reasoning_gym.create_dataset(name, size=size, seed=seed, **_arguments(name, config))
        parts = config.get("datasets")
        if not isinstance(parts, Sequence) or not all(
            isinstance(part, Mapping) and "name" in part and part.keys() <= PART for part in parts
        ):
            raise ValueError(
                f"datasets must be a list of {{{', '.join(sorted(PART))}}}, of which name is needed"
            )
        specs = [
            DatasetSpec(p["name"], p.get("weight", 1.0), _arguments(p["name"], p.get("config", {})))
            for p in parts
        ]
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **{**config, "datasets": specs})
    except (ValueError, TypeError, AssertionError, LookupError) as error:
        raise UserError(f"task={PREFIX}{name}: {error}") from None


def _check_names(name: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError for a set, or an argument of one, that there is not."""
    from reasoning_gym.factory import DATASETS

    if name == "composite":
        return
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        raise ValueError(f"there is no such set{f'; did you mean {near[0]}?' if near else ''}")
    known = {f.name for f in dataclasses.fields(DATASETS[name][1])} - {"size", "seed"}
    unknown = sorted(config.keys() - known - {"curriculum"})
    if unknown:
        raise ValueError(f"there is no argument {unknown[0]}; allowed: {', '.join(sorted(known))}")


def _arguments(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a set: those that its curriculum gives for `curriculum`, then those that are given outright."""
    given = dict(config)
    if "curriculum" not in given:
        return given
    from reasoning_gym.factory import CURRICULA, create_curriculum

    levels = given.pop("curriculum")
    if name not in CURRICULA:
        raise ValueError(f"the set {name} has no curriculum")
    made = create_curriculum(name)
    if isinstance(levels, int):
        made.set_global_level(levels)
    elif not isinstance(levels, Mapping):
        raise ValueError(f"curriculum={levels!r} must be a level or {{attribute: level}}")
    for attribute, level in levels.items() if isinstance(levels, Mapping) else ():
        if attribute not in made.attributes:
            raise ValueError(
                f"the curriculum of {name} has no {attribute!r}; it has {', '.join(made.attributes)}"
            )
        made.set_attr_level(attribute, level)
    fields = vars(made.generate_configuration())
    return {key: value for key, value in fields.items() if key not in ("seed", "size")} | given
