"""The schema of metrics.jsonl: every kind of record, every field, and which may be null because there may be nothing to measure.

The writer is held to it by tests/fst_fast/test_metrics_schema.py; readers may rely on it. A field that is added raises nothing and VERSION stays; a field that goes,
changes its meaning or its type raises VERSION. The version of a run is in its fst-run.json (`metrics`), so that metrics.jsonl itself holds
nothing but the run. `json_schema()` is the same as a JSON schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

VERSION = 1

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class CounterFields(Record):
    """Cumulative counts of the run, evaluation left out."""

    rollouts: Count
    fast_rollouts: Count
    reused_rollouts: Count
    tokens_computed: Count
    tokens_unshared: Count
    skipped_steps: Count


class Cell(Record):
    """One combination of weights and context. n: problems judged; without one mean and pass_at_k are null, with fewer than two the stderr."""

    mean: Share | None
    stderr: Annotated[float, Field(ge=0)] | None
    pass_at_k: Share | None
    n: Count
    k: Annotated[int, Field(ge=1)]


class Channels(Record):
    """The cells that were measured."""

    neither: Cell | None = None
    context: Cell | None = None
    weights: Cell | None = None
    both: Cell | None = None


class Measured(Record):
    """What an evaluation measures. KL to the base model in nats per token; null where its cell was not asked for or nothing was sampled."""

    channels: Channels
    k: Annotated[int, Field(ge=1)]
    kl_seed: float | None
    kl_evolved: float | None


class Trouble(Record):
    """A trouble of the run (run/troubles.py): what was measured, its limit, and for how many records in a row, this one included."""

    value: float
    limit: float
    count: Annotated[int, Field(ge=1)]


class Start(Record):
    """The first record of a run. revision: the commit of a model of the Hub."""

    kind: Literal["start"]
    method: Literal["fst", "rl", "gepa"]
    seed: Count
    task: str
    model: str
    revision: str | None = None
    config_hash: str
    versions: dict[str, str]


class Step(CounterFields):
    """After an optimiser step, or one that was left out.

    reward, reward_std: null where no rollout could be judged. troubles: absent where there is none. shaped_reward: the mean that the advantages are made of; null where those are the
    verdicts' rewards. loss to mismatch_cut and grad_norm: null where nothing was trained (no group kept, or the step left out for NaN or Inf); kl,
    the three fractions of clipped, and the two of slow.mismatch also where the objective has none. distilled: a step of distillation, whose kl is
    the one to the teacher. turns, observed_tokens (means of an episode) and
    finishes (episodes by how they ended): with an environment only.
    With rollout.ahead: rollout_staleness, optimiser steps between the weights that sampled a rollout and those that the step starts from, mean over the rollouts,
    reused ones included; null without any.
    With rollout.backend=vllm: probe_mismatch, mean difference of log-probs between server and trainer after the last transfer of weights, nats per
    token; server_restarts since the run was started. Fields with a default came later than version 1 and are always written."""

    kind: Literal["step"]
    step: Count
    cycle: Count
    reward: Share | None
    reward_std: Share | None
    shaped_reward: float | None = None
    groups: Count
    groups_kept: Count
    refill_rounds: Count = 0
    refill_groups: Count = 0
    grad_norm: Annotated[float, Field(ge=0)] | None
    lr: Annotated[float, Field(ge=0)]
    loss: float | None
    kl: float | None
    entropy: float | None
    ratio_mean: Annotated[float, Field(ge=0)] | None
    clipped_fraction: Share | None
    clipped_low_fraction: Share | None = None
    clipped_high_fraction: Share | None = None
    mismatch_kl: float | None
    mismatch_weight: Annotated[float, Field(ge=0)] | None = None
    mismatch_cut: Share | None = None
    rollout_staleness: Annotated[float, Field(ge=0)] | None = None
    distilled: Literal[True] | None = None
    probe_mismatch: Annotated[float, Field(ge=0)] | None = None
    server_restarts: Count | None = None
    response_tokens: Annotated[float, Field(ge=0)] | None
    length_stopped: Share | None
    unjudged: Count
    verify_timeouts: Count
    verify_failures: Count
    verdict_metrics: dict[str, float]
    turns: Annotated[float, Field(ge=0)] | None = None
    observed_tokens: Annotated[float, Field(ge=0)] | None = None
    finishes: dict[str, Count] | None = None
    grad_norm_spike: Annotated[float, Field(ge=1)] | None
    troubles: dict[str, Trouble] | None = None


class Scored(Record):
    """A context as a cycle scored it; mean: null where no rollout under it was judged, or none taken."""

    id: str
    text: str
    parent: str | None
    born: Count
    mean: Share | None
    n: Count


class FailureShown(Record):
    """A failure that the reflector was shown."""

    problem_id: str
    feedback: str


class Born(Scored):
    """A context that was proposed and scored in this cycle."""

    admitted: bool
    failures: list[FailureShown]
    reflection: str


class Cycle(Record):
    """After a fast phase. best_mean, seed_mean: null where nothing was judged, or the seed is no longer in the population. reflection_usd: what
    the reflector's replies cost, as its prices say."""

    kind: Literal["cycle"]
    cycle: Count
    step: Count
    population: list[Scored]
    proposed: Count
    admitted: Count
    refused: dict[str, Count]
    fast_rollouts: Count
    reflection_prompt_tokens: Count
    reflection_completion_tokens: Count
    reflection_usd: Annotated[float, Field(ge=0)] = 0.0
    unjudged: Count
    best_mean: Share | None
    seed_mean: Share | None
    waves: Count
    anchor_problems: Count
    samples: Count
    contexts: list[Born]
    troubles: dict[str, Trouble] | None = None


class Eval(CounterFields, Measured):
    """After an evaluation. stage, task: in a run of several."""

    kind: Literal["eval"]
    step: Count
    final: bool
    stage: Count | None = None
    task: str | None = None


class StageEnd(Measured):
    """At the end of a stage, one for each stage so far. after_stage: the one that ended; stage: the one measured."""

    kind: Literal["stage"]
    step: Count
    after_stage: Count
    stage: Count
    task: str


class ConfigChange(Record):
    """A run was continued and something was not as before: configuration, data, number of processes, versions."""

    kind: Literal["config"]
    step: Count
    changes: Annotated[list[str], Field(min_length=1)]
    config_hash: str


class End(Record):
    """The last record of a run that came to its last step."""

    kind: Literal["end"]
    step: Count


AnyRecord = Annotated[
    Start | Step | Cycle | Eval | StageEnd | ConfigChange | End, Field(discriminator="kind")
]
_ADAPTER: TypeAdapter[Any] = TypeAdapter(AnyRecord)


def check_record(record: Any) -> Any:
    """The record as its model. Raises pydantic.ValidationError, which names the field."""
    return _ADAPTER.validate_python(record)


def json_schema() -> dict[str, Any]:
    """The JSON schema of one line of metrics.jsonl."""
    return {"$id": f"fst-fast/metrics/{VERSION}", **_ADAPTER.json_schema()}
