"""A whole optimiser step, sampling included: this trainer versus TRL's GRPOTrainer (transformers.generate), on the CPU.

    python benchmarks/end_to_end.py [--steps 3] [--threads 1] [--out benchmarks/results/end_to_end.json]
    python benchmarks/end_to_end.py --model FOLDER --problems 4 --threads 2 --micros 4 8

Both sides use the same model in float32, by default the shipped one of 0.8M parameters; star graph problems of the mini world; K = 4 contexts of about 256
tokens in the system message; 16 problems x 4 contexts x 2 samples = 128 samples per step, at most 32 new tokens,
temperature 1; a KL penalty to the frozen base model; AdamW; and a reward that hashes the completion, so that rewards
differ within every group. They differ in the advantage group: TRL has one per prompt, we have one per problem over its
contexts, which costs nothing on either side. TRL runs with its best of several micro-batch sizes and without gradient
checkpointing. Each side runs in its own process; the time of a step is the mean over the steps after the first.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from benchmarks.rollout import surroundings
from fst_fast.config import Config
from fst_fast.contracts import Context, Problem, ScoredRollout, Verdict
from fst_fast.policy.base_model import model_folder
from fst_fast.rollout.prompt import Chat, load_tokenizer, messages_with_context
from fst_fast.tasks.registry import load_task

CONTEXTS, SAMPLES, NEW_TOKENS, CONTEXT_TOKENS = 4, 2, 32, 256
TASK = {"form": "mini", "arms": 5, "path": 4, "ids": 40}
KL_COEF, LR = 1e-3, 1e-4
SENTENCE = "start at the goal and go back to the start . put the final path in the box ."


def problems(steps: int, each: int) -> list[list[Problem]]:
    train = load_task("star_graph", TASK).problems("train")
    return [[train[step * each + i] for i in range(each)] for step in range(steps)]


def contexts() -> list[Context]:
    rng = np.random.default_rng(0)
    return [Context.of(" ".join(rng.choice(SENTENCE.split(), CONTEXT_TOKENS))) for _ in range(CONTEXTS)]


def reward(ids: Any) -> float:
    return float(hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=1).digest()[0] % 2)


def longest_prompt(tokenizer: Any, chosen: list[Problem]) -> int:
    return max(len(Chat.of(tokenizer).prompt(c, p)) for p in chosen for c in contexts())


def ours(model: str, steps: int, each: int) -> list[tuple[float, float, float]]:
    """(wall-clock, CPU, wall-clock of sampling) seconds of each step."""
    from fst_fast import distributed
    from fst_fast.policy import trained
    from fst_fast.policy.scoring import Batching
    from fst_fast.rollout.engine import Request
    from fst_fast.rollout.sampler import Sampler
    from fst_fast.slow.groups import make_groups
    from fst_fast.slow.slow_phase import objective_of
    from fst_fast.slow.update import Reference, optimise, sequences

    longest = longest_prompt(load_tokenizer(model), problems(1, each)[0])
    config = Config.model_validate(
        {
            "model": {"path": model},
            "task_args": TASK,
            "rollout": {"max_prompt_tokens": longest + 32, "max_response_tokens": NEW_TOKENS},
            "slow": {
                "lr": LR,
                "warmup_steps": 0,
                "group_size": CONTEXTS * SAMPLES,
                "kl": "k3",
                "kl_coef": KL_COEF,
            },
        }
    )
    distributed.init()
    out = []
    with Sampler.open(config) as sampler:
        policy, reference = trained.TrainedPolicy(config), trained.load(config)
        engine = sampler.engine(policy.rollout_model)
        prompts, batching = {}, Batching.of(config, sampler.pad_id)
        for step, chosen in enumerate(problems(steps, each)):
            clock = time.perf_counter(), time.process_time()
            requests = []
            for p in chosen:
                for c in contexts():
                    prompts[p.id, c.id] = sampler.prompts.ids(c, p)
                    requests += [
                        Request(p.id, c.id, j, prompts[p.id, c.id], hash((step, p.id, c.id, j)) % 2**62)
                        for j in range(SAMPLES)
                    ]
            rollouts = engine.generate(
                requests, max_response_tokens=NEW_TOKENS, temperature=1.0, policy_version=step
            )
            sampling = time.perf_counter() - clock[0]
            sampled = [ScoredRollout(r, Verdict(reward(r.response_ids)), "") for r in rollouts]
            groups = [g for g in make_groups(sampled, 1e-6) if g.advantages is not None]
            of = [[prompts[m.rollout.problem_id, m.rollout.context_id] for m in g.members] for g in groups]
            data = sequences(groups, of, "problem")
            optimise(policy, Reference(reference), data, objective_of(config.slow), batching, step=step)
            policy.hand_over()
            out.append((time.perf_counter() - clock[0], time.process_time() - clock[1], sampling))
    return out


def trl(model: str, steps: int, each: int, micro: int) -> list[tuple[float, float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, batch = load_tokenizer(model), CONTEXTS * each * SAMPLES
    rows = [
        {"prompt": messages_with_context(c, p)}
        for chosen in problems(steps, each)
        for p in chosen
        for c in contexts()
    ]
    seen: list[int] = []

    def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append(len(completion_ids))
        return [reward(ids) for ids in completion_ids]

    clock: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.append((time.perf_counter(), time.process_time()))

        on_train_end = on_step_begin

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_folder(model), dtype=torch.float32),
            reward_funcs=judge,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro,
                generation_batch_size=batch, num_generations=SAMPLES, max_completion_length=NEW_TOKENS, temperature=1.0, beta=KL_COEF,
                learning_rate=LR, lr_scheduler_type="constant", max_steps=steps, use_cpu=True, bf16=False, gradient_checkpointing=False,
                shuffle_dataset=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            ),
        )  # fmt: skip
        trainer.train()
    assert sum(seen) == steps * batch, f"TRL sampled {sum(seen)} for {steps} steps"
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(clock)]


def child(name: str, args: argparse.Namespace, steps: int, micro: int = 0) -> dict[str, Any]:
    options = {key: getattr(args, key) for key in ("model", "problems", "threads")}
    options |= {"side": name, "steps": steps, "micro": micro}
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="mini", help="folder, Hub id or .gguf file")
    parser.add_argument("--problems", type=int, default=16, help="of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--micros", type=int, nargs="+", default=[16, 32, 64], help="micro-batch sizes to try for TRL"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--micro", type=int, default=32, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/end_to_end.json"))
    args = parser.parse_args()
    if args.side:
        torch.set_num_threads(args.threads)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        steps: Any = (
            ours(args.model, args.steps, args.problems)
            if args.side == "ours"
            else trl(args.model, args.steps, args.problems, args.micro)
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        means = np.array(steps[1:]).mean(axis=0).tolist()
        names = ("seconds", "cpu_seconds", "sampling_seconds")  # TRL does not tell the last
        found = {**dict.fromkeys(names), **dict(zip(names, means, strict=False))}
        print(json.dumps({**found, "steps": steps, "peak_bytes": peak}))
        return

    several = len(args.micros) > 1
    tried = {micro: child("trl", args, 2, micro) for micro in args.micros} if several else {}
    best = min(tried, key=lambda m: tried[m]["cpu_seconds"]) if several else args.micros[0]
    sides = {"ours": child("ours", args, args.steps), "trl": child("trl", args, args.steps, best)}
    a, b, batch = sides["ours"], sides["trl"], CONTEXTS * args.problems * SAMPLES
    result = {
        "load": {"contexts": [CONTEXTS, CONTEXT_TOKENS], "problems": args.problems, "samples": SAMPLES, "new_tokens": NEW_TOKENS},
        "model": f"{Path(args.model).name}, float32",
        "sides": sides,
        "trl_micro_batch": best,
        "trl_by_micro_batch": tried,
        "samples_per_s": {name: batch / s["seconds"] for name, s in sides.items()},
        "speedup": b["seconds"] / a["seconds"],
        "speedup_cpu": b["cpu_seconds"] / a["cpu_seconds"],
        "threads": args.threads,
        **surroundings("trl"),
    }  # fmt: skip
    measure.write(args.out, result)
    for name, s in sides.items():
        print(
            f"{name:5s} {s['seconds']:7.2f} s {s['cpu_seconds']:7.2f} s CPU per step, {batch / s['seconds']:6.1f} samples/s"
            + (f", sampling {s['sampling_seconds']:.2f} s" if s["sampling_seconds"] else "")
        )
    print(
        f"{result['speedup']:.2f}x by wall clock, {result['speedup_cpu']:.2f}x by CPU seconds (TRL at micro-batch {best} of {args.micros}); {args.out}"
    )


if __name__ == "__main__":
    main()
