"""Merge: a child that takes its components from two contexts that win different problems (GEPA's merge, arXiv 2507.19457, by component).

Of a component that only one of the two has changed since their nearest common ancestor, the changed text is taken; of one that both have
changed, that of the context with the better mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fst_fast.config.components import components_of, compose
from fst_fast.contracts import Context
from fst_fast.fast import pareto
from fst_fast.fast.population import Lineage


def merge(
    scores: pareto.Matrix, archive: Sequence[Context], lineage: Mapping[str, Lineage], tried: Collection[str]
) -> tuple[Context, Context, str] | None:
    """(the better parent, the other one, the text) of the most promising merge that has not been tried, None where there is none.

    scores: [contexts of the archive, problems]. The pair is the one whose contexts each beat the other on the most problems."""
    front, means = pareto.wins(scores), pareto.row_means(scores)
    pairs = [(a, b) for a in range(len(archive)) for b in range(a)]

    def gain(pair: tuple[int, int]) -> int:
        a, b = pair
        return int(min((front[a] & ~front[b]).sum(), (front[b] & ~front[a]).sum()))

    for pair in sorted(pairs, key=lambda p: (-gain(p), p)):
        if not gain(pair):
            return None
        better, other = (archive[i] for i in sorted(pair, key=lambda i: (-np.nan_to_num(means[i]), i)))
        ancestor = _common_ancestor(better, other, lineage)
        origin = components_of(ancestor.text) if ancestor else {}
        mine, theirs = components_of(better.text), components_of(other.text)
        text = compose(
            {name: theirs.get(name, t) if t == origin.get(name) else t for name, t in mine.items()}
        )
        if text not in tried:
            return better, other, text
    return None


def _common_ancestor(a: Context, b: Context, lineage: Mapping[str, Lineage]) -> Context | None:
    """The nearest context from which both are edited, or one of the two."""
    above = {context.id for context in _line_of(a, lineage)}
    return next((context for context in _line_of(b, lineage) if context.id in above), None)


def _line_of(context: Context, lineage: Mapping[str, Lineage]) -> list[Context]:
    line = [context]
    while (above := lineage.get(line[-1].parent or "")) and above.context not in line:
        line.append(above.context)
    return line
