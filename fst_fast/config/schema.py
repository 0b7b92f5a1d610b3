"""The configuration as one typed tree: every key, its default, its meaning and the values allowed.

A YAML file gives the tree and dotted command-line arguments override it (`--slow.lr=1e-3`); see `load`. Pydantic refuses unknown keys and
impossible values. Batch sizes have one unit, problems per step; `derived` computes the rest, which `--dry-run` prints.
The docstrings are the reference: `scripts/config_reference.py` writes docs/reference/configuration.md from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fst_fast.config import checks
from fst_fast.config.fast import FastConfig
from fst_fast.config.section import Section


class ModelConfig(Section):
    """The base model, which training starts from and which stays the reference."""

    path: str = "mini"
    """Folder of a Hugging Face model, a model of the Hugging Face Hub such as `Qwen/Qwen3-8B`, a `.gguf` file, or `mini` or
    `mini_tools`, the base models shipped with the package (the second for task=hidden_facts)."""
    revision: str | None = None
    """For a model of the Hub: branch, tag or commit; null: main. A run records the commit."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own: a folder, or `org/name` or `org/name@revision` of the Hub. Its vocabulary must fit the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Data type of the weights during training. `auto`: that of the checkpoint; float32 for a GGUF file. A run records what it is."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    chat_template: str | None = None
    """File with a chat template (Jinja), used instead of the model's own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}. One that the template does not read is refused."""
    system: Literal["auto", "system", "user"] = "auto"
    """Where a context goes: the system message, or before the first user message. `auto` takes the system message where the chat template
    has one."""


class LoraConfig(Section):
    """Low-rank adapters (peft)."""

    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(32, ge=1)
    """Scale of the adapters: the product of their matrices is multiplied by alpha / rank."""
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Names of the linear layers that get an adapter."""


class PolicyConfig(Section):
    """How the trained weights are computed and partitioned."""

    packing: Literal["forest", "padded"] = "forest"
    """`forest` computes a shared prefix once; `padded` computes each sequence by itself, for models that cannot be packed and as the oracle of
    tests."""
    attention: Literal["tree", "sdpa", "flash_attention_2"] = "tree"
    """Attention kernel: `tree` with packing=forest, the other two with packing=padded."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage, which partitions over the processes: 0 nothing, 1 the optimiser's state, 2 also gradients, 3 also weights."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in CPU memory; needs zero_stage >= 1."""
    offload_parameters: bool = False
    """Keep the partitioned weights in CPU memory and fetch them layer by layer; needs zero_stage = 3."""
    optimizer: Literal["auto", "torch_adamw", "fused_adam", "cpu_adam"] = "auto"
    """Which implementation of AdamW: torch's; DeepSpeed's FusedAdam, which needs a GPU and nvcc; DeepSpeedCPUAdam, which needs offload_optimizer and
    a C++ compiler at its first use; `auto`: on a GPU DeepSpeedCPUAdam with offload_optimizer, else torch's in one kernel; without a GPU torch's.
    They differ by rounding."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further keys of the DeepSpeed configuration, such as {zero_optimization: {overlap_comm: true}}. Those that follow from other keys are
    refused by name. Gradients of several micro-batches are added up in float32; under ZeRO {data_types: {grad_accum_dtype: bf16}} halves their
    memory in a bfloat16 model."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory."""
    liger: bool = False
    """On a GPU: compute RMSNorm, SwiGLU and rotary embedding with Liger's kernels (extra `liger`), in every model of the run. Off by default
    because the gain has not been measured."""
    lora: LoraConfig | None = None
    """Train low-rank adapters (peft) instead of all weights. The base weights are in memory once and serve as the reference, too. `{}` takes
    the defaults."""

    @model_validator(mode="after")
    def _fits(self) -> PolicyConfig:
        checks.policy(self)
        return self


class RolloutConfig(Section):
    """How responses are sampled during training."""

    max_prompt_tokens: int = Field(256, ge=1)
    """Longest prompt (context and problem); a longer one is refused, naming the problem and the context."""
    max_response_tokens: int = Field(64, ge=1)
    """Longest response; a longer one is cut (finish = length)."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of training rollouts. There is no top-p or top-k: truncation biases the importance ratio."""
    max_batch: int = Field(256, ge=1)
    """Sequences that one process decodes at the same time; a waiting one takes the place of a finished one."""
    kv_memory_bytes: int | None = Field(None, ge=1)
    """Memory for the keys and values of one process, prompts and responses; fewer sequences run at a time if they do not fit. null: nine
    tenths of the free memory of the GPU or, without one, half of the machine's, shared by its processes."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """On a GPU: record decode steps as CUDA graphs. `auto`: for models that have the fused forward (Llama, Qwen2, Qwen3). Without a GPU it does
    nothing."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a response, besides the eos token. The tokens that complete one belong to the response."""
    max_turns: int = Field(8, ge=1)
    """For a task of several turns (an environment, or a task with tools): maximum number of responses of an episode, each of at most max_response_tokens;
    then it ends (finish = max_turns)."""
    max_episode_tokens: int | None = Field(None, ge=1)
    """Longest episode, everything that was read and sampled; one without room for a further turn ends (finish = max_tokens). null: as many as
    slow.tokens_per_micro_batch and the model's positions allow."""
    max_observation_chars: int = Field(8000, ge=1)
    """Longest text of one message of an environment or a tool; a longer one is cut, and says so."""
    history: Literal["keep", "split"] = "keep"
    """What a later turn reads of earlier ones: `keep`, their tokens as they were sampled; `split`, what the chat template writes of them, which
    leaves out thoughts with some models; a turn whose past was rewritten is then a training sequence of its own."""
    tool_calls: Literal["auto", "hermes", "llama3", "mistral"] = "auto"
    """Syntax in which the policy calls tools; `auto` is that of the chat template."""
    ahead: int = Field(0, ge=0)
    """Steps that sampling is ahead of training: while a step is trained, the batches of the next N are sampled from older weights, at most N steps old. 0: one
    after the other. Needs sampler_ranks, or backend=vllm."""
    sampler_ranks: int = Field(0, ge=0)
    """With ahead: processes of the run, the last ones, that sample while the others train. In fast phases and evaluations all of them sample."""
    backend: Literal["native", "openai", "vllm"] = "native"
    """`native`: the engine of this package, in the training processes. `vllm`: vLLM servers, which are sent the trained weights after every step, sample
    everything. `openai`: a server with weights of its own samples for the fast phase and for the base model in evaluations; the trained weights
    sample in this process, and rollouts of the server are trained on (fast.reuse_rollouts) only if it returns token ids and log-probs."""
    backend_args: dict[str, Any] = Field(default_factory=dict)
    """For backend=vllm: urls, or command, gpus, args, env; transfer, folder, in_flight, max_mismatch, restarts, start_timeout_s, timeout_s, retries,
    concurrency (docs/vllm.md). For backend=openai: model, base_url, timeout_s, retries, concurrency, processed_logprobs. A key comes from
    VLLM_API_KEY or OPENAI_API_KEY only."""


class StageConfig(Section):
    """One of several tasks that a run trains on in turn."""

    task: str
    """Like the key `task`."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Like the key `task_args`."""
    steps: int = Field(ge=1)
    """Optimiser steps of this stage, distillation included."""


class ReferenceConfig(Section):
    """The model that the KL penalty compares the policy with."""

    every: int | None = Field(None, ge=1)
    """null, or `slow.reference: base`: the base model. N: the policy itself as it was after the last multiple of N steps, a frozen copy; needs the
    memory of one more model, with LoRA too. The KL of evaluations stays the one to the base model."""


class SlowConfig(Section):
    """The slow phase: reinforcement learning on the weights."""

    steps: int = Field(100, ge=0)
    """Optimiser steps of the whole run."""
    problems_per_step: int = Field(16, ge=1)
    """Problems of one step, over all processes."""
    group_size: int = Field(8, ge=2)
    """Rollouts of one problem (G), spread evenly over the population. They form one advantage group."""
    lr: float = Field(1e-6, gt=0, le=1)
    """AdamW learning rate, the highest of the schedule."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of linear warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling over the rest of slow.steps along a line or half a cosine."""
    lr_min_ratio: float = Field(0.0, ge=0, le=1)
    """linear, cosine: the share of lr to which they fall."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Largest global norm of the gradient, which is clipped to it; 0: no clipping."""
    objective: Literal["cispo", "grpo", "ppo", "reinforce", "gspo", "dapo", "dr_grpo"] = "cispo"
    """Policy-gradient loss; see fst_kernels.PolicyObjective. grpo, ppo, dapo and dr_grpo clip the ratio of each token, gspo that of a sequence.
    Three of them change defaults of other keys: dapo clip_high=0.28, aggregation=token; dr_grpo aggregation=constant, advantage_scale=none;
    gspo clip_low=3e-4, clip_high=4e-4, aggregation=sequence."""
    ratio_cap: float = Field(4.0, ge=1)
    """cispo: largest importance ratio, as in TRL and Liger. verl, open-instruct, NeMo and slime give it as 1 + eps: the paper's clip_high of
    3.0 is 4.0 here."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """grpo, ppo, dapo, dr_grpo, gspo: the ratio is clipped to at least 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """grpo, ppo, dapo, dr_grpo, gspo: the ratio is clipped to at most 1 + clip_high."""
    mismatch: Literal["none", "tis", "mis"] = "none"
    """Importance weight on the loss for what the sampler's and the trainer's log-probs differ by: `none`: the objective's own ratio is between the
    trained weights and the sampler, and holds it; `tis`: a weight cut to mismatch_cap; `mis`: one that is 0 above it. With the latter two the
    objective's ratio is 1, since a batch has one step, and its clip or cap does not act."""
    mismatch_level: Literal["token", "sequence"] = "token"
    """The ratio of the weight: of each token, or the product over its sequence."""
    mismatch_cap: float = Field(2.0, ge=1)
    """tis: largest weight; mis: largest ratio that keeps its weight."""
    kl: Literal["none", "k3", "reverse", "forward"] = "k3"
    """Penalty for distance from the base model: `none`; `k3`, an estimate from the sampled tokens; `reverse`, the exact KL(pi||ref), and
    `forward`, the exact KL(ref||pi), both over the vocabulary."""
    kl_coef: float = Field(1e-3, ge=0)
    """Weight of the KL penalty."""
    reference: ReferenceConfig = ReferenceConfig()
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    aggregation: Literal["problem", "token", "sequence", "constant"] = "problem"
    """How token losses are averaged: `problem` over the tokens of a problem, then over problems (the paper); `token` over all tokens;
    `sequence` over the tokens of a sequence, then over sequences; `constant`: their sum over problems_per_step x group_size x
    rollout.max_response_tokens, whatever was sampled (Dr. GRPO)."""
    advantage_group: Literal["problem", "context"] = "problem"
    """Rewards that a rollout is compared with: `problem` those of all rollouts of its problem, across contexts (the paper); `context` those
    under its own context."""
    advantage_eps: float = Field(1e-6, ge=0)
    """Added to the population standard deviation of a group's rewards."""
    advantage_scale: Literal["std", "none"] = "std"
    """What r - mean is divided by: `std` the standard deviation of the group, `none` nothing (Dr. GRPO)."""
    dynamic_sampling: int = Field(0, ge=0)
    """Maximum number of rounds in which a step replaces its groups without variance by groups of other training problems, drawn at random; 0: none. A step
    then samples at most 1 + dynamic_sampling times problems_per_step x group_size rollouts."""
    mask_overlong: bool = False
    """Leave rollouts that were cut at rollout.max_response_tokens, or an episode's max_episode_tokens, out of the loss. They stay in the mean and
    deviation of their group."""
    overlong_buffer: int = Field(0, ge=0)
    """Take reward off long responses: nothing up to rollout.max_response_tokens - overlong_buffer tokens, then in proportion, at the longest
    overlong_penalty (DAPO). 0: none."""
    overlong_penalty: float = Field(1.0, gt=0)
    """See overlong_buffer."""
    reward_shaping: str | None = None
    """`file.py:function` of (problem, rollouts of its group) that returns a reward for each, instead of the verdict's. See docs/recipes.md."""
    reward_clip: tuple[float, float] | None = None
    """Smallest and largest reward, applied last. Shaping, penalty and clip change what the advantages are made of; contexts and metrics keep the
    verdict's reward."""
    tokens_per_micro_batch: int = Field(8192, ge=1)
    """Forest tokens (padded: tokens of the padded batch) of one forward/backward on one process."""
    head_chunk_rows: int = Field(1024, ge=1)
    """Rows of logits that the loss holds in memory at a time."""
    distill_steps: int = Field(0, ge=0)
    """Last steps of the run, or of each stage, that are on-policy context distillation instead of RL: the exact reverse KL from the weights
    under the seed context to the same weights, frozen, under the evolved contexts. The evolution then restarts from the seed context."""
    mismatch_warning: float = Field(1e-2, gt=0)
    """Warn of a step without reused rollouts whose mismatch_kl, in nats per token, is above this: rollout engine and trainer then disagree on
    log-probs. Usual values are below 1e-8 in float32 and below 1e-3 in bfloat16."""

    @field_validator("reference", mode="before")
    @classmethod
    def _base(cls, value: Any) -> Any:
        return {} if value == "base" else value

    @model_validator(mode="after")
    def _fits(self) -> SlowConfig:
        for name, value in checks.OBJECTIVE_DEFAULTS.get(self.objective, {}).items():
            if name not in self.model_fields_set:
                self.__dict__[name] = value
        checks.slow(self)
        return self


class EvalConfig(Section):
    """Evaluations: the four cells of seed or evolved contexts, base or trained weights."""

    every: int = Field(20, ge=0)
    """Steps between two evaluations; 0: only at the end."""
    problems: int = Field(64, ge=1)
    """Validation problems of a periodic evaluation."""
    final_problems: int = Field(128, ge=1)
    """Validation problems of the final evaluation."""
    samples: int = Field(4, ge=1)
    """Samples of each problem: the k of mean@k and pass@k."""
    temperature: float = Field(0.6, gt=0)
    """Sampling temperature of the evaluation."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus (top-p) of the evaluation."""
    cells: list[Literal["neither", "context", "weights", "both"]] = Field(
        ["neither", "context", "weights", "both"], min_length=1
    )
    """Cells of a periodic evaluation; `weights` and `both` include the KL under their contexts. The evaluation at the end of the run or of a
    stage has all four."""
    kl_problems: int = Field(32, ge=1)
    """Validation problems on which KL(train||base) is measured, at temperature 1."""


class VerifyConfig(Section):
    """Child processes that judge responses."""

    workers: int | None = Field(None, ge=1)
    """Verifying child processes of each process; null: its share of the machine's cores, one of which stays free, and at most 16."""
    timeout_s: float = Field(10.0, gt=0)
    """Wall-clock limit of one verification; after it the reward is null."""
    memory_mib: int = Field(2048, ge=64)
    """Limit of a verifying process's address space."""
    isolation: Literal["available", "required"] = "available"
    """Isolation of programs that a grader runs with run_code: `available` takes what the system offers, `required` refuses to run them if a
    layer is missing (`fst doctor` lists the layers)."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: int = Field(20, ge=0)
    """Steps between two checkpoints; 0: only at the end. The end of the run always has one."""
    keep_last: int = Field(2, ge=2)
    """Number of newest checkpoints kept."""
    keep_every: int = Field(0, ge=0)
    """Keep the checkpoints of steps that are a multiple of this for good; a multiple of checkpoint.every. 0: none."""


class RunConfig(Section):
    """The processes of a run."""

    timeout_s: float = Field(1800.0, gt=0)
    """Longest wait of one process for another; after it the run stops and names the missing one."""


class AttachConfig(Section):
    """Runs of trackers that exist already."""

    tensorboard: str | None = Field(None, min_length=1)
    """Folder of TensorBoard events; null: RUN/tensorboard."""
    wandb: str | None = Field(None, min_length=1)
    """Id of a Weights & Biases run; null: none."""
    trackio: str | None = Field(None, min_length=1)
    """Name of a trackio run; null: none."""
    mlflow: str | None = Field(None, min_length=1)
    """Id of an MLflow run; null: none."""


class TrackConfig(Section):
    """Where metrics and sample rollouts go, besides metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard events to RUN/tensorboard (extra `track`)."""
    wandb: str | None = None
    """Weights & Biases project (extra `track`); null: none."""
    trackio: str | None = None
    """trackio project (extra `track`); null: none."""
    mlflow: str | None = None
    """MLflow experiment (extra `track`), on the server of MLFLOW_TRACKING_URI; null: none."""
    attach: AttachConfig = AttachConfig()
    """Runs of trackers that exist already and are written to, instead of new ones. A run of W&B, trackio or MLflow that is active in this
    process is written to without being named."""
    rollouts_per_step: int = Field(2, ge=0)
    """Rollouts of each step written to RUN/rollouts.jsonl for a person to read, and sent to the trackers as a table."""

    @model_validator(mode="after")
    def _attached_is_on(self) -> TrackConfig:
        for key, run in self.attach:
            if run and not getattr(self, key):
                raise ValueError(f"track.attach names a run of {key}, but track.{key} is off")
        return self


class Config(Section):
    """The whole tree."""

    method: Literal["fst", "rl", "gepa"] = "fst"
    """`fst`: both phases; `rl`: the slow phase alone, with the seed context; `gepa`: the fast phase alone, with frozen weights."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    task: str = "star_graph"
    """A built-in task, `my_task.py:MyTask`, `reasoning_gym:NAME`, `verifiers:NAME`, `openenv:URL`, `program`, or rows with task_args.verify = a built-in grader or
    `grader.py:function`: `hf:NAME` (a data set of the Hugging Face Hub), `data.jsonl`, `.csv`, `.tsv`, `.parquet`."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task."""
    stages: tuple[StageConfig, ...] = ()
    """Several tasks in turn in one run, instead of `task`; weights, optimiser and contexts carry over. slow.steps is the sum of their steps and
    need not be given."""
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
    """What follows a NaN or Inf in an advantage, log-prob, loss or gradient, which the weights never take: `stop` ends the run, `skip` leaves
    the batch out and counts it (skipped_steps). The batch is written to RUN/dumps, except in distillation."""

    @model_validator(mode="after")
    def _values_fit_together(self) -> Config:
        checks.steps(self)
        checks.together(self)
        checks.recipe(self)
        return self
