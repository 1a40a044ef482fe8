"""Environment hosts as one worker sees them: they take turns, and no call waits for one that does not live.

    call --[LOOK_S without an answer]--> does the host answer at all? --no--> SIGKILL; Ray starts it again

Calls go over a line of our own where the host is on this machine (environments/line.py), and through Ray where it is not. Where a
host has ended, Ray is asked for the line of its successor, and waits for it.

A host bounds its calls by itself (environments/host_actor.py), as long as its event loop runs. It does not while an environment
holds the interpreter's lock, or when the process is stopped: then nobody inside can help. A host that is killed takes its episodes along:
they end as infrastructure errors, and are tried again (rl_core/faults.py).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import ray

from environments.host import EnvironmentBug, failed
from environments.host_actor import EnvLimits, HostActor
from environments.line import Line, LineLost
from environments.registry import is_foreign
from rl_core.config import RunConfig
from rl_core.seams import Observation, Transition
from rl_core.types import Status, Task, Turn
from rollout_workers.episode import SessionFailed

CALLS_PER_HOST = 10_000
"""Calls that one host may hold: those that wait are coroutines, so the number is only a backstop."""
LOOK_S = 15.0
"""A call that takes longer makes its worker look at the host, and again every time that this has passed."""
ANSWER_S = 15.0
"""Longest that a host may take to say that it lives. It needs a millisecond; a machine that swaps needs more."""
START_S = 120.0
"""The same for one that starts again: it imports everything first."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSet:
    """A run's hosts. What comes with polyrl shares some; every environment of somebody else has one to itself.

    Whatever code of others does to its process (end it, fill it, hold its lock, start a hundred more) so happens to itself alone.
    """

    shared: tuple[Any, ...] = ()
    own: Mapping[str, Any] = field(default_factory=dict)  # by the environment's name in the run

    @property
    def all(self) -> tuple[Any, ...]:
        return (*self.shared, *self.own.values())


def start_hosts(config: RunConfig) -> HostSet:
    """The run's environment hosts. One that dies comes back by itself, without its sessions."""
    rollout = config.rollout
    limits = {
        name: EnvLimits(calls=rollout.env_threads, call_timeout_s=env.call_timeout_s, episode_timeout_s=env.timeout_s)
        for name, env in config.environments.items()
    }
    host = ray.remote(HostActor).options(  # type: ignore[attr-defined]
        num_cpus=0,
        max_concurrency=CALLS_PER_HOST,
        max_restarts=-1,
        max_task_retries=1,  # a call that waits when its host is replaced is served by the next process
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    memory = int(rollout.env_host_memory_gib * 2**30)

    def start() -> Any:
        return host.remote(config.sandbox, limits, memory_bytes=memory, own_process=True)

    foreign = [name for name, env in config.environments.items() if is_foreign(env.id or name)]
    shared = rollout.env_hosts if len(foreign) < len(config.environments) else 0
    return HostSet(shared=tuple(start() for _ in range(shared)), own={name: start() for name in foreign})


class Hosts:
    """Gives out sessions; watches the hosts that they are on."""

    def __init__(self, hosts: HostSet, *, owner: str) -> None:
        """`owner` names this worker in this life: a session that a dead one left open does not bar its successor's."""
        self._hosts, self._owner = hosts, owner
        self._turn_of, self._number = itertools.count(), itertools.count()
        self._looking: dict[Any, asyncio.Task[None]] = {}
        self._starting: set[Any] = set()
        self._differ: set[str] = set()
        self._lines: dict[Any, Line | None] = {}
        self._connecting: defaultdict[Any, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.killed = 0

    def session(self, env_id: str, options: Mapping[str, Any], task: Task, beginning: Beginning | None = None) -> RemoteSession:
        """A session of one episode, on its environment's own host, or on the shared one whose turn it is.

        Sessions with the same `beginning` are of one task: the first of them to open is shown something, and so are the others.
        """
        if task.env in self._differ:
            beginning = None
        host = self._hosts.own.get(task.env) or self._hosts.shared[next(self._turn_of) % len(self._hosts.shared)]
        name = f"{self._owner}/{next(self._number)}"
        return RemoteSession(hosts=self, host=host, id=name, env_id=env_id, options=options, task=task, beginning=beginning)

    async def open(self, host: Any, session_id: str, env_id: str, options: Mapping[str, Any], task: Task) -> Observation:
        """Raises SessionFailed where the environment cannot be opened, and LineLost or Ray's error where the host dies again and again."""
        return cast(Observation, await self._opening(host, "open", session_id, env_id, options, task))

    async def play(self, host: Any, session_id: str, env_id: str, options: Mapping[str, Any], task: Task, turn: Turn | None) -> Transition:
        """Open and advance. Raises as `open`."""
        return cast(Transition, await self._opening(host, "play", session_id, env_id, options, task, turn))

    async def _opening(self, host: Any, method: str, *arguments: Any) -> Any:
        try:
            try:
                return await self._call(host, method, *arguments)
            except LineLost:  # its successor can
                return await self._call(host, method, *arguments)
        except EnvironmentBug as bug:
            raise SessionFailed(str(bug), Status.ENV_ERROR) from bug

    def differs(self, env: str) -> None:
        """An environment does not begin a task always alike: from now on, each of its episodes opens by itself."""
        if env not in self._differ:
            log.warning("environment %s began one task in two ways; its episodes share no beginning any more", env)
            self._differ.add(env)

    async def advance(self, host: Any, session_id: str, turn: Turn | None) -> Transition:
        """Step with a turn, truncate with None. A host that dies meanwhile takes the episode along."""
        call = ("truncate", session_id) if turn is None else ("step", session_id, turn)
        try:
            return cast(Transition, await self._call(host, *call))
        except LineLost as lost:
            return failed(Status.INFRA_ERROR, str(lost))

    async def close(self, host: Any, session_id: str) -> None:
        """A host that has died has no sessions left."""
        line = self._lines.get(host)
        if line is None or not line.lost:
            with suppress(LineLost):
                await self._call(host, "close", session_id)

    async def _call(self, host: Any, method: str, *arguments: Any) -> Any:
        line = self._lines.get(host)
        if line is None or line.lost:
            line = await self._line_to(host)
        if line is None:
            return await self._through_ray(host, method, *arguments)
        answer = line.call(method, *arguments)
        overdue = asyncio.get_running_loop().call_later(LOOK_S, self._overdue, host, answer)
        try:
            return await answer
        finally:
            overdue.cancel()

    async def _line_to(self, host: Any) -> Line | None:
        """The line to the process that the host is now; None: it is on another machine."""
        async with self._connecting[host]:
            line = self._lines.get(host)
            if host not in self._lines or (line is not None and line.lost):
                line = self._lines[host] = await self._connect(host)
            return line

    async def _connect(self, host: Any) -> Line | None:
        """A host that died since it gave its address is asked again, once."""
        for _ in range(2):
            address = await self._through_ray(host, "line")
            try:
                return await Line.connect(address) if address else None
            except OSError as error:
                reason = error
        log.warning(
            "an environment host is not reached directly (%s); if it is on this machine, calls to it are dearer than need be", reason
        )
        return None

    async def _through_ray(self, host: Any, method: str, *arguments: Any) -> Any:
        answer = asyncio.ensure_future(_answer(getattr(host, method).remote(*arguments)))
        try:
            while not (await asyncio.wait({answer}, timeout=LOOK_S))[0]:
                await asyncio.shield(self._look_at(host))
            return answer.result()
        except ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", error) from error  # the text of Ray's own error is a traceback
        finally:
            answer.cancel()

    def hang_up(self) -> None:
        """End all lines; calls under way are lost."""
        for line in self._lines.values():
            if line is not None:
                line.hang_up()
        self._lines.clear()

    def _overdue(self, host: Any, answer: asyncio.Future[Any]) -> None:
        """A call over a line takes long: look at the host now, and again later."""
        if not answer.done():
            self._look_at(host)
            asyncio.get_running_loop().call_later(LOOK_S, self._overdue, host, answer)

    def _look_at(self, host: Any) -> asyncio.Task[None]:
        """Kill the host if it does not answer. Many episodes of it come here at once, and one looks."""
        if host not in self._looking:
            self._looking[host] = asyncio.create_task(self._look(host))
            self._looking[host].add_done_callback(lambda _: self._looking.pop(host))
        return self._looking[host]

    async def _look(self, host: Any) -> None:
        patience = START_S if host in self._starting else ANSWER_S
        try:
            # Not sent again: who waits for a host that another worker kills must learn of it.
            await asyncio.wait_for(_answer(host.ping.options(max_task_retries=0).remote()), patience)
            self._starting.discard(host)
        except TimeoutError:
            log.warning("an environment host did not answer within %g s; it is killed, and starts again", patience)
            self.killed += 1
            self._starting.add(host)
            ray.kill(host, no_restart=False)
        except ray.exceptions.RayActorError:
            self._starting.add(host)  # dead already: Ray starts it again


@dataclass(slots=True)
class Beginning:
    """What an environment showed the first of a group's episodes, which it shows the others as well: environments are deterministic.

    So the others need not ask. They open with their first turn, and hold nothing of their environment before: one call in place of two.
    """

    shown: asyncio.Future[tuple[Observation, str] | None] | None = None
    """With its digest; None in it if it could not be opened."""


@dataclass(slots=True, kw_only=True)
class RemoteSession:
    """An EnvSession in a HostActor, which closes it by itself when it has its verdict."""

    hosts: Hosts
    host: Any
    id: str
    env_id: str
    options: Mapping[str, Any]
    task: Task
    beginning: Beginning | None = None
    ended: bool = False
    expects: str | None = None
    """Not opened yet: the digest of what it will show."""

    async def reset(self) -> Observation:
        group = self.beginning
        if group is None:
            return await self._open()
        if group.shown is None:
            return await self._open_for(group)
        first = await asyncio.shield(group.shown)
        if first is None:
            return await self._open()
        observation, self.expects = first
        return observation

    async def _open(self) -> Observation:
        return await self.hosts.open(self.host, self.id, self.env_id, dict(self.options), self.task)

    async def _open_for(self, group: Beginning) -> Observation:
        group.shown, first = asyncio.get_running_loop().create_future(), None
        try:
            observation = await self._open()
            first = observation, observation.digest
            return observation
        finally:
            group.shown.set_result(first)

    async def step(self, turn: Turn) -> Transition:
        return await self._advance(turn)

    async def truncate(self) -> Transition:
        return await self._advance(None)

    async def close(self) -> None:
        if not self.ended and self.expects is None:
            await self.hosts.close(self.host, self.id)

    async def _advance(self, turn: Turn | None) -> Transition:
        expected, self.expects = self.expects, None
        if expected is None:
            transition = await self.hosts.advance(self.host, self.id, turn)
        else:
            transition = await self.hosts.play(self.host, self.id, self.env_id, dict(self.options), self.task, turn)
        self.ended = transition.verdict is not None
        if expected is not None and transition.began not in ("", expected):  # "": it failed before that was known
            self.hosts.differs(self.task.env)
            raise SessionFailed(f"environment {self.task.env!r} began task {self.task.key} in another way than for the rest of its group")
        return transition


async def _answer(ref: Any) -> Any:
    return await ref
