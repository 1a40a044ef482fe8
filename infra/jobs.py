"""Runs as Ray jobs: submit, follow, stop; and a Ray head of our own where the user named no cluster.

    polyrl submit --> JobClient --> Ray head --> driver: polyrl run CONFIG
         ^                                          |
         +------ log lines, `@polyrl {event}` ------+

The driver prints one marked line per event (`infra.view.EventLines`); the follower draws the live view from them. Nothing else
passes between the two, so any way of reading a job's log can follow a run.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UsageError
from infra.ray_cluster import LOGICAL_CPUS, OBJECT_STORE_BYTES
from infra.view import View, parse_line

if TYPE_CHECKING:
    import psutil
    from ray.job_submission import JobSubmissionClient

HEAD_START_S = 90.0
"""Longest start of a Ray head with its dashboard; usually 5 to 15 seconds."""

STOP_WAIT_S = 180
"""How long Ray waits for a stopped driver to end its step and save, before it kills it. Ray's own default is 3."""

EXCLUDES = ["/.venv/", "/.git/", "/runs/", "/build/", "/dist/", "**/__pycache__/", "/.mypy_cache/", "/.ruff_cache/", "/.pytest_cache/"]
"""What of the checkout a job does not need."""


DRIVER_ENVIRONMENT = {"POLYRL_EVENTS": "stdout", "PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}


class JobError(UsageError):
    """A job or its cluster is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A Ray head on this machine that polyrl started."""

    pid: int  # of `ray start --block`, which ends all of its processes when it is told to end
    address: str  # of the job API, http://127.0.0.1:port
    folder: str  # Ray's temporary files, and the token that its job API asks for; nobody else may enter it

    @property
    def token_path(self) -> Path:
        return Path(self.folder) / "token"

    @property
    def headers(self) -> dict[str, str]:
        """What a request to its job API must carry."""
        return {"Authorization": f"Bearer {self.token_path.read_text(encoding='utf-8')}"}

    def save(self, path: Path) -> None:
        """Leave a note, so that `polyrl jobs|logs|stop` in another terminal find it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"pid": self.pid, "address": self.address, "folder": self.folder}), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Head | None:
        """The head that the note names, if it still runs."""
        try:
            head = Head(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return head if _runs(head) else None


def head_note(runs_dir: Path) -> Path:
    """Where the note about the local head lies."""
    return runs_dir / ".ray-head.json"


def start_head(*, dies_with_us: bool) -> Head:
    """Start a Ray head with free ports and a temporary folder of its own. `dies_with_us`: also if this process is killed.

    A job API runs whatever it is sent, and other users of the machine reach its port: the head gets a token of its own.
    """
    folder = tempfile.mkdtemp(prefix="polyrl-ray-")  # short: Ray puts Unix sockets below it, whose paths may have 107 bytes
    token_path = Path(folder, "token")
    token_path.write_text(secrets.token_hex(32), encoding="utf-8")
    ports = free_ports(5)
    command = [
        _beside_python("ray"), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
        f"--port={ports[0]}", "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}",
        f"--dashboard-agent-listen-port={ports[2]}", f"--ray-client-server-port={ports[3]}", f"--metrics-export-port={ports[4]}",
        f"--num-cpus={LOGICAL_CPUS}", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}",
    ]  # fmt: skip
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # jobs find the `polyrl` of this environment
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
    }
    environment.pop("RAY_ADDRESS", None)
    log_path = Path(folder) / "head.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
            preexec_fn=_end_with_parent if dies_with_us else None,
        )  # fmt: skip
    head = Head(pid=process.pid, address=f"http://127.0.0.1:{ports[1]}", folder=folder)
    try:
        _await_head(process, head, log_path)
    except BaseException:
        stop_head(head)
        raise
    return head


def stop_head(head: Head) -> None:
    """End exactly the processes of this head, and remove its folder."""
    import psutil

    for process in (family := _family(head)):
        if process.pid == head.pid:
            process.terminate()  # it ends the others in their order
    psutil.wait_procs(family, timeout=20)
    _reap(head.pid)
    left = _family(head)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=5)
    shutil.rmtree(head.folder, ignore_errors=True)


def _family(head: Head) -> list[psutil.Process]:
    """The processes of this head, also those whose parent has gone: they are in the session that it leads, or name its folder."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == head.pid or any(head.folder in part for part in process.cmdline()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [p for p in found if p.pid != os.getpid()]


def client(address: str | Head) -> JobSubmissionClient:
    """A client of the job API of a cluster, or of our own head. Raises JobError if nothing answers."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    headers = address.headers if isinstance(address, Head) else None
    address = address.address if isinstance(address, Head) else address
    try:
        made = JobSubmissionClient(address, headers=headers)
    except AuthenticationError as error:
        raise JobError(f"the cluster at {address} asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise JobError(f"no Ray job API answers at {address} ({reason}); give the dashboard's address, such as http://HOST:8265") from error
    logging.getLogger("ray").setLevel(logging.ERROR)  # the client turned it up: it would list every ignored file of an upload
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job to be: `polyrl run config overrides...` within `working_dir`."""

    working_dir: Path
    config: Path
    overrides: tuple[str, ...]
    local: bool  # the cluster is this machine: paths mean the same there
    run_id: str = ""  # "" is a new run
    plugins: tuple[Path, ...] = ()  # package folders and wheels that travel beside the checkout

    @property
    def entrypoint(self) -> str:
        inside = self.config.is_relative_to(self.working_dir)
        if not inside and not self.local:
            raise JobError(f"{self.config} lies outside {self.working_dir}, which is all that a remote job gets; move it into that folder")
        config = self.config.relative_to(self.working_dir) if inside else self.config
        name = ["--run", self.run_id] if self.run_id else []
        return shlex.join(["exec", "polyrl", "run", str(config), *self.overrides, *name])

    @property
    def runtime_env(self) -> dict[str, Any]:
        """What the job brings along. The checkout comes before whatever the cluster has installed under the same names."""
        modules = {"py_modules": [str(path) for path in self.plugins]} if self.plugins else {}
        return {"working_dir": str(self.working_dir), "excludes": EXCLUDES, "env_vars": DRIVER_ENVIRONMENT, **modules}

    @property
    def metadata(self) -> dict[str, str]:
        """What a list of jobs says of it."""
        return {"config": self.config.name, "commit": commit_of(self.working_dir), "run": self.run_id}

    def send(self, to: JobSubmissionClient) -> str:
        """Returns the job's id. Waits for a cluster that has just started: its API answers before it can run anything."""
        deadline = time.monotonic() + HEAD_START_S
        while True:
            try:
                return str(to.submit_job(entrypoint=self.entrypoint, runtime_env=self.runtime_env, metadata=self.metadata))
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise JobError(f"the cluster took no job: {' '.join(str(error).split())}") from error
                time.sleep(1)


def project_of(config: Path) -> Path:
    """The folder that a job of this config needs: the nearest one above it with a pyproject.toml or .git, else its own."""
    for folder in config.absolute().parents:
        if (folder / "pyproject.toml").is_file() or (folder / ".git").exists():
            return folder
    return config.absolute().parent


def commit_of(folder: Path) -> str:
    """The checked-out commit, "+" if files differ from it, or "" outside of git."""
    try:
        commit = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(["git", "-C", str(folder), "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit.stdout.strip()[:12] + ("+" if status.stdout.strip() else "")


def follow(to: JobSubmissionClient, job: str, view: View, *, on_stopping: Callable[[], None]) -> str:
    """Show a job's log until it ends; returns its final status, SUCCEEDED, FAILED or STOPPED.

    Ctrl-C or SIGTERM asks the job to stop and follows on until it has: its step ends and is saved. A second one raises KeyboardInterrupt.
    """
    stopping = False

    def on_interrupt(_signal: int, _frame: Any) -> None:
        nonlocal stopping
        if stopping:
            raise KeyboardInterrupt
        stopping = True
        on_stopping()
        request_stop(to, job)

    previous = {number: signal.signal(number, on_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(tail(to, job, view))
        return await_end(to, job)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def request_stop(to: JobSubmissionClient, job: str) -> None:
    """Ask Ray to stop a job, from a thread: a signal handler must not wait for the network."""
    import threading

    threading.Thread(target=to.stop_job, args=(job,), daemon=True).start()


def await_end(to: JobSubmissionClient, job: str) -> str:
    """The final status of a job whose log has ended."""
    deadline = time.monotonic() + STOP_WAIT_S + 30
    while not (status := to.get_job_status(job)).is_terminal():
        if time.monotonic() > deadline:
            raise JobError(f"job {job} is still {status} long after its log ended; see `polyrl logs {job}`")
        time.sleep(0.5)
    return str(status.value)


async def tail(to: JobSubmissionClient, job: str, view: View) -> None:
    """Feed the view from the job's log; pieces of the log are not whole lines."""
    rest = ""
    async for piece in to.tail_job_logs(job):
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            show_line(view, line)
    if rest:
        show_line(view, rest)


def show_line(view: View, line: str) -> None:
    """An event to the view, anything else as a log line."""
    event = parse_line(line)
    if event is not None:
        view.emit(event)
    elif line.strip():
        view.log(line)


def free_ports(count: int) -> Sequence[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def _await_head(process: subprocess.Popen[bytes], head: Head, log_path: Path) -> None:
    """Return once the job API answers and an agent can start drivers."""
    import urllib.request

    deadline = time.monotonic() + HEAD_START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise JobError(f"Ray did not start: {_last_lines(log_path)}")
        try:
            request = urllib.request.Request(f"{head.address}/api/jobs/", headers=head.headers)
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise JobError(f"Ray's job API did not answer within {HEAD_START_S:.0f} s: {_last_lines(log_path)}")


def _last_lines(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:]) or "it said nothing"


def _end_with_parent() -> None:
    """Runs in the child, before Ray: SIGTERM when the process that follows the job is gone, however it went."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _runs(head: Head) -> bool:
    """Whether this very process is a Ray head: pids are used again."""
    import psutil

    try:
        return head.folder in " ".join(psutil.Process(head.pid).cmdline())
    except psutil.Error:
        return False


def _reap(pid: int) -> None:
    """Collect the exit status if the head was our child."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def _beside_python(name: str) -> str:
    """A command of the Python environment that runs us, whether or not it is activated."""
    path = Path(sys.executable).parent / name
    return str(path) if path.is_file() else name


def is_local(address: str | Head) -> bool:
    """Whether a job API is on this machine, so that paths mean the same to the job as to us."""
    from urllib.parse import urlsplit

    return isinstance(address, Head) or (urlsplit(address).hostname or address) in ("127.0.0.1", "localhost", "::1", "auto")
