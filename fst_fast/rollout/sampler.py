"""Requests in, judged rollouts out, in the same order.

Every sequence has a random stream of its own, derived from its request and not from where it runs, so the same requests give the same
rollouts on one process or on many, in one batch or in several.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.contracts import Context, Problem, RolloutRequest, ScoredRollout, Verdict
from fst_fast.errors import UserError
from fst_fast.policy import gpu_forward
from fst_fast.rollout.engine import Request, RolloutEngine
from fst_fast.rollout.episodes import ask_openings, play
from fst_fast.rollout.graphs import StepGraph
from fst_fast.rollout.lengths import ResponseLengths
from fst_fast.rollout.models import Engine
from fst_fast.rollout.prompt import PromptCache, end_ids, response_text
from fst_fast.rollout.responses import Ints, Responses
from fst_fast.rollout.server import ServerEngine
from fst_fast.rollout.template import Findings, check_vocabulary, configured_chat
from fst_fast.rollout.vllm import VllmEngine
from fst_fast.rollout.vllm_args import vllm_args
from fst_fast.rollout.vllm_hosts import Hosts, Weights
from fst_fast.run.cores import spare_cores
from fst_fast.run.counters import Stopwatch
from fst_fast.run.faults import reach
from fst_fast.run.randomness import stream_seed
from fst_fast.tasks.registry import task_spec
from fst_fast.tasks.tools.calls import syntax_of
from fst_fast.verify.pool import VerifierPool


@dataclass
class Sampler:
    """Samples and verifies on this process (`local`), or shares the work over all of them (`spread`)."""

    config: Config
    tokenizer: Any
    prompts: PromptCache
    pool: VerifierPool
    pad_id: int
    template: Findings  # of the check of the chat template
    generation_config: Any = None  # of the run's checkpoint; None: the model's own
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    hosts: Hosts | None = None  # of rollout.backend=vllm
    lengths: ResponseLengths = field(default_factory=ResponseLengths)
    _troubles: tuple[int, int] = (0, 0)

    @classmethod
    def open(
        cls,
        config: Config,
        log: Callable[[str], None] = lambda _: None,
        *,
        saved: Path | None = None,
        date: datetime | None = None,
    ) -> Sampler:
        """Load the tokenizer, check its chat template and start the verifying children of the configured task. Raises UserError; close it
        after use.

        log: gets what the children's programs are isolated by, where they run any, and the first trouble of each kind. saved: the model's folder
        in a checkpoint of the run, whose tokenizer, template and generation config are then used. date: what the chat template takes for today;
        None for now."""
        if config.verify.isolation == "required":
            from fst_fast.verify.run_code import missing_layers

            if missing := missing_layers():
                raise UserError(
                    f"verify.isolation=required, but this system cannot isolate a program: {missing}; allowed here is available"
                )
        chat, findings = configured_chat(config.model, saved=saved, date=date)
        tokenizer = chat.tokenizer
        prompts = PromptCache(chat, max_prompt_tokens=config.rollout.max_prompt_tokens)
        generation = None
        if saved and (saved / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(saved)
        spec, args = task_spec(config)
        syntax = config.rollout.tool_calls
        pool = VerifierPool(
            spec,
            args,
            workers=config.verify.workers or spare_cores(),
            timeout_s=config.verify.timeout_s,
            memory_mib=config.verify.memory_mib,
            isolation=config.verify.isolation,
            tool_calls=(syntax_of(chat.template.source) or "") if syntax == "auto" else syntax,
            observation_chars=config.rollout.max_observation_chars,
            log=log,
        )
        if pool.runs_code:
            from fst_fast.verify.run_code import isolation

            log(f"programs run by run_code: {isolation()}")
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        sampler = cls(config, tokenizer, prompts, pool, pad_id, findings, generation)
        prompts.components = bool(config.fast.components)
        if pool.has_turns:
            prompts.openings = partial(ask_openings, sampler)
        return sampler

    def close(self) -> None:
        """End the verifying children and a server that the run started. May be called twice."""
        self.pool.close()
        if self.hosts:
            self.hosts.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def end_ids(self, model: nn.Module) -> tuple[int, ...]:
        """The token ids that end a response of `model`."""
        return end_ids(self.tokenizer, self.generation_config or getattr(model, "generation_config", None))

    def save_text(self, folder: Path) -> None:
        """Write into a model's folder what turns text into its tokens and back: the tokenizer, the chat template as it is used, and the
        generation config where it is not the model's own."""
        self.tokenizer.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)

    def engine(self, model: nn.Module, note: Callable[[str], None] = print) -> RolloutEngine:
        """An engine that samples from `model` as configured. note: told what had to be chosen for want of memory. Raises UserError where the
        tokenizer does not fit the model."""
        check_vocabulary(self.prompts.chat, model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
        return RolloutEngine(
            model,
            eos_ids=self.end_ids(model),
            pad_id=self.pad_id,
            max_batch=self.config.rollout.max_batch,
            packing=self.config.policy.packing,
            kv_bytes=self.config.rollout.kv_memory_bytes,
            graph=StepGraph() if self._graphs(model) else None,
            stop=self.config.rollout.stop,
            decode=self.tokenizer.decode,
            note=note,
        )

    def _graphs(self, model: nn.Module) -> bool:
        """Whether decode steps of this model are recorded."""
        wanted = self.config.rollout.cuda_graphs
        if wanted == "auto":
            return self.config.policy.packing == "forest" and gpu_forward.unsupported_reason(model) is None
        return wanted is True and distributed.device().type == "cuda"

    def server(self, model: nn.Module, note: Callable[[str], None] = print) -> ServerEngine | None:
        """The server that rollout.backend=openai names, or None. model: whose vocabulary and end-of-response tokens it uses. note: told what the
        server did not answer."""
        if self.config.rollout.backend != "openai":
            return None
        return ServerEngine.from_args(self.config.rollout.backend_args, **self._of_model(model), note=note)

    def open_hosts(
        self, base: nn.Module, probe: tuple[Context, Problem], note: Callable[[str], None]
    ) -> None:
        """With rollout.backend=vllm: check its arguments, and the servers where they run already. probe: whose prompt is asked for after every
        transfer of weights. All processes call it. Raises UserError."""
        if self.config.rollout.backend != "vllm":
            return
        rollout = self.config.rollout
        longest = rollout.max_prompt_tokens + rollout.max_response_tokens
        if self.pool.has_turns:
            episode = rollout.max_episode_tokens or self.config.slow.tokens_per_micro_batch
            positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
            longest = min(episode, positions or episode)
        self.hosts = Hosts(
            vllm_args(self.config),
            self.config,
            longest=longest,
            probe_ids=self.prompts.ids(*probe),
            pad_id=self.pad_id,
            note=note,
        )
        if self.hosts.args.urls:
            self.hosts.prepare(Weights(base, None))

    def vllm(self, model: nn.Module, *, base: bool) -> VllmEngine | None:
        """An engine that samples from `model` on the servers of rollout.backend=vllm, or None. base: its weights do not move."""
        return VllmEngine(self.hosts, model, base=base, **self._of_model(model)) if self.hosts else None

    def _of_model(self, model: nn.Module) -> dict[str, Any]:
        """What an engine of a server must know of the model and its tokenizer."""
        return {
            "eos_ids": self.end_ids(model),
            "stop": self.config.rollout.stop,
            "vocab_size": model.config.get_text_config().vocab_size,  # type: ignore[operator, union-attr]
            "decode": self.tokenizer.decode,
            "encode": self.prompts.chat.special.encode_text,
        }

    def local(
        self,
        engine: Engine,
        requests: Sequence[RolloutRequest],
        *,
        stream: tuple[object, ...],
        policy_version: int,
        temperature: float,
        top_p: float | None = None,
        paired: bool = False,
    ) -> list[ScoredRollout]:
        """Sample and judge `requests` on this process. `paired`: streams leave out the context, so that two contexts meet the same random numbers.

        A response that the server gave up (finish `abort`) is not judged: its reward is None."""
        if isinstance(engine, VllmEngine):
            engine.prepare(policy_version)
        if self.pool.has_turns:
            return play(
                self, engine, requests, stream=stream, policy_version=policy_version, temperature=temperature, top_p=top_p, paired=paired
            )  # fmt: skip
        started = time.perf_counter()
        prompts = [
            Request(
                problem_id=problem.id,
                context_id=context.id,
                sample=sample,
                prompt_ids=self.prompts.ids(context, problem),
                seed=stream_seed(*stream, "" if paired else context.id, problem.id, sample),
            )
            for context, problem, sample in requests
        ]
        ends = {*engine.eos_ids, self.pad_id}
        said: dict[int, tuple[str, int]] = {}  # request -> its response and the place of the verdict
        with self.pool.judging() as judging:

            def judge(i: int, ids: Ints) -> str:
                text = response_text(self.tokenizer, ids, ends)
                if i not in said or said[i][0] != text:
                    said[i] = text, judging.add(requests[i].problem, text)
                return text

            def watch(ended: Ints, responses: Responses) -> None:
                for i in ended.tolist():
                    judge(i, responses.ids[i, : responses.length[i]])
                judging.serve()

            watched: dict[str, Any] = {"watch": watch} if isinstance(engine, RolloutEngine) else {}
            rollouts = engine.generate(
                prompts,
                max_response_tokens=self.config.rollout.max_response_tokens,
                temperature=temperature,
                top_p=None if top_p in (None, 1.0) else top_p,
                policy_version=policy_version,
                **watched,
            )
            sampled_at = time.perf_counter()
            reach("verification")
            texts = [
                response_text(self.tokenizer, r.response_ids, ends)
                if r.finish == "abort"
                else judge(i, r.response_ids)
                for i, r in enumerate(rollouts)
            ]
            judged = judging.verdicts()
        verdicts = [
            judged[said[i][1]] if i in said else Verdict(None, "the server gave the response up")
            for i in range(len(rollouts))
        ]
        self.stopwatch.add("rollout_s", sampled_at - started)
        self.stopwatch.add("verify_s", time.perf_counter() - sampled_at)
        return [ScoredRollout(r, v, t) for r, v, t in zip(rollouts, verdicts, texts, strict=True)]

    def expected_tokens(self, problems: Sequence[Problem]) -> list[int]:
        """Of a response to each problem, the same on all processes, which must call it: samplers may know more than trainers."""
        return distributed.broadcast(self.lengths.expected(problems))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, no special ones added."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def unverified(self) -> dict[str, int]:
        """Verifications since the last call that timed out or failed, over all processes. All processes must call it."""
        now = (self.pool.timeouts, self.pool.failures)
        new = distributed.all_reduce_sum([a - b for a, b in zip(now, self._troubles, strict=True)])
        self._troubles = now
        return {"verify_timeouts": int(new[0]), "verify_failures": int(new[1])}

    def spread(
        self, engine: Engine, requests: Sequence[RolloutRequest], *, remember: bool = True, **how: Any
    ) -> list[ScoredRollout]:
        """Like `local`, each process doing a share; every process gets the whole result. All processes must call it. remember: the lengths, for dealing
        out later requests; not those of evaluations, which change nothing of what is trained."""
        expected = self.expected_tokens([r.problem for r in requests])
        mine = distributed.contiguous_shard_by_cost(requests, expected)
        scored = distributed.concat_shards(distributed.all_gather(self.local(engine, mine, **how)))
        if remember:
            self.lengths.note(s.rollout for s in scored)
        return scored
