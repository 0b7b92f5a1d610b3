"""What README and docs name exists: links, files, tests, configuration keys, commands. What docs/extending.md shows runs."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import fst_fast
from fst_fast import Config, cli
from fst_fast.fast import reflectors
from fst_fast.run.faults import POINTS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PRESENT = [
    page for page in PAGES if page.name not in ("LOG.md", "CHANGELOG.md")
]  # the others tell of former names
FOLDERS = "benchmarks|configs|csrc|docs|examples|fst_fast|kernels|scripts|tests"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of the page's code blocks: fenced ones, and indented ones (language "")."""
    text = page.read_text()
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield language, body
    for body in re.findall(r"(?<=\n\n)(?:    .*\n|\n(?=    ))+", re.sub(r"(?ms)^```.*?^```", "", text)):
        yield "", re.sub("(?m)^    ", "", body)


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(there), f"{name(page)}: {target}"


@pytest.mark.parametrize("page", PRESENT, ids=name)
def test_every_file_and_folder_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(rf"(?<![\w./(-])(?:{FOLDERS})/[\w./*-]*[\w*/]", text):
        if not re.search(r"NAME|\.{2}", path):
            assert list(ROOT.glob(path.rstrip("/"))), f"{name(page)}: {path}"
    for file in re.findall(r"(?<![\w/])test_\w+\.py", text):
        assert list((ROOT / "tests").rglob(file)), f"{name(page)}: {file}"


def test_the_tests_that_the_promises_name_exist() -> None:
    tests = [
        found
        for file in (ROOT / "tests").rglob("test_*.py")
        for found in re.findall(r"(?m)^def (test_\w+)", file.read_text())
    ]
    promised = re.findall(
        r"`(\.\.\w+(?:\.\.)?|test_\w+\.\.)`", (ROOT / "docs" / "reliability.md").read_text()
    )
    assert len(promised) > 20
    for pattern in promised:
        part = pattern.replace("..", "")
        assert any(part in test for test in tests), pattern


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        yield prefix + key
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, f"{prefix}{key}.")


@pytest.mark.parametrize("page", PRESENT, ids=name)
def test_every_configuration_key_that_is_named_exists(page: Path) -> None:
    known = set(keys())
    sections = "|".join(key for key in known if any(other.startswith(key + ".") for other in known))
    for key in re.findall(rf"`(?:--)?((?:{sections})\.\w+(?:\.\w+)*)(?==|: |`)", page.read_text()):
        free = re.sub(r"(_args|_kwargs|\.deepspeed)\..*", r"\1", key)
        other = key in POINTS or key.endswith((".py", ".md", ".yaml", ".json", ".jsonl"))
        assert free in known or other, f"{name(page)}: {key}"


def commands(page: Path) -> Iterator[list[str]]:
    for language, body in blocks(page):
        if language not in ("", "bash", "sh"):
            continue
        for line in body.replace("\\\n", " ").splitlines():
            match = re.match(
                r"(?:\$ )?((?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:fst|make|python|torchrun|deepspeed|bash)\b .*)",
                line,
            )
            if match:
                words = shlex.split(match[1], comments=True)
                yield [
                    word.removeprefix(".venv/bin/") for word in words if not re.match(r"[A-Z_]+=\S+$", word)
                ]


@pytest.mark.parametrize("page", PRESENT, ids=name)
def test_every_command_that_is_shown_is_one_that_the_program_takes(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"(?m)^(\w+):", (ROOT / "Makefile").read_text()))
    for words in commands(page):
        program, *rest = words
        where = f"{name(page)}: {shlex.join(words)}"
        if "train.py" in words:
            program, rest = "fst", ["train", *words[words.index("train.py") + 1 :]]
        if program == "make":
            named = [word for word in rest if re.fullmatch(r"\w+", word)]
            assert named, where
            assert set(named) <= targets, where
        elif program == "fst":
            takes_it(rest, where)
        elif program == "bash":
            assert (ROOT / rest[0]).is_file(), where
        elif program == "python" and rest[:2] != ["-m", "venv"]:
            module = rest[1] if rest[0] == "-m" else rest[0]
            files = [word for word in rest if re.match(rf"(?:{FOLDERS})/", word)]
            assert all((ROOT / file).exists() for file in files), where
            if rest[0] == "-m" and re.match(FOLDERS, module):
                assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), where


def takes_it(words: list[str], where: str) -> None:
    """`fst train` and `fst probe` as a dry run; the others by the parser of the command line alone."""
    words = [
        "configs/mini/star_graph.yaml" if word in ("CONFIG.yaml", "tiny.yaml") else word
        for word in words
        if word not in ("[", "]", "...]")
    ]
    words = [word if "=[" in word else word.strip("[]") for word in words]
    own, overrides = cli.split_overrides(words)
    args = cli._parser().parse_args(own)
    if words[0] in ("train", "probe"):
        config = [str(args.config)] if args.config else []
        assert cli.main(["train", *config, *overrides, "--dry-run"]) == 0, where


def test_a_command_with_a_misspelt_option_or_key_is_noticed() -> None:
    from fst_fast import UserError

    with pytest.raises(AssertionError, match="here"):
        takes_it(["train", "CONFIG.yaml", "--slow.lrr=1e-3"], "here")
    with pytest.raises(UserError, match="unrecognized"):
        takes_it(["report", "DIR", "--outt", "x"], "here")


EXTENDING = ROOT / "docs" / "extending.md"


def examples() -> dict[str, list[tuple[str, str]]]:
    """Heading of docs/extending.md -> its fenced blocks; "" has those before the first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for section in re.split(r"(?m)^## ", "\n" + EXTENDING.read_text()):
        title = section.splitlines()[0] if found else ""
        found[title] = re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize("title", [title for title in examples() if title])
def test_the_example_of_an_extension_point_runs_as_printed(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("fst_kernels.backends")  # fst_kernels.backends is the function
    monkeypatch.setattr(module, "IMPLEMENTED", module.IMPLEMENTED.copy())
    monkeypatch.setattr(reflectors, "REFLECTORS", reflectors.REFLECTORS.copy())
    given = [block for block in [*examples()[""], *examples()["A task"]] if block[1].startswith("# ")]
    names: dict[str, object] = {}
    for language, body in [*given, *examples()[title]]:
        file = re.match(r"# (\w+\.\w+)\n", body)
        if file:
            Path(file[1]).write_text(body[file.end() :])
        elif language == "bash":
            for words in map(shlex.split, body.splitlines()):
                assert words[0] == "fst"
                assert cli.main(words[1:]) == 0, capsys.readouterr().err
        else:
            assert language == "python"
            exec(compile(body, str(EXTENDING), "exec"), names)


def test_every_extension_point_of_the_table_has_an_example_of_at_least_one_block() -> None:
    linked = re.findall(r"(?m)^\| \[[^]]*\]\(#([\w-]+)\)", EXTENDING.read_text())
    titles = {title.lower().replace(" ", "-"): found for title, found in examples().items() if title}
    assert set(linked) == set(titles)
    assert all(titles.values())


def python_blocks() -> list[tuple[Path, str]]:
    return [(page, body) for page in PRESENT for language, body in blocks(page) if language == "python"]


@pytest.mark.parametrize(
    ("page", "body"), python_blocks(), ids=lambda part: name(part) if isinstance(part, Path) else ""
)
def test_what_python_examples_import_exists(page: Path, body: str) -> None:
    for node in ast.walk(ast.parse(body, name(page))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, imported) for imported in names), f"{name(page)}: {ast.unparse(node)}"
        else:
            for imported in names:
                importlib.import_module(imported)


def test_the_task_and_the_graders_of_the_how_tos_judge_as_they_say() -> None:
    def run(page: str, number: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        exec([body for language, body in blocks(ROOT / "docs" / page) if language == "python"][number], found)
        return found

    task = run("own_task.md", 0)["Sums"](largest=20)
    for split in ("train", "validation"):
        problem = task.problems(split)[3]
        assert task.verify(problem, task.gold(problem)).reward == 1
        assert task.verify(problem, "no").feedback
    problem = fst_fast.Problem("1", [], "5", {"input": "2 3"})
    grade = run("own_reward.md", 0)["grade"]
    assert [grade(problem, response)["reward"] for response in ("it is 5", "it is 6")] == [1, 0]
    run_and_compare = run("own_reward.md", 1)["grade"]
    assert run_and_compare(problem, "print(sum(map(int, input().split())))") == 1
    assert run_and_compare(problem, "print(1 / 0)")["feedback"].startswith("error: ")
