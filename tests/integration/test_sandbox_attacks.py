"""Programs that try to be paid for nothing or to harm the machine, on both backends, several at the same time.

Each earns 0 with the status that its end deserves; no process, control group, container, mount or file of any is left; and a right
program that runs after each class, while others are still attacking, is paid.
"""

from __future__ import annotations

import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import docker
import pytest

from environments.code import MAX_PROGRAM_CHARS, CodeEnv, judged
from environments.sandbox import Limits, Sandbox, base
from environments.sandbox.bubblewrap import BubblewrapSandbox
from environments.sandbox.choose import close_sandboxes
from environments.sandbox.containers import OWNER, owner
from rl_core.types import Status, Turn
from tests.integration.attacks import ATTACKS, BY_NAME, CANARY_FOLDER, CLASSES, MARK, Attack
from tests.integration.sandboxes import BACKENDS, HONEST, SHORT, Attempt, attempt, open_backend, soon

AT_A_TIME = 8
CALM = Limits(wall_s=40.0, case_wall_s=20.0)
"""For whom time is not the point: a machine that has other things to do must not change the verdict."""


@dataclass(kw_only=True)
class Battle:
    """What became of all attacks on one backend."""

    groups_bounded: bool
    attempts: dict[str, Attempt] = field(default_factory=dict)  # by name
    honest: dict[int, Attempt] = field(default_factory=dict)  # by class, right after it
    most_processes: int = 0  # of one program at any time, seen by the host
    mounts_before: int = 0


@pytest.fixture(scope="module", params=BACKENDS)
def battle(request: pytest.FixtureRequest) -> Battle:
    sandbox = open_own(request.param)
    found = Battle(groups_bounded=getattr(sandbox, "group_limits", "cgroup") == "cgroup", mounts_before=mounts())
    over = threading.Event()
    watcher = threading.Thread(target=watch_processes, args=(found, over))
    watcher.start()
    try:
        with ThreadPoolExecutor(AT_A_TIME) as threads:
            waiting = []
            for number in CLASSES:
                waiting += [threads.submit(fight, sandbox, attack, found) for attack in ATTACKS if attack.number == number]
                waiting.append(threads.submit(work, sandbox, number, found))
        for job in waiting:
            job.result()
        work(sandbox, 0, found)
    finally:
        over.set()
        watcher.join()
        sandbox.close()
    return found


def open_own(name: str) -> Sandbox:
    """A backend of this test's own, as wide as it attacks; a skip where there is no Docker engine."""
    open_backend(name)
    if name == "bubblewrap":
        return BubblewrapSandbox(width=AT_A_TIME)
    from environments.sandbox.docker import DockerSandbox

    return DockerSandbox(width=AT_A_TIME, warm=AT_A_TIME)


def fight(sandbox: Sandbox, attack: Attack, found: Battle) -> None:
    mode, inputs, expected = {
        "forge": ("function", (20, 21), (40, 42)),
        "stdin": ("stdin", ("20", "21"), ("40", "42")),
        "probe": ("function", (20,), ([],)),
    }[attack.kind]
    limits = SHORT if attack.end == "late" else CALM
    found.attempts[attack.name] = attempt(sandbox, attack.program, mode=mode, inputs=inputs, expected=expected, limits=limits)


def work(sandbox: Sandbox, number: int, found: Battle) -> None:
    found.honest[number] = attempt(sandbox, HONEST, limits=CALM)


# --- what the host sees -----------------------------------------------------------------------------------------------


def sandboxed() -> dict[int, int]:
    """{uid: processes} of programs that this process started, by the host's view; those named MARK count as uid 0."""
    ours = range(base.unprivileged_uid(0), base.unprivileged_uid(255) + 1)
    counts: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        lines = dict(line.split(":\t", 1) for line in read(status).splitlines() if ":\t" in line)
        uid = int(lines["Uid"].split()[0]) if "Uid" in lines else -1
        if uid in ours or lines.get("Name") == MARK:
            counts[uid if uid in ours else 0] = counts.get(uid if uid in ours else 0, 0) + 1
    return counts


def watch_processes(found: Battle, over: threading.Event) -> None:
    while not over.wait(0.2):
        found.most_processes = max([found.most_processes, *sandboxed().values()])


def mounts() -> int:
    """The host's, but for those of containers: other test processes keep some warm meanwhile. Ours are counted by the engine."""
    points = [line.split()[1] for line in read(Path("/proc/self/mounts")).splitlines()]
    return sum("/overlay2/" not in point and "/containers/" not in point for point in points)


def containers_of_ours() -> list[str]:
    """Ids of this process's containers, where an engine answers."""
    try:
        engine = docker.APIClient(**docker.utils.kwargs_from_env())
        return [found["Id"] for found in engine.containers(all=True, filters={"label": f"{OWNER}={owner()}"})]
    except docker.errors.DockerException:
        return []


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


# --- the attacks ------------------------------------------------------------------------------------------------------


def test_there_are_attacks_of_every_class() -> None:
    elsewhere = {24}  # the test of sixteen siblings below
    assert {a.number for a in ATTACKS} == set(CLASSES) - elsewhere
    assert len({a.program for a in ATTACKS}) == len(ATTACKS) >= 80


@pytest.mark.parametrize("attack", ATTACKS, ids=[a.id for a in ATTACKS])
def test_an_attack_earns_nothing_and_ends_as_it_deserves(battle: Battle, attack: Attack) -> None:
    tried = battle.attempts[attack.name]
    status, reward = judged(tried.result, tried.score)
    if attack.kind == "probe":
        assert tried.paid, f"it reached something, or did not come to its end: {tried}"
        return
    assert reward == 0.0, tried
    assert status is (Status.TIMEOUT_MODEL if attack.end == "late" else Status.OK), tried
    out_of_memory = attack.end == "oom" and battle.groups_bounded
    if attack.end == "flood":
        assert tried.result.kind == "output_limit" or b'"state": "output"' in tried.result.stdout, tried
    elif attack.end != "late":
        assert tried.result.kind == ("oom" if out_of_memory else "finished"), tried
    assert all(c.isprintable() or c == "\n" for c in tried.result.stderr_tail)


@pytest.mark.parametrize("number", [0, *CLASSES])
def test_a_right_program_after_the_attacks_is_paid(battle: Battle, number: int) -> None:
    assert battle.honest[number].paid, battle.honest[number]


def test_the_host_is_as_it_was(battle: Battle) -> None:
    assert battle.most_processes <= Limits().processes + 8
    close_sandboxes()  # the one that this process shares among tests keeps containers warm
    assert soon(lambda: not sandboxed()), sandboxed()
    assert soon(lambda: mounts() <= battle.mounts_before), mounts()
    assert soon(lambda: not containers_of_ours()), containers_of_ours()
    assert not [p for p in Path("/sys/fs/cgroup").glob(f"*/polyrl-{os.getpid()}-*") if p.is_dir()]
    assert not [p for folder in ("/tmp", "/dev/shm", ".") for p in Path(folder).glob(f"{MARK}*")]
    assert not Path(CANARY_FOLDER).exists()


# --- those that need more than a program ------------------------------------------------------------------------------


@pytest.fixture(params=BACKENDS)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return open_backend(request.param)


def test_the_right_function_is_paid_whatever_it_prints(sandbox: Sandbox) -> None:
    assert attempt(sandbox, "print('FAIL')\ndef f(x):\n print(x)\n return x*2").paid


def test_sixteen_siblings_at_their_limits_do_not_keep_an_honest_program_from_its_turn(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(17) as threads:
        siblings = [threads.submit(attempt, sandbox, BY_NAME["spin"].program, inputs=(20,), expected=(40,)) for _ in range(4)]
        siblings += [threads.submit(attempt, sandbox, BY_NAME["thread bomb"].program, inputs=(20,), expected=(40,)) for _ in range(12)]
        honest = threads.submit(attempt, sandbox, HONEST, limits=CALM)
        assert honest.result().paid
    assert not any(s.result().paid or s.result().result.kind == "infra_error" for s in siblings)


def test_a_program_sees_none_of_the_hosts_secrets(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POLYRL_CANARY", "canary-5f1d")
    (tmp_path / "secret").write_text("canary-5f1d")
    for name in ("environment", "environments of processes", "any file with the canary"):
        assert attempt(sandbox, BY_NAME[name].program, inputs=(1,), expected=([],), limits=CALM).paid, name
    program = "import os\ndef f(p): return [os.path.exists(p), os.path.exists(os.path.dirname(p)), os.path.exists('/tmp/pytest-of-root')]"
    assert attempt(sandbox, program, inputs=(str(tmp_path / "secret"),), expected=([False] * 3,), limits=CALM).paid


def test_a_megabyte_of_input_that_nobody_reads_holds_nothing_up(sandbox: Sandbox) -> None:
    tried = attempt(sandbox, "print(1)", mode="stdin", inputs=("a" * 1_000_000,) * 2, expected=("1", "1"), limits=CALM)
    assert tried.paid, tried


def test_a_search_of_all_memory_objects_does_not_find_the_expected_value(sandbox: Sandbox) -> None:
    program = """
import gc, sys
def f(x):
    seen, frame = gc.get_objects(), sys._getframe()
    while frame:
        seen += [*frame.f_locals.values(), *frame.f_code.co_consts]
        frame = frame.f_back
    seen += gc.get_referents(*seen)
    numbers = [o for o in seen if type(o) is int] + [int(o) for o in seen if type(o) is str and o.isdecimal() and len(o) < 20]
    return ([o for o in numbers if o % 1000003 == 270891] or [0])[-1]
"""
    expected = 918273645
    assert expected % 1000003 == 270891
    tried = attempt(sandbox, program, inputs=(1,), expected=(expected,))
    assert tried.score.ran, tried
    assert not tried.paid
    assert attempt(sandbox, program, inputs=(expected,), expected=(expected,)).paid, "the search itself does not work"


def test_cases_do_not_share_memory(sandbox: Sandbox) -> None:
    program = "import builtins\ndef f(x):\n builtins.calls = getattr(builtins, 'calls', 0) + 1\n return builtins.calls"
    assert attempt(sandbox, program, inputs=(1, 1, 1), expected=(1, 1, 1)).paid


def test_cases_do_not_share_files(sandbox: Sandbox) -> None:
    program = "import os\ndef f(x):\n found = os.listdir('/tmp')\n os.makedirs('/tmp/a/b'); open('/tmp/c', 'w').close()\n return found"
    assert attempt(sandbox, program, inputs=(1, 1, 1), expected=([], [], []), limits=CALM).paid


def test_nothing_but_tmp_can_be_written(sandbox: Sandbox) -> None:
    program = """
import os
def f(x):
    written = []
    for folder, _, _ in os.walk('/'):
        if folder.startswith(('/proc', '/sys', '/dev/mqueue')): continue  # no files: queues of this namespace, bounded by RLIMIT_MSGQUEUE
        try:
            with open(folder + '/probe', 'w'): written.append(folder)
        except OSError: pass
    return sorted(written)
"""
    tried = attempt(sandbox, program, inputs=(1,), expected=(["/tmp"],), limits=Limits())
    assert tried.paid, tried


# --- through the environment: what the policy says, and what it is told -----------------------------------------------

SOURCES = {
    "zero bytes": ("def f(x):\n return x\0", Status.INVALID_OUTPUT),
    "ten megabytes": ("x=1\n" * 2_500_000, Status.INVALID_OUTPUT),
    "just too long": ("#" * (MAX_PROGRAM_CHARS + 1), Status.INVALID_OUTPUT),
    "nothing": ("```python\n```", Status.INVALID_OUTPUT),
    "a byte order mark": ("\ufeffdef f(x): return 0", Status.OK),
    "half a character": ("def f(x): return '\ud800'", Status.OK),
    "the right program in the block before the last": ("```python\nRIGHT\n```\n```python\ndef f(x): return 0\n```", Status.OK),
    "a block within a block": ("```python\n```python\nRIGHT\n```\ndef f(x): return 0\n```", Status.OK),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_plays_tricks_earns_nothing(sandbox: Sandbox, case: str) -> None:
    task = CodeEnv.task_at("eval", 0, 0, {"kinds": ["ints"]})
    env = CodeEnv(sandbox=sandbox.name)
    env.reset(options={"task": task})
    source, status = SOURCES[case]
    verdict = env.step(Turn(content=source))[4]["verdict"]
    assert (verdict.status, verdict.reward) == (status, 0.0), verdict


def test_a_right_program_in_the_thought_alone_is_not_graded(sandbox: Sandbox) -> None:
    task = CodeEnv.task_at("eval", 0, 0, {"kinds": ["ints"]})
    env = CodeEnv(sandbox=sandbox.name)
    right = env.oracle(env.reset(options={"task": task})[1]["observation"], random.Random(0)).content
    assert env.step(Turn(thought=right, content="def f(x): return 0"))[4]["verdict"].reward == 0.0


def test_the_policy_is_told_nothing_about_hidden_cases_and_has_one_try(sandbox: Sandbox) -> None:
    task = CodeEnv.task_at("eval", 0, 0, {"kinds": ["ints"]})
    env = CodeEnv(sandbox=sandbox.name)
    env.reset(options={"task": task})
    _, reward, terminated, _, info = env.step(
        Turn(content="import sys\ndef f(x):\n print('wanted?', file=sys.stderr)\n raise ValueError('wanted?')")
    )
    assert (reward, terminated) == (0.0, True)
    assert info["observation"].messages == ()
    with pytest.raises(RuntimeError, match="after the end of the episode"):
        env.step(Turn(content="def f(x): return 0"))
    written = json.dumps(dict(info["verdict"].evidence))
    assert not [value for value in task.private["expected"] if str(value) in written]
