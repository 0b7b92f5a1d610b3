"""The lineage of the contexts: one tree per run, from the records of its cycles.

A record is written in the cycle in which a context is born; the population of later cycles re-scores it. The tree keeps both: the
score at birth (against its parent, same problems) and the latest one (under the policy of that cycle).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Literal

from fst_fast.config.components import components_of, compose
from fst_fast.report.load import FailureShown, Run

Change = tuple[Literal["same", "ins", "del", "part"], str]
"""A piece of a text against that of the parent; `part`: the name of the component that follows."""


@dataclass
class Node:
    id: str
    text: str
    parent: str | None
    born: int
    admitted: bool | None = None
    birth_mean: float | None = None
    birth_n: int | None = None
    mean: float | None = None  # latest
    n: int | None = None
    scored_in: int | None = None  # cycle of the latest score
    copies: int = 0  # places in the final population
    failures: list[FailureShown] = field(default_factory=list)
    reflection: str | None = None
    depth: int = 0
    changes: list[Change] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    @property
    def folded(self) -> bool:
        """Refused and without children: shown folded."""
        return self.admitted is False and not self.children and not self.copies


def lineage(run: Run) -> list[Node]:
    """All contexts of the run, parents before children, a depth each; roots are contexts whose parent is not known."""
    nodes: dict[str, Node] = {}

    def node(id: str, text: str, parent: str | None, born: int) -> Node:
        return nodes.setdefault(id, Node(id, text, parent, born))

    for cycle in run.cycles:
        for born in cycle.contexts:
            new = node(born.id, born.text, born.parent, born.born)
            new.admitted, new.birth_mean, new.birth_n = born.admitted, born.mean, born.n
            new.failures, new.reflection = born.failures, born.reflection
            if new.scored_in is None:
                new.mean, new.n, new.scored_in = born.mean, born.n, cycle.cycle
        for member in cycle.population:
            known = node(member.id, member.text, member.parent, member.born)
            if member.mean is not None:
                known.mean, known.n, known.scored_in = member.mean, member.n, cycle.cycle
    if run.contexts:
        for id, kept in run.contexts.contexts.items():
            node(id, kept.text, kept.parent, kept.born)
    for id, copies in Counter(population(run)).items():
        if id in nodes:
            nodes[id].copies = copies
    return _tree(nodes)


def population(run: Run) -> list[str]:
    """Ids of the last population, in order; the best may occur more than once."""
    if run.contexts:
        return run.contexts.population
    return [member.id for member in run.cycles[-1].population] if run.cycles else []


def _tree(nodes: dict[str, Node]) -> list[Node]:
    for child in nodes.values():
        parent = nodes.get(child.parent) if child.parent else None
        if parent is not None:
            parent.children.append(child)
            child.changes = context_diff(parent.text, child.text)
    for root in nodes.values():
        if not root.changes and len(alone := context_diff(root.text, root.text)) > 1:
            root.changes = alone
    ordered: list[Node] = []
    seen: set[str] = set()
    roots = [node for node in nodes.values() if node.parent is None or node.parent not in nodes]
    for start in [*roots, *nodes.values()]:  # the second part is empty unless parents form a ring
        stack = [(start, 0)]
        while stack:
            node, depth = stack.pop()
            if node.id in seen:
                continue
            seen.add(node.id)
            node.depth = depth
            ordered.append(node)
            later = sorted(node.children, key=lambda child: (child.folded, child.born))
            stack.extend((child, depth + 1) for child in reversed(later))
    return ordered


def context_diff(old: str, new: str) -> list[Change]:
    """`word_diff` of two contexts; of contexts of components by component, those that did not change whole."""
    before, after = components_of(old), components_of(new)
    if not after or compose(after) != new:
        return word_diff(old, new)
    changes: list[Change] = []
    for name, text in after.items():
        changes += [("part", name), *word_diff(before.get(name, ""), text)]
    return changes


def word_diff(old: str, new: str) -> list[Change]:
    """Word by word, white space belonging to the word before it: the pieces that are not `del` are exactly the new text."""
    a, b = re.findall(r"\s+|\S+\s*", old), re.findall(r"\s+|\S+\s*", new)
    same = SequenceMatcher(None, [word.strip() for word in a], [word.strip() for word in b], autojunk=False)
    changes: list[Change] = []
    for what, i, j, k, m in same.get_opcodes():
        if what == "equal":
            changes.append(("same", "".join(b[k:m])))
            continue
        if j > i:
            removed = "".join(a[i:j])
            changes.append(("del", removed if removed[-1].isspace() else removed + " "))
        if m > k:
            changes.append(("ins", "".join(b[k:m])))
    return _spaced(changes)


def _spaced(changes: Sequence[Change]) -> list[Change]:
    """Put a space before a removed piece that would stick to the word before it (a text that only grows shorter at its end)."""
    out: list[Change] = []
    for what, text in changes:
        if what == "del" and out and not out[-1][1][-1:].isspace():
            text = " " + text
        out.append((what, text))
    return out
