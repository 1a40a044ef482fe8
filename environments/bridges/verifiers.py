"""Environments of the `verifiers` package (Prime Intellect), as they are: prompts, tools, several turns, rubrics.

    environments:
      reverse: {id: verifiers, options: {env: reverse-text, arguments: {num_train_examples: 500}}}

`env` is what `verifiers.load_environment` takes, the name of an installed environment package, or `module:function`. Its rollout runs in
an event loop of its own, and where it would call a model it waits for the policy: the package's own code decides what comes next.

    begin --> rollout starts ... asks its client for a completion --> the messages are the observation
    act   --> that completion is the policy's turn ... asks again   --> the new messages are the observation
                                                   ... ends, rubric --> rewards are the components, their weighted sum the reward

The rubric's functions count an exception as 0, which would train the policy on our failures: here it is a verifier_error, as are a rollout
that ends in an error and one that takes longer than `timeout_s` to come back. Written for verifiers 0.1.14, the last with this interface.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import math
import queue
import random
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict
from environments.bridges import need, verifier_failed
from environments.knobs import OptionError, check_range, read_knobs

INSTALL = "pip install 'verifiers==0.1.14'"
KNOBS: dict[str, Any] = {"env": "", "arguments": {}, "timeout_s": 60.0, "low": 0.0, "high": 1.0}
"""env: an environment package, or module:function. arguments: of its load_environment. timeout_s: until it comes back after a turn.
low, high: the range of its weighted rewards, mapped to 0 and 1."""

ROLES = {"text": "user", "developer": "system"}
FAILURES: ContextVar[list[str] | None] = ContextVar("failures", default=None)
"""What the reward functions of the rollout at hand raised."""


class VerifiersEnv(TextEnv):
    """An environment of the verifiers package; its rubric gives the reward."""

    id: ClassVar[str] = "verifiers"
    version: ClassVar[str] = "1"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.knobs = checked_knobs(options)
        self._rollout: LiveRollout | None = None
        self._known = 0

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        rows = load(checked_knobs(options)).get_dataset()
        row = json.loads(json.dumps(rows[rng.randrange(len(rows))], default=str))
        return TaskDraft(public={"prompt": row["prompt"]}, private={"row": row}, difficulty=str(row.get("task") or ""))

    def begin(self, task: Task) -> Observation:
        self.close()
        self._rollout, self._known = LiveRollout(load(self.knobs), task.private["row"]), 0
        event = self._rollout.wait(self.knobs["timeout_s"])
        if not isinstance(event, Asked):
            raise RuntimeError(f"the rollout ended before it asked for a turn: {event}")
        tools = tuple({"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in event.tools)
        return Observation(messages=self._new(event), tools=tools)

    def act(self, turn: Turn) -> Observation | Verdict:
        if turn.malformed:
            return Verdict(status=Status.INVALID_OUTPUT, reward=0.0, evidence={"reason": turn.malformed})
        assert self._rollout is not None
        self._known += 1  # the turn itself comes back as a message of the next prompt
        self._rollout.answer(turn)
        event = self._rollout.wait(self.knobs["timeout_s"])
        if isinstance(event, Asked):
            return Observation(messages=self._new(event))
        if event.error:
            return verifier_failed(f"{self.knobs['env']}: {event.error}")
        if not math.isfinite(event.reward):
            return verifier_failed(f"{self.knobs['env']}: its rubric gave the reward {event.reward}")
        reward = min(1.0, max(0.0, (event.reward - self.knobs["low"]) / (self.knobs["high"] - self.knobs["low"])))
        return Verdict(status=Status.OK, reward=reward, components=event.metrics, evidence={"weighted": f"{event.reward:g}"})

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        """The row's answer, which is what most single-turn packages compare with."""
        assert self.task is not None
        answer = self.task.private["row"].get("answer")
        return Turn(content=answer) if isinstance(answer, str) and answer else super().oracle(observation, rng)

    def close(self) -> None:
        if self._rollout is not None:
            self._rollout.cancel()
            self._rollout = None

    def _new(self, event: Asked) -> tuple[Message, ...]:
        """The messages that the policy has not seen: all after those of its last prompt and its own turn."""
        fresh = event.prompt[self._known :]
        self._known = len(event.prompt)
        return tuple(Message(role=ROLES.get(m.role, m.role), content=text_of(m.content)) for m in fresh)


@dataclass(frozen=True, slots=True)
class Asked:
    """The rollout wants a turn for this prompt."""

    prompt: list[Any]
    tools: list[Any]


@dataclass(frozen=True, slots=True)
class Ended:
    """The rollout is over and scored, or broke."""

    reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


class LiveRollout:
    """A rollout of the package in the loop thread, and its two mailboxes."""

    def __init__(self, env: Any, row: Mapping[str, Any]) -> None:
        self._events: queue.SimpleQueue[Asked | Ended] = queue.SimpleQueue()
        self._turns: asyncio.Queue[Turn] = asyncio.Queue()
        self._loop = event_loop()
        self._work = asyncio.run_coroutine_threadsafe(self._run(env, dict(row)), self._loop)

    def wait(self, seconds: float) -> Asked | Ended:
        """What comes next; nothing is an end in an error."""
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            self.cancel()
            return Ended(error=f"the rollout neither asked for a turn nor ended within {seconds:g} s")

    def answer(self, turn: Turn) -> None:
        self._loop.call_soon_threadsafe(self._turns.put_nowait, turn)

    def cancel(self) -> None:
        self._work.cancel()

    async def ask(self, prompt: list[Any], tools: list[Any]) -> Turn:
        self._events.put(Asked(list(prompt), list(tools)))
        return await self._turns.get()

    async def _run(self, env: Any, row: dict[str, Any]) -> None:
        failures: list[str] = []
        FAILURES.set(failures)
        try:
            state = await env.rollout(row, make_client(self.ask), "policy", {})
            if state.get("error") is not None:
                raise RuntimeError(f"the rollout ended in {state['error']!r}")
            await env.rubric.score_rollout(state)
            await env.rubric.cleanup(state)
            if failures:
                raise RuntimeError(failures[0])
            metrics = {str(k): float(v) for k, v in (state.get("metrics") or {}).items()}
            self._events.put(Ended(float(state["reward"]), metrics))
        except Exception as error:  # noqa: BLE001 -- it crosses to the episode's thread, which raises
            self._events.put(Ended(error=f"{type(error).__name__}: {error}"[:400]))


def make_client(ask: Callable[[list[Any], list[Any]], Any]) -> Any:
    """A client of the package's own kind that asks the policy. Made by a function, since its base class is theirs."""
    types = need("verifiers.types", INSTALL)
    base = need("verifiers.clients.client", INSTALL).Client

    class PolicyClient(base):  # type: ignore[misc, valid-type]
        def setup_client(self, config: Any) -> Any:
            return config

        async def to_native_tool(self, tool: Any) -> Any:
            return tool

        async def to_native_prompt(self, messages: Any) -> tuple[Any, dict[str, Any]]:
            return messages, {}

        async def get_native_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **kwargs: Any) -> Any:
            return await ask(prompt, tools or [])

        async def raise_from_native_response(self, response: Any) -> None:
            return None

        async def from_native_response(self, response: Turn) -> Any:
            calls = [
                types.ToolCall(id=f"call_{i}", name=c.name, arguments=json.dumps(dict(c.arguments)))
                for i, c in enumerate(response.tool_calls)
            ]
            message = types.ResponseMessage(
                content=response.content, reasoning_content=response.thought or None, tool_calls=calls or None,
                finish_reason="tool_calls" if calls else "stop", is_truncated=False,
            )  # fmt: skip
            return types.Response(id="policy", created=0, model="policy", message=message)

        async def close(self) -> None:
            return None

    return PolicyClient(None)


def load(knobs: Mapping[str, Any]) -> Any:
    """The package's environment, once per process for the same arguments."""
    return _load(knobs["env"], json.dumps(knobs["arguments"], sort_keys=True))


@lru_cache(maxsize=16)
def _load(name: str, arguments: str) -> Any:
    package = need("verifiers", INSTALL)
    try:
        if ":" in name:
            module, _, function = name.rpartition(":")
            env = getattr(importlib.import_module(module), function)(**json.loads(arguments))
        else:
            env = package.load_environment(name, **json.loads(arguments))
    except Exception as error:
        raise OptionError(f"environment 'verifiers': loading {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(env, package.MultiTurnEnv):
        raise OptionError(
            f"environment 'verifiers': {name!r} gave a {type(env).__name__}, wanted a verifiers.MultiTurnEnv (a single turn is one)"
        )
    if env.rubric.has_group_rewards:
        raise OptionError(f"environment 'verifiers': the rubric of {name!r} scores whole groups, which is no reward of an episode")
    for rubric in getattr(env.rubric, "rubrics", [env.rubric]):
        rubric.funcs = [noticed(function) for function in rubric.funcs]
    return env


def noticed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward function whose exceptions are remembered before the package turns them into zeros."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            found = function(*args, **kwargs)
            return await found if inspect.isawaitable(found) else found
        except Exception as error:
            seen = FAILURES.get()
            if seen is not None:
                seen.append(f"reward function {getattr(function, '__name__', function)!r} raised {type(error).__name__}: {error}"[:300])
            raise

    return wrapper


@lru_cache(maxsize=1)
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop in which all rollouts of this process run."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="verifiers", daemon=True).start()
    return loop


def checked_knobs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that `options` set. Raises OptionError."""
    knobs = read_knobs(VerifiersEnv.id, KNOBS, options)
    if not knobs["env"]:
        raise OptionError("environment 'verifiers': option env is empty, wanted an installed environment package, or module:function")
    check_range(VerifiersEnv.id, "timeout_s", knobs["timeout_s"], 0.1, 3600)
    if not knobs["low"] < knobs["high"]:
        raise OptionError(f"environment 'verifiers': low={knobs['low']} and high={knobs['high']}, wanted low < high")
    return knobs


def text_of(content: Any) -> str:
    """A message's content as text; parts that are no text are left out."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "") if hasattr(part, "get") else "") for part in content or [])
