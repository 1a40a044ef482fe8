"""Learned rewards: what models say of a group's answers, beside what the environment verified.

    Group --> one Part per component: classifier, judge, pairwise judge --> scores or failures --> combined reward --> Group
                                                                                        \\-> length control, relative to the group

A component is asked about all answers of a group at once. It never turns a failure into a number: a rollout whose score is
missing becomes a verifier error and does not train. Trusted code alone answers for empty and for invalid answers: they earn nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from reward_models.framing import count_markup
from reward_models.length_control import LengthControl, length_control
from rl_core.rewards import VERIFIED, Composer, RewardRule
from rl_core.types import Group, Rollout, Status, Verdict

MAX_REASON_CHARS = 300

Role = Literal["weight", "gate", "metric"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a component gets to see of one rollout."""

    question: str
    """The conversation before the policy's last turn, as text."""
    text: str  # the last turn without its thought
    thought: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """No score, and why. Ours, never the policy's."""

    reason: str


Scores = Sequence[float | Failure]


class Component(Protocol):
    """One learned score for each answer of a group, in [0, 1]."""

    @property
    def version(self) -> str:
        """Which model, by what rules: goes into the verdict."""
        ...

    async def score(self, answers: Sequence[Answer]) -> Scores:
        """In the order of `answers`, none of which is empty. Bounded in time; raises nothing for what a model or an endpoint does."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A component and what its score does to the reward."""

    name: str
    component: Component
    role: Role = "weight"
    """What `rl_core.rewards` makes of the score; so also the next three."""
    weight: float = 1.0
    at_least: float = 0.0
    normalise: str = "none"
    needs_group: bool = False
    """Compares answers with each other: left out where a group has one rollout, as in evaluation."""

    @property
    def rule(self) -> RewardRule:
        return RewardRule(name=self.name, role=self.role, weight=self.weight, at_least=self.at_least, normalise=self.normalise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How an environment's reward is made: components of its verdict, the learned parts, length control on top."""

    parts: tuple[Part, ...] = ()
    components: tuple[RewardRule, ...] = ()
    """Of the environment's verdict. Where a group has one rollout, as in evaluation, the environment's own reward stands for them."""
    composer: Composer = field(default_factory=Composer)
    verified_role: Role = "weight"
    verified_weight: float = 1.0
    length: LengthControl | None = None
    timeout_s: float = 120.0
    """Bound on all components of one group."""
    count_tokens: Callable[[str], int] = len
    """Length of a thought or an answer, for length control."""

    def rules(self, parts: Sequence[Part], *, alone: bool) -> list[RewardRule]:
        """What each component does to the reward of a group, or of a rollout that is alone in its group."""
        verified = RewardRule(name=VERIFIED, role=self.verified_role, weight=self.verified_weight)
        own = [RewardRule(name=VERIFIED)] if alone and self.components else [verified, *self.components]
        return [*own, *(p.rule for p in parts)]


async def reward_group(group: Group, recipe: Recipe) -> Group:
    """`group` with combined rewards. Rollouts that do not train stay as they are."""
    parts = [p for p in recipe.parts if len(group.rollouts) > 1 or not p.needs_group]
    asked = {i: answer for i, r in enumerate(group.rollouts) if r.verdict.status is Status.OK and (answer := answer_of(r)).text.strip()}
    scores = await asyncio.gather(*(_ask(p, list(asked.values()), recipe.timeout_s) for p in parts))
    by_rollout: dict[int, dict[str, float | Failure]] = {
        i: {p.name: column[place] for p, column in zip(parts, scores, strict=True)} for place, i in enumerate(asked)
    }
    scored = [
        _scored(r.verdict, by_rollout.get(i, {p.name: 0.0 for p in parts}), parts, asked.get(i)) for i, r in enumerate(group.rollouts)
    ]
    complete = replace(group, rollouts=tuple(replace(r, verdict=v) for r, v in zip(group.rollouts, scored, strict=True)))
    composed = recipe.composer.compose(complete, recipe.rules(parts, alone=len(group.rollouts) == 1))
    verdicts = [r.verdict for r in composed.rollouts]
    if recipe.length is not None and len(group.rollouts) > 1:
        verdicts = _shortened(group.rollouts, verdicts, recipe, recipe.length)
    return replace(group, rollouts=tuple(replace(r, verdict=v) for r, v in zip(group.rollouts, verdicts, strict=True)))


def answer_of(rollout: Rollout) -> Answer:
    """The last turn, and what stands before it."""
    said = rollout.messages
    last = max((i for i, m in enumerate(said) if m.role == "assistant"), default=len(said))
    question = "\n".join(m.content if m.role == "user" and last == 1 else f"[{m.role}] {m.content}" for m in said[:last])
    turn = rollout.turns[-1] if rollout.turns else None
    return Answer(question=question, text=turn.content if turn else "", thought=turn.thought if turn else "")


async def _ask(part: Part, answers: Sequence[Answer], seconds: float) -> Scores:
    """One score or failure for each answer, in bounded time."""
    if not answers:
        return []
    try:
        scores = await asyncio.wait_for(part.component.score(answers), seconds)
    except TimeoutError:
        return [Failure(reason=f"no score within {seconds:g} s")] * len(answers)
    assert len(scores) == len(answers), f"component {part.name} gave {len(scores)} scores for {len(answers)} answers"
    return scores


def _scored(verdict: Verdict, scores: Mapping[str, float | Failure], parts: Sequence[Part], answer: Answer | None) -> Verdict:
    """The environment's verdict with the parts' scores among its components; a verifier error where one that counts is missing."""
    if verdict.reward is None:
        return verdict
    evidence = dict(verdict.evidence)
    version = " ".join([verdict.verifier_version, *(f"{p.name}={p.component.version}" for p in parts)])
    if answer is not None and (marks := count_markup(answer.text)):
        evidence["judge_markup"] = str(marks)
    failures = {name: score.reason for name, score in scores.items() if isinstance(score, Failure)}
    values = {name: score for name, score in scores.items() if not isinstance(score, Failure)}
    components = {**verdict.components, VERIFIED: verdict.reward, **values}
    if any(p.name in failures for p in parts if p.role != "metric"):
        text = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        evidence["error"] = text[:MAX_REASON_CHARS]
        return replace(
            verdict, status=Status.VERIFIER_ERROR, reward=None, components=components, evidence=evidence, verifier_version=version
        )
    return replace(verdict, components=components, evidence=evidence, verifier_version=version)


def _shortened(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], recipe: Recipe, control: LengthControl) -> list[Verdict]:
    """Length control over the rollouts that train. No answer falls below 0, what an invalid one earns."""
    able = [i for i, v in enumerate(verdicts) if v.status is Status.OK and v.reward is not None]
    answers = [answer_of(rollouts[i]) for i in able]
    changes = length_control(
        [verdicts[i].reward or 0.0 for i in able],
        [recipe.count_tokens(a.thought) for a in answers],
        [recipe.count_tokens(a.text.strip()) for a in answers],
        control,
    )
    changed = list(verdicts)
    for i, change in zip(able, changes, strict=True):
        verdict = verdicts[i]
        reward = max(0.0, (verdict.reward or 0.0) + change)
        changed[i] = replace(verdict, reward=reward, components={**verdict.components, "length": change})
    return changed
