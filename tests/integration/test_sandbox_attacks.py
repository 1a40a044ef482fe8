"""Programs that try to be paid for nothing or to harm the machine. Each scores 0, is no failure of ours, and leaves the next run clean."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from environments.sandbox import Limits, Sandbox
from tests.integration.attacks import FUNCTION_ATTACKS, MARK, NAME_ITSELF
from tests.integration.sandboxes import BACKENDS, assert_next_run_is_clean, attempt, open_backend


@pytest.fixture(params=BACKENDS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    backend = open_backend(request.param)
    yield backend
    assert_next_run_is_clean(backend)
    assert not marked_processes()


def marked_processes() -> list[str]:
    """Processes on this machine that named themselves MARK, given a moment to be reaped."""
    for _ in range(50):
        found = [p for p in Path("/proc").glob("[0-9]*/comm") if read(p).strip() == MARK]
        if not found:
            return []
        time.sleep(0.1)
    return [str(p) for p in found]


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("attack", FUNCTION_ATTACKS)
def test_a_hostile_function_earns_nothing_and_is_never_a_failure_of_ours(sandbox: Sandbox, attack: str) -> None:
    tried = attempt(sandbox, FUNCTION_ATTACKS[attack])
    assert not tried.paid, tried
    assert tried.result.kind != "infra_error", tried


@pytest.mark.parametrize(
    "program",
    [
        "while True: print('40')",
        "import os\nwhile True: os.write(1, b'\\xff' * 65536)",
        "print('a' * 1_000_000_000)",
        "print('PASS')",
        "exit(0)",
        "input(); input()",
    ],
    ids=["endless output", "endless binary output", "one line of a gigabyte", "printed verdict", "exit", "reads past the end"],
)
def test_a_hostile_program_on_stdin_earns_nothing(sandbox: Sandbox, program: str) -> None:
    tried = attempt(sandbox, program, mode="stdin", inputs=("20", "21"), expected=("40", "42"))
    assert not tried.paid, tried
    assert tried.result.kind != "infra_error", tried


def test_the_right_function_is_paid_whatever_it_prints(sandbox: Sandbox) -> None:
    assert attempt(sandbox, "print('FAIL')\ndef f(x):\n print(x)\n return x*2").paid


def test_reading_the_environment_and_other_processes_finds_nothing(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRL_CANARY", "canary-5f1d")
    program = """
import os
def f(paths):
    found = [repr(dict(os.environ))]
    for path in paths:
        try: found.append(repr(os.listdir(path)))
        except OSError: pass
        try: found.append(open(path, 'rb').read(10000).decode('latin-1'))
        except OSError: pass
    processes = [p for p in os.listdir('/proc') if p.isdigit()] if os.path.isdir('/proc') else []
    return [repr(found), len(processes)]
"""
    paths = ["/proc/1/environ", "/proc/self/environ", "/etc/shadow", "/var/run/docker.sock", "/root", "/home", os.getcwd()]
    tried = attempt(sandbox, program, inputs=(paths,), expected=("",))
    assert tried.score.ran, tried
    text, processes = json.loads(json.loads(tried.result.stdout)["out"])
    assert "canary" not in text
    assert "root:" not in text
    assert "pyproject" not in text
    assert processes <= 3, "the runner and its child, and nobody else"


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


def test_nothing_outside_can_be_reached(sandbox: Sandbox) -> None:
    program = """
import socket
internet4, internet6, unix, vsock, stream, datagram, raw = 2, 10, 1, 40, 1, 2, 3
TARGETS = [
    (internet4, stream, ('127.0.0.1', 22)), (internet4, stream, ('1.1.1.1', 53)), (internet4, datagram, ('8.8.8.8', 53)),
    (internet6, stream, ('::1', 22)), (internet6, datagram, ('2606:4700::1111', 53)), (internet4, raw, ('127.0.0.1', 0)),
    (unix, stream, chr(0) + 'polyrl'), (unix, stream, '/var/run/docker.sock'), (vsock, stream, (2, 22)),
]
def f(port):
    reached = []
    for family, kind, address in [*TARGETS, (internet4, stream, ('127.0.0.1', port))]:
        try:
            s = socket.socket(family, kind); s.settimeout(0.5); s.connect(address); reached.append(repr(address))
        except OSError: pass
    try: reached.append(socket.gethostbyname('example.com'))
    except OSError: pass
    return reached
"""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        tried = attempt(sandbox, program, inputs=(listening.getsockname()[1],), expected=([],))
    assert tried.paid, tried


def test_a_daemon_does_not_outlive_its_case(sandbox: Sandbox) -> None:
    program = (
        NAME_ITSELF + "\nimport os, time\ndef f(x):\n if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
        "   for _ in range(600):\n    time.sleep(0.1)\n    open('/tmp/mark', 'w').close()\n  os._exit(0)\n return x*2"
    )
    tried = attempt(sandbox, program)
    assert tried.result.kind == "finished"
    assert not marked_processes()
    assert attempt(sandbox, "import os\ndef f(x): return os.listdir('/tmp')", inputs=(1,), expected=([],)).paid


def test_cases_do_not_share_memory(sandbox: Sandbox) -> None:
    program = "import builtins\ndef f(x):\n builtins.calls = getattr(builtins, 'calls', 0) + 1\n return builtins.calls"
    assert attempt(sandbox, program, inputs=(1, 1, 1), expected=(1, 1, 1)).paid


def test_a_program_has_no_privilege_left(sandbox: Sandbox) -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def capable():  # capget, version 3: effective, permitted, inheritable, twice
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    return data[0] + data[1] + data[3] + data[4]
def f(x):
    ambient = sum(libc.prctl(47, 1, cap, 0, 0) > 0 for cap in range(41))
    refused = [libc.unshare(0x10000000), libc.mount(b'a', b'/tmp', b'tmpfs', 0, None), libc.setuid(0), libc.chroot(b'/tmp'),
               libc.syscall(323, 0), libc.syscall(425, 1, None)]
    return [os.getuid() >= 65534, os.getgid() >= 65534, capable(), ambient, libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0),
            sum(r != -1 for r in refused)]
"""
    tried = attempt(sandbox, program, inputs=(1,), expected=([True, True, 0, 0, 1, 2, 0],))
    assert tried.paid, tried


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


def test_memory_of_many_processes_is_reported_as_out_of_memory(sandbox: Sandbox) -> None:
    if getattr(sandbox, "group_limits", "cgroup") != "cgroup":
        pytest.skip("no writable cgroups here: memory is bounded per process only")
    assert attempt(sandbox, FUNCTION_ATTACKS["memory in many processes"]).result.kind == "oom"


def test_a_program_that_never_ends_is_reported_as_a_time_out(sandbox: Sandbox) -> None:
    for attack in ("spin", "spin deaf to signals", "sleep"):
        tried = attempt(sandbox, FUNCTION_ATTACKS[attack])
        assert tried.score.timed_out or tried.result.kind == "timeout", (attack, tried)
