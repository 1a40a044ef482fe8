"""Weights from the learner into a running engine, through a safetensors file that lives in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rollout_workers.vllm_plugin import conv_alias


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """`path` of a safetensors file that every worker of the engine can open; names as in a Hugging Face checkpoint."""

    path: str = ""


class SharedMemoryWeights(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads policy and draft from the same file; each takes the names that it knows.

    A layerwise reload puts the loaders back that vLLM drops after the first load, and copies into the tensors that kernels and
    graphs already hold.
    """

    init_info_cls, update_info_cls = InitInfo, UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        conv_alias.refresh(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The base class synchronises an accelerator afterwards, which a CPU does not have."""
        if self.device.type == "cpu":
            self.receive_weights(self.parse_update_info(update_info))
        else:
            super().update_weights(update_info)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        # A safe_open handle is no dict: it has keys(), but is not iterable.
        with safe_open(update_info.path, "pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def shutdown(self) -> None:
        pass
