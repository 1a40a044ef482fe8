"""Each guarantee of the sandboxes, read by the host from a program that is running in one. docs/sandbox.md lists them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from environments.sandbox import Limits, Sandbox
from environments.sandbox.cgroups import CgroupFactory
from environments.sandbox.containers import ENVIRONMENT
from tests.integration.sandboxes import BACKENDS, attempt, open_backend, soon

NAME = "polyrl-look"
PROGRAM = f"import ctypes, time\nctypes.CDLL(None).prctl(15, b'{NAME}', 0, 0, 0)\ndef f(x): time.sleep(x); return 1"
CGROUPS = Path("/sys/fs/cgroup")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root sees all of another user's process")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What /proc told about a program's process."""

    backend: str
    status: dict[str, str]
    limits: dict[str, tuple[str, str]]  # soft, hard
    namespaces: dict[str, str]
    environment: dict[str, str]
    files: list[str]  # what its descriptors point at
    mounts: dict[str, tuple[str, set[str]]]  # mount point: (kind, options)
    network: dict[str, list[str]]  # lines of /proc/PID/net/*
    cgroups: dict[str, Path]  # folder of each controller
    oom_score_adj: int


@pytest.fixture(scope="module", params=BACKENDS)
def seen(request: pytest.FixtureRequest) -> Iterator[Seen]:
    sandbox = open_backend(request.param)
    running = threading.Thread(target=attempt, args=(sandbox, PROGRAM), kwargs={"inputs": (1,), "expected": (1,), "limits": Limits()})
    running.start()
    try:
        yield look(sandbox, find())
    finally:
        running.join()


def find() -> Path:
    for _ in range(500):
        for comm in Path("/proc").glob("[0-9]*/comm"):
            try:
                if comm.read_text().strip() == NAME:
                    return comm.parent
            except OSError:
                continue
        time.sleep(0.02)
    raise AssertionError("no program to look at")


def look(sandbox: Sandbox, proc: Path) -> Seen:
    def text(name: str) -> str:
        return (proc / name).read_text()

    limits = {line[:26].strip(): (line[26:47].strip(), line[47:68].strip()) for line in text("limits").splitlines()[1:]}
    mounts = {}
    for line in text("mountinfo").splitlines():
        left, right = line.split(" - ")
        mounts[left.split()[4]] = (right.split()[0], {*left.split()[5].split(","), *right.split()[2].split(",")})
    cgroups = {}
    for line in text("cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            cgroups[controller] = CGROUPS / controller / path.lstrip("/")
    return Seen(
        backend=sandbox.name,
        status=dict(line.split(":\t", 1) for line in text("status").splitlines() if ":\t" in line),
        limits=limits,
        namespaces={p.name: os.readlink(p) for p in (proc / "ns").iterdir()},
        environment=dict(e.split("=", 1) for e in text("environ").split("\0") if e),
        files=[os.readlink(p) for p in (proc / "fd").iterdir()],
        mounts=mounts,
        network={name: text(f"net/{name}").splitlines() for name in ("dev", "route")},
        cgroups=cgroups,
        oom_score_adj=int(text("oom_score_adj")),
    )


def test_it_has_namespaces_of_its_own(seen: Seen) -> None:
    for name in ("net", "pid", "ipc", "uts", "mnt"):
        assert seen.namespaces[name] != os.readlink(f"/proc/self/ns/{name}"), name


def test_it_runs_as_a_user_that_owns_nothing(seen: Seen) -> None:
    uids, gids = ({int(i) for i in seen.status[key].split()} for key in ("Uid", "Gid"))
    assert len(uids) == len(gids) == 1
    assert min(uids | gids) >= 100_000_000
    assert seen.status.get("Groups", "").strip() in ("", str(*gids))


def test_it_has_no_capability_and_can_get_none(seen: Seen) -> None:
    assert {seen.status[key] for key in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert seen.status["NoNewPrivs"] == "1"
    if seen.backend == "docker":
        assert seen.status["CapBnd"] == "0" * 16


def test_its_system_calls_are_filtered(seen: Seen) -> None:
    assert seen.status["Seccomp"] == "2"
    # The runner's filter, in Docker on top of the engine's own.
    assert int(seen.status.get("Seccomp_filters", 2)) >= (2 if seen.backend == "docker" else 1)


def test_its_resource_limits_are_those_of_the_job(seen: Seen) -> None:
    limits = Limits()
    wanted = {
        "Max file size": limits.file_mb << 20, "Max core file size": 0,
        "Max processes": limits.processes, "Max open files": limits.open_files, "Max address space": 2 * limits.memory_mb << 20,
    }  # fmt: skip
    assert {name: seen.limits[name] for name in wanted} == {name: (str(v), str(v)) for name, v in wanted.items()}
    assert seen.limits["Max cpu time"] == (str(limits.cpu_s), str(limits.cpu_s + 1))


def test_all_its_processes_together_are_bounded_in_memory_number_and_processor(seen: Seen) -> None:
    if "memory" not in seen.cgroups and not (CGROUPS / "cgroup.controllers").is_file():
        pytest.skip("no control groups on this machine")
    limits = Limits()
    if "memory" in seen.cgroups:
        memory, pids, cpu = (seen.cgroups[name] for name in ("memory", "pids", "cpu"))
        found = [(memory / "memory.limit_in_bytes").read_text(), (pids / "pids.max").read_text(), (cpu / "cpu.cfs_quota_us").read_text()]
        with_swap = memory / "memory.memsw.limit_in_bytes"
        if with_swap.exists():
            assert int(with_swap.read_text()) == limits.memory_mb << 20
    else:
        folder = seen.cgroups[""]
        found = [(folder / name).read_text() for name in ("memory.max", "pids.max", "cpu.max")]
        if (folder / "memory.swap.max").exists():
            assert int((folder / "memory.swap.max").read_text()) == 0
    assert [int(text.split()[0]) for text in found] == [limits.memory_mb << 20, limits.processes + 8, 100_000]


def test_a_group_is_idle_work_until_it_is_hurried() -> None:
    group = CgroupFactory().open(Limits())
    if group is None:
        pytest.skip("no control groups on this machine")
    try:
        weights = [folder / "cpu.idle" for folder in group.folders if (folder / "cpu.idle").exists()]
        if not weights:
            pytest.skip("no idle groups on this machine")
        assert weights[0].read_text().strip() == "1"
        group.hurry()
        assert weights[0].read_text().strip() == "0"
    finally:
        group.remove()


def test_a_program_that_takes_its_time_is_idle_work_no_longer() -> None:
    sandbox = open_backend("bubblewrap")
    running = threading.Thread(target=attempt, args=(sandbox, PROGRAM), kwargs={"inputs": (3,), "expected": (1,), "limits": Limits()})
    running.start()
    try:
        weight = processor_group(find()) / "cpu.idle"
        if not weight.exists():
            pytest.skip("no idle groups on this machine")
        assert soon(lambda: weight.read_text().strip() == "0")
    finally:
        running.join()


def processor_group(proc: Path) -> Path:
    """The folder of a process's control group of processors, of either version."""
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            return CGROUPS / "cpu" / path.lstrip("/")
    return CGROUPS / path.lstrip("/")  # the line of version 2 comes last


def test_its_root_is_read_only_and_its_tmp_is_small(seen: Seen) -> None:
    assert "ro" in seen.mounts["/"][1]
    kind, options = seen.mounts["/tmp"]
    assert kind == "tmpfs"
    assert {"nosuid", "nodev", f"size={Limits().tmp_mb << 10}k"} <= options
    if seen.backend == "docker":  # bubblewrap cannot: there the filter, which knows no exec, stands alone
        assert {"noexec", "nr_inodes=4k"} <= options or {"noexec", "nr_inodes=4096"} <= options


def test_nothing_of_the_host_is_mounted_for_writing(seen: Seen) -> None:
    real = {point: options for point, (kind, options) in seen.mounts.items() if kind not in ("tmpfs", "proc", "sysfs", "cgroup", "cgroup2")}
    own = ("/dev/pts", "/dev/mqueue", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")  # of its namespaces, or without content
    assert [point for point, options in real.items() if "ro" not in options and point not in own] == []


def test_it_has_no_network_and_no_route(seen: Seen) -> None:
    interfaces = {line.split(":")[0].strip() for line in seen.network["dev"][2:]}
    assert interfaces <= {"lo", "sit0", "tunl0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6gre0"}
    assert len(seen.network["route"]) == 1, "a heading, and no route"


def test_it_has_no_environment_and_no_file_of_ours(seen: Seen) -> None:
    assert set(seen.environment) <= {*ENVIRONMENT, "LD_LIBRARY_PATH", "PWD", "HOSTNAME"}
    assert {key: seen.environment[key] for key in ENVIRONMENT} == ENVIRONMENT
    assert not [f for f in seen.files if not f.startswith(("pipe:", "/memfd:stdin", "/dev/null"))]


def test_it_dies_first_when_the_machine_runs_out_of_memory(seen: Seen) -> None:
    assert seen.oom_score_adj >= 500
