"""A host bounds every call: what hangs, leaks, prints or forks ends its own episodes as data, and the others go on."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest

from environments import host_actor
from environments.base import TaskDraft, TextEnv
from environments.host import EnvironmentFailure
from environments.host_actor import EnvLimits, HostActor
from environments.output_cap import Allowance
from environments.registry import resolve
from environments.scripted import LocalSession, OracleEpisode
from rl_core.chat import ChatML
from rl_core.seams import Observation, Transition
from rl_core.types import EpisodeSpec, Message, SamplingParams, Status, Task, Turn, Verdict
from rollout_workers.episode import run_episode

ROOT = Path(__file__).parents[2]
SEED_MODEL = ROOT / "configs" / "models" / "seed"
HERE = f"{__name__}:TrapEnv"
LATE_S = 1.0  # a busy machine may take half of that to run a thread


class TrapEnv(TextEnv):
    """Does what it is told, which is what no environment should do."""

    id = "trap"
    release: ClassVar[threading.Event] = threading.Event()
    inside: ClassVar[list[str]] = []
    freed: ClassVar[list[str]] = []

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        return TaskDraft(public={"n": rng.random(), "begin": options.get("begin", "")})

    def begin(self, task: Task) -> Observation:
        self.spring(task.public["begin"])
        return Observation(messages=(Message(role="user", content="go"),))

    def act(self, turn: Turn) -> Observation | Verdict:
        self.spring(turn.content)
        return Verdict(status=Status.OK, reward=1.0)

    def on_truncated(self) -> Verdict:
        self.spring(self.options.get("truncate", ""))
        return super().on_truncated()

    def close(self) -> None:
        self.spring(self.options.get("close", ""))
        self.freed.append("x")

    def spring(self, trap: str) -> None:
        if trap == "spin":
            while True:  # plain Python: an exception from outside ends it
                pass
        if trap == "wait":
            self.release.wait(20)  # in C: nothing but the event ends it
        if trap == "slow":
            self.inside.append("x")
            time.sleep(0.1)
        if trap == "hold":
            self.inside.append("x")
            TrapEnv.peak = max(TrapEnv.peak, len(self.inside))
            self.release.wait(20)
            self.inside.pop()

    peak: ClassVar[int] = 0


@pytest.fixture(autouse=True)
def _traps() -> Any:
    TrapEnv.release, TrapEnv.inside, TrapEnv.freed, TrapEnv.peak = threading.Event(), [], [], 0
    yield
    TrapEnv.release.set()


def trap(**options: Any) -> Task:
    return next(TrapEnv.tasks("train", 0, options))


def a_host(late_s: float = LATE_S, **changes: Any) -> HostActor:
    limits = EnvLimits(calls=4, call_timeout_s=late_s, episode_timeout_s=60.0)
    return HostActor("bubblewrap", {"trap": limits}, **{"exit": lambda: None, **changes})


async def opened(host: HostActor, name: str = "s", **options: Any) -> None:
    await host.open(name, HERE, options, trap())


def status_of(transition: Transition) -> Status:
    assert transition.verdict is not None
    return transition.verdict.status


@pytest.fixture
def host() -> HostActor:
    return a_host()


@pytest.mark.parametrize("how", ["spin", "wait"])
async def test_a_step_that_hangs_ends_its_episode_as_data_and_no_other(host: HostActor, how: str) -> None:
    await opened(host, "hangs")
    await opened(host, "well")
    late, fine = await asyncio.gather(host.step("hangs", Turn(content=how)), host.step("well", Turn(content="fine")))
    assert status_of(late) is Status.ENV_ERROR
    assert late.verdict is not None
    assert late.verdict.reward is None
    assert "step: the call took longer than 1 s" in late.verdict.evidence["error"]
    assert fine.verdict is not None
    assert fine.verdict.reward == 1.0
    TrapEnv.release.set()
    await until(lambda: not host._rooms["trap"].stuck and len(TrapEnv.freed) == 2)
    assert await host.ping() == 0  # the one that hung is given up, and the one that is well has its verdict


async def test_open_truncate_and_close_have_a_time_out_as_well(host: HostActor) -> None:
    with pytest.raises(EnvironmentFailure, match="open: the call took longer"):
        await host.open("a", HERE, {}, trap(begin="wait"))
    await opened(host, "b", truncate="wait")
    assert status_of(await host.truncate("b")) is Status.ENV_ERROR
    await opened(host, "c", close="wait")
    began = time.monotonic()
    await host.close("c")
    assert time.monotonic() - began < 10
    assert await host.ping() == 0
    TrapEnv.release.set()
    await until(lambda: len(TrapEnv.freed) == 2 and not host._rooms["trap"].stuck)


async def test_an_episode_that_has_its_verdict_is_closed_and_freed_by_itself(host: HostActor) -> None:
    for name in ("a", "b"):
        await opened(host, name)
    await host.step("a", Turn(content="fine"))
    await host.truncate("b")
    await until(lambda: len(TrapEnv.freed) == 2)
    assert (await host.ping(), host._episodes) == (0, {})
    await host.close("a")
    assert len(TrapEnv.freed) == 2


async def test_an_episode_may_open_with_its_first_turn(host: HostActor) -> None:
    shown = await host.open("first", HERE, {}, trap())
    stepped = await host.play("a", HERE, {}, trap(), Turn(content="fine"))
    ended = await host.play("b", HERE, {}, trap(), None)
    assert [status_of(t) for t in (stepped, ended)] == [Status.OK, Status.INVALID_OUTPUT]
    assert stepped.began == ended.began == shown.digest
    await until(lambda: len(TrapEnv.freed) == 2)
    with pytest.raises(EnvironmentFailure, match="open and first turn: the call took longer than 2 s"):
        await host.play("c", HERE, {}, trap(begin="wait"), Turn(content="fine"))
    with pytest.raises(EnvironmentFailure, match="has no 'NoSuchEnv'"):
        await host.play("d", f"{__name__}:NoSuchEnv", {}, trap(), None)
    assert set(host._episodes) == {"first"}
    TrapEnv.release.set()
    await until(lambda: len(TrapEnv.freed) == 3 and not host._rooms["trap"].stuck)


async def test_threads_are_used_again_and_a_call_that_waits_holds_up_no_other(host: HostActor) -> None:
    math, before = next(resolve("math").tasks("train", 0, {})), set(threading.enumerate())
    for i in range(20):
        await host.open(f"m{i}", "math", {}, math)
    await opened(host)
    holds = asyncio.create_task(host.step("s", Turn(content="wait")))
    for i in range(20):
        assert status_of(await host.step(f"m{i}", Turn(content="1"))) is Status.OK
    assert [t.name for t in set(threading.enumerate()) - before] == ["call"] * 2, "one waits, one serves all the others"
    TrapEnv.release.set()
    await holds


async def test_an_episode_that_is_closed_while_it_opens_is_freed(host: HostActor) -> None:
    opening = asyncio.create_task(host.open("s", HERE, {}, trap(begin="slow")))
    await until(lambda: bool(TrapEnv.inside))
    await host.close("s")
    await opening
    await until(lambda: len(TrapEnv.freed) == 1)
    assert await host.ping() == 0


async def test_an_environment_runs_at_most_its_number_of_calls_and_does_not_hold_up_another() -> None:
    host = a_host(late_s=30.0)
    for i in range(12):
        await opened(host, f"s{i}")
    math = next(resolve("math").tasks("train", 0, {}))
    running = [asyncio.create_task(host.step(f"s{i}", Turn(content="hold"))) for i in range(12)]
    await until(lambda: len(TrapEnv.inside) == 4)
    await host.open("m", "math", {}, math)
    assert not any(r.done() for r in running)
    TrapEnv.release.set()
    await asyncio.gather(*running)
    assert TrapEnv.peak == 4


async def test_a_host_whose_calls_stay_stuck_takes_nothing_new_and_ends_when_it_is_empty() -> None:
    exits: list[str] = []
    host = a_host(exit=lambda: exits.append("x"))
    for i in range(host_actor.MAX_STUCK + 1):
        await opened(host, f"s{i}")
    await asyncio.gather(*(host.step(f"s{i}", Turn(content="wait")) for i in range(host_actor.MAX_STUCK + 1)))
    waiting = asyncio.create_task(opened(host, "new"))
    await until(lambda: bool(exits))
    assert not waiting.done()
    assert "9 calls hang" in (await host.status())["ending"]
    waiting.cancel()


async def test_a_host_that_grows_beyond_its_memory_ends_between_episodes() -> None:
    exits: list[str] = []
    host = a_host(memory_bytes=int(0.8 * host_actor.resident_bytes()), exit=lambda: exits.append("x"))
    host._episodes["s"] = host_actor._Episode("trap", time.monotonic() + 60)
    await until(lambda: bool(host.ending))
    assert "more than rollout.env_host_memory_gib" in host.ending
    await asyncio.sleep(2 * host_actor.WATCH_S)
    assert not exits
    host._episodes.clear()
    await until(lambda: bool(exits))


async def test_an_episode_whose_worker_has_died_is_closed_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_actor, "LATE_S", 0.0)
    host = HostActor("bubblewrap", {"trap": EnvLimits(episode_timeout_s=0.1)}, exit=lambda: None)
    await opened(host)
    await until(lambda: len(TrapEnv.freed) == 1)
    assert status_of(await host.step("s", Turn(content="fine"))) is Status.INFRA_ERROR


# --- a process of its own -----------------------------------------------------------------------------------------------

OWN_PROCESS = """
import asyncio, os, sys
from environments.host_actor import HostActor
{setup}
host = HostActor("bubblewrap", own_process=True)
{body}
"""


def in_own_process(body: str, setup: str = "", timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
    program = OWN_PROCESS.format(body=body, setup=setup)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=timeout, check=False)


def test_a_host_that_prints_without_end_lets_a_quarter_of_a_megabyte_through() -> None:
    done = in_own_process(
        """
for _ in range(256):
    os.write(1, b"x" * (1 << 20))
os.system("echo from a child")
import time; time.sleep(0.5)
print("the end", flush=True)
time.sleep(0.5)
os._exit(0)
"""
    )
    assert done.returncode == 0, done.stderr
    assert 100_000 < len(done.stdout) < 400_000
    assert b"bytes of output left out" in done.stdout
    assert b"the end" in done.stdout


def test_an_allowance_fills_up_again_and_says_what_was_left_out() -> None:
    now = [0.0]
    allowance = Allowance(now=lambda: now[0], burst=10, rate=1.0)
    assert allowance.pass_on(b"0123456789abc") == b"0123456789"
    assert allowance.pass_on(b"def") == b""
    now[0] = 2.0
    assert allowance.pass_on(b"gh") == b"\n[... 6 bytes of output left out ...]\ngh"


def test_a_fork_bomb_ends_its_host_and_leaves_nothing_behind() -> None:
    marker = f"polyrl-bomb-{os.getpid()}"
    done = in_own_process(
        f"""
import subprocess, time
for _ in range(40):
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)", "{marker}"])
time.sleep(30)
""",
        setup="from environments import confine; confine.MAX_TASKS = 40; confine.MAX_CHILDREN = 20",
    )
    assert done.returncode in (1, host_actor.RECYCLED), done.stderr[-500:]  # 1: the kernel refused a fork, and the loop raised
    time.sleep(0.2)
    from environments.confine import sweep

    sweep()  # what the next host does first
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if marker.encode() in _read(p)]
    assert not left


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


# --- many episodes ------------------------------------------------------------------------------------------------------


async def test_many_episodes_of_several_turns_take_few_threads_and_cancelling_them_frees_everything() -> None:
    host = HostActor("bubblewrap", exit=lambda: None)
    chat, cls = ChatML(SEED_MODEL), resolve("tools")
    options = {"failure_rate": 0.0, "oracle_working": 1.0}
    spec = EpisodeSpec(group_size=1, sampling=SamplingParams(max_tokens=512), max_turns=8, max_total_tokens=8192, timeout_s=60)
    tasks = list(islice(cls.tasks("train", 0, options), 100))

    def episode(i: int, think_s: Any = None) -> Any:
        session = LocalSession(host=host, id=f"r{i}", env_id="tools", options=options, task=tasks[i % len(tasks)])
        policy = OracleEpisode(session, cls(**options), tasks[i % len(tasks)], chat, think_s=think_s)
        return run_episode(tasks[i % len(tasks)], spec, policy, policy, chat, f"r{i}")

    before, databases = count_calls(), count_databases()
    running = [asyncio.create_task(episode(i, think_s=lambda: 30.0)) for i in range(100)]
    while await host.ping() < 100:
        await asyncio.sleep(0.01)
    calls = EnvLimits().calls
    assert count_calls() - before <= 2 * calls, "calls that run, and threads that have handed their result over and not yet come to rest"
    assert count_databases() - databases >= 100
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert await host.ping() == 0
    assert count_databases() == databases
    rollouts = await asyncio.gather(*(episode(i) for i in range(100)))
    assert {r.verdict.reward for r in rollouts} == {1.0}
    assert max(len(r.completions) for r in rollouts) >= 4
    assert await host.ping() == 0
    assert count_databases() == databases


def count_calls() -> int:
    """Threads of hosts, in which calls into environments run."""
    return sum(thread.name.startswith("call") for thread in threading.enumerate())


def count_databases() -> int:
    gc.collect()
    # by type, since isinstance asks a weak proxy, which others leave behind, for the class of what it stood for
    return sum(issubclass(type(o), sqlite3.Connection) for o in gc.get_objects())


async def until(true: Any, seconds: float = 30.0) -> None:
    """Wait for something that must become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.01)
