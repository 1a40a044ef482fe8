"""Correction for training on what another policy sampled: a weight for each token, by one of a few rules.

For a token of trajectory y with train logprob p, proximal logprob q (of the policy at the start of the optimizer step) and
behaviour logprob b (of the weights, engine and sampler that sampled it), all in nats:

    rule             token counts while                         weight while it counts            bounds by default
    masked           low <= exp(p - b) <= high                  exp(q - b)                        0.2    5
    icepop           low <= exp(q - b) <= high                  exp(q - b)                        0.5    5
    truncated        always                                     min(exp(q - b), high)             -      2
    sequence_mask    low <= exp(sum_y (p - b)) <= high          exp(sum_y (q - b))                0      3
    geometric_mask   low <= exp(mean_y (p - b)) <= high         exp(q - b)                        0.99   1.01
    dppo             not (A > 0 and e^p - e^b > high), and
                     not (A < 0 and e^p - e^b < low)            exp(q - b)                        -0.2   0.2
    none             always                                     1

A token that does not count contributes nothing to the gradient, and still counts in the normaliser, which is the number of trained
tokens of the whole batch: leaving it out there would need a second pass over all ranks, and would make the others louder
the more tokens a fault of the engine breaks. Weights carry no gradient.

With one optimizer step per batch, which is what the learner does, the recomputed proximal policy is the current one: p = q in
value. Then masked and icepop differ by their bounds alone.

What masking assumes: a token far outside the trust region is a fault (a kernel, a router that chose other experts, weights that
are too old) more often than news, and its gradient would be noise of high weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped to this before exp, so that a single broken logprob cannot make an infinity. exp(20) is far outside any bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """T trained tokens of R trajectories; those of one trajectory are all here. Logprobs in nats."""

    train: Tensor  # [T] p, the only one with a gradient
    proximal: Tensor  # [T] q, finite
    behaviour: Tensor  # [T] b
    advantages: Tensor  # [T]
    rows: Tensor  # [T] int64, 0 ... R - 1: the trajectory
    num_rows: int

    def mean_of_rows(self, values: Tensor) -> Tensor:
        """[T] -> [T]: each token gets the mean over its trajectory. With a gradient if `values` has one."""
        counts = torch.bincount(self.rows, minlength=self.num_rows).clamp(min=1)
        return self.sum_of_rows(values) / counts[self.rows].to(values.dtype)

    def sum_of_rows(self, values: Tensor) -> Tensor:
        """[T] -> [T]: each token gets the sum over its trajectory, added up in float64: 32k small terms."""
        sums = torch.zeros(self.num_rows, dtype=torch.float64, device=values.device).index_add(0, self.rows, values.double())
        return sums[self.rows].to(values.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Importance weights of T tokens, without gradient."""

    ratio: Tensor  # [T] exp(train - behaviour), whatever the rule
    weight: Tensor  # [T] what multiplies the token's loss
    kept: Tensor  # [T] bool; False where the rule changed the weight to 0 or capped it


def masked(tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Masked importance sampling, on tokens: those whose train/behaviour ratio leaves [low, high] contribute nothing.

    Liu et al. 2025, "When speed kills stability" (token-level MIS); Prime Intellect 2025, INTELLECT-3. Bounds: 0.2 to 5, the same
    distance both ways in log ratio; our choice.
    """
    return _within(exp(tokens.train - tokens.behaviour), low, high), exp(tokens.proximal - tokens.behaviour)


def icepop(tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The same on the proximal/behaviour ratio: of two engines rather than of two steps of training.

    Ling team 2025, IcePop (Ring-1T); bounds of the paper, 0.5 to 5. Needs the recomputed proximal policy.
    """
    ratio = exp(tokens.proximal - tokens.behaviour)
    return _within(ratio, low, high), ratio


def truncated(tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Truncated importance sampling: the weight is capped at `high`; `low` is not used. A biased estimate of bounded variance.

    Ionides 2008; V-trace, Espeholt et al. 2018; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training" (cap 2).
    """
    del low
    ratio = exp(tokens.proximal - tokens.behaviour)
    return ratio <= high, ratio.clamp(max=high)


def sequence_mask(tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The weight is the ratio of the whole trajectory, unbiased; trajectories whose ratio leaves [low, high] are dropped whole.

    Liu et al. 2025, "When speed kills stability" (sequence-level MIS). A product over tokens: for long answers nearly all are
    dropped. Bounds: 0 to 3, TRL's default.
    """
    return (
        _within(exp(tokens.sum_of_rows(tokens.train - tokens.behaviour)), low, high),
        exp(tokens.sum_of_rows(tokens.proximal - tokens.behaviour)),
    )


def geometric_mask(tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Trajectories whose mean log ratio leaves [log low, log high] are dropped whole, whatever their length; others keep token ratios.

    Liu et al. 2025, "When speed kills stability"; the seq-mask-tis of NeMo-RL. Bounds: 0.99 to 1.01, SkyRL's default; the mean log
    ratio estimates - KL(behaviour, train) per token, so weights that are some versions old may need wider ones.
    """
    mean = tokens.mean_of_rows(tokens.train - tokens.behaviour)
    return _within(exp(mean), low, high), exp(tokens.proximal - tokens.behaviour)


def dppo(tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Tokens already moved further than a probability of [low, high], and pushed further still, contribute nothing.

    Qi et al. 2026, "Rethinking the trust region in LLM reinforcement learning" (DPPO, binary total variation). A difference of
    probabilities does not punish rare tokens, whose ratios are large for nothing. Bounds: -0.2 to 0.2, prime-rl's default.
    """
    moved = tokens.train.exp() - tokens.behaviour.exp()
    too_far = ((tokens.advantages > 0) & (moved > high)) | ((tokens.advantages < 0) & (moved < low))
    return ~too_far, exp(tokens.proximal - tokens.behaviour)


def none(tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """No correction: unbiased on policy alone."""
    del low, high
    return torch.ones_like(tokens.train, dtype=torch.bool), torch.ones_like(tokens.train)


CAPS = {"truncated"}
"""Rules that keep the token where they say that it does not count as it is."""

RULES: Mapping[str, Callable[[Tokens, float, float], tuple[Tensor, Tensor]]] = {
    "masked": masked, "icepop": icepop, "truncated": truncated, "sequence_mask": sequence_mask, "geometric_mask": geometric_mask,
    "dppo": dppo, "none": none,
}  # fmt: skip
"""By name: tokens, low, high -> (counts [T] bool, weight [T])."""


@torch.no_grad()
def importance_weights(tokens: Tokens, *, rule: str, low: float, high: float) -> Weights:
    """Weights of the tokens under a rule. A token whose behaviour or train logprob is not finite does not count under any."""
    if rule not in RULES:
        raise ValueError(f"importance rule {rule!r}, wanted one of {', '.join(RULES)}; set learner.importance.rule")
    kept, weight = RULES[rule](tokens, low, high)
    known = tokens.behaviour.isfinite() & tokens.train.isfinite()
    counts = known if rule in CAPS else known & kept
    return Weights(
        ratio=torch.where(known, exp(tokens.train - tokens.behaviour), 1.0),
        weight=torch.where(counts, weight, torch.zeros_like(weight)),
        kept=kept & known,
    )


def exp(log_ratio: Tensor) -> Tensor:
    """exp of a clamped log ratio; see MAX_LOG_RATIO."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _within(ratio: Tensor, low: float, high: float) -> Tensor:
    """False also where the ratio is not a number."""
    return (ratio >= low) & (ratio <= high)
