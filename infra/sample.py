"""One episode in the terminal: an environment, and somebody who answers it.

oracle      the environment's own
by hand     lines from standard input, ended by an empty one; "/name {json}" is a tool call
a model     a checkpoint, sampled through Transformers
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from environments.base import TextEnv
from infra.errors import UsageError
from rl_core.chat import chat_format
from rl_core.seams import Observation
from rl_core.types import Task, ToolCall, Turn, Verdict

Policy = Callable[[Observation], Turn]
Say = Callable[[str], None]


def play_aloud(env: TextEnv, task: Task, policy: Policy, *, name: str, say: Say, max_turns: int) -> Verdict | None:
    """Play one episode and say everything. None if the policy has nothing to say before the end."""
    say(f"--- task {task.key} ({task.difficulty or 'no difficulty'})")
    observation: Observation = env.reset(options={"task": task})[1]["observation"]
    for tool in observation.tools:
        arguments = ", ".join(f"{name}: {schema.get('type', 'any')}" for name, schema in tool["parameters"].get("properties", {}).items())
        say(f"[tool] {tool['name']}({arguments})  {tool.get('description', '')}")
    for turn_number in range(max_turns + 1):
        for message in observation.messages:
            say(f"[{message.role}] {message.content}")
        if turn_number == max_turns:
            info = env.truncate()[4]
        else:
            try:
                turn = policy(observation)
            except (NotImplementedError, EOFError):
                return None
            say(f"[{name}] {spell(turn)}")
            info = env.step(turn)[4]
        if "verdict" in info:
            verdict: Verdict = info["verdict"]
            say(f"[verdict] {verdict.status.value}, reward {verdict.reward}, {dict(verdict.components)}")
            if verdict.reward != 1.0:
                say(f"[evidence] {dict(verdict.evidence)}")
            return verdict
        observation = info["observation"]
    return None


def spell(turn: Turn) -> str:
    thought = f"<think>{turn.thought}</think>" if turn.thought else ""
    calls = "".join(f" {c.name}({dict(c.arguments)})" for c in turn.tool_calls)
    return f"{thought}{turn.content}{calls}{f' [malformed: {turn.malformed}]' if turn.malformed else ''}"


def oracle(env: TextEnv, seed: int) -> Policy:
    """The environment's own answers."""
    rng = random.Random(seed)
    return lambda observation: env.oracle(observation, rng)


def by_hand(source: TextIO | None = None, say: Say = lambda line: None) -> Policy:
    """What somebody types. Raises EOFError where there is no more."""

    def answer(observation: Observation) -> Turn:
        say('(your turn; an empty line ends it, "/name {json}" calls a tool)')
        typed: list[str] = []
        for line in source or sys.stdin:
            if not line.strip():
                break
            typed.append(line.rstrip("\n"))
        if not typed:
            raise EOFError
        return read_turn(typed)

    return answer


def read_turn(typed: Sequence[str]) -> Turn:
    """Lines as a turn: those with a slash are tool calls, the rest is the answer."""
    calls, content, malformed = [], [], ""
    for line in typed:
        if not line.startswith("/"):
            content.append(line)
            continue
        name, _, arguments = line[1:].partition(" ")
        try:
            parsed: Any = json.loads(arguments or "{}")
        except ValueError as error:
            malformed = f"tool call is not JSON: {error}"
            continue
        calls.append(ToolCall(name=name, arguments=parsed if isinstance(parsed, dict) else {}))
    return Turn(content="\n".join(content), tool_calls=tuple(calls), malformed=malformed)


def a_model(path: str, *, max_tokens: int, temperature: float, seed: int) -> Policy:
    """A checkpoint, one sequence, in this process: slow, and enough to look at an episode. Raises UsageError for what is none."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        chat = chat_format(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise UsageError(f"no checkpoint in {path!r}: {error}") from error
    torch.manual_seed(seed)
    ids: list[int] = []
    tools: tuple[dict[str, Any], ...] = ()

    def answer(observation: Observation) -> Turn:
        nonlocal ids, tools
        tools = observation.tools or tools
        ids = chat.extend(ids, observation.messages) if ids else chat.prompt(observation.messages, observation.tools)
        dice = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=max_tokens,
                eos_token_id=list(chat.stop_ids),
                pad_token_id=chat.stop_ids[0],
                do_sample=temperature > 0,
                **dice,
            )
        sampled = out[0, len(ids) :].tolist()
        ids = [*ids, *sampled]
        return chat.parse(sampled, tools)

    return answer
