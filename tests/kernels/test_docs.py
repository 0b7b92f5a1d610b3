"""The program in docs/kernels/own_trainer.md runs, and its assertions hold."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "kernels" / "own_trainer.md"


def test_the_program_for_other_trainers_runs_as_printed() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["head"].weight.grad.norm() > 0
