"""The sampler of one rollout: says again what a draft holds, then lets the engine go on, and writes all of it down as the next draft.

    episode --> Continuing --> engine       a rollout that goes on from a draft is an episode like any other: its environment starts
                    |                       anew and hears the same turns again, only that the first ones come from the draft
                    +--> draft file

Environments are deterministic given their task, so they answer as before; each prompt is compared with the draft's, id for id. Where
one differs, what was sampled after it belongs to another world, and the rollout starts from nothing.

A thought that has used up its budget is such a turn, too: cut off, closed by a marker of ours, and gone on with (rl_core/thinking.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rl_core.drafts import CUT_OFF, Draft, DraftFile, joined
from rl_core.seams import Sampler
from rl_core.thinking import MAX_CLOSED, THOUGHT_FULL
from rl_core.types import Completion, SamplingParams, VersionSpan

SNAPSHOT_S = 0.5
"""Seconds between two looks at the turns under way, and between two records of the draft file."""
SNAPSHOT_TOKENS = 16
"""New tokens of a turn below which a look writes nothing: they are sampled again faster than they are read."""


class Diverged(Exception):
    """The environment did not say again what it had said when the draft was sampled."""


class Continuing:
    """A Sampler. `file` is where drafts go, None for nowhere."""

    def __init__(self, engine: Sampler, file: DraftFile | None, group_id: str, index: int, draft: Draft | None = None) -> None:
        self.request_id = ""
        """Of the request under way; "" between turns."""
        self.seen = 0
        """Tokens of this request that are in the draft."""
        self._engine, self._file, self._group_id, self._index = engine, file, group_id, index
        self._said = deque(draft.completions if draft else ())
        self._turn = 0
        self._known: list[int] = []  # ids of all turns that ended
        self._before: Completion | None = None  # of the turn under way, what is older than its request

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str) -> Completion:
        self.request_id, self.seen = request_id, 0
        completion = await self._next(prompt_ids, params, request_id)
        self.request_id, self._before = "", None
        self._write(completion)
        self._known = [*completion.prompt_ids.tolist(), *completion.token_ids.tolist()]
        self._turn += 1
        return completion

    def snapshot(self, part: Completion) -> None:
        """What the engine has sampled of the turn under way after the tokens that it was `seen` to have."""
        if len(part.token_ids) < SNAPSHOT_TOKENS:
            return
        before = 0 if self._before is None else len(self._before.token_ids)
        if self.seen == 0:
            self._write(part if self._before is None else joined(self._before, part))
        else:
            self._write(part, start=before + self.seen)
        self.seen += len(part.token_ids)

    async def _next(self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str) -> Completion:
        if not self._said:
            return await self._sample(prompt_ids, params, request_id, None)
        said = self._said.popleft()
        if said.prompt_ids.tolist() != list(prompt_ids):
            raise Diverged(f"{self._group_id}-{self._index}: the prompt of turn {self._turn} is not the one that was answered before")
        return await self._sample(prompt_ids, params, request_id, said) if said.finish_reason == CUT_OFF else said

    async def _sample(self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str, so_far: Completion | None) -> Completion:
        """What is left of a turn, in one request; and one more behind each thought that we close."""
        number = 0
        while True:
            if so_far is not None and (so_far := settled(so_far, params)).finish_reason == "length":
                return so_far
            known = [] if so_far is None else so_far.token_ids.tolist()
            self._before, self.seen = so_far, 0
            self.request_id = f"{request_id}.{number}" if number else request_id
            part = await self._engine.sample([*prompt_ids, *known], part_params(params, known, number), request_id=self.request_id)
            so_far = part if so_far is None else joined(so_far, part)
            if part.finish_reason != THOUGHT_FULL:
                return so_far
            so_far, number = replace(so_far, finish_reason=CUT_OFF), number + 1

    def _write(self, completion: Completion, *, start: int = 0) -> None:
        if self._file is not None:
            known = len(self._known)
            extends = start > 0 or completion.prompt_ids[:known].tolist() == self._known
            self._file.add(self._group_id, self._index, self._turn, completion, known=known if extends else 0, start=start)


def part_params(params: SamplingParams, known: Sequence[int], number: int) -> SamplingParams:
    """Sampling of a turn's rest behind its `known` ids: within what is left of its budgets, and not with the same dice again."""
    seed = params.seed if params.seed is None or not number else (params.seed + 15_485_863 * number) % 2**31
    thinking = params.thinking.after(known) if params.thinking is not None else None
    return replace(params, max_tokens=params.max_tokens - len(known), seed=seed, thinking=thinking)


def settled(so_far: Completion, params: SamplingParams) -> Completion:
    """A turn that was cut off, its thought closed if that is full; with the finish reason "length" if nothing may follow."""
    room = params.max_tokens - len(so_far.token_ids)
    if room > 0 and params.thinking is not None and params.thinking.after(so_far.token_ids.tolist()).full:
        if len(so_far.forced) == MAX_CLOSED:
            return replace(so_far, finish_reason="length")
        so_far, room = closed(so_far, params.thinking.close_id), room - 1
    return so_far if room > 0 else replace(so_far, finish_reason="length")


def closed(part: Completion, close_id: int) -> Completion:
    """`part` of a turn, with the marker that ends its thought behind it. The policy reads it, and did not sample it."""
    mark = Completion(
        prompt_ids=part.prompt_ids[:0],
        token_ids=np.array([close_id], np.int32),
        logprobs=np.zeros(1, np.float32),
        spans=(VersionSpan(start=0, stop=1, version=part.spans[-1].version),),
        finish_reason=CUT_OFF,
        forced=(0,),
    )
    return joined(part, mark)
