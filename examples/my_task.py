"""A task of one's own, as small as it gets: `fst train CONFIG.yaml --task=examples/my_task.py:AddTwo`.

`problems(split)` gives the problems, without any context: the trainer puts that into the system message. `verify` judges one response:
the reward is in [0, 1], the feedback is what the reflection reads, so it should say what went wrong and not only that it did. `gold`
is optional: a response that must get reward 1; where it is there, a run starts only if the grader passes its own gold.

`verify` runs in child processes, on text that a model made up. It must be a pure function of its arguments; what it prints is dropped;
if it hangs or crashes, the response counts as not judged.
"""

import random
import re
from collections.abc import Sequence

from fst_fast.contracts import Problem, Verdict


class AddTwo:
    """Add two numbers; the sum must stand in \\boxed{}."""

    def __init__(self, largest: int = 20, train: int = 256, validation: int = 64, seed: int = 0) -> None:
        self.largest, self.seed = largest, seed
        self.sizes = {"train": train, "validation": validation}

    def problems(self, split: str) -> Sequence[Problem]:
        draw = random.Random(f"{self.seed}/{split}")
        problems = []
        for index in range(self.sizes[split]):
            a, b = draw.randint(0, self.largest), draw.randint(0, self.largest)
            question = {"role": "user", "content": f"What is {a} + {b}?"}
            problems.append(Problem(id=f"{split}/{index}", messages=[question], answer=a + b))
        return problems

    def verify(self, problem: Problem, response: str) -> Verdict:
        boxes = re.findall(r"\\boxed\s*\{\s*(-?\d+)\s*\}", response)
        if not boxes:
            return Verdict(0.0, "there is no \\boxed{} with a number in the response.")
        if int(boxes[-1]) != problem.answer:
            return Verdict(0.0, f"the sum is {problem.answer}, but the box holds {boxes[-1]}.")
        return Verdict(1.0, "right.")

    def gold(self, problem: Problem) -> str:
        return f"\\boxed{{{problem.answer}}}"
