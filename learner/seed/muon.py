"""Muon: steps for hidden matrices whose singular values are all alike. Learns more from each token than Adam does at this size.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Per matrix W [m, n], momentum M:

    M <- beta M + G        W <- W - lr * sqrt(max(1, m / n)) * orthogonalize(G + beta M)

`torch.optim.Muon` takes single matrices only; the experts of a layer are one stack [E, m, n], which this one orthogonalises
matrix by matrix in one batch. Embeddings, the LM head, routers, convolutions and vectors are left to Adam.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration x -> a x + b x^3 + c x^5, steep at zero: five rounds bring singular values near 1."""
ROUNDS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """[..., m, n] -> the nearest matrices with singular values near 1, of the same shape."""
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For parameters [m, n] or stacks of them [E, m, n]."""

    def __init__(self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                moment = state.setdefault("momentum", torch.zeros_like(parameter))
                moment.mul_(group["momentum"]).add_(parameter.grad)
                update = orthogonalize(parameter.grad + group["momentum"] * moment)
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
