"""The experiments by name. Each is a function of a Runner: it trains its runs, unless another experiment has, and returns a Result.

Its docstring is the question that it answers. Claims are judged by the code: `holds` is True or False, None where the runs cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable

from fst_fast.experiments.ablations import ablation
from fst_fast.experiments.certainty import certainty
from fst_fast.experiments.comparison import channels, drift, efficiency, generalisation
from fst_fast.experiments.continual import continual, reversal
from fst_fast.experiments.distillation import distill
from fst_fast.experiments.no_help import no_help
from fst_fast.experiments.plasticity import plasticity
from fst_fast.experiments.result import Result
from fst_fast.experiments.rivals import rivals
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.tools import tools

EXPERIMENTS: dict[str, Callable[[Runner], Result]] = {
    "efficiency": efficiency,
    "drift": drift,
    "channels": channels,
    "generalisation": generalisation,
    "plasticity": plasticity,
    "continual": continual,
    "reversal": reversal,
    "no_help": no_help,
    "distill": distill,
    "ablation": ablation,
    "rivals": rivals,
    "tools": tools,
    "certainty": certainty,
}
