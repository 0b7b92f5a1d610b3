"""Each experiment: which runs it makes, which numbers it takes from them, which claims of the method these numbers bear on.

An experiment is a function of a Runner; it asks for runs (those that another experiment has asked for are there already) and returns a
Result. Claims are judged by the code, never typed in: `holds` is True or False, None where the runs cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable

from fst_fast.experiments.ablations import ablation
from fst_fast.experiments.comparison import channels, drift, efficiency, generalisation
from fst_fast.experiments.continual import continual, distill, plasticity
from fst_fast.experiments.result import Result
from fst_fast.experiments.runner import Runner

EXPERIMENTS: dict[str, Callable[[Runner], Result]] = {
    "efficiency": efficiency,
    "drift": drift,
    "channels": channels,
    "generalisation": generalisation,
    "plasticity": plasticity,
    "continual": continual,
    "distill": distill,
    "ablation": ablation,
}
