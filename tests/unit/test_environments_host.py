"""The host runs many episodes at once, and turns whatever happens inside an environment into data."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest

from environments.base import TaskDraft, TextEnv
from environments.host import EnvHost, EnvironmentBug, EnvironmentFailure
from environments.registry import resolve
from environments.sandbox.base import SandboxUnavailable
from rl_core.seams import Observation
from rl_core.types import Message, Status, Task, Turn, Verdict

ERRORS = {
    "bug": ZeroDivisionError("by zero"),
    "exit": SystemExit(1),
    "disk": OSError(28, "no space left"),
    "sandbox": SandboxUnavailable("install bubblewrap"),
    "nested": RecursionError("too deep"),
}
HERE = f"{__name__}:MishapEnv"
BARRIER = threading.Barrier(2, timeout=10)


class MishapEnv(TextEnv):
    """Does what the turn says."""

    id = "mishap"
    closed = 0

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        return TaskDraft(public={"n": rng.randrange(10**6), "begin": options.get("begin", "")})

    def begin(self, task: Task) -> Observation:
        if task.public["begin"]:
            raise ERRORS[task.public["begin"]]
        return Observation(messages=(Message(role="user", content=str(self.options["sandbox"])),))

    def act(self, turn: Turn) -> Any:
        if turn.content in ERRORS:
            raise ERRORS[turn.content]
        if turn.content == "meet":
            BARRIER.wait()
        if turn.content == "nonsense":
            return {"reward": 1.0}
        if turn.content == "more":
            return Observation(messages=(Message(role="user", content="go on"),))
        return Verdict(status=Status.OK, reward=1.0)

    def close(self) -> None:
        type(self).closed += 1


def a_task(**options: Any) -> Task:
    return next(MishapEnv.tasks("train", 0, options))


@pytest.fixture
def host() -> EnvHost:
    host = EnvHost("bubblewrap")
    host.open("s", HERE, {}, a_task())
    return host


def test_an_episode_goes_from_open_to_verdict(host: EnvHost) -> None:
    going = host.step("s", Turn(content="more"))
    assert (going.terminated, going.truncated, going.verdict) == (False, False, None)
    assert going.observation.messages[0].content == "go on"
    ended = host.step("s", Turn(content="fine"))
    assert ended.terminated
    assert ended.verdict is not None
    assert ended.verdict.reward == 1.0
    assert ended.verdict.latency_s > 0
    assert ended.verdict.verifier_version == "mishap/1"


def test_the_host_names_the_sandbox_unless_the_config_does() -> None:
    host = EnvHost("docker")
    assert host.open("a", HERE, {}, a_task()).messages[0].content == "docker"
    assert host.open("b", HERE, {"sandbox": "bubblewrap"}, a_task()).messages[0].content == "bubblewrap"


@pytest.mark.parametrize(
    ("mishap", "status"),
    [
        ("bug", Status.ENV_ERROR),
        ("exit", Status.ENV_ERROR),
        ("nested", Status.ENV_ERROR),
        ("nonsense", Status.ENV_ERROR),
        ("disk", Status.INFRA_ERROR),
        ("sandbox", Status.INFRA_ERROR),
    ],
)
def test_an_exception_in_a_step_becomes_a_verdict_without_reward(host: EnvHost, mishap: str, status: Status) -> None:
    ended = host.step("s", Turn(content=mishap))
    assert ended.terminated
    assert ended.verdict is not None
    assert (ended.verdict.status, ended.verdict.reward) == (status, None)
    assert ended.verdict.evidence["error"]
    assert host.ping() == 1


def test_an_exception_at_the_start_is_an_environment_failure_that_pickles() -> None:
    host = EnvHost()
    for begin, complaint, kind in [
        ("bug", "ZeroDivisionError", EnvironmentBug), ("exit", "SystemExit", EnvironmentBug), ("disk", "OSError", EnvironmentFailure),
    ]:  # fmt: skip
        with pytest.raises(EnvironmentFailure, match=complaint) as caught:
            host.open("s", HERE, {}, a_task(begin=begin))
        assert type(caught.value) is kind
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 -- our own bytes
    with pytest.raises(EnvironmentFailure, match="did you mean 'math'"):
        host.open("s", "mathh", {}, a_task())
    assert host.ping() == 0


def test_a_budget_truncates_with_a_score_of_zero(host: EnvHost) -> None:
    ended = host.truncate("s")
    assert (ended.terminated, ended.truncated) == (False, True)
    assert ended.verdict is not None
    assert (ended.verdict.status, ended.verdict.reward) == (Status.INVALID_OUTPUT, 0.0)


def test_a_session_that_is_gone_is_an_infrastructure_error(host: EnvHost) -> None:
    before = MishapEnv.closed
    host.close("s")
    host.close("s")
    assert MishapEnv.closed == before + 1
    for ended in (host.step("s", Turn(content="fine")), host.truncate("never opened")):
        assert ended.verdict is not None
        assert ended.verdict.status is Status.INFRA_ERROR


def test_a_session_id_in_use_is_refused_and_the_first_goes_on(host: EnvHost) -> None:
    with pytest.raises(EnvironmentFailure, match="open already"):
        host.open("s", HERE, {}, a_task())
    ended = host.step("s", Turn(content="fine"))
    assert ended.verdict is not None
    assert ended.verdict.reward == 1.0


def test_steps_of_two_sessions_run_at_the_same_time(host: EnvHost) -> None:
    host.open("t", HERE, {}, a_task())
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda s: host.step(s, Turn(content="meet")), ["s", "t"]))
    assert [e.verdict.reward for e in ended if e.verdict] == [1.0, 1.0]


def test_a_hundred_episodes_in_sixteen_threads_all_earn_what_their_oracle_earns() -> None:
    host = EnvHost()

    def episode(task: Task) -> float | None:
        env_class = resolve(task.env)
        oracle = env_class()
        oracle.reset(options={"task": task})
        observation = host.open(task.key, task.env, {}, task)
        transition = host.step(task.key, oracle.oracle(observation, random.Random(0)))
        host.close(task.key)
        return transition.verdict.reward if transition.verdict else None

    tasks = {t.key: t for name in ("math", "long_context") for t in islice(resolve(name).tasks("train", 0), 50)}
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(episode, tasks.values())) == {1.0}
    assert host.ping() == 0
