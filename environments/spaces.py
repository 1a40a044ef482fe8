"""Gymnasium spaces for chat: what an environment shows (MessagesSpace) and what a policy answers (TurnSpace).

Gymnasium's own `Text` refuses spaces, newlines and the empty string unless they are listed in a charset, and it samples
character by character. These two accept every `str` and sample from a handful of short texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gymnasium.spaces import Space

from rl_core.types import ToolCall, Turn

ROLES = ("system", "user", "assistant", "tool")
SAMPLE_TEXTS = ("", " ", "0", "42", "none", "hello world", "line one\nline two", "\u00e9\u4e2d\U0001f600", "{}", "\\boxed{7}")
"""What `sample` draws from: enough variety to exercise an environment, never a right answer by design."""


class MessagesSpace(Space[dict[str, Any]]):
    """`{"messages": ({"role": str, "content": str}, ...), "tools": str}` where `tools` is a JSON list of schemas."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(shape=None, dtype=None, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> dict[str, Any]:
        count = int(self.np_random.integers(0, 3))
        messages = tuple({"role": ROLES[int(self.np_random.integers(len(ROLES)))], "content": _text(self)} for _ in range(count))
        return {"messages": messages, "tools": "[]"}

    def contains(self, x: Any) -> bool:
        if not isinstance(x, dict) or set(x) != {"messages", "tools"} or not isinstance(x["messages"], tuple):
            return False
        return isinstance(x["tools"], str) and all(
            isinstance(m, dict) and set(m) == {"role", "content"} and m["role"] in ROLES and isinstance(m["content"], str)
            for m in x["messages"]
        )

    def __repr__(self) -> str:
        return "MessagesSpace()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MessagesSpace)

    __hash__ = None  # type: ignore[assignment]


class TurnSpace(Space[dict[str, Any]]):
    """A Turn, or its dict form, of which only `content` is required:

    {"content": str, "thought": str, "tool_calls": ({"name": str, "arguments": {...}}, ...), "malformed": str}
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(shape=None, dtype=None, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> dict[str, Any]:
        return {"content": _text(self), "thought": _text(self), "tool_calls": (), "malformed": ""}

    def contains(self, x: Any) -> bool:
        try:
            self.to_turn(x)
        except ValueError:
            return False
        return True

    @staticmethod
    def to_turn(action: Any) -> Turn:
        """A member of this space as a Turn. Raises ValueError that names what is wrong with anything else."""
        if isinstance(action, Turn):
            return action
        if not isinstance(action, Mapping):
            raise ValueError(f"action is a {type(action).__name__}, wanted a Turn or a dict such as {{'content': 'the answer'}}")
        if "content" not in action or (unknown := set(action) - {"content", "thought", "tool_calls", "malformed"}):
            what = "no 'content'" if "content" not in action else f"unknown keys {sorted(map(str, unknown))}"
            raise ValueError(f"action has {what}, wanted content and, optionally, thought, tool_calls, malformed")
        for key in ("content", "thought", "malformed"):
            if not isinstance(action.get(key, ""), str):
                raise ValueError(f"action's {key!r} is a {type(action[key]).__name__}, wanted a str")
        calls = action.get("tool_calls", ())
        if not isinstance(calls, tuple | list):
            raise ValueError(f"action's 'tool_calls' is a {type(calls).__name__}, wanted a tuple of {{'name', 'arguments'}}")
        return Turn(
            content=action["content"],
            thought=action.get("thought", ""),
            tool_calls=tuple(_to_call(call) for call in calls),
            malformed=action.get("malformed", ""),
        )

    @staticmethod
    def from_turn(turn: Turn) -> dict[str, Any]:
        """The dict form of a Turn; `to_turn` undoes it."""
        calls = tuple({"name": c.name, "arguments": json.loads(json.dumps(dict(c.arguments)))} for c in turn.tool_calls)
        return {"content": turn.content, "thought": turn.thought, "tool_calls": calls, "malformed": turn.malformed}

    def __repr__(self) -> str:
        return "TurnSpace()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TurnSpace)

    __hash__ = None  # type: ignore[assignment]


def _to_call(call: Any) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), Mapping):
        raise ValueError(f"tool call {str(call)[:80]!r}: wanted {{'name': str, 'arguments': dict}}")
    return ToolCall(name=call["name"], arguments=dict(call["arguments"]))


def _text(space: Space[Any]) -> str:
    return SAMPLE_TEXTS[int(space.np_random.integers(len(SAMPLE_TEXTS)))]
