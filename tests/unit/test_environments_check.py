"""The conformance kit passes the built-ins and catches what authors get wrong."""

from __future__ import annotations

import itertools
import random
import re
import threading
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from environments import check
from environments.base import TaskDraft, TextEnv
from environments.check import check_environment
from environments.registry import resolve
from rl_core.seams import Observation
from rl_core.types import Message, Status, Task, Turn, Verdict

COUNTER = itertools.count()


class Good(TextEnv):
    """Say the number."""

    id = "good"

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        number = str(rng.randrange(10**6, 10**7))
        return TaskDraft(public={"number": number}, private={"gold": number[::-1]})

    def begin(self, task: Task) -> Observation:
        return Observation(messages=(Message(role="user", content=f"{task.public['number']} backwards"),))

    def act(self, turn: Turn) -> Observation | Verdict:
        assert self.task is not None
        return self.score(turn.content.strip() == self.task.private["gold"])

    def score(self, right: bool) -> Verdict:
        return Verdict(status=Status.OK, reward=float(right), components={"correct": float(right)})

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        assert self.task is not None
        return Turn(content=self.task.private["gold"])


class PaysTheEmptyAnswer(Good):
    def act(self, turn: Turn) -> Observation | Verdict:
        assert self.task is not None
        return self.score(self.task.private["gold"].startswith(turn.content.strip()))


class PaysShotguns(Good):
    def act(self, turn: Turn) -> Observation | Verdict:
        assert self.task is not None
        return self.score(len(turn.content) > 1000 or turn.content == self.task.private["gold"])


class ReadsTheThought(Good):
    def act(self, turn: Turn) -> Observation | Verdict:
        assert self.task is not None
        return self.score(self.task.private["gold"] in (turn.thought, turn.content))


class CrashesOnOddText(Good):
    def act(self, turn: Turn) -> Observation | Verdict:
        assert self.task is not None
        return self.score(int(turn.content) == int(self.task.private["gold"]))


class LetsThePolicyMaskItself(Good):
    def act(self, turn: Turn) -> Observation | Verdict:
        if turn.malformed:
            return Verdict(status=Status.VERIFIER_ERROR, reward=None)
        return super().act(turn)


class AsksYesOrNo(Good):
    def begin(self, task: Task) -> Observation:
        return Observation(messages=(Message(role="user", content=f"{task.public['number']} > 5?"),))

    def act(self, turn: Turn) -> Observation | Verdict:
        return self.score(turn.content.strip() == "yes")

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        return Turn(content="yes")


class DrawsFromElsewhere(Good):
    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        return TaskDraft(public={"number": str(next(COUNTER))}, private={"gold": "1"})


class OrderOfASet(Good):
    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        names = [f"w{rng.randrange(10**6)}" for _ in range(20)]
        return TaskDraft(public={"number": " ".join(set(names))}, private={"gold": "1"})


class KeepsATuple(Good):
    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        draft = super().make_task(rng, options)
        return TaskDraft(public=draft.public, private={**draft.private, "pair": (1, 2)})


class WrongOracle(Good):
    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        return Turn(content="dunno")


class Fickle(Good):
    def act(self, turn: Turn) -> Observation | Verdict:
        assert self.task is not None
        right = turn.content == self.task.private["gold"]
        return Verdict(status=Status.OK, reward=float(right), components={"speed": float(next(COUNTER))})


class SharesItsTask(Good):
    current: Task

    def begin(self, task: Task) -> Observation:
        SharesItsTask.current = task
        return super().begin(task)

    def act(self, turn: Turn) -> Observation | Verdict:
        return self.score(turn.content == SharesItsTask.current.private["gold"])


class GoesOn(Good):
    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._done = False
        return super().step(action)


class NoOracle(Good):
    oracle = TextEnv.oracle


class SearchesForTheAnswer(Good):
    def act(self, turn: Turn) -> Observation | Verdict:
        assert self.task is not None
        return self.score(self.task.private["gold"] in turn.content)


class PaysTooMuch(Good):
    def score(self, right: bool) -> Verdict:
        return Verdict(status=Status.OK, reward=2.0 * right)


class ComponentsWithoutValue(Good):
    def score(self, right: bool) -> Verdict:
        return Verdict(status=Status.OK, reward=float(right), components={"speed": float("nan")})


class Hangs(Good):
    def act(self, turn: Turn) -> Observation | Verdict:
        if len(turn.content) > 1000:
            threading.Event().wait(3)
        return super().act(turn)


class LeaksFiles(Good):
    kept: ClassVar[list[Any]] = []

    def begin(self, task: Task) -> Observation:
        self.kept.append(open("/dev/null"))  # noqa: SIM115 -- the fault
        return super().begin(task)


def failures(env_class: type[TextEnv], *, second_process: bool = True, num_tasks: int = 4) -> str:
    results = check_environment(env_class, num_tasks=num_tasks, second_process=second_process)
    return "\n".join(str(result) for result in results if not result.ok)


def test_a_good_environment_passes_every_check() -> None:
    assert failures(Good) == ""


@pytest.mark.parametrize(
    ("env_class", "complaint"),
    [
        (PaysTheEmptyAnswer, "empty: reward 1.0"),
        (PaysShotguns, "every small number: reward 1.0"),
        (ReadsTheThought, "inside the thought"),
        (CrashesOnOddText, "raised ValueError"),
        (LetsThePolicyMaskItself, "could have itself masked"),
        (AsksYesOrNo, "always answering 'yes' earns 1.00"),
        (DrawsFromElsewhere, "global random state"),
        (OrderOfASet, "order of a set"),
        (KeepsATuple, "JSON round trip"),
        (WrongOracle, "reward 0.0, ok"),
        (Fickle, "10 different verdicts"),
        (SharesItsTask, "interleaved episodes"),
        (GoesOn, "it was accepted"),
        (NoOracle, "has no oracle"),
        (SearchesForTheAnswer, "followed by another one, earns 1.0"),
        (PaysTooMuch, "reward 2.0, wanted 0 to 1"),
        (ComponentsWithoutValue, "components that are no numbers"),
        (Hangs, "a turn took more than 0.3 s"),
        (LeaksFiles, "open files behind"),
    ],
)
def test_a_faulty_environment_fails_for_the_right_reason(env_class: type[TextEnv], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if env_class is Hangs:
        monkeypatch.setattr(check, "DEADLINE_S", 0.3)
    found = failures(env_class, second_process=env_class is OrderOfASet)
    assert re.search(re.escape(complaint), found), found


HARD: dict[str, dict[str, Any]] = {
    "math": {"digits": 12, "terms": 30},
    "long_context": {"min_tokens": 8192, "max_tokens": 32_768, "records": 200, "key_words": 2, "hops": 6, "updates": 4, "questions": 4},
    "tools": {"distractors": 4, "failure_rate": 0.5},
    "code": {"num_steps": 8, "digits": 4},
    "instructions": {"min_rules": 8, "max_rules": 12, "min_words": 40, "max_words": 120, "max_lines": 10, "style": "full"},
    "structured": {
        "types": ["int", "str", "bool", "enum", "strings", "ints", "object"], "min_fields": 8, "max_fields": 20, "depth": 4, "items": 8,
        "changes": 6, "extras": 6, "computed": 3, "style": "full",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HARD))
def test_every_built_in_conforms(name: str) -> None:
    assert failures(resolve(name), num_tasks=1 if name == "code" else 4) == ""  # each of its verdicts starts a sandbox


@pytest.mark.parametrize("name", sorted(set(HARD) - {"code"}))
def test_a_perfect_policy_solves_the_hardest_settings_as_well(name: str) -> None:
    env = resolve(name)(**HARD[name])
    assert all(check.play_oracle(env, task).reward == 1.0 for task in itertools.islice(env.tasks("eval", 5, HARD[name]), 12))


def test_programs_for_the_hardest_pipelines_pass_in_the_sandbox() -> None:
    env = resolve("code")(**HARD["code"])
    assert all(check.play_oracle(env, task).reward == 1.0 for task in itertools.islice(env.tasks("eval", 5, HARD["code"]), 3))
