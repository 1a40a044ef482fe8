"""The parts of the sandboxes that need none: the filter of system calls, when a verdict is settled, what a job may be."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time

import pytest

from environments.sandbox import Limits, Sandbox, SandboxJob, SandboxResult, base
from environments.sandbox.base import READY
from environments.sandbox.pump import pump
from environments.sandbox.seccomp import _AUDIT_ARCH, _DENIED, filter_program

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
CALLS = {"x86_64": {"read": 0, "clone": 56, "socket": 41, "fork": 57}, "aarch64": {"read": 63, "clone": 220, "socket": 198}}

CODE = {machine: list(struct.iter_unpack("=HBBI", filter_program(machine))) for machine in CALLS}


def decide(machine: str, number: int, argument: int = 0, *, arch: int | None = None) -> int:
    """What the kernel would do with a call: the filter, interpreted."""
    data = {0: number, 4: _AUDIT_ARCH[machine] if arch is None else arch, 16: argument & 0xFFFFFFFF}
    position, loaded, code = 0, 0, CODE[machine]
    while True:
        operation, if_true, if_false, operand = code[position]
        position += 1
        if operation == 0x06:
            return int(operand)
        if operation == 0x20:
            loaded = data[operand]
        else:
            true = {0x15: loaded == operand, 0x35: loaded >= operand, 0x45: bool(loaded & operand)}[operation]
            position += if_true if true else if_false


@pytest.mark.parametrize("machine", CALLS)
def test_the_filter_refuses_what_it_lists_and_lets_the_rest_through(machine: str) -> None:
    column = list(_AUDIT_ARCH).index(machine)
    denied = {row[column] for row in _DENIED.values() if row[column] is not None}
    special = {CALLS[machine]["socket"], 435}
    for number in range(600):
        wanted = ERRNO | errno.EPERM if number in denied else ALLOW
        if number not in special:
            assert decide(machine, number) == wanted, number
    assert decide(machine, 435) == ERRNO | errno.ENOSYS  # clone3


@pytest.mark.parametrize("machine", CALLS)
def test_the_filter_reads_arguments_of_socket_and_clone(machine: str) -> None:
    calls = CALLS[machine]
    assert decide(machine, calls["socket"], 1) == ALLOW
    assert {decide(machine, calls["socket"], family) for family in (0, 2, 10, 16, 17, 38, 40)} == {ERRNO | errno.EAFNOSUPPORT}
    assert decide(machine, calls["clone"], 0x01200011) == ALLOW  # what fork() asks for
    assert decide(machine, calls["clone"], 0x003D0F00) == ALLOW  # a thread
    for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide(machine, calls["clone"], namespace | 17) == ERRNO | errno.EPERM


def test_the_filter_kills_calls_of_another_architecture_and_their_disguise() -> None:
    assert decide("x86_64", 0, arch=0x40000003) == KILL  # 32-bit calls have other numbers
    assert decide("x86_64", 0x40000000 | 59) == KILL


class Lines:
    """A runner that says these lines, and then waits or ends."""

    def __init__(self, *lines: bytes, ends: bool) -> None:
        self.reader, self.writer = os.pipe()
        os.write(self.writer, READY + b"".join(lines))
        self.open = True
        if ends:
            os.close(self.writer)

    def filenos(self) -> tuple[list[int], list[int]]:
        return [self.reader], []

    def read(self, fd: int) -> list[tuple[str, bytes]]:
        data = os.read(fd, 65536)
        self.open = bool(data)
        return [("out", data)]

    def write(self, data: bytes) -> int:
        return len(data)


VALUE, ERROR = b'{"case": 0, "state": "value", "out": "1"}\n', b'{"case": 1, "state": "error", "out": ""}\n'


def test_a_verdict_is_settled_once_every_case_has_a_value() -> None:
    kind, transcript = pump(Lines(VALUE, VALUE, ends=False), b"", Limits(wall_s=60), cases=2)
    assert (kind, transcript.answer) == ("finished", VALUE + VALUE)


@pytest.mark.parametrize(
    "lines",
    [(VALUE, ERROR), (VALUE,), (VALUE, VALUE[:-1]), (VALUE, b'{"case": 1, "state": "error", "out": "\\"state\\": \\"value\\""}\n')],
    ids=["an error", "one missing", "no end of line", "words within an output"],
)
def test_otherwise_the_end_is_waited_for(lines: tuple[bytes, ...]) -> None:
    assert pump(Lines(*lines, ends=False), b"", Limits(wall_s=0.05), cases=2)[0] == "timeout"
    assert pump(Lines(*lines, ends=True), b"", Limits(wall_s=60), cases=2)[0] == "finished"


def test_a_program_that_says_nothing_is_late_and_no_failure_of_ours() -> None:
    warm = Lines(ends=False)
    assert pump(warm, b"", Limits(wall_s=60), until_ready=True)[0] == "finished"
    assert pump(warm, b"", Limits(wall_s=0.05), cases=1, said=READY)[0] == "timeout"


def test_a_gate_lets_as_many_in_as_it_is_wide() -> None:
    gate, counting, inside, most = base.Gate(2), threading.Lock(), 0, 0

    def pass_through() -> None:
        nonlocal inside, most
        with gate:
            with counting:
                inside, most = inside + 1, max(most, inside + 1)
            time.sleep(0.02)
            with counting:
                inside -= 1

    threads = [threading.Thread(target=pass_through) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= most <= 2


def test_a_gate_says_how_long_it_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([5.0, 7.5])
    monkeypatch.setattr(base.time, "monotonic", lambda: next(clock))
    with base.Gate(1) as waited_s:
        assert waited_s == 2.5


def test_a_runner_that_never_got_ready_is_a_failure_of_ours() -> None:
    silent = Lines(ends=True)
    os.read(silent.reader, 100)
    assert pump(silent, b"", Limits(wall_s=60), cases=1)[0] == "infra_error"


def test_a_program_is_hurried_once_when_patience_ends_and_not_before() -> None:
    called: list[float] = []

    def run(wall_s: float, *lines: bytes) -> str:
        began = time.monotonic()
        told = lambda: called.append(time.monotonic() - began)  # noqa: E731
        return pump(Lines(*lines, ends=False), b"", Limits(wall_s=wall_s), cases=1, hurry=told, patience_s=0.05)[0]

    assert run(60, VALUE) == "finished"
    assert run(0.01) == "timeout"
    assert not called
    assert run(0.3) == "timeout"
    assert len(called) == 1
    assert 0.05 <= called[0] < 0.3


class Python(Sandbox):
    name, languages = "toy", base.LANGUAGES

    def run(self, job: SandboxJob) -> SandboxResult:
        base.check_language(self, job)
        return SandboxResult(kind="finished", stdout=b"", stderr_tail="", wall_s=0.0)


def test_a_language_that_a_sandbox_does_not_run_is_named_with_those_it_does() -> None:
    assert Python().run(SandboxJob(program="", mode="stdin", inputs=())).kind == "finished"
    with pytest.raises(ValueError, match="'rust'; the toy sandbox runs python"):
        Python().run(SandboxJob(program="fn main() {}", mode="stdin", inputs=(), language="rust"))


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="'repl'"):
        SandboxJob(program="", mode="repl", inputs=())
