"""How weights get from the trainer into vLLM servers, through vLLM's own weight-transfer interface.

    file     safetensors files in memory (tmpfs), read by an engine of ours that vLLM loads (vllm_worker/fst_weights.py); any machine, no GPU
    nccl     vLLM's own: broadcast from the trainer's GPU to the servers' GPUs
    ipc      vLLM's own: CUDA IPC, trainer and server on the same GPU

All three send the parameters of a whole plain model: under ZeRO 0 to 2 the trained one itself, under ZeRO-3 the replica, which `TrainedPolicy.hand_over`
has gathered, each bucket once. With LoRA the base stays where it is and `send_adapters` sends the adapters alone, as files in peft's format.

nccl and ipc use vLLM's trainer side, so vLLM must be installed beside the trainer; file needs nothing of it here.
"""

from __future__ import annotations

import base64
import pickle
import shutil
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fst_fast.errors import UserError
from fst_fast.policy import lora
from fst_fast.rollout.vllm_client import VllmClient

BUCKET_BYTES = 256 * 2**20
InFlight = Literal["wait", "abort", "keep"]


class Servers:
    """The control routes of all servers at once. It is the client that vLLM's trainer engines ask for.

    stamp: the version that the servers are told when an update ends, which every answer then carries."""

    def __init__(self, clients: Sequence[VllmClient], in_flight: InFlight) -> None:
        self.clients, self.in_flight, self.stamp = list(clients), in_flight, ""

    def post(self, path: str, bodies: Sequence[Any], **params: str) -> None:
        """POST to every server at the same time: a broadcast waits for all of its receivers."""
        with ThreadPoolExecutor(len(self.clients)) as pool:
            sent = [
                pool.submit(client.post, path, body, **params)
                for client, body in zip(self.clients, bodies, strict=True)
            ]
        for one in sent:
            one.result()

    def _all(self, path: str, body: Any = None, **params: str) -> None:
        self.post(path, [body] * len(self.clients), **params)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Where the engine counts ranks, those of a server come after those of the servers before it."""
        infos, offset = [], init_info.get("rank_offset", 0)
        for client in self.clients:
            infos.append({"init_info": {**init_info, **({"rank_offset": offset} if offset else {})}})
            if offset:
                offset += client.get("/get_world_size")["world_size"]
        self.post("/init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        self._all("/pause", mode=self.in_flight)
        self._all("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._all("/update_weights", {"update_info": _json_safe(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Ends with empty prefix caches: their keys and values are the old weights'. Requests that were kept compute theirs anew."""
        self._all("/finish_weight_update", {"weight_version": weight_version or self.stamp})
        self._all("/reset_prefix_cache", reset_running_requests=str(self.in_flight == "keep").lower())
        self._all("/resume")

    def world_size(self) -> int:
        """Workers of all servers."""
        return sum(client.get("/get_world_size")["world_size"] for client in self.clients)


def _json_safe(update_info: dict[str, Any]) -> dict[str, Any]:
    """IPC handles are no JSON; pickled they are what vLLM reads where VLLM_ALLOW_INSECURE_SERIALIZATION=1 allows it."""
    if "ipc_handles" not in update_info:
        return update_info
    pickled = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
    return {**{k: v for k, v in update_info.items() if k != "ipc_handles"}, "ipc_handles_pickled": pickled}


class FileTransfer:
    """folder: that trainer and servers share."""

    backend = "fst_file"

    def __init__(self, servers: Servers, folder: Path) -> None:
        self.servers, self.folder = servers, folder
        self._begun = False

    def send(self, module: nn.Module) -> None:
        """Raises UserError where the folder is full."""
        if not self._begun:
            self.servers.init_weight_transfer_engine({})
            self._begun = True
        self.servers.start_weight_update()
        path = self.folder / "weights.safetensors"
        try:
            for bucket in buckets(module.named_parameters()):
                _write(bucket, path)
                self.servers.update_weights({"path": str(path)})
        finally:
            path.unlink(missing_ok=True)
        self.servers.finish_weight_update()


class VllmTransfer:
    """nccl and ipc. Raises UserError where vLLM is not installed here."""

    def __init__(self, servers: Servers, backend: Literal["nccl", "ipc"], address: str) -> None:
        try:
            from vllm.distributed.weight_transfer.base import ModuleSource
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        except ImportError as error:
            raise UserError(
                f"rollout.backend_args.transfer={backend} needs the package vllm in the trainer's environment too: {error}; transfer=file "
                "does not"
            ) from error
        self.servers, self.backend, self.address = servers, backend, address
        self._source: Any = ModuleSource
        self._factory: Any = WeightTransferTrainerFactory
        self._engine: Any = None

    def send(self, module: nn.Module) -> None:
        source = self._source(module)
        if self._engine is None:
            self._engine = self._factory.trainer_init(self._init_info(), client=self.servers, source=source)
        self._engine.source = source
        self._engine.send_weights()

    def _init_info(self) -> Any:
        if self.backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=BUCKET_BYTES, rank=0)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            master_address=self.address,
            master_port=free_port(self.address),
            world_size=1 + self.servers.world_size(),
            packed=True,
            packed_buffer_size_bytes=BUCKET_BYTES,
            rank=0,
        )


def send_adapters(
    clients: Sequence[VllmClient], module: nn.Module, folder: Path, name: str, old: str
) -> None:
    """Give the servers the adapters of `module` under `name`, and take those under `old` ("": none) from them."""
    lora.save_adapters(module, folder / name)
    for client in clients:
        client.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder / name)})
        if old:
            client.post("/v1/unload_lora_adapter", {"lora_name": old})
    if old:
        shutil.rmtree(folder / old, ignore_errors=True)


def buckets(parameters: Iterator[tuple[str, nn.Parameter]]) -> Iterator[dict[str, Tensor]]:
    """Tensors by name, in order, about BUCKET_BYTES at a time."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, parameter in parameters:
        bucket[name] = parameter.detach()
        size += parameter.numel() * parameter.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = {}, 0
    if bucket:
        yield bucket


def _write(bucket: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous().to("cpu") for name, tensor in bucket.items()}, path)
    except Exception as error:  # safetensors has an error of its own for a full disk
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"rollout.backend_args.folder: the weights cannot be written to {path.parent}: {str(error).splitlines()[0]}"
        ) from error


def free_port(address: str) -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
