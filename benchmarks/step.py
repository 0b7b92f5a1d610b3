"""A whole step of the slow phase, phase by phase, beside what `fst plan` predicts of it for this machine.

    python -m benchmarks.step [--rounds 2] [--out FOLDER]

The code of a run on random tokens (plan_step.py) and random weights: on a GPU the shape of Qwen3-1.7B in bfloat16, 4 contexts x 1536 tokens, 32 problems x 300, 2
samples x 256 under each; on a CPU a small float32 model, whose figures only show that it runs. The first step, which compiles kernels, is left out. Seconds
are wall-clock, the device waited for; a ratio above 1 is slower than predicted. The constants of a GPU in fst_fast/plan/machines.py are makers' figures
times stated shares: this is what they are to be corrected by.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.plan import OF_PHASE
from benchmarks.plan_step import PHASES, Load, MeasuredStep, configure

SHAPES: dict[str, dict[str, Any]] = {
    "cuda": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    "cpu": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300},
}  # fmt: skip
LOADS = {"cuda": Load(4, 1536, 32, 300, 2, 256), "cpu": Load(2, 32, 2, 8, 2, 6)}
KEYS: dict[str, dict[str, Any]] = {
    "cuda": {"model.dtype": "bfloat16", "policy.zero_stage": 1, "slow.tokens_per_micro_batch": 32768},
    "cpu": {},
}


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(**shape, tie_word_embeddings=True, max_position_embeddings=8192)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def predicted(config: Any, shape: dict[str, Any], load: Load) -> tuple[str, dict[str, float]]:
    """The machine that was taken, and seconds by phase."""
    from fst_fast.plan.advice import plan
    from fst_fast.plan.machines import found_here, machine
    from fst_fast.plan.shapes import shape_of
    from fst_fast.plan.workload import Assumed

    m = machine(found_here(), threads=torch.get_num_threads())
    tree = shape | {"model_type": "qwen3", "tie_word_embeddings": True}
    assumed = Assumed(load.context, load.problem, load.response, 0.0, 0.0)
    timed = {t.name: t.seconds for t in plan(config, shape_of(tree, "Qwen3"), m, 1, assumed).step.phases}
    return m.name, {phase: sum(timed[name] for name in names) for phase, names in OF_PHASE.items()}


def main() -> None:
    parser = measure.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for step_cpu.json or step_cuda.json")
    args = parser.parse_args()
    device = measure.device()
    shape, load = SHAPES[device.type], LOADS[device.type]
    path = None if args.out is None else args.out / f"step_{device.type}.json"
    columns = [("name", "phase", ""), ("seconds", "seconds", ".3f"), ("predicted", "predicted", ".3f"), ("ratio", "ratio", ".2f")]  # fmt: skip
    results = measure.Results("step", columns, path)

    def waited() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), shape)
        config = configure("mini", load, KEYS[device.type] | {"model.path": folder})
        name, guess = predicted(config, shape, load)
        results.about = {"model": shape, "load": vars(load), "keys": KEYS[device.type], "predicted for": name}
        step = MeasuredStep(config, load)
        seconds: dict[str, list[float]] = defaultdict(list)
        for number in range(args.rounds + 1):
            for phase, run in step.phases():
                began = waited()
                run()
                if number:
                    seconds[phase].append(waited() - began)
    median = {phase: statistics.median(seconds[phase]) for phase in PHASES}
    for phase in (*PHASES, "step"):
        took, said = (sum(x.values()) if phase == "step" else x[phase] for x in (median, guess))
        results.add({"name": phase, "seconds": took, "predicted": said, "ratio": took / said})
    print(results.table())


if __name__ == "__main__":
    main()
