"""Build a run from its configuration, or resume it from its newest whole checkpoint.

Bad input is refused before anything is written: the task and its gold answers first, then the models, then the run folder. All processes
build the same run; only rank 0 has a run folder, a metrics writer and a console that prints. Refusals are the same on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from torch import nn

from fst_fast import distributed, mini
from fst_fast.config import Config
from fst_fast.config.load import config_hash, dump
from fst_fast.contracts import Context, Problem
from fst_fast.data.fingerprint import Fingerprint, shared_fingerprint
from fst_fast.data.fingerprint import changes as data_changes
from fst_fast.data.stages import Stage, make_stages
from fst_fast.data.stream import minibatch
from fst_fast.errors import UserError
from fst_fast.fast.population import FastState
from fst_fast.fast.reflection import Reflector
from fst_fast.fast.shared_reflector import shared_reflector
from fst_fast.policy import lora, optimiser, trained
from fst_fast.policy.base_weights import open_base
from fst_fast.policy.trained import TrainedPolicy
from fst_fast.rollout.engine import RolloutEngine
from fst_fast.rollout.episodes import check_turns
from fst_fast.rollout.link import Link, Order, RankLink, ThreadLink
from fst_fast.rollout.models import SamplingModels
from fst_fast.rollout.prompt import read_template
from fst_fast.rollout.sampler import Sampler
from fst_fast.rollout.template import missing_messages, turn_end
from fst_fast.run import checkpoint
from fst_fast.run.callbacks import Callback, Callbacks, CheckpointWritten, RunEnd, RunStart
from fst_fast.run.console import Console
from fst_fast.run.environment import grow_segments, wall_clock
from fst_fast.run.faults import arm, reach
from fst_fast.run.folder import RunFolder, changed_keys, check_config, check_folder, disk_errors, open_run
from fst_fast.run.identity import identity, versions, writer
from fst_fast.run.liveness import Liveness, describe_missing
from fst_fast.run.metrics import MetricsWriter
from fst_fast.run.randomness import seed_globals
from fst_fast.run.recorder import SUMMARY, Recorder, last_grad_norms, read_summary
from fst_fast.run.track import check_trackers
from fst_fast.run.troubles import read_back
from fst_fast.slow.rewards import load_shaping
from fst_fast.state import State
from fst_fast.tasks.registry import load_task, task_spec
from fst_fast.verify.gold import check_gold
from fst_kernels.backends import choose_backend

TEACHER = "teacher"  # folder in a checkpoint that was written during distillation
REFERENCE = "reference"  # with slow.reference.every: folder in a checkpoint after the first refresh


@dataclass
class Run:
    """The parts of an open run. The trainer hands each phase the parts that it needs."""

    config: Config
    run_dir: Path
    state: State
    stages: list[Stage]
    seed_context: Context
    sampler: Sampler
    models: SamplingModels
    policy: TrainedPolicy | None  # None for method=gepa: the weights do not move
    reference: nn.Module  # the base model, frozen
    reflect: Reflector
    recorder: Recorder
    teacher: nn.Module | None = None  # frozen weights, while contexts are distilled
    link: Link | None = None  # rollout.ahead: between those who sample and those who train
    sampling_models: SamplingModels | None = None  # of a thread that samples while this process trains
    refreshed: nn.Module | None = (
        None  # what the KL penalty compares with, once it is not the base model (slow.reference.every)
    )
    folder: RunFolder | None = None  # on rank 0
    resumed: bool = False  # from a checkpoint

    @property
    def policy_version(self) -> int:
        """Optimiser steps behind the weights that sample."""
        return 0 if self.config.method == "gepa" else self.state.step

    def save_checkpoint(self) -> None:
        """Write the whole run; on disk it is there whole or not at all. All processes call it."""
        step = self.state.step
        self.recorder.begin("checkpoint", step)
        tmp = Path(distributed.broadcast_result(lambda: str(checkpoint.begin(self.run_dir, step))))
        failure = f"the checkpoint of step {step} cannot be written to {tmp}"
        with disk_errors(failure):
            if self.policy is not None:
                with distributed.part():
                    self.policy.save(tmp)
        reach("save.engine")
        distributed.barrier()

        def write() -> str:
            with disk_errors(failure):
                self.state.save(tmp / "state.json")
                reach("save.state")
                if self.teacher is not None:
                    self.teacher.save_pretrained(tmp / TEACHER)  # type: ignore[operator]
                if self.refreshed is not None:
                    self.refreshed.save_pretrained(tmp / REFERENCE)  # type: ignore[operator]
                # The weights once more, whole and as safetensors: for `fst export` and `fst eval`, under any ZeRO stage.
                lora.save(self.models.trained_module, tmp)
                self.sampler.save_text(tmp / "model")
                reach("save.model")
            keep = self.config.checkpoint
            final = checkpoint.commit(
                self.run_dir,
                tmp,
                step,
                keep_last=keep.keep_last,
                keep_every=keep.keep_every,
                written_by=writer(self.config),
            )
            return str(final)

        path = Path(distributed.broadcast_result(write))
        self.recorder.callbacks.send(CheckpointWritten, step=step, path=path)

    def distillation_teacher(self) -> nn.Module:
        """The frozen weights that are distilled from: a copy of the policy, made at the first call. All processes call it."""
        if self.teacher is None:
            self.teacher = trained.load(self.config)
            self.teacher.load_state_dict(lora.merged_state_dict(self.models.trained_module))
        return self.teacher

    def kl_reference(self) -> nn.Module:
        """What the KL penalty of the next step compares the policy with; refreshed here where slow.reference.every says so. All processes call it
        before every step."""
        every, step = self.config.slow.reference.every, self.state.step
        if every and step and step % every == 0:
            if self.refreshed is None:
                self.refreshed = trained.load(self.config)
            self.refreshed.load_state_dict(lora.merged_state_dict(self.models.trained_module))
        return self.reference if self.refreshed is None else self.refreshed

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sampler.close()
        self.recorder.close()
        if self.folder:
            self.folder.close()
        if isinstance(error, FloatingPointError):
            where = (
                f"after step {self.state.step}"
                if self.policy_version
                else f"model.path={self.config.model.path}"
            )
            cure = "continue with --resume; if it recurs, the checkpoint is affected too: resume from an earlier one"
            raise UserError(
                f"{where}: {error}; these weights are not usable"
                + (f": {cure}" if self.policy_version else "")
            ) from error
        if distributed.is_lost_peer(error):
            who = describe_missing(self.run_dir, rank=distributed.rank(), world=distributed.world_size())
            raise UserError(
                f"{who}; this one stops. Start all of them again with --resume; a wait is limited by run.timeout_s "
                f"({self.config.run.timeout_s:g} s)"
            ) from error
        self.recorder.liveness.close()


def build_run(
    config: Config,
    run_dir: Path,
    *,
    resume: bool,
    allow_config_change: bool = False,
    allow_data_change: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Run | dict[str, Any]:
    """Build the run, or continue it from its newest whole checkpoint; the summary where the run has ended and nothing has changed since.
    Raises UserError on bad input, the same on every process."""
    arm(distributed.rank())
    seed_globals(config.seed, "opening", distributed.rank())
    if config.slow.reward_shaping is not None:
        load_shaping(config.slow.reward_shaping)
    args = config.rollout.backend_args if config.rollout.backend == "vllm" else {}
    grow_segments(shares_memory=args.get("transfer") == "ipc")
    distributed.init(config.run.timeout_s, samplers=config.rollout.sampler_ranks)
    is_main = distributed.rank() == 0
    watchers = Callbacks(callbacks, run_dir, is_main=is_main)
    console = Console(total_steps=config.slow.steps, enabled=is_main)
    distributed.on_rank_zero(lambda: check_folder(run_dir, resume=resume))
    task = load_task(*task_spec(config))
    found = _newest_checkpoint(run_dir) if resume else None
    began = distributed.broadcast(wall_clock().isoformat(timespec="seconds"))
    state = State.load(found / "state.json") if found else None
    if state and state.date:
        began = state.date
    config, base_weights = open_base(
        config, console.note, run_dir=run_dir if state else None, expected=state.base_weights if state else ""
    )
    moved = ("model.path", "model.revision") if state and state.base_weights else ()
    kept: dict[str, Any] = {
        "config_yaml": dump(config), "config_hash": config_hash(config), "defaults": Config().model_dump(mode="json"), "moved": moved,
    }  # fmt: skip
    if resume:  # before anything large is loaded
        distributed.on_rank_zero(lambda: check_config(run_dir, allow_change=allow_config_change, **kept))
        if state and (summary := _summary_of_ended(config, run_dir, state, task)):
            console.note(f"the run in {run_dir} has ended; --slow.steps=N --allow-config-change adds steps")
            console.final_table(summary["channels"])
            watchers.send(RunStart, step=state.step, config=config.model_dump(mode="json"), resumed=True)
            watchers.send(RunEnd, step=state.step, summary=summary)
            return summary
    check_kernels(config)
    sampler = Sampler.open(
        config, console.note, saved=found / "model" if found else None, date=datetime.fromisoformat(began)
    )
    folder: RunFolder | None = None
    try:
        for line in (sampler.template.line, *sampler.template.warnings):
            console.note(line)
        if found and config.model.chat_template:
            _compare_template(config.model.chat_template, sampler.tokenizer, console)
        check_gold(task, sampler.pool)
        for line in getattr(task, "notes", ()):
            console.note(line)
        reference = trained.load(config)
        lora.check(reference, config)
        base = sampler.engine(reference, console.note)
        server = sampler.server(reference, console.note)
        if server and config.method == "fst" and config.fast.reuse_rollouts:
            distributed.on_rank_zero(lambda: server.check_training(config.rollout.temperature))
        reflect = shared_reflector(config, base, sampler.prompts.chat)
        end = turn_end(sampler.prompts.chat)
        if end is not None and end not in base.eos_ids:
            console.note(
                f"warning: the chat template closes an assistant's turn with {sampler.prompts.chat.special.words[end]!r}, which does not end a "
                "response: neither the tokenizer's eos token nor the generation config names it"
            )
        check_trackers(config.track)
        seed_context = Context.of(config.fast.seed_context)
        if config.method != "rl" and config.fast.reflector == "mini" and not mini.speaks(sampler.tokenizer):
            console.note(
                f"warning: fast.reflector=mini writes sentences of the mini world only, and {config.model.path} is not its model; self or openai write others"
            )
        stages = make_stages(config, task)
        for stage in stages:
            console.note(f"{len(stage.train):,} training and {len(stage.validation):,} validation problems")
            first = minibatch(stage.train, 0, config.slow.problems_per_step, config.seed)
            evaluated = stage.validation[: config.eval.final_problems]
            check_lengths(config, base, sampler, seed_context, [*first, *evaluated])
            check_messages(sampler, first[0], console.note)
            if sampler.pool.has_turns:
                check_turns(sampler, seed_context, first[0], console.note)
        if config.method != "gepa":
            optimiser.check(config, trained.deepspeed_config(config))
        data = shared_fingerprint(stages)
        sampler.open_hosts(reference, (seed_context, stages[0].train[0]), console.note)
        folder = distributed.on_rank_zero(
            lambda: open_run(
                run_dir,
                resume=resume,
                allow_config_change=allow_config_change,
                **kept,
            )
        )
        if sampler.hosts:
            sampler.hosts.enter(run_dir)
        liveness = Liveness(run_dir, distributed.rank())
        link = _open_link(config, reference) if config.rollout.ahead else None
        policy, module, moves = None, reference, config.method != "gepa"
        if link is not None and link.samples:
            assert link.copy is not None
            module = link.copy
        elif moves:
            with distributed.part():
                policy = TrainedPolicy(config, reference)
            module = policy.rollout_model
        engine = sampler.engine(module, console.note)
        run = Run(
            config=config,
            run_dir=run_dir,
            state=state or State(FastState.initial(config.fast.seed_context), [seed_context]),
            stages=stages,
            seed_context=seed_context,
            sampler=sampler,
            models=SamplingModels(
                trained=sampler.vllm(module, base=not moves) or engine,
                base=sampler.vllm(reference, base=True) or server or base,
                fast=sampler.vllm(module, base=not moves) or server or engine,
                trained_module=module,
                base_module=reference,
            ),
            policy=policy,
            reference=reference,
            reflect=reflect,
            recorder=Recorder(
                run_dir=run_dir,
                seed=config.seed,
                rollouts_per_step=config.track.rollouts_per_step,
                max_grad_norm=config.slow.max_grad_norm,
                console=console,
                callbacks=watchers,
                stopwatch=sampler.stopwatch,
                liveness=liveness,
                limits={"mismatch_high": config.slow.mismatch_warning},
            ),
            folder=folder,
        )
        run.link = link
        if isinstance(link, ThreadLink) and link.copy is not None:
            served = sampler.vllm(link.copy, base=False)
            assert served is not None
            run.sampling_models = SamplingModels(served, served, served, link.copy, reference)
        run.state.date, run.state.base_weights = began, base_weights
        _start_or_resume(run, found, data, allow_data_change)
        sampler.lengths = run.state.lengths
    except BaseException:
        sampler.close()
        console.close()
        if folder:
            folder.close()  # a program that catches the refusal may try again
        raise
    return run


def _summary_of_ended(config: Config, run_dir: Path, state: State, task: Any) -> dict[str, Any] | None:
    """What summary.json holds; None where steps are left, or it is of another configuration or other data. All processes call it."""
    if state.step < config.slow.steps or state.data is None:
        return None
    summary: dict[str, Any] | None = distributed.broadcast_result(
        lambda: read_summary(run_dir, config_hash(config))
    )
    same = summary and not data_changes(state.data, shared_fingerprint(make_stages(config, task)))
    return summary if same else None


def _open_link(config: Config, reference: nn.Module) -> Link:
    """Between those who sample ahead and those who train; with a copy of the model where one is sampled from. All processes call it."""
    split = distributed.split()
    holds = split.samples if split else distributed.rank() == 0
    copy, names = trained.sampling_copy(config, reference) if holds else (None, [])
    if split is None:
        return ThreadLink(names, copy)
    return RankLink(split, distributed.all_gather(names)[-1], copy)


def _compare_template(file: str, tokenizer: Any, console: Console) -> None:
    """A resumed run keeps the template of its checkpoint; say so where the file is another now."""
    try:
        same = read_template(file) == tokenizer.chat_template
    except UserError:
        same = False
    if not same:
        console.note(
            f"model.chat_template={file} is gone or not what the run began with; it keeps the template of its checkpoint"
        )


def _newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint, the same on all processes. All processes call it."""
    found = distributed.broadcast_result(lambda: str(checkpoint.latest(run_dir) or ""))
    return Path(found) if found else None


def _start_or_resume(run: Run, found: Path | None, data: Fingerprint, allow_data_change: bool) -> None:
    """Load the weights of the checkpoint, where there is one, and open the metrics files."""
    config, state, recorder = run.config, run.state, run.recorder
    changes = list(run.folder.changes) if run.folder else []
    if found:
        run.resumed = True
        changes += _check_data(run, data, allow_data_change)
        before, now = checkpoint.written_by(found), writer(config)
        if before["config_hash"] != now["config_hash"]:
            state.base_rewards.clear()  # measured under the old configuration
        # Report changed keys where known; the hash alone only if the run was killed after the change was saved.
        changes += [d for d in changed_keys(before, now) if not (changes and d.startswith("config_hash "))]
        _load_weights(run, found)
    if run.link is not None:
        if run.policy is not None:
            run.link.send(run.policy.rollout_model, Order(state.step, pause=True))
        if run.link.copy is not None:
            run.link.receive()
    elif state.ahead:
        recorder.note(
            f"rollout.ahead is 0 now: what was sampled for {len(state.ahead)} steps is sampled anew"
        )
        state.ahead = []
    state.data = data
    if run.folder:
        run.folder.accept()
        recorder.metrics = MetricsWriter(
            run.run_dir, resume_at_step=state.step if found else None, track=config.track, note=recorder.note
        )
        (run.run_dir / SUMMARY).unlink(missing_ok=True)  # the run goes on
        recorder.stopwatch.before = recorder.metrics.last_seconds
        if changes:
            recorder.note(f"changed since the run was last started: {'; '.join(changes)}")
        if found and changes:
            recorder.metrics.write(
                "config", step=state.step, changes=changes, config_hash=config_hash(config)
            )
        if not found:
            recorder.metrics.write("start", **identity(config), versions=versions())
    if found:
        past = distributed.broadcast_result(lambda: (last_grad_norms(run.run_dir), read_back(run.run_dir)))
        recorder.grad_norms, recorder.recent = past


def _check_data(run: Run, now: Fingerprint, allowed: bool) -> list[str]:
    """What of the task's data is not as the checkpoint knows it. Raises UserError unless that is allowed; then drops what was measured on it."""
    if run.state.data is None:
        run.recorder.note(
            "the checkpoint is of a version that kept no fingerprint of the data: whether they have changed since is not known"
        )
        return []
    found = data_changes(run.state.data, now)
    if found and not allowed:
        raise UserError(
            f"--resume: the data of the task are not those of the run in {run.run_dir}: {'; '.join(found)}; "
            "--allow-data-change continues with the new ones"
        )
    if found:
        run.state.forget_data()
    return found


def _load_weights(run: Run, found: Path) -> None:
    if run.policy is not None:
        try:
            with distributed.part():
                run.policy.load(found)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            # Only where a manifest from elsewhere vouches for damaged files.
            raise UserError(
                f"--resume: {found} does not hold the optimiser's state: {type(error).__name__}: {error}"
            ) from error
        with distributed.part():
            run.policy.hand_over()
    if (found / TEACHER).is_dir():
        run.teacher = trained.load(run.config, found / TEACHER)
    if run.config.slow.reference.every and (found / REFERENCE).is_dir():
        run.refreshed = trained.load(run.config, found / REFERENCE)


def check_kernels(config: Config) -> None:
    """Refuse a kernel path forced by FST_KERNELS that this machine cannot take."""
    operations = ["linear_logprob", "linear_policy_loss", "sample_tokens"]
    for operation in operations + (["tree_attention"] if config.policy.attention == "tree" else []):
        try:
            choose_backend(operation, None, distributed.device(), trained.dtype_of(config))
        except (RuntimeError, ValueError) as error:
            raise UserError(str(error)) from error


def check_lengths(
    config: Config, base: RolloutEngine, sampler: Sampler, seed_context: Context, problems: Sequence[Problem]
) -> None:
    """Refuse lengths that cannot work: beyond the model's positions, beyond the memory for keys and values, or prompts that are too long
    under the seed context."""
    positions = getattr(base.model.config, "max_position_embeddings", None)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if positions is not None and longest > positions:
        raise UserError(
            f"rollout.max_prompt_tokens={config.rollout.max_prompt_tokens} + rollout.max_response_tokens="
            f"{config.rollout.max_response_tokens} are {longest} tokens; the model has {positions} positions"
        )
    room, each = config.rollout.kv_memory_bytes, base.token_bytes()
    if room is not None and config.policy.packing == "forest" and longest * each > room:
        raise UserError(
            f"keys and values of the longest sequence, {longest} tokens (rollout.max_prompt_tokens + rollout.max_response_tokens), take "
            f"{longest * each} bytes ({each} per token); rollout.kv_memory_bytes allows {room}"
        )
    sampler.prompts.openable(problems)  # all at once
    for problem in problems:
        sampler.prompts.ids(seed_context, problem)


def check_messages(sampler: Sampler, problem: Problem, note: Callable[[str], None]) -> None:
    """Say which messages of a problem the chat template leaves out of its prompt."""
    problem = replace(problem, messages=sampler.prompts.opening(problem).messages)
    for i in missing_messages(sampler.prompts.chat, problem):
        role = problem.messages[i]["role"]
        note(
            f"warning: the chat template leaves message {i} (role {role}) of problem {problem.id} out of the prompt"
        )
