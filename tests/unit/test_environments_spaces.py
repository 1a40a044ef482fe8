"""The Gymnasium spaces of chat accept any text and nothing but chat."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from environments.base import to_gym
from environments.spaces import MessagesSpace, TurnSpace
from rl_core.seams import Observation
from rl_core.types import Message, ToolCall, Turn


@given(st.text())
def test_any_text_is_a_turn_and_a_message(text: str) -> None:
    assert {"content": text} in TurnSpace()
    assert Turn(content=text, thought=text) in TurnSpace()
    assert to_gym(Observation(messages=(Message(role="user", content=text),))) in MessagesSpace()


def test_samples_are_members_and_follow_the_seed() -> None:
    for space_class in (TurnSpace, MessagesSpace):
        space, twin = space_class(seed=5), space_class(seed=5)
        samples = [space.sample() for _ in range(50)]
        assert all(sample in space for sample in samples)
        assert samples == [twin.sample() for _ in range(50)]
        assert len({repr(sample) for sample in samples}) > 5


def test_a_turn_survives_its_dict_form() -> None:
    turn = Turn(content="a", thought="b", tool_calls=(ToolCall(name="find", arguments={"name": "Ana", "n": [1, 2]}),), malformed="c")
    assert TurnSpace.to_turn(TurnSpace.from_turn(turn)) == turn
    assert TurnSpace.to_turn(turn) is turn
    assert TurnSpace.to_turn({"content": "x"}) == Turn(content="x")


@pytest.mark.parametrize(
    ("action", "complaint"),
    [
        ("just text", "is a str"),
        (None, "is a NoneType"),
        ({}, "no 'content'"),
        ({"content": 3}, "'content' is a int"),
        ({"content": "", "tokens": [1]}, "tokens"),
        ({"content": "", "tool_calls": "find"}, "'tool_calls' is a str"),
        ({"content": "", "tool_calls": ({"name": "find"},)}, "tool call"),
        ({"content": "", "tool_calls": ({"name": "find", "arguments": [1]},)}, "tool call"),
    ],
)
def test_what_is_no_turn_is_refused_with_the_reason(action: object, complaint: str) -> None:
    assert action not in TurnSpace()
    with pytest.raises(ValueError, match=complaint):
        TurnSpace.to_turn(action)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"messages": [], "tools": "[]"},
        {"messages": ({"role": "user"},), "tools": "[]"},
        {"messages": ({"role": "root", "content": ""},), "tools": "[]"},
        {"messages": (), "tools": []},
    ],
)
def test_what_is_no_observation_is_refused(value: object) -> None:
    assert value not in MessagesSpace()
