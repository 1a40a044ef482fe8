"""The episode: ids only grow, budgets end it, our failures become data and the engine's raise."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rl_core.seams import BadTask, Observation, Transition
from rl_core.types import Completion, EpisodeSpec, Message, Rollout, SamplingParams, Status, Task, Turn, Verdict, VersionSpan
from rollout_workers.episode import CUT_OFF, MIN_ROOM, run_episode, turn_params

TASK = Task(env="letters", key="k", split="train", seed=0, public={})
RIGHT = Verdict(status=Status.OK, reward=1.0)
CUT = Verdict(status=Status.INVALID_OUTPUT, reward=0.0)


class Letters:
    """A chat format in which each character is a token; 0 ends a turn, 1 stands before a message."""

    stop_ids = (0,)
    think_ids = (ord("<"), ord(">"))

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        return [token for m in messages for token in [1, *map(ord, m.content)]]

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        return [*ids, *self.prompt(messages)]

    def parse(self, token_ids: Sequence[int], tools: Sequence[dict[str, Any]] = ()) -> Turn:
        return Turn(content="".join(chr(i) for i in token_ids if i > 1))


class Says:
    """An engine that says the given lines, one a turn, and keeps what it was asked."""

    def __init__(self, *lines: str, finish: str = "stop", seconds: float = 0.0) -> None:
        self.lines, self.finish, self.seconds = list(lines), finish, seconds
        self.asked: list[tuple[list[int], SamplingParams, str]] = []

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str) -> Completion:
        self.asked.append((list(prompt_ids), params, request_id))
        await asyncio.sleep(self.seconds)
        ids = np.array([*map(ord, self.lines.pop(0)), 0], np.int32)[: params.max_tokens]
        spans = (VersionSpan(start=0, stop=len(ids), version=3),)
        prompt, logprobs = np.array(prompt_ids, np.int32), -np.ones(len(ids), np.float32)
        return Completion(prompt_ids=prompt, token_ids=ids, logprobs=logprobs, spans=spans, finish_reason=self.finish)


class Session:
    """Asks until it hears "stop"; keeps what happened to it."""

    def __init__(self, *, breaks: str = "", first: str = "hello", error: Exception | None = None) -> None:
        self.breaks, self.first, self.error = breaks, first, error
        self.turns: list[Turn] = []
        self.closed = self.truncated = False

    def _check(self, call: str) -> None:
        if call == self.breaks:
            raise self.error or OSError(f"the host died in {call}")

    async def reset(self) -> Observation:
        self._check("reset")
        return Observation(messages=(Message(role="user", content=self.first),))

    async def step(self, turn: Turn) -> Transition:
        self._check("step")
        self.turns.append(turn)
        if turn.content == "stop" or turn.malformed:
            verdict = CUT if turn.malformed else RIGHT
            return Transition(observation=Observation(messages=()), terminated=True, truncated=False, verdict=verdict)
        shown = Observation(messages=(Message(role="tool", content=f"no {len(self.turns)}"),))
        return Transition(observation=shown, terminated=False, truncated=False, verdict=None)

    async def truncate(self) -> Transition:
        self._check("truncate")
        self.truncated = True
        return Transition(observation=Observation(messages=()), terminated=False, truncated=True, verdict=CUT)

    async def close(self) -> None:
        self.closed = True
        self._check("close")


def spec(**changes: Any) -> EpisodeSpec:
    values: dict[str, Any] = {"max_turns": 5, "max_total_tokens": 200, "timeout_s": 5.0, "max_tokens": 20} | changes
    sampling = SamplingParams(max_tokens=values.pop("max_tokens"), seed=values.pop("seed", None))
    return EpisodeSpec(group_size=1, sampling=sampling, **values)


async def play(engine: Says, session: Session, **changes: Any) -> Rollout:
    return await run_episode(TASK, spec(**changes), engine, session, Letters(), "r1", worker="w0")


async def test_an_episode_takes_turns_until_there_is_a_verdict() -> None:
    engine, session = Says("a", "bb", "stop"), Session()
    rollout = await play(engine, session)
    assert rollout.verdict == RIGHT
    assert [m.content for m in rollout.messages] == ["hello", "a", "no 1", "bb", "no 2", "stop"]
    assert [m.role for m in rollout.messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [t.content for t in session.turns] == ["a", "bb", "stop"]
    assert (list(rollout.turns), rollout.truncated) == (session.turns, False), "what leads to the same verdict again"
    assert (rollout.id, rollout.env, rollout.task_key, rollout.worker, rollout.min_version) == ("r1", "letters", "k", "w0", 3)
    assert session.closed
    assert not session.truncated


async def test_each_prompt_is_the_earlier_prompt_its_answer_and_what_the_environment_said() -> None:
    rollout = await play(Says("a", "bb", "stop"), Session())
    for before, after in zip(rollout.completions, rollout.completions[1:], strict=False):
        known = [*before.prompt_ids, *before.token_ids]
        assert after.prompt_ids[: len(known)].tolist() == known
        assert len(after.prompt_ids) > len(known)
    assert rollout.num_prompt == 1 + 5 + 2 * (1 + 4)


async def test_the_turn_limit_ends_an_episode_with_the_environments_verdict() -> None:
    session = Session()
    rollout = await play(Says("a", "b", "c"), session, max_turns=2)
    assert rollout.verdict == CUT
    assert len(rollout.completions) == 2
    assert session.truncated
    assert (list(rollout.turns), rollout.truncated) == (session.turns, True)


async def test_the_token_limit_is_never_exceeded_and_ends_an_episode() -> None:
    session = Session()
    rollout = await play(Says(*["abcdef"] * 20), session, max_turns=20, max_total_tokens=40)
    assert rollout.verdict == CUT
    assert session.truncated
    last = rollout.completions[-1]
    assert len(last.prompt_ids) + len(last.token_ids) <= 40


async def test_a_turn_gets_no_more_tokens_than_there_is_room() -> None:
    engine = Says("stop")
    await play(engine, Session(first="x" * 79), max_total_tokens=90, max_tokens=50)
    assert engine.asked[0][1].max_tokens == 90 - 80


async def test_a_turn_cut_off_by_its_budget_is_malformed_even_if_it_reads_well() -> None:
    session = Session()
    rollout = await play(Says("stop", finish="length"), session)
    assert session.turns[0].malformed == CUT_OFF
    assert rollout.verdict == CUT


@pytest.mark.parametrize("call", ["reset", "step", "truncate"])
async def test_a_failure_of_the_environments_side_is_masked_and_says_why(call: str) -> None:
    session = Session(breaks=call)
    rollout = await play(Says("a"), session, max_turns=1)
    assert rollout.verdict.status is Status.INFRA_ERROR
    assert rollout.verdict.reward is None
    assert rollout.verdict.evidence["error"] == f"OSError: the host died in {call}"
    assert session.closed


async def test_a_task_that_cannot_be_graded_is_a_verifier_error_and_costs_no_sampling() -> None:
    session, engine = Session(breaks="reset", error=BadTask("its gold answer cannot be read")), Says("a")
    rollout = await play(engine, session)
    assert (rollout.verdict.status, rollout.verdict.reward) == (Status.VERIFIER_ERROR, None)
    assert rollout.verdict.evidence["error"] == "BadTask: its gold answer cannot be read"
    assert not engine.asked


async def test_a_failing_close_leaves_the_verdict_as_it_is() -> None:
    assert (await play(Says("stop"), Session(breaks="close"))).verdict == RIGHT


async def test_an_episode_that_takes_too_long_is_our_failure_and_keeps_its_turns() -> None:
    rollout = await play(Says("a", "b", "c", "d", seconds=0.06), Session(), timeout_s=0.15)
    assert rollout.verdict.status is Status.INFRA_ERROR
    assert "longer than 0.15 s" in rollout.verdict.evidence["error"]
    assert 1 <= len(rollout.completions) <= 2


async def test_a_prompt_that_leaves_no_room_is_our_failure_and_costs_no_sampling() -> None:
    engine = Says("stop")
    rollout = await play(engine, Session(first="x" * 99), max_total_tokens=100 + MIN_ROOM - 1)
    assert rollout.verdict.status is Status.INFRA_ERROR
    assert "max_total_tokens=107" in rollout.verdict.evidence["error"]
    assert not engine.asked


async def test_what_the_engine_raises_is_raised_and_the_session_is_closed() -> None:
    session = Session()
    with pytest.raises(IndexError):  # it has nothing to say
        await play(Says(), session)
    assert session.closed


async def test_a_cancelled_episode_closes_its_session() -> None:
    session = Session()
    running = asyncio.create_task(play(Says("a", seconds=30.0), session, timeout_s=60.0))
    await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert session.closed


def test_fixed_dice_differ_from_turn_to_turn_and_free_dice_stay_free() -> None:
    fixed = SamplingParams(max_tokens=10, seed=2**31 - 1)
    seeds = {turn_params(fixed, turn, 10).seed for turn in range(50)}
    assert len(seeds) == 50
    assert all(seed is not None and 0 <= seed < 2**31 for seed in seeds)
    assert turn_params(SamplingParams(max_tokens=10), 3, 10).seed is None
