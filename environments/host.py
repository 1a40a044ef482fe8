"""EnvHost: the process in which episodes run, many at a time, each call in a thread of its caller's pool.

    open(session, env, options, task) -> Observation      step(session, turn) -> Transition  ...  close(session)

A plain class with thread-safe, blocking methods; a run wraps it in a HostActor, which bounds every call. An exception inside an
environment is data: it becomes a Transition whose verdict says that we failed, and it can never become a reward.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium

from environments.base import TextEnv
from environments.registry import resolve
from environments.sandbox.base import SandboxUnavailable
from environments.sources import UNDRAWN
from rl_core.seams import BadTask, Observation, Transition
from rl_core.types import Status, Task, Turn, Verdict

MAX_EVIDENCE_CHARS = 500

log = logging.getLogger(__name__)
Gym5 = tuple[dict[str, Any], float, bool, bool, dict[str, Any]]


TRANSIENT = (OSError, MemoryError, SandboxUnavailable)
"""What the machine raises, and not the environment's code."""


class EnvironmentFailure(RuntimeError):
    """An episode could not be opened: our failure, never the policy's. One string argument, so that it survives pickling."""


class EnvironmentBug(EnvironmentFailure):
    """It could not, because of the environment's own code."""


class TaskUnusable(EnvironmentFailure, BadTask):
    """It could not, because its task cannot be graded."""


@dataclass(slots=True)
class _Session:
    """One episode. `env` is None until it has started."""

    env: TextEnv | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # an episode has one caller at a time; a late duplicate waits
    closed: bool = False


class EnvHost:
    """Runs the episodes of all environments of a run."""

    def __init__(self, sandbox: str = "auto") -> None:
        self.sandbox = sandbox
        """Backend for untrusted programs; environments get it as the option `sandbox` unless their config names one."""
        self._sessions: dict[str, _Session] = {}
        self._classes: dict[str, type[TextEnv]] = {}
        self._lock = threading.Lock()

    def ping(self) -> int:
        """How many sessions are open; answering at all says that the host lives."""
        return len(self._sessions)

    def open(self, session_id: str, env_id: str, options: Mapping[str, Any], task: Task) -> Observation:
        """Start an episode of `task`. Raises EnvironmentFailure when the environment cannot start it, TaskUnusable when nothing could."""
        if cause := task.private.get(UNDRAWN):
            raise EnvironmentBug(f"environment {env_id!r}: {cause}")
        try:
            session = self._enter(session_id)
            with self._held(session):
                try:
                    return self._begin(session, env_id, options, task)
                except BaseException:
                    self.close(session_id)
                    raise
        except (Exception, SystemExit) as error:
            log.warning("environment %s could not open task %s", env_id, task.key, exc_info=True)
            kind = EnvironmentFailure if isinstance(error, TRANSIENT) else TaskUnusable if isinstance(error, BadTask) else EnvironmentBug
            raise kind(f"environment {env_id!r}, task {task.key}: {describe(error)}") from None

    def step(self, session_id: str, turn: Turn) -> Transition:
        """Hand the policy's turn to the environment. Never raises for what happens inside it."""
        return self._advance(session_id, lambda env: env.step(turn))

    def play(self, session_id: str, env_id: str, options: Mapping[str, Any], task: Task, turn: Turn | None) -> Transition:
        """`open`, and then `step` with the turn, or `truncate` where there is none."""
        began = self.open(session_id, env_id, options, task).digest
        return replace(self.truncate(session_id) if turn is None else self.step(session_id, turn), began=began)

    def truncate(self, session_id: str) -> Transition:
        """End the episode because a budget ran out."""
        return self._advance(session_id, lambda env: env.truncate())

    def close(self, session_id: str) -> None:
        """Forget the session; does not wait for a call that is inside it, which then frees it on its way out.

        Closing one that is not open does nothing, so that clean-up may run twice.
        """
        with self._lock:
            session = self._sessions.pop(session_id, None)
        if session is None:
            return
        session.closed = True
        _free_if_closed(session)

    def frees_nothing(self, session_id: str) -> bool:
        """Whether `close` only forgets: the environment's own `close` is Gymnasium's, which does nothing."""
        session = self._sessions.get(session_id)
        return session is None or session.env is None or getattr(session.env.close, "__func__", None) is gymnasium.Env.close

    def _class(self, env_id: str) -> type[TextEnv]:
        """Resolved once: looking through everything that is installed takes a tenth of a second."""
        if env_id not in self._classes:
            self._classes[env_id] = resolve(env_id)
        return self._classes[env_id]

    def _enter(self, session_id: str) -> _Session:
        with self._lock:
            if session_id in self._sessions:
                raise ValueError(f"session {session_id!r} is open already; close it first")
            session = self._sessions[session_id] = _Session()
        return session

    def _begin(self, session: _Session, env_id: str, options: Mapping[str, Any], task: Task) -> Observation:
        session.env = self._class(env_id)(**{"sandbox": self.sandbox, **options})
        observation = session.env.reset(options={"task": task})[1]["observation"]
        if not isinstance(observation, Observation):
            raise TypeError(f"begin() returned a {type(observation).__name__}, wanted an Observation")
        return observation

    def _advance(self, session_id: str, move: Callable[[TextEnv], Gym5]) -> Transition:
        session = self._sessions.get(session_id)
        if session is None:
            return failed(Status.INFRA_ERROR, f"no open session {session_id!r}: this host was restarted, or the session was closed")
        with self._held(session):
            env = session.env
            if session.closed or env is None:
                return failed(Status.INFRA_ERROR, f"session {session_id!r} was closed while a turn waited")
            start = time.perf_counter()
            try:
                return to_transition(env, move(env), time.perf_counter() - start)
            except (Exception, SystemExit) as error:
                log.warning("environment %s failed in session %s", env.id, session_id, exc_info=True)
                status = Status.INFRA_ERROR if isinstance(error, TRANSIENT) else Status.ENV_ERROR
                return failed(status, describe(error), seconds=time.perf_counter() - start)

    @contextmanager
    def _held(self, session: _Session) -> Iterator[None]:
        """The session's one caller. Whoever leaves a session that was closed meanwhile frees it."""
        try:
            with session.lock:
                yield
        finally:
            _free_if_closed(session)


def to_transition(env: TextEnv, result: Gym5, seconds: float) -> Transition:
    """Gymnasium's five values as a Transition; the verdict gets its latency and, if it names none, its verifier."""
    _, _, terminated, truncated, info = result
    observation, verdict = info["observation"], info.get("verdict")
    if not isinstance(observation, Observation) or (terminated or truncated) != isinstance(verdict, Verdict):
        raise TypeError(f"act() of {env.id!r} returned neither an Observation nor a Verdict")
    if verdict is not None:
        verdict = replace(verdict, latency_s=seconds, verifier_version=verdict.verifier_version or f"{env.id}/{env.version}")
    return Transition(observation=observation, terminated=terminated, truncated=truncated, verdict=verdict)


def failed(status: Status, message: str, *, seconds: float = 0.0) -> Transition:
    """The end of an episode through a failure of ours: masked out of the loss and of its group's baseline."""
    verdict = Verdict(status=status, reward=None, evidence={"error": message[:MAX_EVIDENCE_CHARS]}, latency_s=seconds)
    return Transition(observation=Observation(messages=()), terminated=True, truncated=False, verdict=verdict)


def describe(error: BaseException) -> str:
    """An exception in one capped line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_EVIDENCE_CHARS]


def _free_if_closed(session: _Session) -> None:
    """Close the environment of a closed session, once; if somebody is inside it, they do so when they leave."""
    if not session.closed or not session.lock.acquire(blocking=False):
        return
    try:
        env, session.env = session.env, None
        if env is not None:
            env.close()
    except (Exception, SystemExit):
        log.warning("closing an environment failed", exc_info=True)
    finally:
        session.lock.release()
