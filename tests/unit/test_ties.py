"""A tie of experts is seen, from where it is on and no sooner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter

from tests.integration.ties import TIE, choices_of, mean_of, worst


def test_positions_count_as_decided_up_to_the_first_tie() -> None:
    router = NemotronHTopkRouter(NemotronHConfig(hidden_size=4, n_routed_experts=4, num_experts_per_tok=2))
    router.weight.data = torch.eye(4)
    clear = [3.0, 2.0, 1.0, 0.0]
    within_the_chosen, of_the_last_chosen, not_quite = [3.0, 3.0, 1.0, 0.0], [3.0, 1.0, 1.0, 0.0], [3.0, 1.0, 1.0 - 40 * TIE, 0.0]
    with choices_of(torch.nn.ModuleList([router])) as choices:
        router(torch.tensor([clear, within_the_chosen, not_quite, of_the_last_chosen, clear]))
    assert choices.decided().tolist() == [True, True, True, False, False]


def test_errors_behind_a_tie_do_not_count_and_most_must() -> None:
    assert worst([np.array([0.1, -0.3, np.nan]), np.array([0.2])]) == 0.3
    assert mean_of([np.array([0.1, -0.3, np.nan])]) == pytest.approx(0.2)
    with pytest.raises(AssertionError, match="1 of 3 tokens"):
        worst([np.array([0.1, np.nan, np.nan])])
