"""A rollout goes on where its worker died: same ids, each token under the version and logprob that sampled it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rl_core.drafts import Draft, DraftFile, read_drafts
from rl_core.types import CUT_OFF, Completion, Rollout, SamplingParams, VersionSpan
from rollout_workers.continuing import SNAPSHOT_TOKENS, Continuing, Diverged
from rollout_workers.episode import run_episode
from tests.unit.test_drafts import closed_in_the_end
from tests.unit.test_episode import RIGHT, TASK, Letters, Says, Session, spec

__all__ = ["closed_in_the_end"]
LONG = "l" * (2 * SNAPSHOT_TOKENS)


class Dies(Exception):
    """The engine is gone."""


class Mortal(Says):
    """Says its lines under a version, and dies when it has none left, `amid` so many tokens of the next."""

    def __init__(self, *lines: str, version: int, amid: str = "") -> None:
        super().__init__(*lines)
        self.version, self.amid = version, amid
        self.sampler: Continuing | None = None

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str) -> Completion:
        if not self.lines:
            assert self.sampler is not None
            for start in range(0, len(self.amid), SNAPSHOT_TOKENS):  # looks, before the end
                assert self.sampler.seen == start
                self.sampler.snapshot(sampled(prompt_ids, self.amid[start : start + SNAPSHOT_TOKENS], self.version, start))
            raise Dies
        said = await super().sample(prompt_ids, params, request_id=request_id)
        return replace(said, spans=(VersionSpan(start=0, stop=len(said.token_ids), version=self.version),))


def sampled(prompt: Sequence[int], text: str, version: int, start: int = 0) -> Completion:
    ids = np.array([*map(ord, text)], np.int32)
    return Completion(
        prompt_ids=np.array(prompt if start == 0 else [], np.int32), token_ids=ids, logprobs=np.full(len(ids), -version, np.float32),
        spans=(VersionSpan(start=0, stop=len(ids), version=version),), finish_reason=CUT_OFF,
    )  # fmt: skip


async def play(engine: Mortal, session: Session, file: DraftFile | None, draft: Draft | None = None) -> Rollout:
    sampler = engine.sampler = Continuing(engine, file, "g", 0, draft)
    try:
        return await run_episode(TASK, spec(max_total_tokens=400, max_tokens=60), sampler, session, Letters(), "g-0")
    finally:
        if file is not None:
            file.flush()
            file.flush()


async def left_by(folder: Path, engine: Mortal) -> Draft:
    """What is left of a rollout whose engine dies."""
    with pytest.raises(Dies):
        await play(engine, Session(), DraftFile(folder, "w0"))
    return read_drafts(folder, ["g"])["g"][0]


async def test_finished_turns_are_said_again_and_the_rest_is_sampled(tmp_path: Path) -> None:
    draft = await left_by(tmp_path, Mortal("a", "bb", version=3))
    engine, session = Mortal("stop", version=5), Session()
    rollout = await play(engine, session, DraftFile(tmp_path, "w1"), draft)
    assert rollout.verdict == RIGHT
    assert [t.content for t in session.turns] == ["a", "bb", "stop"], "the environment heard all of it"
    assert len(engine.asked) == 1, "only the last turn was sampled"
    assert [c.versions.tolist() for c in rollout.completions] == [[3, 3], [3, 3, 3], [5] * 5]
    whole = await play(Mortal("a", "bb", "stop", version=3), Session(), None)
    assert [c.prompt_ids.tolist() for c in rollout.completions] == [c.prompt_ids.tolist() for c in whole.completions]
    assert rollout.messages == whole.messages
    assert len(read_drafts(tmp_path, ["g"])["g"][0].completions) == 3, "the second worker's draft stands alone"


async def test_a_turn_that_was_cut_off_goes_on_amid_its_tokens(tmp_path: Path) -> None:
    draft = await left_by(tmp_path, Mortal("a", version=3, amid=LONG))
    engine, session = Mortal("op", "stop", version=5), Session()
    rollout = await play(engine, session, None, draft)
    _, second, third = rollout.completions
    assert engine.asked[0][0] == [*second.prompt_ids.tolist(), *map(ord, LONG)]
    assert engine.asked[0][1].max_tokens == 60 - len(LONG)
    assert session.turns[1].content == LONG + "op"
    assert second.versions.tolist() == [3] * len(LONG) + [5] * 3
    assert second.logprobs.tolist() == [-3.0] * len(LONG) + [-1.0] * 3
    assert third.prompt_ids[: len(second.prompt_ids) + len(LONG) + 3].tolist() == [*second.prompt_ids, *second.token_ids]
    assert rollout.min_version == 3


async def test_a_turn_may_be_cut_off_twice(tmp_path: Path) -> None:
    draft = await left_by(tmp_path, Mortal(version=3, amid="a" * SNAPSHOT_TOKENS))
    with pytest.raises(Dies):
        await play(Mortal(version=4, amid="b" * 2 * SNAPSHOT_TOKENS), Session(), DraftFile(tmp_path, "w1"), draft)
    again = read_drafts(tmp_path, ["g"])["g"][0]
    rollout = await play(Mortal("c", "stop", version=6), Session(), None, again)
    n = SNAPSHOT_TOKENS
    assert rollout.completions[0].versions.tolist() == [3] * n + [4] * 2 * n + [6] * 2


async def test_an_environment_that_says_something_else_makes_the_draft_worthless(tmp_path: Path) -> None:
    draft = await left_by(tmp_path, Mortal("a", "bb", version=3))
    session = Session(first="another task")
    with pytest.raises(Diverged, match="g-0: the prompt of turn 0"):
        await play(Mortal("stop", version=5), session, None, draft)
    assert session.closed


async def test_a_draft_that_used_up_its_turn_ends_it(tmp_path: Path) -> None:
    draft = await left_by(tmp_path, Mortal(version=3, amid="x" * 64))
    rollout = await play(Mortal("never", version=5), Session(), None, draft)
    assert rollout.completions[0].finish_reason == "length"
    assert rollout.verdict.reward == 0.0
