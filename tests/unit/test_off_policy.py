"""Each rule learns where the uncorrected objective is led astray: an engine that hangs on old weights samples three rollouts of ten.

One parameter moves probability between a good answer (arm 0, reward 0.8) and the best one (arm 1, reward 1.0); arm 2 is worth
nothing. The old weights love arm 0, so their samples alone make arm 0 look like the way up: below, uncorrected training ends there.
Expectations are exact (all sequences, weighted by their probability): nothing here is random.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from learner.importance import RULES, Tokens
from learner.losses import LOSSES, token_losses
from rl_core.config import ImportanceConfig, LearnerConfig

DIRECTION = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
REWARD = torch.tensor([0.8, 1.0, 0.0], dtype=torch.float64)
OLD = torch.tensor([0.90, 0.07, 0.03], dtype=torch.float64).log()
SHARE_OLD = 0.3
LENGTH = 2
SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))  # [9, 2]
STEPS, RATE = 60, 5.0


def train(config: LearnerConfig) -> float:
    """Expected reward per token of the policy at the end."""
    logit = torch.zeros((), dtype=torch.float64)
    ids = torch.cat([SEQUENCES, SEQUENCES])
    rows = torch.arange(len(ids)).repeat_interleave(LENGTH)
    rewards = REWARD[ids].mean(1)
    for _ in range(STEPS):
        logit.requires_grad_()
        policy = (logit * DIRECTION).log_softmax(0)
        now = policy[ids].reshape(-1)
        behaviour = torch.cat([policy.detach()[SEQUENCES], OLD[SEQUENCES]])
        probability = behaviour.sum(1).exp() * torch.tensor([1 - SHARE_OLD, SHARE_OLD], dtype=torch.float64).repeat_interleave(
            len(SEQUENCES)
        )
        tokens = Tokens(
            train=now,
            proximal=now.detach() if config.proximal == "recomputed" else behaviour.reshape(-1),
            behaviour=behaviour.reshape(-1),
            advantages=(rewards - (probability * rewards).sum()).repeat_interleave(LENGTH),
            rows=rows,
            num_rows=len(ids),
        )
        loss = (token_losses(tokens, config).loss * probability.repeat_interleave(LENGTH)).sum()
        (gradient,) = torch.autograd.grad(loss, logit)
        logit = logit.detach() - RATE * gradient
    return float(((logit * DIRECTION).softmax(0) * REWARD).sum())


def config(rule: str, policy_loss: str = "ppo", proximal: str = "recomputed") -> LearnerConfig:
    """With the bounds that the rules have by default."""
    return LearnerConfig(policy_loss=policy_loss, proximal=proximal, importance=ImportanceConfig(rule=rule))


@pytest.mark.parametrize("policy_loss", list(LOSSES))
def test_without_correction_training_ends_at_the_worse_answer(policy_loss: str) -> None:
    assert train(config("none", policy_loss)) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("policy_loss", list(LOSSES))
@pytest.mark.parametrize("rule", [r for r in RULES if r != "none"])
def test_every_importance_rule_finds_the_best_answer(rule: str, policy_loss: str) -> None:
    assert train(config(rule, policy_loss)) > 0.97


@pytest.mark.parametrize("policy_loss", list(LOSSES))
@pytest.mark.parametrize("rule", ["none", "masked", "sequence_mask", "geometric_mask", "dppo"])
def test_so_does_every_policy_loss_that_is_centred_on_the_policy_that_sampled(rule: str, policy_loss: str) -> None:
    assert train(config(rule, policy_loss, "behaviour")) > 0.97
