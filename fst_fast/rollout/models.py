"""The models of a run that sample, and the count of tokens that they compute."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fst_fast import distributed
from fst_fast.rollout.engine import RolloutEngine
from fst_fast.rollout.server import ServerEngine
from fst_fast.rollout.vllm import VllmEngine

Engine = RolloutEngine | ServerEngine | VllmEngine


@dataclass
class SamplingModels:
    """The sampling engines and their modules. `fast` samples the fast phase: a server's base model or the trained weights.

    Two of the engines may be the same object."""

    trained: RolloutEngine | VllmEngine
    base: Engine
    fast: Engine
    trained_module: nn.Module
    base_module: nn.Module
    _counted: tuple[int, int] = (0, 0)

    def forget_prefixes(self) -> None:
        """Drop all cached keys and values, so that a run resumed at this point is bit-reproducible."""
        for engine in (self.trained, self.base, self.fast):
            engine.forget()

    def new_tokens(self) -> tuple[int, int]:
        """(tokens computed since the last call over all processes, tokens of the same work without sharing). All processes call it."""
        computed, unshared = self._tokens()
        new = distributed.all_reduce_sum([computed - self._counted[0], unshared - self._counted[1]])
        self._counted = computed, unshared
        return int(new[0]), int(new[1])

    def skip_tokens(self) -> None:
        """Exclude the tokens since the last call from the count; used for evaluations, which are not part of the method's cost."""
        self._counted = self._tokens()

    def served(self) -> dict[str, float | int | None]:
        """What metrics.jsonl says of vLLM's servers: the last probe's mismatch and the restarts so far. {} without."""
        if not isinstance(self.trained, VllmEngine):
            return {}
        hosts = self.trained.hosts
        return {"probe_mismatch": hosts.mismatch, "server_restarts": hosts.generation}

    def _tokens(self) -> tuple[int, int]:
        engines = {id(e): e for e in (self.trained, self.base, self.fast)}.values()
        return sum(e.tokens_computed for e in engines), sum(e.tokens_unshared for e in engines)
