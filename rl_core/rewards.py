"""Reward composition: from named components to the one number that trains, for all rollouts of a group at once.

    reward = gates * sum(weight * component)

    role      what it does
    weight    weight * component is added; with `normalise` the component is first made a z-score: over the group (as in GDPO), or over
              all rollouts of the environment that this worker has seen
    gate      the sum is multiplied by the component; with `at_least`, by 1 from that value on and by 0 below it. With gates alone the
              reward is their product
    metric    recorded only

A gate never makes a reward better. A rollout that it stops earns 0, or what the worst rollout that passed earned, whichever is less:
where lengths are punished, an answer that fails its gate is so never the better way out.

Components are stored as they were, never weighted; the environment's own reward is among them as "verified".
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rl_core.types import Group, Rollout, Status

Values = NDArray[np.float64]

VERIFIED = "verified"
"""Name of the component that keeps the environment's own reward."""
DERIVED = (VERIFIED, "tokens", "turns")
"""Components that every rollout has: the environment's own reward, sampled tokens, assistant turns."""
ROLES = ("weight", "gate", "metric")
NORMALISATIONS = ("none", "group", "running")
EPSILON = 1e-6
"""Keeps a z-score defined where all values are equal; it is then 0."""


class RewardError(ValueError):
    """The configured composition does not fit the environment's verdicts. The message is one sentence for the run's user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRule:
    """What one named component does to the reward."""

    name: str
    role: str = "weight"
    weight: float = 1.0
    at_least: float = 0.0  # of a gate: what it takes to pass; 0 multiplies by the component itself
    normalise: str = "none"


@dataclass(slots=True)
class RunningScale:
    """Mean and variance of one component so far (Welford 1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations

    def add(self, values: Values) -> None:
        for value in values:
            self.count += 1
            step = float(value) - self.mean
            self.mean += step / self.count
            self.squares += step * (float(value) - self.mean)

    def z(self, values: Values) -> Values:
        """The values in standard deviations from the mean."""
        return (values - self.mean) / (math.sqrt(self.squares / max(self.count, 1)) + EPSILON)


@dataclass(slots=True)
class Composer:
    """Composes the groups of one environment; keeps the running scales of its components."""

    scales: dict[str, RunningScale] = field(default_factory=dict)

    def compose(self, group: Group, rules: Sequence[RewardRule]) -> Group:
        """`group` with composed rewards. Only rollouts whose status trains have one; their verdicts hold every component named."""
        paying = [rule for rule in rules if rule.role != "metric"]
        values = {rule.name: np.array([value_of(r, rule.name) for r in group.trainable], np.float64) for rule in paying}
        rewards = iter(self.rewards(paying, values, len(group.trainable)))
        rollouts = [_with_reward(r, float(next(rewards)), rules) if r.verdict.status.trains else r for r in group.rollouts]
        return replace(group, rollouts=tuple(rollouts))

    def rewards(self, rules: Sequence[RewardRule], values: Mapping[str, Values], count: int) -> Values:
        """[n] from [n] of each component."""
        factor = np.ones(count)
        for rule in rules:
            if rule.role == "gate":
                factor = factor * (values[rule.name] >= rule.at_least if rule.at_least else values[rule.name])
        passed = factor > 0
        terms = [rule.weight * self._scaled(rule, values[rule.name], passed) for rule in rules if rule.role == "weight"]
        total = np.sum(terms, axis=0) if terms else np.ones(count)
        rewards = np.where(total >= 0, total * factor, total)
        floor = min(0.0, float(rewards[passed].min())) if passed.any() else 0.0
        return np.where(passed, rewards, floor)

    def _scaled(self, rule: RewardRule, values: Values, passed: NDArray[np.bool_]) -> Values:
        """Rollouts that a gate stops move no scale."""
        if rule.normalise == "none" or not passed.any():
            return values
        scale = RunningScale() if rule.normalise == "group" else self.scales.setdefault(rule.name, RunningScale())
        scale.add(values[passed])
        return scale.z(values)


def value_of(rollout: Rollout, name: str) -> float:
    """One component of a rollout. What ended early may lack one (it counts 0); an ordinary verdict may not. Raises RewardError."""
    known = derived(rollout) | dict(rollout.verdict.components)
    if name not in known:
        if rollout.verdict.status is not Status.OK:
            return 0.0
        raise RewardError(unknown_component(rollout.env, name, known))
    value = float(known[name])
    if not math.isfinite(value):
        raise RewardError(f"environment {rollout.env!r} gave the component {name!r} the value {value}; wanted a finite number")
    return value


def derived(rollout: Rollout) -> dict[str, float]:
    """The components that every rollout has."""
    own = rollout.verdict.reward
    return {VERIFIED: 0.0 if own is None else own, "tokens": float(rollout.num_sampled), "turns": float(len(rollout.completions))}


def unknown_component(env: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a component that the environment does not have."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
    return f"environments.{env}.rewards names the component {name!r}, which this environment does not have; {hint}"


def _with_reward(rollout: Rollout, reward: float, rules: Sequence[RewardRule]) -> Rollout:
    known = derived(rollout)
    named = {name: known[name] for name in (VERIFIED, *(rule.name for rule in rules)) if name in known}
    return replace(rollout, verdict=replace(rollout.verdict, reward=reward, components=named | dict(rollout.verdict.components)))
