"""rollout.backend_args of rollout.backend=vllm: how the servers are found or started, and what is refused before anything is written."""

from __future__ import annotations

import os
import re
import shutil
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.rollout.weight_transfer import InFlight
from fst_fast.run.openai_client import validated

USER = "rollout.backend=vllm"
SECTION = "rollout.backend_args"


class VllmArgs(BaseModel):
    """rollout.backend_args of rollout.backend=vllm."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    urls: tuple[str, ...] = ()
    """Servers that run already, http(s)://host:port each; none: the run starts one of its own and ends it."""
    command: tuple[str, ...] = Field(("vllm",), min_length=1)
    """Without urls: the program, such as the path of `vllm` in an environment of its own. It gets `serve MODEL --uds ...`."""
    gpus: str | None = Field(None, pattern=r"^\d+(,\d+)*$")
    """Without urls: the GPUs of the server, such as "2,3" (CUDA_VISIBLE_DEVICES). On a machine with GPUs it must be said."""
    args: tuple[str, ...] = ()
    """Without urls: further arguments of `vllm serve`, such as --tensor-parallel-size=2."""
    env: dict[str, str] = Field(default_factory=dict)
    """Without urls: further environment of the server."""
    transfer: Literal["file", "nccl", "ipc"] = "file"
    """How weights are sent. nccl and ipc need GPUs, one training process for ipc, and the package vllm beside the trainer."""
    folder: str | None = None
    """Where transfer=file and LoRA adapters put their files; the servers must see the same folder. null: /dev/shm."""
    in_flight: InFlight = "wait"
    """What becomes of requests that others have under way while weights are replaced: finished, aborted, or kept and continued on the new weights."""
    max_mismatch: float | None = Field(None, gt=0)
    """Largest mean difference of log-probs, nats per token, between server and trainer after a transfer. null: 1e-3 in float32, 0.05 in bfloat16."""
    restarts: int = Field(3, ge=0)
    """How often the servers may be lost and brought back; then the run stops."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Longest wait for a server to come up."""
    timeout_s: float = Field(600.0, gt=0)
    """Longest wait for one try of a request, its time in the server's queue included."""
    retries: int = Field(3, ge=0, le=10)
    """Further tries of a request that timed out or was given up."""
    concurrency: int = Field(256, ge=1, le=4096)
    """Requests of one process under way at the same time."""

    @field_validator("urls", "command", "args", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        """A list of one may be written without its brackets."""
        return [value] if isinstance(value, str) else value


def vllm_args(config: Config) -> VllmArgs:
    """The checked arguments. Raises UserError."""
    args = validated(VllmArgs, config.rollout.backend_args, section=SECTION, user=USER)
    for url in args.urls:
        if not re.match(r"^https?://[^\s@?#/]+/?$", url):
            raise UserError(
                f"{SECTION}.urls must be http(s)://host:port without user name, password, path or query"
            )
    started = sorted(args.model_fields_set & {"args", "command", "env", "gpus"})
    if args.urls and started:
        raise UserError(
            f"{SECTION}.{started[0]} is for a server that the run starts, but urls names some that run already"
        )
    has_gpu = torch.cuda.is_available()
    if args.transfer != "file" and not has_gpu:
        raise UserError(f"{SECTION}.transfer={args.transfer} needs a GPU; transfer=file works without")
    if args.transfer == "ipc" and distributed.world_size() > 1:
        raise UserError(
            f"{SECTION}.transfer=ipc is for one training process, not {distributed.world_size()}; nccl and file are for any number"
        )
    if not args.urls and has_gpu and args.gpus is None:
        raise UserError(f"{SECTION}.gpus is missing: which GPUs has the server, such as gpus: '1'?")
    if not args.urls and shutil.which(args.command[0]) is None:
        raise UserError(
            f"{SECTION}.command={args.command[0]!r} is not a program that can be run; {USER} needs vLLM, or the urls of servers"
        )
    if args.folder is not None and len(args.folder.encode()) > 80:
        raise UserError(
            f"{SECTION}.folder={args.folder!r} is longer than 80 bytes, too long for the path of a socket"
        )
    nodes = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    if not args.urls and nodes != distributed.world_size():
        raise UserError(
            f"{USER} starts a server on one machine, but the run has processes on several; start servers and name their urls"
        )
    return args
