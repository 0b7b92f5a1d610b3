"""Each experiment: which runs it makes, which numbers it takes from them, which claims of the method these numbers bear on.

An experiment is a function of a Lab; it asks for runs (those that another experiment has asked for are there already) and returns a
Result. Claims are judged by the code, never typed in: `holds` is True or False, None where the runs cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable

from fst_fast.experiment.ablations import ablation
from fst_fast.experiment.comparison import channels, drift, efficiency, generalisation
from fst_fast.experiment.lab import Lab
from fst_fast.experiment.result import Result
from fst_fast.experiment.sequels import continual, distill, plasticity

EXPERIMENTS: dict[str, Callable[[Lab], Result]] = {
    "efficiency": efficiency,
    "drift": drift,
    "channels": channels,
    "generalisation": generalisation,
    "plasticity": plasticity,
    "continual": continual,
    "distill": distill,
    "ablation": ablation,
}
