"""Tasks: where problems come from and how a response is judged. Nothing here imports torch: children that verify must start fast."""

from fst_fast.tasks.registry import check_gold, load_task
from fst_fast.tasks.verify import VerifierPool

__all__ = ["VerifierPool", "check_gold", "load_task"]
