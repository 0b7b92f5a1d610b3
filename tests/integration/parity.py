"""One curve under every engine setting: what the parity gate runs, and the command that writes its reference.

    python -m tests.integration.parity        writes tests/integration/data/parity.safetensors and parity.json

A run of the mini model (one process, ZeRO 0, forest) is recorded: the rollouts, advantages and log-probs of its 20 steps. Every setting then
trains on these same rollouts, from the same base, with the trainer's own step: what differs between two curves is the engine and nothing
else. Sampled anew, a token would fall differently sooner or later, and the curves part for a reason that is no error; runs that do sample are
compared in test_processes.py, at a learning rate at which that does not happen.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.integration.launch import one_thread

DATA = Path(__file__).parent / "data"
BATCHES, REFERENCE = DATA / "parity.safetensors", DATA / "parity.json"
STEPS = 20
RUN = [
    f"--slow.steps={STEPS}", "--slow.problems_per_step=4", "--slow.group_size=4", "--slow.lr=3e-4", "--slow.warmup_steps=4",
    "--slow.kl_coef=0.01", "--fast.population=2", "--fast.cycle_steps=10", "--fast.anchor_size=4", "--fast.children=2", "--fast.samples=1",
    "--fast.rollout_budget=24", "--fast.seed_context=first trace back from the goal . put the final answer in the box .",
    "--eval.every=0", "--eval.final_problems=1", "--eval.samples=1", "--eval.kl_problems=1", "--checkpoint.every=0",
    "--rollout.max_prompt_tokens=100", "--rollout.max_response_tokens=32",
]  # fmt: skip
CURVES = ("loss", "grad_norm")


@dataclass(frozen=True)
class Setting:
    """tokens: of a micro-batch; a step has one or, accumulated, as many as its sequences need."""

    processes: int
    stage: int
    offload: bool
    packing: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.processes}p-zero{self.stage}{'-offload' * self.offload}-{self.packing}-{self.tokens}"


TOKENS = (8192, 240, 140)  # forest: 1, about 2, about 4 micro-batches of a step on one process
SETTINGS = [
    Setting(n, stage, offload, packing, tokens)
    for n in (1, 2)
    for stage in range(4)
    for offload in (False, True)[: 1 + (stage > 0)]
    for packing in ("forest", "padded")
    for tokens in TOKENS
]
SOURCE = Setting(1, 0, False, "forest", 8192)


def curves(setting: Setting, *, lr_times: float = 1.0, weights_times: float = 1.0) -> dict[str, list[float]]:
    """Train on the recorded rollouts under `setting`, in one of its processes. The factors are errors to be found: of the learning rate, and of
    the tokens' weights, such as a wrong denominator makes."""
    from fst_fast import distributed
    from fst_fast.config import load as config_load
    from fst_fast.mini import default_config
    from fst_fast.policy import trained
    from fst_fast.policy.scoring import Batching
    from fst_fast.slow.slow_phase import objective_of
    from fst_fast.slow.update import Reference, optimise

    distributed.init()
    config = config_load.load(default_config(), [
        *RUN, f"--policy.zero_stage={setting.stage}", f"--policy.offload_optimizer={str(setting.offload).lower()}",
        f"--policy.packing={setting.packing}", f"--policy.attention={'tree' if setting.packing == 'forest' else 'sdpa'}",
        f"--slow.tokens_per_micro_batch={setting.tokens}", "--slow.lr", str(3e-4 * lr_times),
    ])  # fmt: skip
    reference, policy = trained.load(config), trained.TrainedPolicy(config)
    objective, batching = objective_of(config.slow), Batching.of(config, 0)
    recorded = load_file(BATCHES)
    found: dict[str, list[float]] = {curve: [] for curve in CURVES}
    for step in range(STEPS):
        data = share(recorded, step, distributed.rank(), distributed.world_size())
        data.weights[:] *= weights_times
        numbers = optimise(policy, Reference(reference), data, objective, batching, step=step)
        policy.hand_over()
        for curve in CURVES:
            found[curve].append(numbers[curve])
    policy.engine.destroy()
    return found


def share(recorded: dict[str, NDArray[Any]], step: int, rank: int, world: int) -> Any:
    """The sequences of a step that this process trains: whole groups, as the trainer deals them out."""
    from fst_fast.slow.nonfinite import arrays_to_sequences
    from fst_fast.slow.update import Sequences

    prefix = f"{step}/"
    arrays = {
        key.removeprefix(prefix): array.astype(np.int64) if array.dtype == np.int16 else array.copy()
        for key, array in recorded.items()
        if key.startswith(prefix)
    }
    group = arrays.pop("group")
    whole = arrays_to_sequences(arrays)
    mine = np.flatnonzero(group % world == rank)
    lengths = np.array([len(leaf.response_ids) for leaf in whole.leaves], np.int64)
    tokens = np.concatenate(
        [np.arange(whole.start[i], whole.start[i] + lengths[i]) for i in mine] or [np.zeros(0, np.int64)]
    )
    return Sequences(
        leaves=[whole.leaves[i] for i in mine], start=np.cumsum(lengths[mine]) - lengths[mine],
        advantages=whole.advantages[tokens], weights=whole.weights[tokens], behaviour=whole.behaviour[tokens],
    )  # fmt: skip


def record() -> dict[str, NDArray[Any]]:
    """The sequences of every step of a run, as flat arrays under `STEP/...`."""
    from fst_fast import trainer
    from fst_fast.config import load as config_load
    from fst_fast.mini import default_config
    from fst_fast.slow import slow_phase
    from fst_fast.slow.nonfinite import sequences_to_arrays

    sequences, kept = slow_phase.sequences, []

    def keeping(groups: Sequence[Any], *given: Any) -> Any:
        data = sequences(groups, *given)
        group = np.repeat(np.arange(len(groups)), [len(g.members) for g in groups])
        kept.append({**sequences_to_arrays(data), "group": group})
        return data

    slow_phase.sequences = keeping
    with tempfile.TemporaryDirectory() as folder:
        trainer.train(config_load.load(default_config(), RUN), Path(folder) / "run")
    assert len(kept) == STEPS
    return {
        f"{step}/{name}": narrow(array) for step, arrays in enumerate(kept) for name, array in arrays.items()
    }


def narrow(array: NDArray[Any]) -> NDArray[Any]:
    """Token ids and lengths of the mini world fit into 16 bits."""
    return array.astype(np.int16) if array.dtype.kind == "i" else array


def main() -> None:
    os.environ |= one_thread()
    from fst_fast.run.environment import prepare_environment

    prepare_environment()
    DATA.mkdir(exist_ok=True)
    save_file(record(), BATCHES)
    BATCHES.chmod(0o644)
    tree = {
        "setting": str(SOURCE),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "machine": cpu(),
        "curves": curves(SOURCE),
    }
    REFERENCE.write_text(json.dumps(tree, indent=1) + "\n")


def cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, one thread"


if __name__ == "__main__":
    main()
