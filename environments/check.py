"""The conformance kit: what an environment must do before a policy is trained on it.

    for result in check_environment(MyEnv, {}):
        print(result)            ->  ok    the oracle earns 1.0 when it shows its working: 8 tasks

The environment's own oracle plays the perfect policy. The hostile answers are the ones that reinforcement learning finds
first where a verifier can be paid for nothing.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import queue
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from gymnasium.utils.env_checker import check_env

from environments.base import TextEnv
from environments.plugin_files import target_of
from rl_core.seams import Observation
from rl_core.types import Task, ToolCall, Turn, Verdict

T = TypeVar("T")

MAX_TURNS = 64
NUM_TRAIN, NUM_EVAL = 1600, 400  # tasks that are searched for one that sits in both splits
CONSTANT_LIMIT = 0.25
"""Mean reward that one constant answer may earn: a question with few answers pays a lucky guess now and then, not more."""
DEADLINE_S = 30.0  # longest that an environment may take over one turn

CONSTANTS = ("0", "1", "7", "42", "yes", "no", "none", "done", "true", "return x")
BIG = 1_000_000  # characters
ABANDONED = 16  # episodes
FILES = "/proc/self/fd"

CHILD = """
import json, sys
from environments.check import fingerprint
from environments.registry import load
print(fingerprint(load(sys.argv[1]), json.loads(sys.argv[2])))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One line of the report."""

    name: str  # what holds if ok, as a sentence
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name}: {self.detail}"


def check_environment(
    env_class: type[TextEnv], options: Mapping[str, Any] | None = None, *, num_tasks: int = 8, second_process: bool = True
) -> list[CheckResult]:
    """Every check, in order; none raises. Takes seconds, and minutes where each verdict runs a program.

    Without `second_process` no Python is started to compare draws with.
    """
    options = dict(options or {})
    checks: list[tuple[str, Callable[[], str]]] = [
        ("Gymnasium's own checker passes", lambda: _gymnasium(env_class, options)),
        ("tasks are JSON and survive a round trip", lambda: _json(env_class, options, num_tasks)),
        ("tasks and prompts are identical in every process", lambda: _processes(env_class, options, second_process)),
        ("no task is in both splits", lambda: _splits(env_class, options)),
        ("the oracle earns 1.0 when it shows its working", lambda: _oracle(env_class, options | {"oracle_working": 1.0}, num_tasks)),
        ("the oracle earns 1.0 when it answers at once", lambda: _oracle(env_class, options | {"oracle_working": 0.0}, num_tasks)),
        ("no answer that ignores the question is paid", lambda: _hostile(env_class, options, num_tasks)),
        ("no constant answer is paid", lambda: _constants(env_class, options, num_tasks)),
        ("the right answer among others is not paid", lambda: _hedged(env_class, options, num_tasks)),
        ("the thought is not read for an answer", lambda: _thought(env_class, options, num_tasks)),
        ("the same answer scores the same ten times", lambda: _repeatable(env_class, options)),
        ("sessions do not leak into each other", lambda: _isolated(env_class, options)),
        ("what an episode opens, closing it frees", lambda: _frees(env_class, options)),
        ("a step after the end raises", lambda: _after_end(env_class, options)),
    ]
    return [_run(name, check) for name, check in checks]


def play(env: TextEnv, task: Task, policy: Callable[[Observation], Turn]) -> Verdict:
    """One episode. A policy that takes more than MAX_TURNS turns is cut off."""
    observation = env.reset(options={"task": task})[1]["observation"]
    for _ in range(MAX_TURNS):
        turn = policy(observation)
        info = within_deadline(lambda turn=turn: env.step(turn)[4])  # type: ignore[misc]
        observation = info["observation"]
        if "verdict" in info:
            return _verdict(info)
    return _verdict(env.truncate()[4])


def within_deadline(call: Callable[[], T]) -> T:
    """The result of `call`, or an AssertionError if it takes too long; its thread is then left to itself."""
    done: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((call(), None))
        except Exception as error:  # noqa: BLE001 -- raised again where it is waited for
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=DEADLINE_S)
    except queue.Empty:
        raise AssertionError(f"a turn took more than {DEADLINE_S:g} s; bound what the verifier reads or runs") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def play_oracle(env: TextEnv, task: Task, seed: int = 0) -> Verdict:
    """One episode of the environment's own oracle."""
    rng = random.Random(seed)
    return play(env, task, lambda observation: env.oracle(observation, rng))


def fingerprint(env_class: type[TextEnv], options: Mapping[str, Any], count: int = 12) -> str:
    """A hash of some tasks of both splits and of their first observations."""
    digest = hashlib.sha256()
    env = env_class(**options)
    for split in ("train", "eval"):
        for task in islice(env_class.tasks(split, 3, options), count):
            observation = env.reset(options={"task": task})[1]["observation"]
            digest.update(repr((task.key, task.seed, observation)).encode())
    env.close()
    return digest.hexdigest()


def hostile_turns(prompt: str) -> Iterator[tuple[str, Turn]]:
    """(name, turn) of answers that must earn nothing, whatever was asked."""
    yield "empty", Turn(content="")
    yield "blank", Turn(content=" \n\t ")
    yield "echo of the prompt", Turn(content=prompt)
    yield "malformed markup", Turn(content="", malformed="unclosed <think>")
    yield "NaN", Turn(content="NaN")
    yield "infinity", Turn(content="1e999")
    yield "every small number", Turn(content=" ".join(map(str, range(2000))))
    yield "a claim of success", Turn(content='{"reward": 1.0, "correct": true, "status": "ok"}')
    yield "an unclosed box", Turn(content="\\boxed{" * 200)
    yield "deep nesting", Turn(content="[" * 50_000)
    yield "a megabyte of letters", Turn(content="a" * BIG)
    yield "a megabyte of digits", Turn(content="1" * BIG)
    yield "lone surrogates", Turn(content="\ud800\udfff\x00")
    yield "digits of other scripts", Turn(content="\uff14\uff12 \u0664\u0662 \u00b2 \u2463")
    yield "text that runs backwards", Turn(content="\u202e42\u202c\u2066x\u2069")
    yield "invisible characters", Turn(content="\u200b\u200d\ufeff\u2060" * 100)
    yield "a heap of accents", Turn(content="e" + "\u0301" * 100_000)
    yield "a tool that is not there", Turn(content="", tool_calls=(ToolCall(name="__init__", arguments={}),))
    yield "a tool call full of nonsense", Turn(content="", tool_calls=(ToolCall(name="", arguments={"": math.nan, "a": [[]] * 99}),))
    yield "a tool call of a megabyte", Turn(content="", tool_calls=(ToolCall(name="x" * BIG, arguments={"x": "x" * BIG}),))
    yield "a thousand tool calls", Turn(content="", tool_calls=(ToolCall(name="find", arguments={"name": "x"}),) * 1000)


# --- the checks: each returns what it saw, and raises AssertionError for what it did not want to see ------------------------


def _run(name: str, check: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name=name, ok=True, detail=check())
    except AssertionError as error:
        return CheckResult(name=name, ok=False, detail=str(error))
    except Exception as error:  # noqa: BLE001 -- the report is where an author looks for it
        return CheckResult(name=name, ok=False, detail=f"raised {type(error).__name__}: {error}")


def _gymnasium(env_class: type[TextEnv], options: Mapping[str, Any]) -> str:
    env = env_class(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env, skip_render_check=True)
    env.close()
    texts = sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)})
    assert not texts, f"it warns: {texts[0]}"
    return "reset, step, spaces and seeding are as Gymnasium wants them"


def _json(env_class: type[TextEnv], options: Mapping[str, Any], num_tasks: int) -> str:
    for task in _tasks(env_class, options, num_tasks):
        for part in (task.public, task.private):
            assert json.loads(json.dumps(part)) == part, f"task {task.key} changes in a JSON round trip (a tuple, or a key that is no str?)"
        assert task.env == env_class.id, f"task {task.key} says env={task.env!r}, the class says {env_class.id!r}"
    return f"{num_tasks} tasks"


def _processes(env_class: type[TextEnv], options: Mapping[str, Any], second: bool) -> str:
    here = fingerprint(env_class, options)
    assert here == fingerprint(env_class, options), "two draws in one process differ: does make_task or begin use a global random state?"
    if not second or "<locals>" in env_class.__qualname__ or env_class.__module__ == "__main__":
        return "the same twice in this process; no second one was asked, or none can import the class"
    target = target_of(env_class)
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, target, json.dumps(dict(options))],
        env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, f"a second process could not draw them: {child.stderr.strip().splitlines()[-1:]}"
    assert child.stdout.strip() == here, "a second process drew others: does something depend on the order of a set, or on hash()?"
    return "two draws here and one in a second process agree"


def _splits(env_class: type[TextEnv], options: Mapping[str, Any]) -> str:
    train = list(islice(env_class.tasks("train", 0, options), NUM_TRAIN))
    evaluation = list(islice(env_class.tasks("eval", 0, options), NUM_EVAL))
    keys = {t.key for t in train}
    assert not keys & {t.key for t in evaluation}, "a task key is in both splits"
    asked = {json.dumps(t.public, sort_keys=True) for t in train}
    shared = sum(json.dumps(t.public, sort_keys=True) in asked for t in evaluation)  # right where the answer lies in a hidden world
    note = f"; {shared} of the latter ask in the same words about other hidden things" if shared else ""
    return f"{len(keys)} distinct of {NUM_TRAIN} train tasks, {len({t.key for t in evaluation})} distinct of {NUM_EVAL} eval tasks{note}"


def _oracle(env_class: type[TextEnv], options: Mapping[str, Any], num_tasks: int) -> str:
    env = env_class(**options)
    for task in _tasks(env_class, options, num_tasks):
        verdict = play_oracle(env, task)
        assert verdict.reward == 1.0, (
            f"task {task.key} ({task.difficulty}): reward {verdict.reward}, {verdict.status}, {dict(verdict.evidence)}"
        )
    env.close()
    return f"{num_tasks} tasks"


def _hostile(env_class: type[TextEnv], options: Mapping[str, Any], num_tasks: int) -> str:
    env = env_class(**options)
    names: list[str] = []
    for task in _tasks(env_class, options, min(2, num_tasks)):
        prompt = "\n".join(m.content for m in env.reset(options={"task": task})[1]["observation"].messages)
        names = []
        for name, turn in hostile_turns(prompt):
            verdict = play(env, task, lambda _, turn=turn: turn)  # type: ignore[misc]
            assert verdict.status.trains, (
                f"{name}: status {verdict.status}, so the policy could have itself masked; {dict(verdict.evidence)}"
            )
            assert verdict.reward == 0.0, f"{name}: reward {verdict.reward}"
            names.append(name)
    env.close()
    return ", ".join(names)


def _constants(env_class: type[TextEnv], options: Mapping[str, Any], num_tasks: int) -> str:
    env, means = env_class(**options), {}
    tasks = _tasks(env_class, options, num_tasks)
    for constant in CONSTANTS:
        rewards = [play(env, task, lambda _, c=constant: Turn(content=c)).reward or 0.0 for task in tasks]  # type: ignore[misc]
        means[constant] = sum(rewards) / len(rewards)
    env.close()
    best = max(means, key=lambda c: means[c])
    assert means[best] <= CONSTANT_LIMIT, f"always answering {best!r} earns {means[best]:.2f} on average, wanted at most {CONSTANT_LIMIT}"
    return f"{len(CONSTANTS)} tried, the best earns {means[best]:.2f} on average"


def _hedged(env_class: type[TextEnv], options: Mapping[str, Any], num_tasks: int) -> str:
    """Where one answer ends the episode: the oracle's, and others beside it. A verifier that searches the text for the answer pays."""
    env, hedged = env_class(**options), 0
    for task in _tasks(env_class, options, min(4, num_tasks)):
        observation = env.reset(options={"task": task})[1]["observation"]
        right = env.oracle(observation, random.Random(0))
        if right.tool_calls or not right.content.strip() or "verdict" not in env.step(right)[4]:
            continue
        for name, text in (
            ("followed", f"{right.content}\nor\n{right.content}0"),
            ("preceded", f"{right.content}0 or 1 or {right.content}"),
        ):
            verdict = play(env, task, lambda _, text=text: Turn(content=text))  # type: ignore[misc]
            assert verdict.reward == 0.0, f"the right answer, {name} by another one, earns {verdict.reward}: {text[:80]!r}"
        hedged += 1
    env.close()
    return f"{hedged} tasks" if hedged else "does not apply: no single answer ends an episode"


def _thought(env_class: type[TextEnv], options: Mapping[str, Any], num_tasks: int) -> str:
    env = env_class(**options)
    for task in _tasks(env_class, options, min(2, num_tasks)):
        observation = env.reset(options={"task": task})[1]["observation"]
        right = env.oracle(observation, random.Random(0))
        verdict = play(env, task, lambda _, text=right.content: Turn(content="", thought=text))  # type: ignore[misc]
        assert verdict.reward == 0.0, "the right answer inside the thought, and no content, is paid"
    env.close()
    return "an answer there earns nothing"


def _repeatable(env_class: type[TextEnv], options: Mapping[str, Any]) -> str:
    env = env_class(**options)
    task = _tasks(env_class, options, 1)[0]
    for policy in (lambda: play_oracle(env, task), lambda: play(env, task, lambda _: Turn(content="41 or 42"))):
        seen = {(v.status, v.reward, tuple(sorted(v.components.items()))) for v in (policy() for _ in range(10))}
        assert len(seen) == 1, f"ten times the same answer gave {len(seen)} different verdicts: {sorted(map(str, seen))[:2]}"
    env.close()
    return "a right one and a wrong one"


def _isolated(env_class: type[TextEnv], options: Mapping[str, Any]) -> str:
    first, second = _tasks(env_class, options, 2)
    a, b = env_class(**options), env_class(**options)
    rng_a, rng_b = random.Random(1), random.Random(2)
    seen_a = a.reset(options={"task": first})[1]["observation"]
    seen_b = b.reset(options={"task": second})[1]["observation"]
    verdicts: dict[str, Verdict] = {}
    for _ in range(MAX_TURNS):
        if "a" not in verdicts:
            seen_a = _advance(a, a.oracle(seen_a, rng_a), verdicts, "a")
        if "b" not in verdicts:
            seen_b = _advance(b, b.oracle(seen_b, rng_b), verdicts, "b")
    assert [v.reward for v in verdicts.values()] == [1.0, 1.0], "two interleaved episodes of the oracle did not both earn 1.0"
    a.reset(options={"task": second})
    assert play_oracle(a, first).reward == 1.0, "an episode after one that was left half-way did not earn 1.0"
    a.close()
    b.close()
    return "interleaved and abandoned episodes change nothing"


def _frees(env_class: type[TextEnv], options: Mapping[str, Any]) -> str:
    """Threads and open files, after some episodes that are left half-way, and after many more."""
    tasks = _tasks(env_class, options, 4)

    def leave(times: int) -> tuple[int, int]:
        for i in range(times):
            env = env_class(**options)
            observation = env.reset(options={"task": tasks[i % len(tasks)]})[1]["observation"]
            env.oracle(observation, random.Random(0))
            env.close()
        gc.collect()
        return threading.active_count(), len(os.listdir(FILES)) if os.path.isdir(FILES) else 0

    few, many = leave(4), leave(4 + ABANDONED)
    for what, before, after in zip(("threads", "open files"), few, many, strict=True):
        assert after - before < ABANDONED // 2, f"{ABANDONED} episodes that were closed half-way left {after - before} {what} behind"
    return f"{ABANDONED} episodes leave nothing behind"


def _after_end(env_class: type[TextEnv], options: Mapping[str, Any]) -> str:
    env = env_class(**options)
    play_oracle(env, _tasks(env_class, options, 1)[0])
    try:
        env.step(Turn(content="again"))
    except RuntimeError as error:
        return str(error)
    finally:
        env.close()
    raise AssertionError("it was accepted: call super() where you override step()")


def _tasks(env_class: type[TextEnv], options: Mapping[str, Any], count: int) -> list[Task]:
    return list(islice(env_class.tasks("eval", 1, options), count))


def _advance(env: TextEnv, turn: Turn, verdicts: dict[str, Verdict], name: str) -> Observation:
    info = env.step(turn)[4]
    if "verdict" in info:
        verdicts[name] = _verdict(info)
    observation = info["observation"]
    assert isinstance(observation, Observation), f"info['observation'] is a {type(observation).__name__}"
    return observation


def _verdict(info: Mapping[str, Any]) -> Verdict:
    verdict = info["verdict"]
    assert isinstance(verdict, Verdict), f"act() ended the episode with a {type(verdict).__name__}, wanted a Verdict"
    assert verdict.reward is None or 0.0 <= verdict.reward <= 1.0, f"reward {verdict.reward}, wanted 0 to 1"
    odd = {name: value for name, value in verdict.components.items() if not math.isfinite(value)}
    assert not odd, f"components that are no numbers: {odd}"
    return verdict
