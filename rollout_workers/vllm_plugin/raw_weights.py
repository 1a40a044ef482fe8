"""Weights of small linear layers as they were loaded, for kernels.py.

vLLM packs a layer's weight for the library that multiplies with it on CPU, and lets go of the weight. Here a reference to it stays on the
layer, beside the packed one. In an update it is made, checked and handed over with it (staging.py, receipts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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


class Views:
    """Weights of several layers as NumPy arrays, made anew where an update has moved one.

    To ask modules for their parameters, and to make an array of each, takes longer than to multiply a token with them. A view holds on to
    the memory that it was made of, so no other weight can be found at its address.
    """

    def __init__(self, *places: tuple[Any, str]) -> None:
        """`places`: modules, and which of their tensors; "weight" stands for what `raw_weight` says."""
        self._places = [place(*asked) for asked in places]
        self._addresses: list[int] = []
        self._arrays: tuple[NDArray[np.float32], ...] = ()

    def now(self) -> tuple[NDArray[np.float32], ...]:
        tensors = [held[name] for held, name in self._places]
        addresses = [t.data_ptr() for t in tensors]
        if addresses != self._addresses:
            self._addresses, self._arrays = addresses, tuple(t.detach().numpy() for t in tensors)
        return self._arrays


def place(layer: Any, name: str) -> tuple[Mapping[str, Tensor], str]:
    """The dictionary in which a module holds a tensor, and its name there."""
    held = vars(layer)
    if name == "weight" and held.get("polyrl_raw_weight") is not None:
        return held, "polyrl_raw_weight"
    return (held if name in held else held["_parameters"]), name


def raw_weight(layer: Any) -> Tensor | None:
    """[out, in] of a linear layer, contiguous float32; None if there is none."""
    weight = getattr(layer, "polyrl_raw_weight", None)
    weight = layer.weight if weight is None else weight
    return weight if weight.numel() and weight.dtype == torch.float32 and weight.is_contiguous() else None
