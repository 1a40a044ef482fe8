"""The line between a worker and a host: what travels arrives as it was, and whatever breaks is known at once."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from environments import line as line_module
from environments.host import EnvironmentBug, EnvironmentFailure, TaskUnusable
from environments.line import Line, LineLost, encode, listen
from rl_core.seams import Observation, Transition
from rl_core.types import Message, Status, Task, ToolCall, Turn, Verdict, to_json

DONE = Verdict(status=Status.OK, reward=0.5, components={"a": 1.0}, evidence={"e": "\ud800\x1b[0m"}, verifier_version="v1", latency_s=0.25)


def transition(verdict: Verdict | None = DONE, text: str = "x") -> Transition:
    shown = Observation(messages=(Message(role="tool", content=text),), tools=({"name": "t"},))
    return Transition(observation=shown, terminated=verdict is not None, truncated=False, verdict=verdict)


class Host:
    """Answers what it is told to; remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.turns: list[Turn] = []
        self.opened: dict[str, tuple[str, Any, Task]] = {}
        self.closed: list[str] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def open(self, session_id: str, env_id: str, options: Mapping[str, Any], task: Task) -> Observation:
        self.opened[session_id] = env_id, options, task
        return self._said(session_id)

    async def step(self, session_id: str, turn: Turn) -> Transition:
        self.turns.append(turn)
        await self.may_answer.wait()
        return self._said(session_id)

    async def play(self, session_id: str, env_id: str, options: Mapping[str, Any], task: Task, turn: Turn | None) -> Transition:
        self.opened[session_id] = env_id, options, task
        self.turns += [turn] if turn else []
        return self._said(session_id)

    async def truncate(self, session_id: str) -> Transition:
        return self._said(session_id)

    async def close(self, session_id: str) -> None:
        self.closed.append(session_id)

    def _said(self, session_id: str) -> Any:
        answer = self.answers[session_id]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest_asyncio.fixture
async def ends() -> AsyncIterator[tuple[Host, Line]]:
    host = Host()
    address, server = await listen(host)
    line = await Line.connect(address)
    yield host, line
    line.hang_up()
    assert server is not None
    server.close()
    await asyncio.sleep(0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_subnormal=False) | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
)
calls = st.builds(ToolCall, name=st.text(), arguments=st.dictionaries(st.text(), json_values))
turns = st.builds(Turn, content=st.text(), thought=st.text(), tool_calls=st.lists(calls, max_size=2).map(tuple), malformed=st.text())


@given(turns)
def test_a_turn_arrives_as_it_was_said(turn: Turn) -> None:
    assert Turn.from_dict(json.loads(to_json(turn))) == turn


@given(st.text(), st.none() | st.just(DONE))
def test_a_transition_arrives_as_it_was_made(text: str, verdict: Verdict | None) -> None:
    number, written, error = json.loads(encode(7, transition(verdict, text)))
    assert (number, line_module._read(written), error) == (7, transition(verdict, text), None)


async def test_an_episode_is_opened_with_its_task_and_closed(ends: tuple[Host, Line]) -> None:
    host, line = ends
    task = Task(env="math", key="k", split="train", seed=3, public={"q": [1, {"a": None}]}, private={"gold": "\ud800"}, difficulty="easy")
    host.answers["a"] = transition(None, "begin").observation
    assert await line.call("open", "a", "math:Env", {"digits": 2}, task) == host.answers["a"]
    assert host.opened == {"a": ("math:Env", {"digits": 2}, task)}
    assert await line.call("close", "a") is None
    assert host.closed == ["a"]


@pytest.mark.parametrize("turn", [None, Turn(content="\ud800", tool_calls=(ToolCall(name="t", arguments={"x": [1]}),))])
async def test_an_episode_opens_with_its_first_turn_or_its_end(ends: tuple[Host, Line], turn: Turn | None) -> None:
    host, line = ends
    task = Task(env="math", key="k", split="train", seed=3, public={})
    host.answers["a"] = replace(transition(), began="0123")
    assert await line.call("play", "a", "math:Env", {"digits": 2}, task, turn) == host.answers["a"]
    assert (host.opened, host.turns) == ({"a": ("math:Env", {"digits": 2}, task)}, [turn] if turn else [])


async def test_what_an_environment_showed_has_one_digest_on_both_sides(ends: tuple[Host, Line]) -> None:
    host, line = ends
    tools = ({"name": "\ud800", "limits": (np.int64(3), np.float32(0.5)), "by": {1: "x"}},)
    host.answers["a"] = shown = Observation(messages=(Message(role="user", content="\ud800"),), tools=tools)
    got = await line.call("open", "a", "e", {}, Task(env="e", key="k", split="train", seed=0, public={}))
    assert got.digest == shown.digest != Observation(messages=shown.messages).digest


def test_a_line_connects_on_the_loop_that_rays_actors_run_on() -> None:
    async def main() -> Any:
        host = Host()
        host.answers["a"] = transition()
        address, server = await listen(host)
        line = await Line.connect(address)
        try:
            return await line.call("truncate", "a")
        finally:
            line.hang_up()
            assert server is not None
            server.close()

    assert uvloop.run(main()) == transition()


@pytest.mark.parametrize("kind", [EnvironmentBug, EnvironmentFailure, TaskUnusable])
async def test_why_an_episode_could_not_be_opened_is_told_by_class(ends: tuple[Host, Line], kind: type[Exception]) -> None:
    host, line = ends
    host.answers["a"] = kind("no gold")
    with pytest.raises(kind, match=r"^no gold$") as raised:
        await line.call("open", "a", "e", {}, Task(env="e", key="k", split="train", seed=0, public={}))
    assert type(raised.value) is kind


async def test_an_environment_that_shows_what_is_no_data_has_a_bug(ends: tuple[Host, Line]) -> None:
    host, line = ends
    host.answers["a"] = Observation(messages=(), tools=({"name": object()},))
    with pytest.raises(EnvironmentBug, match="no JSON"):
        await line.call("open", "a", "e", {}, Task(env="e", key="k", split="train", seed=0, public={}))


async def test_only_an_environments_calls_can_be_made(ends: tuple[Host, Line]) -> None:
    _, line = ends
    with pytest.raises(RuntimeError, match="KeyError"):
        await line.call("_said", "a")


async def test_calls_are_answered_each_by_its_own_answer_in_any_order(ends: tuple[Host, Line]) -> None:
    host, line = ends
    host.answers = {"a": transition(text="a"), "b": transition(None, "b")}
    host.may_answer.clear()
    slow, quick = line.call("step", "a", Turn(content="1")), line.call("truncate", "b")
    assert await quick == transition(None, "b")
    assert not slow.done()
    host.may_answer.set()
    assert await slow == transition(text="a")
    assert host.turns == [Turn(content="1")]
    assert not line._waiting


async def test_what_the_host_raises_is_the_callers(ends: tuple[Host, Line]) -> None:
    host, line = ends
    host.answers["a"] = KeyError("a bug of ours")
    with pytest.raises(RuntimeError, match="the environment host failed: KeyError: 'a bug of ours'"):
        await line.call("step", "a", Turn(content=""))


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (transition(Verdict(status=Status.OK, reward=1.0, components={"a": object()})), "no JSON"),  # type: ignore[dict-item]
        (transition(text="x" * 2000), "more than 0"),
    ],
)
async def test_an_answer_that_cannot_travel_is_an_environments_error(
    ends: tuple[Host, Line], monkeypatch: pytest.MonkeyPatch, answer: Transition, problem: str
) -> None:
    host, line = ends
    monkeypatch.setattr(line_module, "MAX_FRAME", 1000)
    host.answers["a"] = answer
    got = await line.call("step", "a", Turn(content=""))
    assert got.verdict is not None
    assert got.verdict.status is Status.ENV_ERROR
    assert problem in got.verdict.evidence["error"]


async def test_numpys_numbers_travel_as_numbers(ends: tuple[Host, Line]) -> None:
    host, line = ends
    host.answers["a"] = transition(Verdict(status=Status.OK, reward=np.float32(0.5), components={"a": np.int64(3)}))  # type: ignore[arg-type]
    got = await line.call("step", "a", Turn(content=""))
    assert got.verdict == Verdict(status=Status.OK, reward=0.5, components={"a": 3})


async def test_a_host_that_ends_is_known_to_all_who_wait_and_all_who_come_later(ends: tuple[Host, Line]) -> None:
    host, line = ends
    host.may_answer.clear()
    waiting = [line.call("step", "a", Turn(content="")) for _ in range(3)]
    await asyncio.sleep(0)
    line.hang_up()
    for call in waiting:
        with pytest.raises(LineLost):
            await call
    with pytest.raises(LineLost):
        await line.call("step", "a", Turn(content=""))
    assert line.lost
    host.may_answer.set()


async def test_a_call_that_nobody_waits_for_leaves_nothing(ends: tuple[Host, Line]) -> None:
    host, line = ends
    host.answers["a"] = transition()
    host.may_answer.clear()
    call = line.call("step", "a", Turn(content=""))
    call.cancel()
    await asyncio.sleep(0)
    assert not line._waiting
    host.may_answer.set()
    assert await line.call("step", "a", Turn(content="")) == transition()


async def test_a_turn_beyond_all_measure_harms_nobody_else(ends: tuple[Host, Line], monkeypatch: pytest.MonkeyPatch) -> None:
    host, line = ends
    monkeypatch.setattr(line_module, "MAX_FRAME", 1000)
    host.answers["a"] = transition()
    host.may_answer.clear()
    call = line.call("step", "a", Turn(content=""))
    with pytest.raises(ValueError, match="a turn or task of"):
        line.call("step", "b", Turn(content="x" * 2000))
    host.may_answer.set()
    assert await call == transition()
    assert not line._waiting


async def test_a_frame_beyond_all_measure_ends_the_connection(ends: tuple[Host, Line]) -> None:
    _, line = ends
    line._transport.write(b"\xff\xff\xff\xff")
    with pytest.raises(LineLost):
        await line.call("step", "a", Turn(content=""))


async def test_other_users_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    (address, server), me = await listen(Host()), os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    line = await Line.connect(address)
    with pytest.raises(LineLost):
        await line.call("truncate", "a")
    assert server is not None
    server.close()


async def test_where_nobody_listens_there_is_no_line() -> None:
    with pytest.raises(OSError, match=r"refused|Errno"):
        await Line.connect("polyrl-host-of-nobody")
