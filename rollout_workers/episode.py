"""One episode: the policy and an environment take turns until there is a verdict.

    reset -> prompt ids -> sample -> parse -> step --> extend ids -> sample -> ...
                                              |
                                              +--> verdict                      (or a budget ends it: truncate -> verdict)

Pure: engine, environment and chat format come as Protocols. Ids only grow; text is never tokenized twice (invariant 1). What the
environment's side breaks becomes a verdict (data); what the engine breaks raises.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from rl_core.seams import BadTask, ChatFormat, EnvSession, Sampler
from rl_core.thinking import Thinking, thinking_tokens
from rl_core.types import Completion, EpisodeSpec, Message, Rollout, SamplingParams, Status, Task, Turn, Verdict

T = TypeVar("T")
log = logging.getLogger(__name__)

MIN_ROOM = 8
"""Tokens below which another turn cannot say anything: the episode ends instead."""

CLOSE_TIMEOUT_S = 10.0
MAX_EVIDENCE_CHARS = 500
CUT_OFF = "cut off by the token budget"


class SessionFailed(Exception):
    """Our side of an episode failed. `status` says whose fault it was: ours, the environment's, or its task's (VERIFIER_ERROR)."""

    def __init__(self, message: str, status: Status = Status.INFRA_ERROR) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Transcript:
    """What has happened so far; a timeout keeps it."""

    completions: list[Completion] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    truncated: bool = False
    thinking_tokens: int = 0


async def run_episode(
    task: Task, spec: EpisodeSpec, sampler: Sampler, session: EnvSession, chat: ChatFormat, rollout_id: str, *, worker: str = ""
) -> Rollout:
    """Roll out one attempt at `task`. Raises what the engine raises; everything else ends in the rollout's verdict."""
    started_at, began = time.time(), time.monotonic()
    transcript = Transcript()
    try:
        async with asyncio.timeout(spec.timeout_s):
            verdict = await converse(spec, sampler, session, chat, rollout_id, transcript)
    except TimeoutError:
        verdict = broken(f"the episode took longer than {spec.timeout_s:g} s after {len(transcript.completions)} turns")
    except SessionFailed as failure:
        verdict = broken(str(failure), failure.status)
    finally:
        await close(session)
    return Rollout(
        id=rollout_id,
        env=task.env,
        task_key=task.key,
        completions=tuple(transcript.completions),
        messages=tuple(transcript.messages),
        verdict=verdict,
        turns=tuple(transcript.turns),
        truncated=transcript.truncated,
        thinking_tokens=transcript.thinking_tokens,
        worker=worker,
        started_at=started_at,
        seconds=time.monotonic() - began,
    )


async def converse(
    spec: EpisodeSpec, sampler: Sampler, session: EnvSession, chat: ChatFormat, rollout_id: str, transcript: Transcript
) -> Verdict:
    """Take turns until there is a verdict."""
    shown = await ask(session.reset())
    transcript.messages += shown.messages
    ids = chat.prompt(shown.messages, shown.tools)
    if spec.max_total_tokens - len(ids) < MIN_ROOM:
        raise SessionFailed(
            f"the prompt has {len(ids)} tokens, which leaves no room to answer within max_total_tokens={spec.max_total_tokens}; "
            f"raise that, or make the environment's prompts shorter"
        )
    for number in range(spec.max_turns):
        room = spec.max_total_tokens - len(ids)
        if room < MIN_ROOM:
            break
        params = replace(turn_params(spec.sampling, number, room), thinking=cap(spec, chat))
        completion = await sampler.sample(ids, params, request_id=f"{rollout_id}-{number}")
        transcript.completions.append(completion)
        transcript.thinking_tokens += thinking_tokens(completion.token_ids.tolist(), *chat.think_ids) if chat.think_ids else 0
        turn = chat.parse(completion.token_ids.tolist(), shown.tools)
        if completion.finish_reason == "length" and not turn.malformed:
            turn = replace(turn, malformed=CUT_OFF)
        transcript.messages.append(Message(role="assistant", content=render(turn)))
        transcript.turns.append(turn)
        transition = await ask(session.step(turn))
        if transition.verdict is not None:
            return transition.verdict
        transcript.messages += transition.observation.messages
        ids = chat.extend([*ids, *completion.token_ids.tolist()], transition.observation.messages)
    transcript.truncated = True
    transition = await ask(session.truncate())
    if transition.verdict is None:
        raise SessionFailed("truncate() gave no verdict; an environment's on_truncated() must return one", Status.ENV_ERROR)
    return transition.verdict


def turn_params(sampling: SamplingParams, turn: int, room: int) -> SamplingParams:
    """Sampling of one turn: within the room that is left, with dice of its own where the dice are fixed."""
    seed = None if sampling.seed is None else (sampling.seed + 7919 * turn) % 2**31
    return replace(sampling, max_tokens=min(sampling.max_tokens, room), seed=seed)


def cap(spec: EpisodeSpec, chat: ChatFormat) -> Thinking | None:
    """The thinking budget of one turn, nothing of it used. That the markers are there was checked before the run."""
    if spec.thinking_budget is None:
        return None
    assert chat.think_ids is not None, "a thinking budget needs thinking markers of one id each (infra/preflight.py)"
    open_id, close_id = chat.think_ids
    return Thinking(budget=spec.thinking_budget, open_id=open_id, close_id=close_id)


def render(turn: Turn) -> str:
    """An assistant turn as people read it."""
    thought = f"<think>{turn.thought}</think>" if turn.thought else ""
    calls = "".join(
        f"<tool_call>{json.dumps({'name': c.name, 'arguments': dict(c.arguments)}, ensure_ascii=False)}</tool_call>"
        for c in turn.tool_calls
    )
    note = f" [malformed: {turn.malformed}]" if turn.malformed else ""
    return f"{thought}{turn.content}{calls}{note}"


def broken(message: str, status: Status = Status.INFRA_ERROR) -> Verdict:
    """The verdict of an episode that we broke: it cannot become a zero (invariant 5)."""
    return Verdict(status=status, reward=None, evidence={"error": message[:MAX_EVIDENCE_CHARS]})


async def ask(call: Awaitable[T]) -> T:
    """The session's answer; whatever it raises is a failure of ours, and data."""
    try:
        return await call
    except SessionFailed:
        raise
    except Exception as error:
        status = Status.VERIFIER_ERROR if isinstance(error, BadTask) else Status.INFRA_ERROR
        raise SessionFailed(f"{type(error).__name__}: {error}", status) from error


async def close(session: EnvSession) -> None:
    """Give the session back. Its verdict stands, so a failure here is only logged."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await session.close()
    except Exception:
        log.warning("closing a session failed", exc_info=True)
