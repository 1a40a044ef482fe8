"""The tools environment: a desk in a small shop, several turns, judged by the state of the shop.

    user       Refund the lamp of Ana.
    assistant  <tool_call>{"name": "find", "arguments": {"name": "Ana"}}</tool_call>           tool  customer 4821
    assistant  <tool_call>{"name": "orders", "arguments": {"customer": 4821}}</tool_call>      tool  orders cup 2231, lamp 7310
    assistant  <tool_call>{"name": "refund", "arguments": {"order": 7310}}</tool_call>         tool  ok
    assistant  done                                                              -> reward 1: the shop is as it should be

The reward is 1 when the shop's final state equals the state that the goal program makes of a fresh shop and, for a question, the
answer is right as well; else 0. Nothing that the policy claims to have done counts. The longest ask takes four turns, and a tool that
was busy one more: six turns are a comfortable budget. Policy rules (rules.py) take one look-up more, or a refusal.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from environments.base import Observation, TaskDraft, TextEnv, as_honeypot, unguessable
from environments.knobs import check_choices, check_range, read_knobs, shows_working
from environments.tools.asks import KINDS, make_world
from environments.tools.rules import IDLE, govern, is_refusal
from environments.tools.rules import SYSTEM as RULES_SYSTEM
from environments.tools.world import CORE, DISTRACTORS, Shop, State, ToolError, check_call
from rl_core.types import Message, Status, Task, ToolCall, Turn, Verdict

SYSTEM = "Do what is asked with the tools. Answer with the value, or done."
BUSY = "busy, try again"
DONE = "done"

KNOBS: dict[str, Any] = {"kinds": list(KINDS), "failure_rate": 0.05, "distractors": 2, "rules": 0}
"""kinds: of asks. failure_rate: chance that a call finds the shop busy, once per episode at most. distractors: tools that no ask needs.
rules: that forbid some of what is asked; 0 is none."""

MAX_BUSY = 1  # transient failures per episode, so that a turn budget can be planned
MAX_ERRORS = 3  # refused calls per episode; one more ends it. Bounds a search for ids by trial.
MAX_CALLS_PER_TURN = 4
MAX_ANSWER_CHARS = 80


class ToolsEnv(TextEnv):
    """Serve one ask at the desk."""

    id: ClassVar[str] = "tools"
    version: ClassVar[str] = "1"
    components: ClassVar[tuple[str, ...]] = ("correct", "state", "answer")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.knobs = checked_knobs(options)
        self._tools = CORE + DISTRACTORS[: self.knobs["distractors"]]
        self._offered = frozenset(tool.name for tool in self._tools)
        self._shop: Shop | None = None

    # --- task and first observation ---------------------------------------------------------------------------------

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        """An ask, and the shop that the tools reach; private are the goal program, the answer, and what the oracle says."""
        knobs = checked_knobs(options)
        kind = rng.choice(knobs["kinds"])
        world = make_world(rng)
        ask, rules = KINDS[kind](rng, world), knobs["rules"]
        public: dict[str, Any] = {"ask": ask.text, "world": world}
        if rules:
            public["rules"], ask = govern(rng, world, kind, ask, rules)
        private = {"plan": ask.plan, "goal": ask.goal, "answer": ask.answer, "found": ask.found}
        return TaskDraft(public=public, private=private, difficulty=kind)

    def begin(self, task: Task) -> Observation:
        self.close()
        self.task = task
        self._shop = Shop(task.public["world"])
        self._dice = random.Random(f"busy {task.seed}")
        self._busy = self._errors = self._calls = 0
        self._script: list[Turn] | None = None
        self._spoken = 0
        rules = task.public.get("rules", ())
        system = f"{SYSTEM}\n{RULES_SYSTEM}\nRules: {' '.join(rules)}" if rules else SYSTEM
        messages = (Message(role="system", content=system), Message(role="user", content=task.public["ask"]))
        return Observation(messages=messages, tools=tuple(tool.schema for tool in self._tools))

    def close(self) -> None:
        if self._shop is not None:
            self._shop.close()
            self._shop = None

    # --- the episode ------------------------------------------------------------------------------------------------

    def act(self, turn: Turn) -> Observation | Verdict:
        if turn.malformed:
            return self._refuse(turn.malformed)
        if not turn.tool_calls:
            return self._judge(turn.content)
        if len(turn.tool_calls) > MAX_CALLS_PER_TURN:
            return self._refuse(f"{len(turn.tool_calls)} tool calls in one turn, at most {MAX_CALLS_PER_TURN} are served")
        replies = tuple(Message(role="tool", content=self._serve(call)) for call in turn.tool_calls)
        if self._errors > MAX_ERRORS:
            return self._refuse(f"{self._errors} refused calls, at most {MAX_ERRORS} are served; last reply: {replies[-1].content}")
        return Observation(messages=replies)

    def on_truncated(self) -> Verdict:
        """Whatever the state: an episode that was not brought to an end is not done."""
        return self._refuse("a budget ended the episode before a final answer")

    def _serve(self, call: ToolCall) -> str:
        """The tool's reply to one call. Only calls that are well formed can find the shop busy."""
        assert self._shop is not None
        self._calls += 1
        arguments = dict(call.arguments) if isinstance(call.arguments, Mapping) else call.arguments
        try:
            if check_call(call.name, arguments).name not in self._offered:
                raise ToolError("error: no such tool")
            if self._dice.random() < self.knobs["failure_rate"] and self._busy < MAX_BUSY:
                self._busy += 1
                return BUSY
            return self._shop.call(call.name, arguments)
        except ToolError as error:
            self._errors += 1
            return str(error)

    def _judge(self, content: str) -> Verdict:
        """Compare the shop with the goal, and the answer with the gold answer where one was asked for."""
        assert self._shop is not None
        assert self.task is not None
        got, wanted = self._shop.state(), _goal_state(self.task)
        gold = self.task.private["answer"]
        found = extract_number(content)
        if gold is not None and is_refusal(gold):
            right = is_refusal(content) and found == extract_number(gold)
        else:
            right = gold is None or found == gold
        state, answer = float(got == wanted), float(right)
        evidence = {"answer": content[:MAX_ANSWER_CHARS] if found is None else found, "calls": str(self._calls)}
        if got != wanted:
            evidence["difference"] = _first_difference(got, wanted)
        components = {"correct": state * answer, "state": state, "answer": answer}
        return self._finish(Status.OK, components, evidence)

    def _refuse(self, reason: str) -> Verdict:
        components = {"correct": 0.0, "state": 0.0, "answer": 0.0}
        return self._finish(Status.INVALID_OUTPUT, components, {"reason": reason[:200], "calls": str(self._calls)})

    def _finish(self, status: Status, components: dict[str, float], evidence: dict[str, str]) -> Verdict:
        self.close()
        reward = components["correct"]
        return Verdict(status=status, reward=reward, components=components, evidence=evidence, verifier_version=self.version)

    @classmethod
    def honeypot(cls, task: Task, rng: random.Random) -> Task:
        """Done as asked, the shop is as it should be; but the answer that is wanted stands nowhere in it."""
        return as_honeypot(task, {**task.private, "answer": str(unguessable(rng))})

    # --- demonstrations ---------------------------------------------------------------------------------------------

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        """Serve the ask perfectly, in one of two styles chosen once per episode: working looks up each id that it uses, direct knows it."""
        assert self.task is not None
        if self._script is None:
            self._script = _script(self.task, working=shows_working(self.knobs, rng))
        elif not (observation.messages and observation.messages[-1].content == BUSY):
            self._spoken += 1
        return self._script[min(self._spoken, len(self._script) - 1)]


def _script(task: Task, *, working: bool) -> list[Turn]:
    """The turns of a perfect episode in which no tool is busy."""
    calls = task.private["plan"] if working else task.private["goal"]
    turns = []
    for call in calls:
        tool_call = ToolCall(name=call["name"], arguments=call["arguments"])
        turns.append(Turn(content="", thought=call["thought"] if working else "", tool_calls=(tool_call,)))
    return [*turns, Turn(content=task.private["answer"] or DONE, thought=task.private["found"] if working else "")]


def extract_number(content: str) -> str | None:
    """The one number of a short answer ("307", "The stock is 307."), or None if there is none, or more than one, or the answer is long."""
    if len(content) > MAX_ANSWER_CHARS:
        return None
    numbers = [n.rstrip(".,") for n in re.findall(r"[-+]?[0-9][0-9.,]*", content)]
    return numbers[0] if len(numbers) == 1 else None


def _goal_state(task: Task) -> State:
    shop = Shop(task.public["world"])
    try:
        for call in task.private["goal"]:
            shop.call(call["name"], call["arguments"])
        return shop.state()
    finally:
        shop.close()


def _first_difference(got: State, wanted: State) -> str:
    for table, rows in wanted.items():
        extra, missing = [r for r in got[table] if r not in rows], [r for r in rows if r not in got[table]]
        if extra or missing:
            return f"{table}: {extra[:1]} instead of {missing[:1]}"
    return "the same rows, in other numbers"


def checked_knobs(options: Mapping[str, Any]) -> dict[str, Any]:
    knobs = read_knobs(ToolsEnv.id, KNOBS, options)
    check_choices(ToolsEnv.id, "kinds", knobs["kinds"], tuple(KINDS))
    check_range(ToolsEnv.id, "rules", knobs["rules"], 0, len(IDLE))
    check_range(ToolsEnv.id, "failure_rate", knobs["failure_rate"], 0, 1)
    check_range(ToolsEnv.id, "distractors", knobs["distractors"], 0, len(DISTRACTORS))
    return knobs
