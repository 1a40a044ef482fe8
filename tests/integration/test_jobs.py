"""The job path on a real Ray head: what the driver prints becomes events, Ctrl-C reaches it, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from infra.jobs import Head, JobError, client, follow, start_head, stop_head
from infra.view import PlainView
from rl_core.events import Event

DRIVER = """
import signal, sys, time
sys.path.insert(0, {root!r})
from infra.view import EventLines
from rl_core.events import Event
out = EventLines()

def stop(*_):
    time.sleep(4)  # longer than Ray's own patience of 3 s: the step that is saved
    out.emit(Event(kind="run_finished", data={{"outcome": "stopped", "reason": "saved", "seconds": 1.0}}))
    sys.exit(1)

signal.signal(signal.SIGTERM, stop)
out.emit(Event(kind="run_started", data={{"run": "r", "steps": 3, "environments": {{"math": 1.0}}, "max_staleness": 1}}))
print("a line of the log", flush=True)
time.sleep({seconds})
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Listening(PlainView):
    """Calls back at every event."""

    def __init__(self, on_event: object = None) -> None:
        super().__init__(Console(record=True, width=200, force_terminal=False, file=open(os.devnull, "w")))  # noqa: SIM115
        self.kinds: list[str] = []
        self.lines: list[str] = []
        self._on_event = on_event

    def emit(self, event: Event) -> None:
        super().emit(event)
        self.kinds.append(event.kind)
        if callable(self._on_event):
            self._on_event(event)

    def log(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    started = start_head(dies_with_us=True)
    family = psutil.Process(started.pid).children(recursive=True)
    assert len(family) >= 3
    yield started
    stop_head(started)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "Ray processes outlived their head"
    assert not Path(started.folder).exists()


def driver(tmp_path: Path, seconds: float) -> str:
    path = tmp_path / "driver.py"
    path.write_text(DRIVER.format(root=os.getcwd(), seconds=seconds))
    return f"exec python {path}"


def submit(head: Head, entrypoint: str) -> str:
    """As `Submission.send`, which is patient with a cluster that has just started, with another program."""
    from infra.jobs import Submission

    class Program(Submission):
        @property
        def entrypoint(self) -> str:
            return entrypoint

    folder = Path(entrypoint.split()[-1]).parent
    return Program(working_dir=folder, config=folder / "x.yaml", overrides=(), local=True).send(client(head))


def test_a_job_is_followed_to_its_end(head: Head, tmp_path: Path) -> None:
    view = Listening()
    status = follow(client(head), submit(head, driver(tmp_path, 0.1)), view, on_stopping=lambda: None)
    assert status == "SUCCEEDED"
    assert view.kinds == ["run_started"]
    assert "a line of the log" in view.lines


def test_ctrl_c_stops_the_job_which_has_time_to_save(head: Head, tmp_path: Path) -> None:
    told: list[str] = []

    def interrupt(event: Event) -> None:
        if event.kind == "run_started":
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    before = signal.getsignal(signal.SIGINT)
    view = Listening(interrupt)
    status = follow(client(head), submit(head, driver(tmp_path, 120)), view, on_stopping=lambda: told.append("stopping"))
    assert told == ["stopping"]
    assert view.kinds == ["run_started", "run_finished"]
    assert status == "STOPPED"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stranger_without_the_token_is_refused(head: Head) -> None:
    with pytest.raises(JobError, match="asks for a token"):
        client(head.address).list_jobs()
