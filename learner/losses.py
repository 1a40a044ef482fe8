"""The policy loss, as pure functions of flat tensors over trained tokens [T].

For a token with advantage A, train logprob p (with gradient), proximal logprob q, importance weight w (`learner/importance.py`)
and r = exp(p - q):

    ppo      - w min(r A, clip(r, 1 - low, 1 + high) A)
    gspo     - w min(s A, clip(s, 1 - low, 1 + high) A),     s = exp(mean over the trajectory of (p - q)), gradient as s grad p
    cispo    - w sg(clip(r, 1 - low, 1 + high)) A p

    and with a reference policy of logprob f:    + kl_weight w r k3(f - p),     k3(x) = exp(x) - 1 - x

The sum over tokens is divided by the number of trained tokens of the whole batch, over all ranks and microbatches, masked
ones included (token-level mean, Yu et al. 2025, DAPO): a long answer weighs as many tokens as it has, and packing changes nothing.
(GSPO's paper takes a mean over trajectories instead, in which an answer weighs the same whatever its length.)

The proximal policy is where the clip is centred.

    recomputed   the learner's own policy at the start of the step; w then corrects for everything between it and the sampler:
                 Hilton et al. 2022, "Batch size-invariance for policy optimization" (decoupled PPO); Fu et al. 2025, AReaL.
                 We take one optimizer step per batch, so r = s = 1 in value, the clip binds nowhere, and the gradient is - w A grad p
                 for all three rules. No forward pass is spent on it.
    behaviour    the policy that sampled, as in the papers of PPO, GSPO and CISPO; w is then 1 for a token that counts, and the
                 clip (or the clipped weight) is the correction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.importance import MAX_LOG_RATIO, Tokens, Weights, exp, importance_weights
from rl_core.config import LearnerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """Loss of T tokens, not yet weighted, summed or normalised."""

    loss: Tensor  # [T] with gradient
    pull: Tensor  # [T] c, where the gradient of the loss is - c A grad p
    clipped: Tensor  # [T] bool: the clip bound here (ppo, gspo: no gradient; cispo: a smaller one)


def ppo(tokens: Tokens, low: float, high: float) -> PolicyLoss:
    """Schulman et al. 2017, PPO. Unequal bounds are "clip-higher" of Yu et al. 2025, DAPO, whose 0.2 and 0.28 are the defaults."""
    return _clipped_surrogate(exp(tokens.train - tokens.proximal.detach()), tokens.advantages, low, high)


def gspo(tokens: Tokens, low: float, high: float) -> PolicyLoss:
    """Zheng et al. 2025, "Group sequence policy optimization", in its token form: one ratio for all tokens of a trajectory.

    Noise of single tokens averages out of the ratio, so the bounds are tight: 3e-4 and 4e-4, as in the paper.
    """
    sequence = exp(tokens.mean_of_rows(tokens.train.detach() - tokens.proximal.detach()))
    return _clipped_surrogate(sequence * (tokens.train - tokens.train.detach()).exp(), tokens.advantages, low, high)


def cispo(tokens: Tokens, low: float, high: float) -> PolicyLoss:
    """MiniMax 2025, MiniMax-M1: the weight is clipped, not the update, so that rare tokens at which reasoning turns keep a gradient.

    low = 1 is no lower bound, as in the paper. high = 4 is within the range that Khatri et al. 2025 (ScaleRL) found to make little
    difference.
    """
    ratio = exp(tokens.train.detach() - tokens.proximal.detach())
    weight = ratio.clamp(1 - low, 1 + high)
    return PolicyLoss(loss=-weight * tokens.advantages * tokens.train, pull=weight, clipped=weight != ratio)


LOSSES: Mapping[str, Callable[[Tokens, float, float], PolicyLoss]] = {"ppo": ppo, "gspo": gspo, "cispo": cispo}
"""By name: tokens, clip_low, clip_high -> loss."""


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> PolicyLoss:
    """- min(ratio A, clip(ratio) A): pessimistic, so that moving back towards the proximal policy is never clipped."""
    clipped_ratio = ratio.clamp(1 - low, 1 + high)
    clipped = (clipped_ratio * advantages < ratio * advantages).detach()
    surrogate = torch.where(clipped, clipped_ratio.detach() * advantages, ratio * advantages)
    return PolicyLoss(loss=-surrogate, pull=torch.where(clipped, torch.zeros_like(ratio), ratio).detach(), clipped=clipped)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLosses:
    """All that is known of T tokens after the loss."""

    loss: Tensor  # [T] with gradient, weighted, KL to the reference included
    pull: Tensor  # [T] c, where the gradient of the policy loss is - c A grad p: the whole weight that the token trains with
    weights: Weights
    clipped: Tensor  # [T] bool
    reference_kl: Tensor | None  # [T] k3 estimate of KL(train, reference) in nats, without gradient; None without a reference


def token_losses(tokens: Tokens, config: LearnerConfig, reference: Tensor | None = None) -> TokenLosses:
    """The whole objective of T tokens. `reference`: their logprobs [T] under the reference policy."""
    if config.policy_loss not in LOSSES:
        raise ValueError(f"policy loss {config.policy_loss!r}, wanted one of {', '.join(LOSSES)}; set learner.policy_loss")
    low, high = config.importance.bounds
    weights = importance_weights(tokens, rule=config.importance.rule, low=low, high=high)
    policy = LOSSES[config.policy_loss](tokens, *config.clip)
    loss, kl = policy.loss, None
    if reference is not None:
        kl = k3(reference - tokens.train)
        loss = loss + config.kl_weight * exp(tokens.train - tokens.proximal.detach()) * kl
        kl = kl.detach()
    counts = weights.weight > 0  # a loss that is not a number must not reach the sum by 0 * nan
    return TokenLosses(
        loss=torch.where(counts, weights.weight * loss, torch.zeros_like(loss)),
        pull=torch.where(counts, weights.weight * policy.pull, torch.zeros_like(policy.pull)),
        weights=weights,
        clipped=policy.clipped & counts,
        reference_kl=kl,
    )


def k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - 1 - x: never negative, and on average over tokens of policy P, with x = log Q - log P, the KL(P, Q).

    Schulman 2020, "Approximating KL divergence". As a loss by itself its gradient is that of KL(Q, P); times the importance ratio
    exp(p - q) its gradient is ratio * (log P - log Q) * grad p, that of KL(P, Q) (DeepSeek-AI 2025, DeepSeek-V3.2).
    """
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - 1 - log_ratio
