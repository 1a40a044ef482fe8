"""The objective written out once more, one token at a time in plain floats, gradients by hand. Shares no code with `learner`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """Logprobs in nats: train, proximal, behaviour, reference."""

    p: float
    q: float
    b: float
    f: float


@dataclass(frozen=True)
class Settings:
    importance: str
    low: float
    high: float
    policy_loss: str
    clip_low: float
    clip_high: float
    kl_weight: float


def losses_and_gradients(trajectories: Sequence[tuple[float, Sequence[Token]]], s: Settings) -> list[tuple[float, float, bool]]:
    """(loss, its derivative by the train logprob, masked or capped) of every token; a trajectory is (advantage, tokens)."""
    return [_token(t, tokens, advantage, s) for advantage, tokens in trajectories for t in tokens]


def _token(t: Token, tokens: Sequence[Token], advantage: float, s: Settings) -> tuple[float, float, bool]:
    w, touched = _weight(t, tokens, advantage, s)
    r = math.exp(t.p - t.q)
    if s.policy_loss == "cispo":
        c = min(max(r, 1 - s.clip_low), 1 + s.clip_high)
        loss, gradient = -c * advantage * t.p, -c * advantage
    else:
        ratio = r if s.policy_loss == "ppo" else math.exp(sum(x.p - x.q for x in tokens) / len(tokens))
        if advantage >= 0:
            bound = ratio > 1 + s.clip_high
            loss = -min(ratio, 1 + s.clip_high) * advantage
        else:
            bound = ratio < 1 - s.clip_low
            loss = -max(ratio, 1 - s.clip_low) * advantage
        gradient = 0.0 if bound else -ratio * advantage
    if s.kl_weight:
        loss += s.kl_weight * r * (math.exp(t.f - t.p) - 1 - (t.f - t.p))
        gradient += s.kl_weight * r * (t.p - t.f)
    return w * loss, w * gradient, touched


def _weight(t: Token, tokens: Sequence[Token], advantage: float, s: Settings) -> tuple[float, bool]:
    """(weight, whether the rule masked or capped the token)."""
    now, then = math.exp(t.p - t.b), math.exp(t.q - t.b)
    if s.importance == "none":
        return 1.0, False
    if s.importance == "truncated":
        return min(then, s.high), then > s.high
    if s.importance == "dppo":
        moved = math.exp(t.p) - math.exp(t.b)
        out = moved > s.high if advantage > 0 else moved < s.low if advantage < 0 else False
        return (0.0, True) if out else (then, False)
    if s.importance == "masked":
        measure, weight = now, then
    elif s.importance == "icepop":
        measure, weight = then, then
    elif s.importance == "sequence_mask":
        measure = math.exp(sum(x.p - x.b for x in tokens))
        weight = math.exp(sum(x.q - x.b for x in tokens))
    elif s.importance == "geometric_mask":
        measure, weight = math.exp(sum(x.p - x.b for x in tokens) / len(tokens)), then
    else:
        raise AssertionError(s.importance)
    return (weight, False) if s.low <= measure <= s.high else (0.0, True)
