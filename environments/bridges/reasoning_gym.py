"""reasoning-gym's procedural tasks, guarded: about a hundred families of questions with a checkable answer.

    environments:
      puzzles: {id: reasoning_gym, options: {families: [chain_sum, gcd, countdown]}}

Three things are done differently than reasoning-gym does them by itself:

- Scorers run in a killable process that cannot start what the policy wrote (`reasoning_gym_scorer.py`); plain comparison is done here.
- Item seeds are hashes. The library's own are neighbours, so that its streams repeat themselves and its splits overlap. An item's key
  is the hash of its question and answer, so that the same item drawn twice is one task, in one split.
- Only a full score pays. Scorers give crumbs for echoes and padding; `floor` says from which score on the score itself is the reward.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict
from environments.bridges import need, verifier_failed
from environments.bridges.process import Late, LineProcess
from environments.knobs import OptionError, check_choices, check_range, read_knobs

INSTALL = "pip install reasoning-gym"
KNOBS: dict[str, Any] = {"families": ["chain_sum", "gcd"], "arguments": {}, "floor": 1.0, "instruction": "Answer with the answer alone."}
"""families: names of reasoning-gym data sets. arguments: {family: {its config's fields}}. floor: the least score that pays.
instruction: the last line of every prompt."""

NEVER = {
    "game_of_life_halting": "it pays any answer that is not empty",
    "coin_flip": "it pays '0' for 95 % of its items",
    "circuit_logic": "it pays '0' for 83 % of its items",
    "polynomial_equations": "it pays '0' for 43 % of its items",
    "composite": "it mixes other families; name them in `families`",
}
"""Families that a constant answer solves. The shares come from research notes of November 2026, and were not measured again here."""

MAX_ANSWER = 20_000  # characters; a longer one is no answer to any family
SCORE_S = 5.0
START_S = 60.0


class ReasoningGymEnv(TextEnv):
    """Procedural puzzles of the reasoning-gym package, scored by its own rules in a process of their own."""

    id: ClassVar[str] = "reasoning_gym"
    version: ClassVar[str] = "1"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.knobs = checked_knobs(options)

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        knobs = checked_knobs(options)
        family = rng.choice(knobs["families"])
        library = need("reasoning_gym", INSTALL)
        arguments = knobs["arguments"].get(family, {})
        item = library.create_dataset(family, seed=rng.randrange(2**31), size=1, **arguments)[0]
        entry = json.loads(json.dumps(item, default=str))
        metadata = {k: v for k, v in entry["metadata"].items() if k not in ("source_index", "source_dataset")}
        entry = {"question": entry["question"], "answer": entry["answer"], "metadata": metadata}
        return TaskDraft(
            public={"family": family, "question": entry["question"]}, private={"entry": entry, "arguments": arguments}, difficulty=family
        )

    def begin(self, task: Task) -> Observation:
        prompt = f"{task.public['question']}\n{self.knobs['instruction']}".strip()
        return Observation(messages=(Message(role="user", content=prompt),))

    def act(self, turn: Turn) -> Verdict:
        assert self.task is not None
        answer, entry = turn.content.strip(), self.task.private["entry"]
        if turn.malformed or turn.tool_calls or not answer or len(answer) > MAX_ANSWER:
            reason = turn.malformed or ("a tool call where there are no tools" if turn.tool_calls else "no answer, or one without end")
            return Verdict(status=Status.INVALID_OUTPUT, reward=0.0, evidence={"reason": reason})
        if answer == entry["answer"]:
            return self._verdict(1.0, {"tier": "equal"})
        if compares_only(self.task.public["family"]):
            return self._verdict(0.0, {"tier": "equal", "answer": answer[:80]})
        request = {"family": self.task.public["family"], "arguments": self.task.private["arguments"], "entry": entry, "answer": answer}
        try:
            result = SCORERS.ask(request)
        except Late:
            reason = f"the scorer took longer than {SCORE_S:g} s over this answer"
            return Verdict(
                status=Status.TIMEOUT_MODEL, reward=0.0, components={"score": 0.0}, evidence={"reason": reason, "answer": answer[:80]}
            )
        if "error" in result:
            return verifier_failed(f"reasoning-gym's scorer of {self.task.public['family']!r} failed: {result['error']}")
        evidence = {"tier": "scorer", "answer": answer[:80]} | ({"refused": result["refused"]} if result.get("refused") else {})
        return self._verdict(float(result["score"]), evidence)

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        assert self.task is not None
        gold = self.task.private["entry"]["answer"]
        if not isinstance(gold, str) or not gold:
            return super().oracle(observation, rng)
        return Turn(content=gold)

    def _verdict(self, score: float, evidence: dict[str, str]) -> Verdict:
        reward = min(1.0, score) if score >= self.knobs["floor"] else 0.0
        return Verdict(status=Status.OK, reward=reward, components={"score": score}, evidence=evidence)


class Scorers:
    """One scorer process for this process, made when it is first asked, replaced when it is late or dead. One answer at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: LineProcess | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The scorer's line. Raises Late for an answer that took too long, and OSError when no scorer can be had."""
        script = Path(__file__).with_name("reasoning_gym_scorer.py")
        with self._lock:
            fresh = self._process is None or not self._process.alive
            if self._process is None or fresh:
                self._process = LineProcess([sys.executable, "-I", str(script), json.dumps(sys.path)])
                entry = request["entry"]  # the first start imports for seconds: on the gold answer, so that the time is not the policy's
                self._process.ask(request | {"answer": str(entry["answer"])}, START_S)
            try:
                return self._process.ask(request, SCORE_S)
            except (Late, subprocess.SubprocessError, OSError):
                self._process.close()
                self._process = None
                raise

    def close(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.close()
                self._process = None


SCORERS = Scorers()


def checked_knobs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that `options` set. Raises OptionError, also where the package is not there or a family may not be used."""
    knobs = read_knobs(ReasoningGymEnv.id, KNOBS, options)
    known = need("reasoning_gym.factory", INSTALL).DATASETS
    check_choices(ReasoningGymEnv.id, "families", knobs["families"], sorted(known))
    check_choices(ReasoningGymEnv.id, "arguments", list(knobs["arguments"]) or knobs["families"], knobs["families"])
    check_range(ReasoningGymEnv.id, "floor", knobs["floor"], 0.0, 1.0)
    for family in knobs["families"]:
        if family in NEVER:
            raise OptionError(f"environment 'reasoning_gym': family {family!r} is refused: {NEVER[family]}")
    return knobs


def compares_only(family: str) -> bool:
    """Whether the family keeps the library's plain comparison, which we do ourselves, exactly."""
    plain = need("reasoning_gym.dataset", INSTALL).ProceduralDataset.score_answer
    return bool(need("reasoning_gym.factory", INSTALL).DATASETS[family][0].score_answer is plain)
