"""Which host an episode goes to, and what the episodes of a group ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import pytest

from environments.host import EnvironmentBug
from environments.host_actor import HostActor
from environments.line import Line, LineLost, listen
from environments.math import MathEnv
from environments.registry import resolve
from rl_core.seams import Observation, Transition
from rl_core.types import Message, Status, Task, Turn, Verdict
from rollout_workers.episode import SessionFailed
from rollout_workers.hosts import Beginning, Hosts, HostSet, RemoteSession

TASK = Task(env="math", key="k", split="train", seed=0, public={})


class Told(Hosts):
    """Hosts whose calls end here."""

    def __init__(self) -> None:
        super().__init__(HostSet(shared=("a",)), owner="w0.0")
        self.calls: list[str] = []
        self.shows = ["hello"] * 9
        self.fails: list[Exception] = []
        self.opens = asyncio.Event()
        self.opens.set()

    async def _call(self, host: Any, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        await self.opens.wait()
        if self.fails:
            raise self.fails.pop(0)
        if method == "close":
            return None
        shown = Observation(messages=(Message(role="user", content=self.shows.pop(0)),)) if method in ("open", "play") else None
        if method == "open":
            return shown
        verdict = Verdict(status=Status.OK, reward=1.0)
        return Transition(
            observation=Observation(messages=()), terminated=True, truncated=False, verdict=verdict, began=shown.digest if shown else ""
        )

    def group(self, size: int, options: Mapping[str, Any] | None = None) -> list[RemoteSession]:
        begun = Beginning()
        return [self.session("math", options or {}, TASK, begun) for _ in range(size)]


async def test_the_first_of_a_group_opens_and_the_others_open_with_their_first_turn() -> None:
    hosts = Told()
    hosts.opens.clear()
    sessions = hosts.group(3)
    resets = [asyncio.create_task(s.reset()) for s in sessions]
    await asyncio.sleep(0)
    hosts.opens.set()
    assert {o.messages[0].content for o in await asyncio.gather(*resets)} == {"hello"}
    assert hosts.calls == ["open"]
    assert (await sessions[0].step(Turn(content=""))).verdict is not None
    assert (await sessions[1].step(Turn(content=""))).verdict is not None
    assert (await sessions[2].truncate()).verdict is not None
    for session in sessions:
        await session.close()
    assert hosts.calls == ["open", "step", "play", "play"], "a session with a verdict is closed by its host"


async def test_who_gives_up_before_a_turn_has_nothing_to_close_but_the_first() -> None:
    hosts = Told()
    for session in hosts.group(2):
        await session.reset()
        await session.close()
    assert hosts.calls == ["open", "close"]


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_where_the_first_cannot_open_each_opens_by_itself(how: str) -> None:
    hosts = Told()
    first, second, third = hosts.group(3)
    hosts.opens.clear()
    opening, waiting = asyncio.create_task(first.reset()), asyncio.create_task(second.reset())
    await asyncio.sleep(0.01)
    if how == "fails":
        hosts.fails.append(EnvironmentBug("no"))
    else:
        opening.cancel()
    hosts.opens.set()
    with pytest.raises(SessionFailed if how == "fails" else asyncio.CancelledError):
        await opening
    assert (await waiting).messages[0].content == "hello"
    await third.reset()
    await second.step(Turn(content=""))
    assert hosts.calls == ["open", "open", "open", "step"]


async def test_one_that_waits_for_the_first_and_is_cancelled_ends_nobody_else() -> None:
    hosts = Told()
    first, second, third = hosts.group(3)
    hosts.opens.clear()
    opening, waiting, other = (asyncio.create_task(s.reset()) for s in (first, second, third))
    await asyncio.sleep(0.01)
    waiting.cancel()
    hosts.opens.set()
    assert await opening == await other
    assert waiting.cancelled()


async def test_an_environment_that_begins_one_task_in_two_ways_is_asked_by_each_from_then_on() -> None:
    hosts = Told()
    hosts.shows = ["hello", "good day", "hello", "good day"]
    first, second = hosts.group(2)
    await first.reset()
    await second.reset()
    with pytest.raises(SessionFailed, match="began task k in another way") as failed:
        await second.step(Turn(content=""))
    assert failed.value.status is Status.INFRA_ERROR, "it is tried again"
    again = hosts.group(2)
    assert [(await s.reset()).messages[0].content for s in again] == ["hello", "good day"]
    assert hosts.calls == ["open", "play", "open", "open"]


class FickleEnv(MathEnv):
    """Begins differently each time, which no environment should."""

    id = "fickle"
    begun: ClassVar[int] = 0

    def begin(self, task: Task) -> Observation:
        FickleEnv.begun += 1
        return Observation(messages=(Message(role="user", content=f"{FickleEnv.begun}"),))


@pytest.mark.parametrize(("env", "shared"), [("math", True), (f"{__name__}:FickleEnv", False)])
async def test_a_real_host_over_a_real_line_finds_out_who_begins_alike(env: str, shared: bool) -> None:
    host = HostActor("bubblewrap", exit=lambda: None)
    address, server = await listen(host)
    hosts = Hosts(HostSet(shared=("a",)), owner="w0.0")
    hosts._lines["a"] = await Line.connect(address)
    begun, task = Beginning(), next(resolve("math").tasks("train", 0, {}))
    first, second = (hosts.session(env, {}, task, begun) for _ in range(2))
    assert await first.reset() == await second.reset()
    assert await host.ping() == 1
    if shared:
        assert (await second.step(Turn(content="0"))).verdict is not None
    else:
        with pytest.raises(SessionFailed, match="in another way"):
            await second.step(Turn(content="0"))
        assert hosts.session(env, {}, task, begun).beginning is None
    assert (await first.truncate()).verdict is not None
    await asyncio.gather(*host._closing)
    assert await host.ping() == 0
    hosts.hang_up()
    assert server is not None
    server.close()


async def test_an_episode_that_is_not_open_yet_outlives_its_host() -> None:
    hosts = Told()
    first, second = hosts.group(2)
    await first.reset()
    await second.reset()
    hosts.fails.append(LineLost("gone"))
    assert (await second.step(Turn(content=""))).verdict is not None
    assert hosts.calls == ["open", "play", "play"]


def test_an_episode_goes_to_its_environments_own_host_or_to_the_shared_one_whose_turn_it_is() -> None:
    hosts = HostSet(shared=("a", "b"), own={"plugin": "c"})
    assert hosts.all == ("a", "b", "c")
    sessions = Hosts(hosts, owner="w0.0")
    tasks = list(islice(resolve("math").tasks("train", 0), 4))
    assert [sessions.session("math", {}, task).host for task in tasks] == ["a", "b", "a", "b"]
    mine = [replace(task, env="plugin") for task in tasks]
    found = [sessions.session("plugin", {}, task) for task in mine]
    assert {s.host for s in found} == {"c"}
    assert len({s.id for s in found}) == 4
