"""Where the last bit decides which expert a token goes to, two right computations of one policy go different ways, and stay apart.

Seen: a router's second and third score 1.3e-7 apart in float64, and logprobs 0.01 to 5 nats apart from there on. It befalls one of some
hundred thousand tokens of a random model in float32. What stands behind such a token says nothing about either computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from learner.model import PolicyModel
from rl_core.types import Completion

TIE = 1e-6
"""Of scores between 0 and 1; ten roundings in float32."""


class Choices:
    """What the routers of a model with one group of experts decide in a pass over one sequence."""

    def __init__(self) -> None:
        self._gaps: list[Tensor] = []

    def sees(self, router: Any, asked: tuple[Tensor]) -> None:
        assert router.num_group == 1, "a tie between groups is another one"
        hidden = asked[0].reshape(-1, router.hidden_dim).double()
        scores = linear(hidden, router.weight.double()).sigmoid() + router.e_score_correction_bias
        best = scores.topk(router.top_k + 1, dim=-1).values
        self._gaps.append(best[:, -2] - best[:, -1])

    def decided(self) -> NDArray[np.bool_]:
        """[positions] whether no choice up to and with this position was a tie."""
        assert self._gaps, "no router was asked"
        return np.asarray(torch.stack(self._gaps).min(0).values.cummin(0).values > TIE)


@contextmanager
def choices_of(model: nn.Module) -> Iterator[Choices]:
    choices = Choices()
    hooks = [m.register_forward_pre_hook(choices.sees) for m in model.modules() if type(m).__name__ == "NemotronHTopkRouter"]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


def logprob_errors(model: PolicyModel, c: Completion) -> NDArray[np.float64]:
    """[T] by how much the engine's logprobs differ from the learner's, in nats; NaN behind a tie."""
    ids, start = torch.from_numpy(np.concatenate([c.prompt_ids, c.token_ids]).astype(np.int64))[None], len(c.prompt_ids)
    with torch.no_grad(), choices_of(model) as choices:
        logprobs, _ = model.token_logprobs(model(ids)[0, start - 1 : -1], ids[0, start:])
    return np.where(choices.decided()[start - 1 : -1], logprobs.double().numpy() - c.logprobs, np.nan)


def worst(errors: Iterable[NDArray[np.float64]]) -> float:
    """The largest of errors that are NaN behind a tie."""
    return float(comparable(errors).max())


def mean_of(errors: Iterable[NDArray[np.float64]]) -> float:
    return float(comparable(errors).mean())


def comparable(errors: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Their absolute values, of which most must be numbers."""
    together = np.concatenate(list(errors))
    known = np.abs(together[~np.isnan(together)])
    assert 2 * len(known) > len(together), f"{len(known)} of {len(together)} tokens stand before a tie, wanted more than half"
    return known
