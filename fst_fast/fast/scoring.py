"""The one function through which the fast phase gets judged rollouts.

The fast phase never samples and never verifies: it names requests, and a `ScoreFn` answers them in one batch, in the same order. The
trainer's ScoreFn samples on all processes and verifies; a test's is a table; that of a GEPAAdapter is in `gepa_adapter.py`. The sample
number selects the random stream: the same request in the same cycle gives the same rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fst_fast.contracts import RolloutRequest, ScoredRollout

ScoreFn = Callable[[Sequence[RolloutRequest]], list[ScoredRollout]]
