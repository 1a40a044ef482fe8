"""LoRA: low-rank additions to some matrices are all of the policy that trains (Hu et al. 2021, arXiv:2106.09685).

    W' = W + alpha / rank * B A        A [rank, in] random, B [out, rank] zero at the start

Adapters live in the learner and in its optimizer's checkpoint. Whatever leaves the learner is W': published weights, `model/` of a
checkpoint, an export. Engines need not know. The layers are peft's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_core.config import ConfigError, LoraConfig

ADAPTER, BASE = ".lora_", ".base_layer."


def install(lm: Any, config: LoraConfig) -> None:
    """Give every layer of `lm` that config.targets names its adapter, and freeze all else. ConfigError if peft refuses a target."""
    import peft  # takes seconds, and few runs want it

    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), lora_dropout=0.0)  # type: ignore[arg-type]
    try:
        peft.inject_adapter_in_model(settings, lm)
    except ValueError as error:
        raise ConfigError(f"learner.lora.targets is {list(config.targets)}: {error}") from error
    head = lm.get_output_embeddings()
    for name, module in lm.named_modules():
        if hasattr(module, "get_delta_weight") and (module is head or not isinstance(module.get_base_layer(), torch.nn.Linear)):
            raise ConfigError(f"learner.lora.targets is {list(config.targets)}: {name} is no linear layer below the LM head; leave it out")


@torch.no_grad()
def merged_state(lm: Any) -> dict[str, Tensor]:
    """All weights under the names that they have without adapters, W' in place of W."""
    state = {name.replace(BASE, "."): tensor.detach() for name, tensor in lm.state_dict().items() if ADAPTER not in name}
    for name, module in lm.named_modules():
        if hasattr(module, "get_delta_weight"):
            for adapter in module.active_adapters:
                state[f"{name}.weight"] = state[f"{name}.weight"] + module.get_delta_weight(adapter)
    return state
