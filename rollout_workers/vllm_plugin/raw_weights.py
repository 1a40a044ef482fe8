"""Weights of small linear layers as they were loaded, for kernels.py.

vLLM packs a layer's weight for the library that multiplies with it on CPU, and lets go of the weight. Here a reference to it stays on the
layer, beside the packed one. In an update it is made, checked and handed over with it (staging.py, receipts.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST_ELEMENTS = 1 << 20
"""Of a larger weight it would cost memory, and no step of it is small."""


def install() -> None:
    """Keep weights before they are packed."""
    import vllm.model_executor.layers.utils as utils

    if hasattr(utils, "polyrl_keeps"):
        return
    pack = utils.dispatch_cpu_unquantized_gemm

    def keep_and_pack(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight.data
        if weight.dim() == 2 and weight.dtype == torch.float32 and 0 < weight.numel() <= MOST_ELEMENTS and not weight.is_meta:
            layer.polyrl_raw_weight = weight
        pack(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = keep_and_pack
    utils.polyrl_keeps = True


def raw_weight(layer: Any) -> Tensor | None:
    """[out, in] of a linear layer, contiguous float32; None if there is none."""
    weight = getattr(layer, "polyrl_raw_weight", None)
    weight = layer.weight if weight is None else weight
    return weight if weight.numel() and weight.dtype == torch.float32 and weight.is_contiguous() else None
