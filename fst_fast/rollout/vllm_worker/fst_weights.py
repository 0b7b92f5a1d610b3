"""Runs inside vLLM: a weight-transfer engine that reads weights from files, for --weight-transfer-config '{"backend": "fst_file"}'.

vLLM's own engines (nccl, ipc) need GPUs. This one takes safetensors files, which the trainer writes into memory (tmpfs), so it works on every
machine where the two share a folder. A file is data: nothing in it is run.

vLLM is told of it by `--worker-extension-cls fst_weights.Registered` with this file's folder on PYTHONPATH. The file imports nothing of
fst_fast, which vLLM's environment need not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "fst_file"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing is agreed on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """path: a safetensors file that the workers can read, tensors under the names of the model's checkpoint."""

    path: str


class FileWeights(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads one file per update. vLLM holds a layer's weights back until all of them have come, then processes them as at its start."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        with safe_open(update_info.path, framework="pt") as file:
            names = file.keys()
            self.model.load_weights((name, file.get_tensor(name).to(self.device)) for name in names)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self.model.modules():
            # On a CPU vLLM multiplies with a packed copy, which it renews where a weight is loaded: not for a head tied to the embedding.
            if hasattr(layer, "cpu_linear") and layer.weight.numel():
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        pass


class Registered:
    """Mixed into vLLM's worker; importing it registers the engine."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileWeights)
