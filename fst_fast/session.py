"""Everything a run holds while it trains: models, task, state, and the writing of what happened. The loop itself is trainer.py.

`Session.open` builds from the ground up and refuses bad input before anything is written: task and its gold answers first, then models,
then the run folder. All processes build the same session; only rank 0 has a run folder, metrics and a console that prints.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.config.load import config_hash, dump
from fst_fast.contracts import Context, Problem, Rollout, Sampled
from fst_fast.data.stages import Stage, make_stages, stage_at
from fst_fast.data.stream import minibatch
from fst_fast.errors import UserError
from fst_fast.evaluate import Models
from fst_fast.fast.population import FastState
from fst_fast.fast.reflection import Reflector
from fst_fast.policy import lora
from fst_fast.policy import trained as policy_engine
from fst_fast.policy.trained import NonFiniteError, Policy
from fst_fast.rollout.prompt import render_prompt
from fst_fast.rollout.sampler import Sampler, Triple
from fst_fast.run import checkpoint, recorder, signals
from fst_fast.run.console import Console
from fst_fast.run.faults import arm, reach
from fst_fast.run.folder import RunFolder, changed_keys, disk_errors, open_run, write_json
from fst_fast.run.identity import identity, versions, writer
from fst_fast.run.liveness import Presence, missing
from fst_fast.run.metrics import MetricsWriter
from fst_fast.run.randomness import seed_globals
from fst_fast.run.track import check_trackers
from fst_fast.startup import check_kernels, check_room, reflector
from fst_fast.state import State
from fst_fast.tasks.registry import load_task, task_spec
from fst_fast.verify.gold import check_gold

TEACHER = "teacher"  # in a checkpoint that was written while contexts were distilled


@dataclass
class Session:
    """One run, open. Fields marked [rank 0] are None elsewhere."""

    config: Config
    run_dir: Path
    stages: list[Stage]
    stage: Stage  # the one that the run is in
    seed_context: Context
    sampler: Sampler
    models: Models
    policy: Policy | None  # None for method=gepa: the weights stay
    reference: nn.Module
    reflect: Reflector
    count_tokens: Callable[[str], int]
    state: State
    console: Console
    folder: RunFolder | None = None  # [rank 0]
    metrics: MetricsWriter | None = None  # [rank 0]
    presence: Presence | None = None  # with several processes
    teacher: nn.Module | None = None  # while contexts are distilled
    continued: bool = False  # whether it goes on from a checkpoint
    seconds_before: float = 0.0  # of the runs that this one resumes
    at_hand: dict[str, Problem] = field(default_factory=dict)  # the problems of this phase, by id
    opened: float = field(default_factory=time.perf_counter)
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counted: tuple[int, int] = (0, 0)
    stage_ends: list[dict[str, Any]] = field(
        default_factory=list
    )  # of the last stage's end: see trainer.measure_stages
    grad_norms: deque[float] = field(default_factory=lambda: deque(maxlen=recorder.SPIKE_STEPS))

    # -- opening and closing ----------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls, config: Config, run_dir: Path, *, resume: bool, allow_config_change: bool = False
    ) -> Session:
        """Build the run, or continue it from its newest whole checkpoint. Raises UserError on bad input, the same on every process."""
        arm(distributed.rank())
        seed_globals(config.seed, "opening", distributed.rank())
        check_kernels(config)
        distributed.init(config.run.timeout_s)
        console = Console(total_steps=config.slow.steps, enabled=distributed.rank() == 0)
        task = load_task(*task_spec(config))
        sampler = Sampler.open(config, console.note)
        try:
            check_gold(task, sampler.pool)
            reference = policy_engine.load(config)
            lora.check(reference, config)
            base = sampler.engine(reference, console.note)
            served = sampler.server(reference)
            if served and config.method == "fst" and config.fast.reuse_rollouts:
                distributed.on_rank_zero(lambda: served.check_training(config.rollout.temperature))
            reflect = reflector(config, base, sampler.tokenizer)
            check_trackers(config.track)
            seed_context = Context.of(config.fast.seed_context)
            stages = make_stages(config, task)
            for stage in stages:
                first = minibatch(stage.train, 0, config.slow.problems_per_step, config.seed)
                evaluated = stage.validation[: config.eval.final_problems]
                check_room(config, base, sampler, seed_context, [*first, *evaluated])
            folder = distributed.on_rank_zero(
                lambda: open_run(
                    run_dir,
                    resume=resume,
                    config_yaml=dump(config),
                    config_hash=config_hash(config),
                    allow_config_change=allow_config_change,
                    defaults=Config().model_dump(mode="json"),
                )
            )
            presence = Presence(run_dir, distributed.rank()) if distributed.world_size() > 1 else None
            policy = None if config.method == "gepa" else Policy(config, reference)
            module = reference if policy is None else policy.rollout_model
            own = sampler.engine(module, console.note)
            models = Models(own, served or base, served or own, module, reference)
            session = cls(
                config=config,
                run_dir=run_dir,
                stages=stages,
                stage=stages[0],
                seed_context=seed_context,
                sampler=sampler,
                models=models,
                policy=policy,
                reference=reference,
                reflect=reflect,
                count_tokens=lambda text: len(sampler.tokenizer(text, add_special_tokens=False)["input_ids"]),
                state=State(
                    fast=FastState.initial(config.fast.seed_context),
                    population=[seed_context],
                ),
                console=console,
                folder=folder,
                presence=presence,
            )
            session._begin(resume)
        except BaseException:
            sampler.close()
            console.close()
            raise
        return session

    def _begin(self, resume: bool) -> None:
        """Continue from the newest whole checkpoint, or, where a run was stopped before its first one, from the start."""
        found = (
            distributed.on_rank_zero_everywhere(lambda: str(checkpoint.latest(self.run_dir) or ""))
            if resume
            else ""
        )
        changes = list(self.folder.changes) if self.folder else []
        if found:
            self.continued = True
            self.state = State.load(Path(found) / "state.json")
            before, now = checkpoint.written_by(Path(found)), writer(self.config)
            if before["config_hash"] != now["config_hash"]:
                self.state.base_rewards.clear()  # measured as the old configuration said
            # The keys of the configuration say more than its hash; a run that was killed after they changed has only the hash left.
            changes += [
                d for d in changed_keys(before, now) if not (changes and d.startswith("config_hash "))
            ]
            if self.policy is not None:
                try:
                    self.policy.load(Path(found))
                except (
                    SafetensorError,
                    KeyError,
                    TypeError,
                    ValueError,
                ) as error:  # only where a manifest from elsewhere vouches for it
                    raise UserError(
                        f"--resume: {found} does not hold the optimiser's state: {type(error).__name__}: {error}"
                    ) from error
                self.policy.hand_over()
            if (Path(found) / TEACHER).is_dir():
                self.teacher = policy_engine.load(self.config, Path(found) / TEACHER)
        if self.folder:
            self.metrics = MetricsWriter(
                self.run_dir, resume_at_step=self.state.step if found else None, track=self.config.track
            )
            self.seconds_before = self.metrics.last_seconds
            self.grad_norms = recorder.grad_norms(self.run_dir)
            if changes:
                self.console.note(f"not as it was: {'; '.join(changes)}")
            if found and changes:
                self.metrics.write(
                    "config",
                    step=self.state.step,
                    changes=changes,
                    config_hash=config_hash(self.config),
                )
            if not found:
                self.metrics.write("start", **identity(self.config), versions=versions())

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sampler.close()
        self.console.close()
        if self.metrics:
            self.metrics.close()
        if self.folder:
            self.folder.close()
        if isinstance(error, FloatingPointError):
            raise UserError(
                f"step {self.state.step}: {error}; nothing can be sampled from these weights. Continue with --resume from the last "
                "checkpoint; if it happens again its weights have it too"
            ) from error
        if distributed.lost_one(error):
            who = missing(self.run_dir, rank=distributed.rank(), world=distributed.world_size())
            raise UserError(
                f"{who}; this one stops. Start all of them again with --resume; a wait is limited by run.timeout_s "
                f"({self.config.run.timeout_s:g} s)"
            ) from error
        if self.presence:
            self.presence.close()

    def checkpoint(self) -> None:
        """Write the whole run as it is now; on disk it is there whole or not at all. All processes call it."""
        self.begin("checkpoint")
        tmp = Path(
            distributed.on_rank_zero_everywhere(lambda: str(checkpoint.begin(self.run_dir, self.state.step)))
        )
        with disk_errors(f"the checkpoint of step {self.state.step} cannot be written to {tmp}"):
            if self.policy is not None:
                self.policy.save(tmp)
        reach("save.engine")
        distributed.barrier()

        def write() -> None:
            with disk_errors(f"the checkpoint of step {self.state.step} cannot be written to {tmp}"):
                self.state.save(tmp / "state.json")
                reach("save.state")
                if self.teacher is not None:
                    self.teacher.save_pretrained(tmp / TEACHER)  # type: ignore[operator]
                # The weights once more, whole and as safetensors: for `fst export` and `fst eval`, under any ZeRO stage.
                lora.save(self.models.policy_module, tmp)
                reach("save.model")
            checkpoint.commit(
                self.run_dir,
                tmp,
                self.state.step,
                keep_last=self.config.checkpoint.keep_last,
                keep_every=self.config.checkpoint.keep_every,
                written_by=writer(self.config),
            )

        distributed.on_rank_zero_everywhere(write)

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the closing records; returns the summary."""
        peak = max(distributed.all_gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        summary = {
            **identity(self.config),
            "channels": result["channels"],
            "k": result["k"],
            "steps": 0 if self.config.method == "gepa" else self.state.step,
            **asdict(self.state.counters),
            "seconds": self.seconds(),
            "kl_seed": result["kl_seed"],
            "kl_evolved": result["kl_evolved"],
            "peak_memory_bytes": peak,
        }
        if self.config.stages:
            summary["stages"] = self.stage_ends
        if self.metrics and self.folder:
            self.metrics.write("end", step=self.state.step)
            reach("summary")
            write_json(self.run_dir / "summary.json", summary)
        self.console.final_table(result["channels"])
        return summary

    # -- stages and the teacher --------------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Be in the stage that the next step belongs to. What was distilled is in the weights: contexts begin anew in the next stage."""
        stage = stage_at(self.stages, self.state.step)
        if self.teacher is not None and not stage.distils(self.state.step):
            self.teacher = None
            self.state.fast = self.state.fast.anew()
            self.state.population = [self.seed_context]
        if stage.number != self.stage.number:
            self.state.fast = replace(
                self.state.fast, idle=0, rest=0
            )  # what is known of contexts was known of another task
            self.console.note(
                f"stage {stage.number + 1} of {len(self.stages)}: {stage.task}, steps {stage.first + 1} to {stage.end}"
            )
        self.stage = stage

    def teach(self) -> nn.Module:
        """The frozen weights that are distilled from: as they were when distillation began. All processes call it."""
        if self.teacher is None:
            self.teacher = policy_engine.load(self.config)
            self.teacher.load_state_dict(lora.plain_state(self.models.policy_module))
        return self.teacher

    # -- what the loop asks ------------------------------------------------------------------------------------------------------

    @property
    def step_of_stage(self) -> int:
        """Steps done of the stage that the run is in: the cursor in its data."""
        return self.state.step - self.stage.first

    @property
    def policy_version(self) -> int:
        """Optimiser steps behind the weights that sample."""
        return 0 if self.policy is None else self.state.step

    def stopping(self) -> bool:
        """Whether a signal has told any process of the run to stop."""
        return any(distributed.all_gather(signals.asked()))

    def due(self, every: int) -> bool:
        """Whether a thing done every `every` steps is due now. gepa moves a whole cycle at a time and is then due if it passed one."""
        if not every:
            return False
        stride = self.config.fast.cycle_steps if self.config.method == "gepa" else 1
        return self.state.step // every > (self.state.step - stride) // every

    def reusable(self, sampled: Sequence[Sampled]) -> list[Sampled]:
        """Those of a fast phase's rollouts that RL groups of the cycle may claim: judged, under a context that was kept."""
        if not self.config.fast.reuse_rollouts or self.config.method != "fst":
            return []
        kept = {c.id for c in self.state.population}
        return [s for s in sampled if s.verdict.reward is not None and s.rollout.context_id in kept]

    def claim(self, plan: Sequence[Triple]) -> list[Sampled | None]:
        """For each planned sample a fast-phase rollout of the same context and problem, or None. What is claimed is gone."""
        claims: list[Sampled | None] = []
        for context, problem, _ in plan:
            wanted = (context.id, problem.id)
            at = (
                i
                for i, s in enumerate(self.state.reusable)
                if (s.rollout.context_id, s.rollout.problem_id) == wanted
            )
            found = next(at, None)
            claims.append(None if found is None else self.state.reusable.pop(found))
        return claims

    def prompt_of(self, rollout: Rollout) -> NDArray[np.int64]:
        """The prompt that a rollout of a problem at hand answered."""
        return self.sampler.prompts.ids(self.context(rollout.context_id), self.at_hand[rollout.problem_id])

    def fits(self, context: Context, problems: Sequence[Problem]) -> bool:
        """Whether the context leaves room for the longest of these problems and of the validation problems that will be evaluated."""
        evaluated = self.stage.validation[: max(self.config.eval.problems, self.config.eval.final_problems)]
        prompts = self.sampler.prompts
        longest = max([*problems, *evaluated], key=lambda p: len(prompts.ids(self.seed_context, p)))
        tokens = len(render_prompt(self.sampler.tokenizer, context, longest))
        return tokens <= self.config.rollout.max_prompt_tokens

    def non_finite(self, error: NonFiniteError, dumped: Path | None) -> None:
        """A step with NaN or Inf: the end of the run, or (on_nonfinite=skip) a step that is left out and counted. dumped: None for a step of
        distillation, whose batch is not dumped."""
        batch = (
            f"the batch is in {dumped}, which `fst replay` repeats; "
            if dumped
            else "a step of distillation is not dumped; "
        )
        if self.config.on_nonfinite == "stop":
            raise UserError(
                f"step {self.state.step}: {error}; the weights were not touched, on_nonfinite=stop. {batch[0].upper()}{batch[1:]}"
                "lower slow.lr or skip such batches, and continue with --resume --allow-config-change"
            ) from None
        assert self.policy is not None
        self.policy.discard()
        self.state.counters.skipped_steps += 1
        self.console.note(
            f"step {self.state.step} is left out: {error}" + (f"; the batch is in {dumped}" if dumped else "")
        )

    def warn_of_mismatch(self, mismatch_kl: float | None, reused: int) -> None:
        """Say so where fresh rollouts have other log-probs in the trainer than in the engine that sampled them. Reused ones may differ: the
        weights have moved since."""
        limit = self.config.slow.mismatch_warning
        if mismatch_kl is not None and not reused and mismatch_kl > limit:
            self.console.note(
                f"warning, step {self.state.step}: mismatch_kl={mismatch_kl:.3g} nats per token between rollout engine and trainer on rollouts of "
                f"these very weights; slow.mismatch_warning={limit:g}"
            )

    def forget_prefixes(self) -> None:
        """From here on nothing depends on what the rollout engines computed before: a run that is resumed here repeats itself bit by bit."""
        self.models.policy.forget()
        self.models.base.forget()
        self.models.fast.forget()

    def end_sampling(self) -> None:
        """Until the next hand-over nothing is sampled: the step may have the memory that rollouts took."""
        self.forget_prefixes()
        assert self.policy is not None
        self.policy.release()

    # -- time and tokens ---------------------------------------------------------------------------------------------------------

    def begin(self, phase: str) -> float:
        seed_globals(self.config.seed, phase, self.state.step, distributed.rank())
        self.console.phase(phase)
        if self.presence:
            self.presence.at(f"step {self.state.step}, {phase}")
        return time.perf_counter()

    def end(self, name: str, started: float) -> None:
        """Close a phase that is one kind of work as a whole: the waves inside it are not counted a second time."""
        self.add_seconds(name, time.perf_counter() - started)
        self.sampler.seconds.clear()

    def add_seconds(self, name: str, seconds: float) -> None:
        self.spent[name] += seconds

    def seconds(self) -> float:
        """Wall-clock seconds of the run, those of the runs it resumes included."""
        return self.seconds_before + time.perf_counter() - self.opened

    def count_rollout_tokens(self) -> None:
        """Add what the policy's and the base's engines computed since the last look to the counters."""
        computed, unshared = self._engine_tokens()
        new = distributed.total([computed - self.counted[0], unshared - self.counted[1]])
        self.counted = computed, unshared
        self.count_tokens_computed(int(new[0]), int(new[1]))

    def forget_rollout_tokens(self) -> None:
        """Leave out what was computed since the last look: an evaluation is no cost of the method."""
        self.counted = self._engine_tokens()

    def count_tokens_computed(self, computed: int, unshared: int) -> None:
        self.state.counters.tokens_computed += computed
        self.state.counters.tokens_unshared += unshared

    def _engine_tokens(self) -> tuple[int, int]:
        engines = {id(e): e for e in (self.models.policy, self.models.base, self.models.fast)}.values()
        return sum(e.tokens_computed for e in engines), sum(e.tokens_unshared for e in engines)

    def spent_since_last_record(self) -> dict[str, float]:
        """Seconds by kind of work on this process since the last record in timing.jsonl."""
        kinds = ("rollout_s", "verify_s", "train_s", "fast_s", "eval_s")
        out = {kind: self.spent.pop(kind, 0.0) + self.sampler.seconds.pop(kind, 0.0) for kind in kinds}
        return out

    # -- what a person reads -----------------------------------------------------------------------------------------------------

    def prompt_text(self, rollout: Rollout) -> str:
        """The prompt of a rollout as text, special tokens shown."""
        return str(self.sampler.tokenizer.decode(self.prompt_of(rollout)))

    def context(self, context_id: str) -> Context:
        """A context by its id, any that the run has ever seen."""
        return self.state.fast.contexts[context_id].context

    def write_contexts(self) -> None:
        """contexts.json: the population in order, and the lineage of every context so far. [rank 0]"""
        assert self.folder is not None
        write_json(
            self.run_dir / "contexts.json",
            {
                "population": [c.id for c in self.state.population],
                "contexts": {cid: lineage.to_json() for cid, lineage in self.state.fast.contexts.items()},
            },
        )
