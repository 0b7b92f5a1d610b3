"""`fst eval RUN`: the four cells of a run's newest checkpoint."""

from __future__ import annotations

import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

from fst_fast import distributed
from fst_fast.commands.export import newest
from fst_fast.contracts import Context
from fst_fast.data.fingerprint import changes, fingerprint
from fst_fast.data.stages import make_stages, stage_at, stage_problems
from fst_fast.evaluate import evaluate
from fst_fast.policy.base_weights import open_base
from fst_fast.policy.trained import load
from fst_fast.rollout.models import SamplingModels
from fst_fast.rollout.sampler import Sampler
from fst_fast.run.environment import grow_segments
from fst_fast.state import State
from fst_fast.tasks.registry import load_task, task_spec


def evaluate_run(
    run_dir: Path,
    *,
    problems: int | None = None,
    samples: int | None = None,
    split: str = "validation",
    model: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """The four cells of a run's newest checkpoint, measured afresh on this process. None: as the run's config says. split: of the task of the
    last stage begun. model, revision: where the base model is now, if it was moved. Warns where the data have changed since the checkpoint. Raises UserError
    where the split has no problems."""
    config, found = newest(run_dir)
    if samples is not None:
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"samples": samples})})
    state = State.load(found / "state.json")
    if model is not None or revision is not None:
        at = {"path": model or config.model.path, "revision": revision}
        config = config.model_copy(update={"model": config.model.model_copy(update=at)})
    grow_segments()
    distributed.init()
    config, _ = open_base(config, run_dir=run_dir, expected=state.base_weights)
    date = datetime.fromisoformat(state.date) if state.date else None
    with Sampler.open(config, saved=found / "model", date=date) as sampler:
        base = load(config)
        policy = base if config.method == "gepa" else load(config, found / "model")
        own = sampler.engine(base)
        served = sampler.server(base)
        task = load_task(*task_spec(config))
        stages = make_stages(config, task)
        changed = changes(state.data, fingerprint(stages)) if state.data is not None else []
        if changed:
            warnings.warn(f"since the checkpoint was written, {'; '.join(changed)}", stacklevel=2)
        stage = stage_at(stages, state.step)
        seed_context = Context.of(config.fast.seed_context)
        chosen = stage_problems(config, task, stage, split)[: problems or config.eval.final_problems]
        sampler.open_hosts(base, (seed_context, chosen[0]), lambda line: warnings.warn(line, stacklevel=2))
        trains = config.method != "gepa"
        return evaluate(
            config,
            sampler,
            SamplingModels(
                trained=sampler.vllm(policy, base=not trains) or sampler.engine(policy),
                base=sampler.vllm(base, base=True) or served or own,
                fast=served or own,
                trained_module=policy,
                base_module=base,
            ),
            chosen,
            seed_context=seed_context,
            population=state.fast.evaluated(state.population),
            policy_version=0 if config.method == "gepa" else state.step,
        )
