"""The objective, as pure functions of flat tensors over trained tokens [T].

Token-level GRPO with decoupled importance correction. For a token with advantage A, train logprob p (with gradient),
proximal logprob q (of the policy at the start of the optimizer step) and behaviour logprob b (of the policy that sampled it):

    loss = - w(q, b) * min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A),        r = exp(p - q)

    w    corrects that the behaviour policy is not the proximal one: stale weights, and another implementation of the model.
         It carries no gradient.  Hilton et al. 2022, "Batch size-invariance for policy optimization" (decoupled PPO);
         Fu et al. 2025, AReaL.
    min  Schulman et al. 2017, PPO; unequal bounds are "clip-higher" of Yu et al. 2025, DAPO. We take one gradient step per
         batch, so the proximal policy is the current one and r = 1 in value: then the clip binds nowhere and the gradient is
         - w * A * grad p. The formula is kept general.

The sum over tokens is divided by the number of trained tokens of the whole batch, over all ranks and microbatches, masked
ones included (token-level mean, DAPO): a long answer weighs as many tokens as it has, and packing changes nothing.

Rules for w, of ratio = exp(q - b):

    masked       ratio where low <= ratio <= high, else 0     IcePop (Ling team 2025), masked importance sampling (Liu et al. 2025)
    truncated    min(ratio, high)                             Yao et al. 2025, truncated importance sampling; V-trace (Espeholt et al. 2018)
    none         1

Masking assumes that a token far outside the trust region is a fault (a kernel, a router that chose other experts, weights that
are too old) more often than news; its gradient would be noise of high weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped to this before exp, so that a single broken logprob cannot make an infinity. exp(20) is far outside any bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Importance weights of T tokens, without gradient."""

    ratio: Tensor  # [T] exp(proximal - behaviour)
    weight: Tensor  # [T] what multiplies the token's loss
    kept: Tensor  # [T] bool; False where the rule changed the weight to 0 or capped it


def masked(ratio: Tensor, low: float, high: float) -> Weights:
    """Tokens outside [low, high] contribute nothing. A ratio that is not a number is outside."""
    kept = (ratio >= low) & (ratio <= high)
    return Weights(ratio=ratio, weight=torch.where(kept, ratio, torch.zeros_like(ratio)), kept=kept)


def truncated(ratio: Tensor, low: float, high: float) -> Weights:
    """Weights are capped at `high`; `low` is not used."""
    del low
    return Weights(ratio=ratio, weight=ratio.clamp(max=high), kept=ratio <= high)


def none(ratio: Tensor, low: float, high: float) -> Weights:
    """No correction."""
    del low, high
    return Weights(ratio=ratio, weight=torch.ones_like(ratio), kept=torch.ones_like(ratio, dtype=torch.bool))


RULES: Mapping[str, Callable[[Tensor, float, float], Weights]] = {"masked": masked, "truncated": truncated, "none": none}


def importance_weights(proximal: Tensor, behaviour: Tensor, *, rule: str, low: float, high: float) -> Weights:
    """Weights of T tokens from their logprobs [T] in nats under the proximal and the behaviour policy."""
    if rule not in RULES:
        raise ValueError(f"importance rule {rule!r}, wanted one of {', '.join(RULES)}; set learner.importance.rule")
    log_ratio = (proximal.detach() - behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return RULES[rule](log_ratio.exp(), low, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """Loss of T tokens, not yet summed or normalised."""

    loss: Tensor  # [T] with gradient
    clipped: Tensor  # [T] bool: the clip bound, so the token has no gradient


def policy_loss(logprobs: Tensor, proximal: Tensor, weight: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> PolicyLoss:
    """- weight * min(r A, clip(r) A) for each of T tokens; all arguments are [T]. Only `logprobs` gets a gradient."""
    ratio = (logprobs - proximal.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    clipped = (clipped_ratio * advantages < ratio * advantages).detach()
    return PolicyLoss(loss=-weight.detach() * surrogate, clipped=clipped)


def k3(log_ratio: Tensor) -> Tensor:
    """Estimate of KL(behaviour || proximal) from tokens of the behaviour policy: ratio - 1 - log ratio, never negative, unbiased.

    Schulman 2020, "Approximating KL divergence". log_ratio = proximal - behaviour, [T] in nats.
    """
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - 1 - log_ratio
