"""A cap on the reasoning tokens of a turn: counted where tokens are sampled, closed by us where the policy does not.

    <think> a b c | </think> 4 6 <|im_end|>       budget 3: the engine stops after c, we write </think>, the engine goes on
                    ^ ours: context for what follows, without a behaviour logprob, never trained

Reasoning tokens are those between the markers; the markers cost nothing. The budget is of the whole turn: a thought that is opened
once more has what the earlier ones left. With a budget of 0 every thought is closed at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

MAX_CLOSED = 4
"""Thoughts of one turn that we close. A policy that opens yet another is not going to answer, and each costs a prefill: the turn ends."""

THOUGHT_FULL = "thought full"
"""The finish reason of what an engine sampled up to the cap. Only between an engine and the sampler that goes on with the turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """The cap of one turn, and how much of it is used."""

    budget: int  # reasoning tokens of the turn
    open_id: int  # <think>
    close_id: int  # </think>
    used: int = 0  # reasoning tokens so far
    inside: bool = False  # a thought is open

    @property
    def full(self) -> bool:
        """Another token would be one too many: the thought must be closed now."""
        return self.inside and self.used >= self.budget

    def after(self, ids: Iterable[int]) -> Thinking:
        """Once `ids` are part of the turn as well."""
        used, inside = self.used, self.inside
        for i in ids:
            if i == self.close_id:
                inside = False
            elif i == self.open_id and not inside:
                inside = True
            else:
                used += inside
        return replace(self, used=used, inside=inside)


def thinking_tokens(ids: Iterable[int], open_id: int, close_id: int) -> int:
    """Reasoning tokens of a turn, whatever its cap."""
    return Thinking(budget=0, open_id=open_id, close_id=close_id).after(ids).used
