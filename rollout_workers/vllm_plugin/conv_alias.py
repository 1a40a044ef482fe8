"""The convolution's weights after a weight update in bfloat16, on CPUs with AVX512-BF16.

Defect upstream (vLLM 0.32, CPU): `MambaMixer2.conv_weights` is a view of `conv1d.weight`, made when the layer is built. When weights have
been loaded, `dispatch_cpu_unquantized_gemm` packs those of a causal convolution for another kernel and gives the parameter new memory;
the view keeps the old one. The first load is right by accident. A reload fills the packed memory, and the model goes on with the
convolutions of its first weights: logprobs are off by a third of what the update changed, without an error. (In another form, the
hazard of prime-rl#2482.)

Upstream keeps the unpacked weights of each load beside the parameter; they belong into the view.
"""

from __future__ import annotations

import torch
from torch import nn

UNPACKED = "_cpu_unpacked_conv_weight"


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """After a load: every `conv_weights` of the model holds what was loaded."""
    for module in model.modules():
        view, conv = getattr(module, "conv_weights", None), getattr(module, "conv1d", None)
        if isinstance(view, torch.Tensor) and (unpacked := getattr(conv, UNPACKED, None)) is not None:
            view.copy_(unpacked)
