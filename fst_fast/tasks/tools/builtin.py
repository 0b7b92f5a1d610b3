"""The tools that a configuration may name, in `task_args.tools`:

    tools: [run_code, {search: documents.jsonl}, my_tools.py:lookup]

`search` ranks by BM25 (Robertson and Zaragoza 2009) in memory: enough for some 100,000 passages, and nothing to install or start.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_fast.errors import UserError
from fst_fast.tasks.user import load_object

KEY = "task_args.tools"
_K1, _B = 1.5, 0.75


def named_tools(specs: Any, key: str = KEY) -> list[Callable[..., Any]]:
    """The functions that `specs` names. Raises UserError."""
    if isinstance(specs, str) or not isinstance(specs, Sequence) or not specs:
        raise UserError(f"{key}={specs!r:.80} must be a list such as [run_code, {{search: documents.jsonl}}]")
    return [_named(spec, f"{key}.{i}") for i, spec in enumerate(specs)]


def _named(spec: Any, key: str) -> Callable[..., Any]:
    if isinstance(spec, str) and spec in BUILT_IN:
        return BUILT_IN[spec]({}, key)
    if isinstance(spec, Mapping) and len(spec) == 1 and next(iter(spec)) in BUILT_IN:
        [(name, value)] = spec.items()
        return BUILT_IN[name](dict(value) if isinstance(value, Mapping) else {"path": value}, key)
    if isinstance(spec, str) and ".py:" in spec:
        function: Callable[..., Any] = load_object(spec, key)
        return function
    raise UserError(f"{key}={spec!r:.80} is no tool; allowed: {', '.join(BUILT_IN)}, file.py:function")


def _run_code(args: Mapping[str, Any], key: str) -> Callable[..., Any]:
    unknown = set(args) - {"timeout_s", "memory_mib"}
    if unknown:
        raise UserError(f"{key}.{min(unknown)} is not known; run_code takes timeout_s and memory_mib")
    from fst_fast import run_code as confined

    def run_code(code: str) -> str:
        """Run a Python program, without network and files, and get what it prints."""
        result = confined(code, **args)
        said = result.stdout + (f"\n{result.stderr}" if result.stderr else "")
        return said if result.status == "ok" else f"{said}\n[{result.status}]".lstrip()

    return run_code


def _search(args: Mapping[str, Any], key: str) -> Callable[..., Any]:
    unknown = set(args) - {"path", "results"}
    if unknown or not isinstance(args.get("path"), str):
        raise UserError(f"{key}={dict(args)}: search takes path (a folder or a JSONL file) and results")
    results = args.get("results", 3)
    if not isinstance(results, int) or isinstance(results, bool) or results < 1:
        raise UserError(f"{key}.results={results!r} must be a whole number of at least 1")
    corpus = Corpus(read_passages(Path(args["path"]), key))

    def search(query: str) -> str:
        """Search the documents; returns the passages that fit the query best."""
        found = corpus.best(query, results)
        return "\n\n".join(f"[{title}] {text}" for title, text in found) or "nothing found"

    return search


BUILT_IN: dict[str, Callable[[Mapping[str, Any], str], Callable[..., Any]]] = {
    "run_code": _run_code,
    "search": _search,
}


def read_passages(path: Path, key: str = "path") -> list[tuple[str, str]]:
    """(title, text) of each line {"title": ..., "text": ...} of a JSONL file, or of each paragraph of the .txt and .md files of a folder.
    Raises UserError."""
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md"))
            return [
                (file.stem, part.strip())
                for file in files
                for part in file.read_text(encoding="utf-8").split("\n\n")
                if part.strip()
            ]
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} cannot be read: {error}") from error
    passages = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line)
            passages.append((str(tree.get("title", tree.get("id", number))), str(tree["text"])))
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f'{path}:{number} is not {{"title": ..., "text": ...}}: {type(error).__name__}'
            ) from None
    return passages


class Corpus:
    """Passages, ranked by BM25."""

    def __init__(self, passages: Sequence[tuple[str, str]]) -> None:
        self.passages = passages
        self._postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._lengths = []
        for number, (title, text) in enumerate(passages):
            words = Counter(_words(f"{title} {text}"))
            self._lengths.append(words.total())
            for word, count in words.items():
                self._postings[word].append((number, count))
        self._mean = sum(self._lengths) / max(len(passages), 1)

    def best(self, query: str, count: int) -> list[tuple[str, str]]:
        """The `count` best passages, best first; ties in their order. Only passages with a word of the query."""
        scores: dict[int, float] = defaultdict(float)
        for word in dict.fromkeys(_words(query)):
            found = self._postings.get(word, [])
            rare = math.log(1 + (len(self.passages) - len(found) + 0.5) / (len(found) + 0.5))
            for number, times in found:
                long = 1 - _B + _B * self._lengths[number] / self._mean
                scores[number] += rare * times * (_K1 + 1) / (times + _K1 * long)
        order = sorted(scores, key=lambda number: (-scores[number], number))
        return [self.passages[number] for number in order[:count]]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
