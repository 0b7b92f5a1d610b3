"""What a scored rollout is, and the one door through which the fast phase gets them.

The fast phase never samples and never verifies: it names (context, problem, sample index) triples and a `ScoreFn` answers, in one batch
and in the same order. The trainer's ScoreFn renders, rolls out on all processes and verifies; a test's is a table; a GEPAAdapter's is
in `gepa_adapter.py`. The sample index names the random stream: the same triple in the same cycle is the same rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fst_fast.contracts import Context, Problem, Sampled

ScoreFn = Callable[[Sequence[tuple[Context, Problem, int]]], list[Sampled]]
