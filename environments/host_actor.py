"""HostActor: an EnvHost as a run uses it. It bounds every call, and what the process takes of the machine.

    await open / step / truncate / close  -->  [room for a call of this environment]  -->  a thread, while the call runs
                                                                                             |  longer than call_timeout_s
                                                                                             v
                                      the episode ends as data, the thread gets an exception, and counts as stuck until it ends

An episode that waits for its policy is an entry in a dict: a thousand of them take neither threads nor calls. What one environment
does stays within its own room, so that one which hangs cannot stop the others. A host that cannot get well by itself (calls that
stay stuck, memory that grows) takes no new episode and ends as soon as the open ones have; Ray then starts it anew, and the calls
that waited are served there.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from environments.confine import Confinement, resident_bytes
from environments.host import EnvHost, EnvironmentBug, EnvironmentFailure, failed
from environments.line import listen
from environments.output_cap import cap_output
from rl_core.seams import Observation, Transition
from rl_core.types import Status, Task, Turn

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_STUCK = 8
"""Calls that hang at the same time, after which a host is replaced: their threads cannot be ended from outside."""

DRAIN_S = 60.0
"""How long a host that is to be replaced waits for its open episodes."""

LATE_S = 30.0
"""How much longer than its time-out an episode stays open when nobody closes it: whoever ran it has died."""

WATCH_S = 0.5
RECYCLED = 75
"""Exit status of a host that has ended itself (EX_TEMPFAIL)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvLimits:
    """Bounds of one environment within one host."""

    calls: int = 32  # at the same time
    call_timeout_s: float = 60.0
    episode_timeout_s: float = 120.0


class HungCall(Exception):
    """Raised within a call that took too long, so that plain Python in it ends."""


@dataclass(slots=True)
class _Room:
    """One environment's place in this host."""

    limits: EnvLimits
    calls: asyncio.Semaphore
    stuck: set[int] = field(default_factory=set)  # ids of threads

    @staticmethod
    def of(limits: EnvLimits) -> _Room:
        return _Room(limits=limits, calls=asyncio.Semaphore(limits.calls))


@dataclass(frozen=True, slots=True)
class _Episode:
    env: str
    expires: float  # time.monotonic()


class HostActor:
    """The methods of EnvHost, awaited. Made an actor by the pool; `exit` is called once when the host must be replaced."""

    def __init__(
        self,
        sandbox: str = "auto",
        limits: Mapping[str, EnvLimits] | None = None,
        *,
        memory_bytes: int = 0,
        own_process: bool = False,
        exit: Callable[[], None] | None = None,
    ) -> None:
        """`limits` by environment name; others get the defaults. `memory_bytes`: resident size at which to end between episodes, 0 for
        none. `own_process`: this process is the host's alone, so its output is capped and what it starts is confined."""
        self._host = EnvHost(sandbox)
        self._rooms: dict[str, _Room] = defaultdict(lambda: _Room.of(EnvLimits()))
        self._rooms |= {name: _Room.of(limit) for name, limit in (limits or {}).items()}
        self._episodes: dict[str, _Episode] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._threads = Threads()
        self._memory_bytes, self._exit = memory_bytes, exit or self._end_process
        self.ending = ""
        """Why this host takes no new episode; "" while it is well."""
        self._line: asyncio.Future[tuple[str, asyncio.Server | None]] | None = None
        self._own = Confinement() if own_process else None
        if own_process:
            cap_output()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    async def ping(self) -> int:
        """How many episodes are open; answering at all says that the host lives."""
        return self._host.ping()

    async def line(self) -> str:
        """Where workers on this machine reach this host directly (environments/line.py); "" where they cannot."""
        if self._line is None:
            self._line = asyncio.ensure_future(listen(self))
        return (await asyncio.shield(self._line))[0]

    async def status(self) -> dict[str, Any]:
        """For people and tests: open episodes, stuck calls by environment, resident bytes, threads, open files."""
        stuck = {name: len(room.stuck) for name, room in self._rooms.items() if room.stuck}
        return {
            "open": self._host.ping(),
            "stuck": stuck,
            "ending": self.ending,
            "resident_bytes": resident_bytes(),
            "threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd")),
        }

    async def end(self) -> None:
        """Kill what the environments have started: the host itself is about to be killed, and could not."""
        if self._own is not None:
            await asyncio.to_thread(self._own.kill_others)
            await asyncio.to_thread(self._own.let_end)

    async def open(self, session_id: str, env_id: str, options: Mapping[str, Any], task: Task) -> Observation:
        """As EnvHost.open. Raises EnvironmentFailure also for an environment that hangs here."""
        return await self._opening(session_id, env_id, task, partial(self._host.open, session_id, env_id, options, task))

    async def play(self, session_id: str, env_id: str, options: Mapping[str, Any], task: Task, turn: Turn | None) -> Transition:
        """As EnvHost.play, within the time of two calls. Raises as `open`."""
        play = partial(self._host.play, session_id, env_id, options, task, turn)
        return self._ended(session_id, await self._opening(session_id, env_id, task, play, calls=2))

    async def _opening(self, session_id: str, env_id: str, task: Task, call: Callable[[], T], calls: int = 1) -> T:
        room = self._rooms[task.env]
        while self.ending:  # Ray serves this call in the process that follows
            await asyncio.sleep(WATCH_S)
        self._episodes[session_id] = _Episode(task.env, time.monotonic() + room.limits.episode_timeout_s + LATE_S)
        try:
            return await self._call(task.env, call, calls)
        except TimeoutError as late:
            self._forget(session_id)
            what = "open" if calls == 1 else "open and first turn"
            raise EnvironmentBug(f"environment {env_id!r}, task {task.key}: {what}: {late}") from None
        except EnvironmentFailure:
            self._forget(session_id)
            raise

    async def step(self, session_id: str, turn: Turn) -> Transition:
        """As EnvHost.step."""
        return await self._advance(session_id, "step", lambda: self._host.step(session_id, turn))

    async def truncate(self, session_id: str) -> Transition:
        """As EnvHost.truncate."""
        return await self._advance(session_id, "truncate", lambda: self._host.truncate(session_id))

    async def close(self, session_id: str) -> None:
        """As EnvHost.close. Only who gives an episode up must: one that has its verdict is closed."""
        episode = self._episodes.pop(session_id, None)
        if episode is None:
            return
        if self._host.frees_nothing(session_id):
            self._host.close(session_id)
            return
        try:
            await self._call(episode.env, lambda: self._host.close(session_id))
        except TimeoutError as late:
            log.warning("environment %s: close: %s", episode.env, late)

    async def _advance(self, session_id: str, name: str, call: Callable[[], Transition]) -> Transition:
        episode = self._episodes.get(session_id)
        if episode is None:
            return failed(Status.INFRA_ERROR, f"no open session {session_id!r}: this host was restarted, or the session was closed")
        try:
            transition = await self._call(episode.env, call)
        except TimeoutError as late:
            self._forget(session_id)
            return failed(Status.ENV_ERROR, f"{name}: {late}", seconds=self._rooms[episode.env].limits.call_timeout_s)
        return self._ended(session_id, transition)

    def _ended(self, session_id: str, transition: Transition) -> Transition:
        """A session that has its verdict is closed. Nobody waits for that."""
        if transition.verdict is not None:
            closing = asyncio.create_task(self.close(session_id))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        return transition

    def _forget(self, session_id: str) -> None:
        """Without waiting: whoever is inside the session frees it when they leave."""
        self._episodes.pop(session_id, None)
        self._host.close(session_id)

    async def _call(self, env: str, call: Callable[[], T], calls: int = 1) -> T:
        """`call` in a thread, within the environment's room and the time of so many calls. Raises TimeoutError with a sentence."""
        room, loop = self._rooms[env], asyncio.get_running_loop()
        async with room.calls:
            running = _Call(call, loop)
            limit = calls * room.limits.call_timeout_s
            late = loop.call_later(limit, self._interrupt, env, running, limit)
            self._threads.run(running)
            try:
                return await running.answer
            finally:
                late.cancel()

    def _interrupt(self, env: str, running: _Call[Any], limit: float) -> None:
        """End the waiting, raise HungCall in the thread, and count it as stuck until it ends."""
        room, thread = self._rooms[env], running.thread
        if running.answer.done():
            return
        running.answer.set_exception(TimeoutError(f"the call took longer than {limit:g} s; bound what the environment does in one call"))
        log.warning("environment %s hangs in a call (thread %s)", env, thread)
        if thread is None:
            return
        room.stuck.add(thread)
        running.ended = lambda: room.stuck.discard(thread)
        running.interrupt()
        hanging = sum(len(r.stuck) for r in self._rooms.values())
        if hanging > MAX_STUCK:
            self._end(f"{hanging} calls hang, {len(room.stuck)} of them in environment {env!r}")

    def _end(self, reason: str) -> None:
        if not self.ending:
            log.warning("this environment host will be replaced: %s", reason)
            self.ending = reason

    def _watch(self) -> None:
        """A thread of its own: it sees what the event loop cannot, because somebody holds it up."""
        ending_since = 0.0
        while True:
            time.sleep(WATCH_S)
            now = time.monotonic()
            for session_id, episode in list(self._episodes.items()):
                if episode.expires < now:
                    log.warning("session %s of environment %s was left open; closed", session_id, episode.env)
                    self._forget(session_id)
            if self._memory_bytes and (resident := resident_bytes()) > self._memory_bytes:
                limit = f"rollout.env_host_memory_gib={self._memory_bytes / 2**30:g}"
                self._end(f"it takes {resident / 2**30:.1f} GiB of memory, more than {limit}")
                if resident > 2 * self._memory_bytes:
                    ending_since = ending_since or now - DRAIN_S
            if self._own is not None and (excess := self._own.excess()):
                self._end(excess)
                ending_since = ending_since or now - DRAIN_S
            if self.ending:
                ending_since = ending_since or now
                if not self._episodes or now - ending_since >= DRAIN_S:
                    self._exit()
                    return

    def _end_process(self) -> None:
        if self._own is not None:
            self._own.kill_others()
        os._exit(RECYCLED)


class Threads:
    """As many threads as calls run, each of which then waits for another; the rooms bound how many.

    Not a ThreadPoolExecutor: what that does around a call, and what asyncio does to wait for it, takes longer than most calls do.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call[Any]] = SimpleQueue()
        self._lock = threading.Lock()
        self._free = 0

    def run(self, call: _Call[Any]) -> None:
        with self._lock:
            start, self._free = self._free == 0, max(0, self._free - 1)
        self._calls.put(call)
        if start:
            threading.Thread(target=self._serve, name="call", daemon=True).start()

    def _serve(self) -> None:
        while True:
            tell = self._calls.get().run()
            with self._lock:
                self._free += 1
            tell()  # not before: whoever hears it and calls again would start another thread


class _Call(Generic[T]):
    """A function that can be interrupted in whichever thread it runs. Whoever waits in `loop` gets its answer."""

    def __init__(self, function: Callable[[], T], loop: asyncio.AbstractEventLoop) -> None:
        self._function, self._loop = function, loop
        self._lock = threading.Lock()
        self.answer: asyncio.Future[T] = loop.create_future()
        self.ended: Callable[[], None] = lambda: None
        """Called in the loop when the function has ended, late or not."""
        self.thread: int | None = None  # None before it starts and after it has ended

    def run(self) -> Callable[[], None]:
        """In a thread. What comes back tells the loop."""
        try:
            settle = partial(self._settle, self._within(), None)
        except BaseException as error:  # noqa: BLE001 (HungCall comes wherever it likes)
            settle = partial(self._settle, None, error)

        def tell() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(settle)

        return tell

    def _within(self) -> T:
        with self._lock:
            self.thread = threading.get_ident()
        try:
            return self._function()
        finally:
            with self._lock:
                _raise_in(threading.get_ident(), None)  # what has not been raised by now would hit the thread's next call
                self.thread = None

    def _settle(self, result: Any, error: BaseException | None) -> None:
        self.ended()
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(result)
        else:
            self.answer.set_exception(error)

    def interrupt(self) -> None:
        """Raise HungCall in it, as soon as it runs Python again. What waits in C (a socket, a sleep) waits on."""
        with self._lock:
            if self.thread is not None:
                _raise_in(self.thread, HungCall)


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error))
