"""The whole configuration as one typed tree: every key, its default, what it means and what is allowed.

YAML gives the tree, dotted command-line arguments override it (`--slow.lr=1e-3`), pydantic refuses what is unknown or impossible with
the key's path. One unit for batch sizes: problems per step. Values not said here are derived and shown by `--dry-run`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    path: str = "mini"
    """Folder of a Hugging Face model, or `mini`: the base model shipped with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights during training."""
    trust_remote_code: bool = False
    """Whether code found in the model's folder may run."""
    chat_template: str | None = None
    """File with a chat template (Jinja) to use instead of the model's own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}; one that the template does not read is refused."""
    system: Literal["auto", "system", "user"] = "auto"
    """Where a context goes: the system message, or before the first user message. `auto`: the system message where the chat template takes one."""


class LoraConfig(Section):
    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(32, ge=1)
    """An adapter's product is multiplied by alpha / rank."""
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Names of the linear layers that have one."""


class PolicyConfig(Section):
    packing: Literal["forest", "padded"] = "forest"
    """`forest` computes every shared prefix once; `padded` is the plain path, for models that cannot be packed, and the oracle."""
    attention: Literal["tree", "sdpa", "flash_attention_2"] = "tree"
    """`tree` goes with packing=forest; the other two with packing=padded."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: what is partitioned over the processes (0 nothing, 1 optimiser, 2 + gradients, 3 + weights)."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in CPU memory."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    liger: bool = False
    """On a GPU: RMSNorm, SwiGLU and rotary embedding by Liger's kernels (extra `liger`), in every model of the run. Off until a GPU has shown what it gains."""
    lora: LoraConfig | None = None
    """Train low-rank adapters (peft) instead of all weights; the base's weights, in memory once, are the reference too. `{}` takes the defaults."""


class RolloutConfig(Section):
    max_prompt_tokens: int = Field(256, ge=1)
    """A prompt (context + problem) longer than this is refused, naming the problem and the context."""
    max_response_tokens: int = Field(64, ge=1)
    """Longer responses are cut (finish = length)."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of training rollouts; no top-p or top-k there, since truncation biases the importance ratio."""
    max_batch: int = Field(256, ge=1)
    """Sequences decoded at the same time on one process; finished ones leave and waiting ones enter."""
    kv_memory_bytes: int | None = Field(None, ge=1)
    """Keys and values of one process at a time, prompts and responses; fewer sequences run where they would not fit. null: half of the
    memory that is free (of the GPU; without one, of the machine, shared by its processes)."""
    cuda_graphs: bool = False
    """On a GPU: record decode steps as CUDA graphs. Off until a GPU has shown what it gains; without a GPU it does nothing."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a response, besides the eos token; the tokens that complete one are part of it."""
    backend: Literal["native", "openai"] = "native"
    """`openai`: a server (vLLM, SGLang) samples the fast phase and the base model's side of evaluations; the trained weights sample here.
    Its rollouts are trained on (fast.reuse_rollouts) only if it returns token ids and log-probs."""
    backend_args: dict[str, Any] = Field(default_factory=dict)
    """openai: model, base_url, timeout_s, retries, concurrency, processed_logprobs. The key comes from OPENAI_API_KEY only."""


class StageConfig(Section):
    task: str
    """As the key task."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """As the key task_args."""
    steps: int = Field(ge=1)
    """Steps of this stage, distillation included."""


class SlowConfig(Section):
    steps: int = Field(100, ge=0)
    """Optimiser steps of the whole run."""
    problems_per_step: int = Field(16, ge=1)
    """Problems of one step, over all processes."""
    group_size: int = Field(8, ge=2)
    """Rollouts of one problem (G), spread evenly over the population; one advantage group."""
    lr: float = Field(1e-6, gt=0, le=1)
    """AdamW learning rate after warm-up, constant."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient clipping by global norm; 0 = off."""
    objective: Literal["cispo", "grpo", "ppo", "reinforce"] = "cispo"
    """Policy-gradient loss; see fst_kernels.PolicyObjective."""
    ratio_cap: float = Field(4.0, ge=1)
    """cispo: absolute cap of the importance ratio (TRL, Liger). verl, open-instruct, NeMo and slime write 1 + eps: the paper's clip_high
    of 3.0 there is 4.0 here."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """grpo, ppo: the ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """grpo, ppo: the ratio is clipped above at 1 + clip_high."""
    kl: Literal["none", "k3", "reverse", "forward"] = "k3"
    """Penalty towards the base model: k3 on sampled tokens, exact KL(pi||ref) or exact KL(ref||pi) over the vocabulary."""
    kl_coef: float = Field(1e-3, ge=0)
    """Weight of the penalty."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    aggregation: Literal["problem", "token", "sequence"] = "problem"
    """Mean over tokens inside a problem then over problems (the paper); over all tokens; over tokens of a sequence then sequences."""
    advantage_group: Literal["problem", "context"] = "problem"
    """Whose rewards a rollout is compared with: all of its problem's, across contexts (the paper), or those under its own context."""
    advantage_eps: float = Field(1e-6, ge=0)
    """Added to the population standard deviation of a group's rewards."""
    tokens_per_micro_batch: int = Field(8192, ge=1)
    """Forest tokens (padded: tokens of the padded batch) of one forward/backward on one process."""
    head_chunk_rows: int = Field(1024, ge=1)
    """Rows of logits that exist at one time in the loss."""
    distill_steps: int = Field(0, ge=0)
    """Of the run's steps, or of each stage's, the last ones that are on-policy context distillation instead of RL: exact reverse KL from
    the weights under the seed context to the same weights, frozen, under the evolved contexts. The contexts then begin anew."""
    mismatch_warning: float = Field(1e-2, gt=0)
    """mismatch_kl, in nats per token, above which a step without reused rollouts is warned of: the rollout engine and the trainer then do
    not compute the same log-probs. Usual: below 1e-8 in float32, 1e-3 in bfloat16."""


class FastConfig(Section):
    population: int = Field(4, ge=1)
    """Contexts kept (K). slow.group_size must be a multiple of it."""
    cycle_steps: int = Field(6, ge=1)
    """Slow steps between two fast phases (T)."""
    anchor_size: int = Field(32, ge=1)
    """Problems of the lookahead on which contexts are compared."""
    rollout_budget: int = Field(960, ge=0)
    """Hard cap on the fast phase's rollouts per cycle, over all processes."""
    generations: int = Field(2, ge=1)
    """Proposal waves of a cycle, budget permitting."""
    first_generations: int = Field(4, ge=1)
    """Proposal waves of the first cycle."""
    children: int = Field(4, ge=1)
    """Edits proposed in one wave."""
    samples: int = Field(2, ge=1)
    """Rollouts of one context on one anchor problem in one wave."""
    failures_shown: int = Field(3, ge=1)
    """Failed rollouts shown to the reflector in one reflection."""
    admit_z: float = Field(1.0, ge=0)
    """A child enters the population's archive if its paired mean difference to its parent exceeds this many standard errors."""
    max_context_tokens: int = Field(64, ge=1)
    """Longer proposals are refused."""
    seed_context: str = "solve the problem ."
    """The text that the evolution starts from, and the context of method=rl."""
    reflector: str = "mini"
    """`mini` (rules, mini world only), `self` (the frozen base model), `openai` (any compatible endpoint), or `file.py:function`."""
    reflector_args: dict[str, Any] = Field(default_factory=dict)
    """openai: base_url, model, timeout_s, retries, concurrency, max_tokens, temperature. The key comes from the environment only."""
    reflection_tokens: int = Field(1024, ge=1)
    """reflector=self: the longest reply; a reply cut there is refused."""
    adaptive: bool = False
    """After a cycle that admitted no child, rest: carry the contexts over unscored for one cycle, after two such cycles in a row for two, then
    for three; a child admitted or another stage ends it. Never while the seed context is all there is."""
    reuse_rollouts: bool = True
    """RL groups claim the rollouts of their cycle's fast phase first, each once; the importance ratio uses their stored log-probs."""


class EvalConfig(Section):
    every: int = Field(20, ge=0)
    """Steps between two evaluations; 0 = only at the end."""
    problems: int = Field(64, ge=1)
    """Validation problems of a periodic evaluation."""
    final_problems: int = Field(128, ge=1)
    """Validation problems of the final evaluation."""
    samples: int = Field(4, ge=1)
    """Samples of each problem: k of mean@k and pass@k."""
    temperature: float = Field(0.6, gt=0)
    """Sampling temperature of the evaluation."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus of the evaluation."""
    cells: list[Literal["neither", "context", "weights", "both"]] = Field(
        ["neither", "context", "weights", "both"], min_length=1
    )
    """Cells of a periodic evaluation, and with `weights` and `both` the KL under their contexts; the final evaluation, and a stage's at its end, has all four."""
    kl_problems: int = Field(32, ge=1)
    """Validation problems on which KL(train||base) is measured (temperature 1)."""


class VerifyConfig(Section):
    workers: int = Field(1, ge=1)
    """Child processes that verify, per process."""
    timeout_s: float = Field(10.0, gt=0)
    """Wall-clock limit of one verification; past it the verdict has reward None."""
    memory_mib: int = Field(2048, ge=64)
    """Address-space limit of a verifying process."""
    isolation: Literal["available", "required"] = "available"
    """Of programs that a grader runs with run_code: what the system offers, or no run where a layer is missing (`fst doctor` lists them)."""


class CheckpointConfig(Section):
    every: int = Field(20, ge=0)
    """Steps between two checkpoints; 0 = only at the end. A checkpoint is also written at the end."""
    keep_last: int = Field(2, ge=2)
    """Newest checkpoints kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of steps that are a multiple of this are kept for good, a multiple of checkpoint.every; 0 = none."""


class RunConfig(Section):
    timeout_s: float = Field(1800.0, gt=0)
    """Longest wait of one process for another; past it the run stops and says which one is missing."""


class TrackConfig(Section):
    tensorboard: bool = False
    """Write TensorBoard events to RUN/tensorboard (extra `track`)."""
    wandb: str | None = None
    """Weights & Biases project (extra `track`)."""
    trackio: str | None = None
    """trackio project (extra `track`)."""
    rollouts_per_step: int = Field(2, ge=0)
    """Rollouts written to RUN/rollouts.jsonl for a person to read, per step."""


class Config(Section):
    method: Literal["fst", "rl", "gepa"] = "fst"
    """fst: both phases; rl: slow phase only, with the seed context; gepa: fast phase only, weights frozen."""
    seed: int = Field(0, ge=0)
    """Everything random derives from it."""
    task: str = "star_graph"
    """A built-in task, `my_task.py:MyTask`, or `data.jsonl` with task_args.verify = `grader.py:function`."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task."""
    stages: tuple[StageConfig, ...] = ()
    """Several tasks one after the other in one run, instead of `task`; weights, optimiser and contexts go on. slow.steps is their sum and need not
    be given."""
    model: ModelConfig = ModelConfig()
    policy: PolicyConfig = PolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    slow: SlowConfig = SlowConfig()
    fast: FastConfig = FastConfig()
    eval: EvalConfig = EvalConfig()
    verify: VerifyConfig = VerifyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()
    run: RunConfig = RunConfig()
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """NaN or Inf in a reward, log-prob, loss or gradient, never taken by the weights: `stop` ends the run, `skip` leaves the batch out and
    counts it (skipped_steps). The batch is written to RUN/dumps either way."""

    @model_validator(mode="after")
    def _stages(self) -> Config:
        total = sum(stage.steps for stage in self.stages)
        if self.stages and total != self.slow.steps:
            raise ValueError(
                f"slow.steps={self.slow.steps} is not the sum of the stages' steps, {total}; leave slow.steps out"
            )
        distil = self.slow.distill_steps
        if distil and self.method != "fst":
            raise ValueError(
                f"slow.distill_steps={distil} needs evolved contexts and weights that move: method=fst, not {self.method}"
            )
        shortest = min([stage.steps for stage in self.stages] or [self.slow.steps])
        if distil and distil >= shortest:
            raise ValueError(
                f"slow.distill_steps={distil} leaves no step for the rest of {'a stage' if self.stages else 'the run'} of {shortest} steps"
            )
        return self

    @model_validator(mode="after")
    def _arithmetic(self) -> Config:
        g, k = self.slow.group_size, self.fast.population
        if self.method != "rl" and g % k:
            raise ValueError(
                f"slow.group_size={g} is not a multiple of fast.population={k}; try {-(-g // k) * k}"
            )
        if self.method != "rl" and self.slow.advantage_group == "context" and g < 2 * k:
            raise ValueError(
                f"slow.advantage_group=context compares the {g // k} rollout of a problem under one context with nothing; slow.group_size "
                f"must be at least {2 * k} with fast.population={k}"
            )
        tree = self.policy.attention == "tree"
        if tree != (self.policy.packing == "forest"):
            raise ValueError(
                f"policy.attention={self.policy.attention} does not go with policy.packing={self.policy.packing}; "
                "tree goes with forest, sdpa and flash_attention_2 with padded"
            )
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        if self.policy.packing == "forest" and self.slow.tokens_per_micro_batch < longest:
            raise ValueError(
                f"slow.tokens_per_micro_batch={self.slow.tokens_per_micro_batch} does not hold the longest sequence, {longest} tokens "
                f"(rollout.max_prompt_tokens + rollout.max_response_tokens); at least {longest}"
            )
        if self.rollout.backend == "native" and self.rollout.backend_args:
            raise ValueError("rollout.backend_args is given, but rollout.backend=native takes none")
        if self.policy.offload_optimizer and self.policy.zero_stage == 0:
            raise ValueError("policy.offload_optimizer=true needs policy.zero_stage >= 1, which is 0")
        save, keep = self.checkpoint.every, self.checkpoint.keep_every
        if keep and (not save or keep % save):
            raise ValueError(
                f"checkpoint.keep_every={keep} is not a multiple of checkpoint.every={save}; "
                + (f"try {-(-keep // save) * save}" if save else "with 0 only the last step has a checkpoint")
            )
        if not all(0 <= beta < 1 for beta in self.slow.betas):
            raise ValueError(f"slow.betas={list(self.slow.betas)}; each must be at least 0 and below 1")
        lookahead = self.slow.problems_per_step * self.fast.cycle_steps
        if self.method != "rl" and self.fast.anchor_size > lookahead:
            raise ValueError(
                f"fast.anchor_size={self.fast.anchor_size} is larger than the lookahead of {lookahead} problems "
                f"(slow.problems_per_step x fast.cycle_steps); at most {lookahead}"
            )
        return self
