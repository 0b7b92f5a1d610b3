"""Which components a child revises (fast.component_selector): each in turn, the worst first, or all. A new way is a line in SELECTORS."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from fst_fast.config.components import components_of
from fst_fast.contracts import Context
from fst_fast.fast.evaluations import Evaluations
from fst_fast.fast.population import Lineage

Ranked = Callable[[Context, int, Evaluations, Mapping[str, Lineage]], list[str]]


def revised(
    selector: str,
    parents: Sequence[Context],
    turn: int,
    evaluations: Evaluations,
    lineage: Mapping[str, Lineage],
) -> list[list[str]]:
    """The components that the child of each parent revises. turn: children asked for so far."""
    if selector == "all":
        return [list(components_of(parent.text)) for parent in parents]
    siblings: Counter[str] = Counter()
    chosen = []
    for place, parent in enumerate(parents):
        names = SELECTORS[selector](parent, turn + place, evaluations, lineage)
        chosen.append([names[siblings[parent.id] % len(names)]])
        siblings[parent.id] += selector == "worst_first"  # siblings revise different ones
    return chosen


def in_turn(
    parent: Context, turn: int, evaluations: Evaluations, lineage: Mapping[str, Lineage]
) -> list[str]:
    """The components from the one whose turn it is."""
    names = list(components_of(parent.text))
    return [*names[turn % len(names) :], *names[: turn % len(names)]]


def worst_first(
    parent: Context, turn: int, evaluations: Evaluations, lineage: Mapping[str, Lineage]
) -> list[str]:
    """First those whose present text has been revised in vain the fewest times; of these the one with the lowest mean reward: of a tool, that of
    the episodes that called it (0 where none did), of any other component, that of all."""
    parts = components_of(parent.text)
    overall = evaluations.mean(parent.id)[0] or 0.0

    def reward(name: str) -> float:
        called = (
            evaluations.calls(parent.id, name.removeprefix("tool:")) if name.startswith("tool:") else None
        )
        return overall if called is None else called

    vain: Counter[str] = Counter()
    for line in lineage.values():
        before = lineage.get(line.context.parent or "")
        if line.admitted or before is None:
            continue
        old, new = components_of(before.context.text), components_of(line.context.text)
        vain.update(name for name in parts if old.get(name) == parts[name] != new.get(name))
    return sorted(parts, key=lambda name: (vain[name], reward(name)))


SELECTORS: dict[str, Ranked] = {"round_robin": in_turn, "worst_first": worst_first}
