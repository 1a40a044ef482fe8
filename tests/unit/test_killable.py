"""Calls on hostile input end in time, cheap ones keep their turn, and nothing outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import psutil
import pytest

from reward_models import killable
from reward_models.killable import KillableService, Outcome, ServiceFailed

HANDLER = "tests.unit.killable_handler"
BOMBS = {
    "a loop": {"do": "spin"},
    "one big power, which holds the interpreter": {"do": "power"},
    "memory": {"do": "memory"},
    "deep recursion in C": {"do": "crash"},
    "a reply without end": {"do": "flood"},
    "its own end": {"do": "exit"},
}


@pytest.fixture(scope="module")
def service() -> Iterator[KillableService]:
    opened = KillableService(HANDLER, width=2, cpu_s=0.4, wall_s=10.0, memory_mb=512)
    yield opened
    opened.close()


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_what_costs_too_much_is_late_and_the_next_call_is_answered(service: KillableService, bomb: dict[str, str]) -> None:
    outcome = service.call(bomb)
    assert outcome.state == "late"
    assert outcome.cpu_s < 4 * service.cpu_s
    assert service.call({"do": "double", "n": 21}).value == 42


def test_an_error_of_the_function_is_an_outcome(service: KillableService) -> None:
    assert service.call({"do": "raise"}) == Outcome(state="failed", value="ValueError: as asked", cpu_s=pytest.approx(0, abs=0.4))


def test_nothing_that_one_call_leaves_in_memory_is_seen_by_the_next(service: KillableService) -> None:
    assert [service.call({"do": "count"}).value for _ in range(3)] == [1, 1, 1]


def test_good_calls_keep_their_turn_while_bombs_hold_every_place(service: KillableService) -> None:
    """Four bombs for two places, all before the first good call: each good call is answered before the last bomb has ended."""
    with ThreadPoolExecutor(16) as pool:
        bombs = [pool.submit(service.call, {"do": "sleep"}) for _ in range(4)]
        good = [pool.submit(service.call, {"do": "double", "n": n}) for n in range(40)]
        wait(good)
        assert not any(bomb.done() for bomb in bombs), "the bombs were over before the good calls"
        assert [g.result().value for g in good] == [2 * n for n in range(40)]
        service.close()  # nobody waits for four sleepers
        assert all(isinstance(bomb.exception(), ServiceFailed) for bomb in bombs)


def test_a_server_that_dies_is_started_again(service: KillableService) -> None:
    assert service.call({"do": "double", "n": 1}).value == 2
    first = service.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert service.call({"do": "double", "n": 2}).value == 4
    assert service.pid != first


def test_a_machine_that_gives_no_time_is_our_failure_and_not_the_inputs() -> None:
    service = KillableService(HANDLER, width=1, cpu_s=0.4, wall_s=0.5)
    with pytest.raises(ServiceFailed, match="no processor time"):
        service.call({"do": "sleep"})
    service.close()


def test_a_module_that_cannot_start_is_said_so() -> None:
    with pytest.raises(ServiceFailed, match="did not start"):
        KillableService("tests.unit.no_such_module").call({})


def test_close_ends_server_and_children() -> None:
    service = KillableService(HANDLER, width=2, wall_s=60.0)
    with ThreadPoolExecutor(1) as pool:
        sleeper = pool.submit(service.call, {"do": "sleep"})
        family = family_of(service)
        service.close()
        service.close()
        assert isinstance(sleeper.exception(), ServiceFailed)
    assert not survivors(family)


def test_nothing_outlives_an_owner_that_is_killed() -> None:
    code = (
        "import threading, time\n"
        "from reward_models.killable import KillableService\n"
        f"service = KillableService({HANDLER!r}, wall_s=60.0)\n"
        "service.call({'do': 'double', 'n': 1})\n"
        "threading.Thread(target=service.call, args=({'do': 'sleep'},), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "print(service.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert owner.stdout is not None
    server = psutil.Process(int(owner.stdout.readline()))
    family = [server, *server.children(recursive=True)]
    assert len(family) == 2
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert not survivors(family)


def test_one_service_serves_a_whole_process() -> None:
    assert killable.service("tests.unit.killable_handler") is killable.service("tests.unit.killable_handler")


def family_of(service: KillableService) -> list[psutil.Process]:
    """The server and its child, as soon as there is one."""
    for _ in range(1000):
        if service.pid is not None and (children := psutil.Process(service.pid).children(recursive=True)):
            return [psutil.Process(service.pid), *children]
        time.sleep(0.02)
    raise AssertionError("no child was started")


def survivors(family: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(family, timeout=20)[1]
