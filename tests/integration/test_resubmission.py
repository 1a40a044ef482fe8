"""A Ray cluster that is not ours, beside whatever else runs: submit, follow, stop, submit again, through `polyrl` and through `ray job`.

The quick test has a stand-in for the driver on the cluster's PATH, since what is tested is the way there and back; it takes longer to
save than Ray waits by default, and both sets of commands work on the same run. POLYRL_LONG_TESTS=1 does it with real runs, one for each
set, each stopped and submitted again twice (some minutes).
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from infra.cli.main import app
from infra.errors import UsageError
from infra.jobs import Head, Submission, free_ports, stop_head
from rl_core.ledger import read_balance
from rl_core.run_store import StoredRun

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STEPS = 48
"""Enough that `ray job stop`, which takes seconds to start, finds the run under way."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STAND_IN = """#!{python}
import os, signal, sys, time
from pathlib import Path
assert sys.argv[1] == "run" and Path(sys.argv[2]).is_file(), sys.argv  # the job's folder holds the config
folder = Path(dict(a.split("=", 1) for a in sys.argv if "=" in a)["runs_dir"], sys.argv[sys.argv.index("--run") + 1])
folder.mkdir(parents=True, exist_ok=True)
saved = folder / "saved"
before = int(saved.read_text()) if saved.exists() else 0
import word_sums_elsewhere  # the plugin that travels beside the checkout
print("goes on after", before, "code", Path("marker").read_text(), flush=True)

def stop(*_):
    time.sleep(3.5)  # longer than Ray's own patience of 3 s
    saved.write_text(str(before + 1))
    sys.exit(1)

signal.signal(signal.SIGTERM, stop)
time.sleep(600)
"""

CONFIG = f"""
name: jobs
model: {{path: {ROOT}/configs/models/seed}}
environments:
  math: {{max_tokens: 64, max_total_tokens: 128, options: {{digits: 3, kinds: [add, sub, chain], terms: 5}}}}
loop: {{steps: {STEPS}, groups_per_step: 6, max_staleness: 1}}
rollout: {{max_num_seqs: 32, max_model_len: 256, speculative_tokens: 2}}
eval: {{tasks: 8}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the job API of a head that was started with the plain command: few CPUs, ports and files of its own."""
    import tempfile

    folder = tempfile.mkdtemp(prefix="ray-2nd-")  # short: Unix sockets lie below it
    path = tmp_path_factory.mktemp("bin")
    if not long():
        (path / "polyrl").write_text(STAND_IN.format(python=sys.executable))
        (path / "polyrl").chmod(0o755)
    token = path / "token"
    token.write_text(secrets.token_hex(32))  # a job API runs whatever it is sent: this one hears only us
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    ports = free_ports(5)
    environment = clean() | {"PATH": f"{path}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=4", "--node-ip-address=127.0.0.1",
         f"--port={ports[0]}", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}",
         f"--ray-client-server-port={ports[3]}", f"--metrics-export-port={ports[4]}", "--object-store-memory=268435456",
         f"--temp-dir={folder}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    head = Head(pid=process.pid, address=f"http://127.0.0.1:{ports[1]}", folder=folder)
    try:
        await_true(lambda: answers(head.address, token), 120, "Ray's job API answers")
        yield head.address
        family = psutil.Process(head.pid).children(recursive=True)
    finally:
        stop_head(head)
        patch.undo()
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "Ray processes outlived their head"


def long() -> bool:
    return os.environ.get("POLYRL_LONG_TESTS") == "1"


def clean() -> dict[str, str]:
    """Our environment, without the address of any other cluster."""
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"COLUMNS": "200"}


def answers(head: str, token: Path) -> bool:
    request = urllib.request.Request(f"{head}/api/jobs/", headers={"Authorization": f"Bearer {token.read_text()}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def await_true(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s: {what}"
        time.sleep(0.25)


def called(*words: object) -> str:
    """Standard output of a command that must end well."""
    done = subprocess.run([*map(str, words)], env=clean(), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is submitted: the same each time."""

    project: Path
    runs_dir: Path
    run_id: str
    plugin: Path | None


class Way(Protocol):
    """One set of commands."""

    def submit(self, request: Request) -> str:
        """Returns the job's id."""

    def status(self, job: str) -> str: ...
    def log(self, job: str) -> str: ...
    def follow(self, job: str) -> list[str]:
        """The command that shows the log until the job ends."""

    def stop(self, job: str) -> None: ...


class Polyrl:
    """polyrl submit | jobs | logs | stop. A process each: Ray reads the mode of authentication once in a process."""

    def __init__(self, address: str) -> None:
        self._at = ("--address", address)

    def _call(self, *words: object) -> str:
        return called(sys.executable, "-c", "from infra.cli import main; main()", *words, *self._at)

    def submit(self, request: Request) -> str:
        plugin = ("--plugin", request.plugin) if request.plugin else ()
        config, runs = request.project / "jobs.yaml", f"runs_dir={request.runs_dir}"
        return self._call("submit", config, runs, "--run", request.run_id, "--no-follow", *plugin).splitlines()[0]

    def status(self, job: str) -> str:
        (row,) = (row for row in json.loads(self._call("jobs", "--json")) if row["job"] == job)
        return str(row["status"])

    def log(self, job: str) -> str:
        return self._call("logs", job)

    def follow(self, job: str) -> list[str]:
        return [sys.executable, "-c", "from infra.cli import main; main()", "logs", "-f", job, *self._at]

    def stop(self, job: str) -> None:
        assert f"{job}: stopped" in self._call("stop", job)


class RayJob:
    """ray job submit | status | logs | stop."""

    def __init__(self, address: str) -> None:
        self._at = ("--address", address)

    def _call(self, verb: str, *words: object) -> str:
        return called(BIN / "ray", "job", verb, *self._at, *words)

    def submit(self, request: Request) -> str:
        job = f"{request.run_id}-{time.time_ns()}"
        environment = yaml.safe_load((ROOT / "infra/ray_job.yaml").read_text(encoding="utf-8"))
        if request.plugin:
            environment["py_modules"] = [str(request.plugin)]
        self._call(
            "submit", "--no-wait", "--submission-id", job, "--working-dir", request.project, "--runtime-env-json", json.dumps(environment),
            "--", "polyrl", "run", "jobs.yaml", f"runs_dir={request.runs_dir}", "--run", request.run_id,
        )  # fmt: skip
        return job

    def status(self, job: str) -> str:
        said = self._call("status", job)
        return next(word for word in ("SUCCEEDED", "STOPPED", "FAILED", "RUNNING", "PENDING") if word in said or word.lower() in said)

    def log(self, job: str) -> str:
        return self._call("logs", job)

    def follow(self, job: str) -> list[str]:
        return [str(BIN / "ray"), "job", "logs", "--follow", *self._at, job]

    def stop(self, job: str) -> None:
        self._call("stop", job)


def ended(way: Way, job: str) -> str:
    await_true(lambda: way.status(job) not in ("PENDING", "RUNNING"), 300, f"job {job} ends")
    return way.status(job)


def seen(way: Way, job: str, *, until: Callable[[str], bool], folder: Path) -> None:
    """Follow a job with the way's own command until its output holds something; the job goes on."""
    log = folder / f"{job}.log"
    with log.open("wb") as file:
        follower = psutil.Popen(way.follow(job), env=clean(), cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        await_true(lambda: until(log.read_text(errors="replace")) or follower.poll() is not None, 300, f"job {job} shows it")
        assert until(log.read_text(errors="replace")), log.read_text(errors="replace")
    finally:
        for process in [*follower.children(recursive=True), follower]:
            process.kill()
        follower.wait()


WAYS = {"polyrl": Polyrl, "ray job": RayJob}


@pytest.mark.skipif(long(), reason="the real one runs instead")
def test_jobs_are_submitted_stopped_with_time_to_save_and_submitted_again_by_either_command(cluster: str, tmp_path: Path) -> None:
    ours, plain = Polyrl(cluster), RayJob(cluster)
    project, plugin = tmp_path / "project", tmp_path / "word_sums_elsewhere"
    project.mkdir()
    (project / "jobs.yaml").write_text(CONFIG)
    (project / "marker").write_text("of the checkout")
    plugin.mkdir()
    (plugin / "__init__.py").write_text("")
    request = Request(project=project, runs_dir=tmp_path / "runs", run_id="same", plugin=plugin)
    saved = request.runs_dir / request.run_id / "saved"

    first = ours.submit(request)
    seen(ours, first, until=lambda text: "goes on after 0 code of the checkout" in text, folder=tmp_path)
    plain.stop(first)
    assert plain.status(first) == "STOPPED"
    assert saved.read_text() == "1"

    second = plain.submit(request)
    seen(plain, second, until=lambda text: "goes on after 1 code of the checkout" in text, folder=tmp_path)
    assert "goes on after 1" in ours.log(second)
    ours.stop(second)
    assert ours.status(second) == "STOPPED"
    assert saved.read_text() == "2"


@pytest.mark.skipif(not long(), reason="POLYRL_LONG_TESTS=1 does it: six engine starts")
@pytest.mark.parametrize("name", WAYS)
def test_a_run_is_stopped_and_submitted_again_twice(name: str, cluster: str, tmp_path: Path) -> None:
    way: Way = WAYS[name](cluster)
    (tmp_path / "jobs.yaml").write_text(CONFIG)
    request = Request(project=tmp_path, runs_dir=tmp_path / "runs", run_id=name.replace(" ", "-"), plugin=None)
    run = StoredRun(request.runs_dir / request.run_id)

    def steps() -> list[int]:
        return [int(event.data["version"]) for event in run.events() if event.kind == "step"] if run.run_dir.is_dir() else []

    for round_ in (1, 2):
        before = len(steps())
        job = way.submit(request)
        seen(way, job, until=lambda _, before=before: len(steps()) > before, folder=tmp_path)  # type: ignore[misc]
        assert way.status(job) == "RUNNING"
        way.stop(job)
        assert ended(way, job) == "STOPPED"
        done = steps()
        print(f"{name}, round {round_}: stopped after step {done[-1]} of {STEPS}")
        assert before < len(done) < STEPS
        assert run.state == "stopped"
        assert (run.run_dir / "checkpoints" / f"step-{done[-1]:06d}").is_dir()

    job = way.submit(request)
    assert ended(way, job) == "SUCCEEDED", way.log(job)[-3000:]
    assert f"resumed after step {done[-1]}" in way.log(job)
    assert run.state == "finished"
    assert steps() == list(range(1, STEPS + 1))
    assert all(balance.balanced for balance in read_balance(run.run_dir / "ledger.sqlite"))

    once_more = way.submit(request)  # as a cluster does that starts a job again: nothing is left to do
    assert ended(way, once_more) == "SUCCEEDED"
    assert "has finished" in way.log(once_more)


def test_the_runtime_environment_for_plain_ray_is_that_of_our_own_jobs() -> None:
    ours = Submission(working_dir=ROOT, config=ROOT / "configs/quickstart.yaml", overrides=(), local=True).runtime_env
    theirs = yaml.safe_load((ROOT / "infra/ray_job.yaml").read_text(encoding="utf-8"))
    assert {key: value for key, value in ours.items() if key != "working_dir"} == theirs


def test_resume_is_what_a_named_run_does(tmp_path: Path) -> None:
    """`polyrl resume` refuses what `polyrl run --run` refuses: another config under the same name."""
    from tests.unit.stored_runs import store_run

    run = store_run(tmp_path / "runs" / "named", finished=False)
    (run / "config.yaml").write_text(CONFIG)
    (tmp_path / "jobs.yaml").write_text(CONFIG)
    for words in (["resume", "named", "--runs-dir", str(tmp_path / "runs")], ["run", str(tmp_path / "jobs.yaml"), "--run", "named"]):
        override = ["loop.max_staleness=2", *([f"runs_dir={tmp_path}/runs"] if words[0] == "run" else [])]
        done = CliRunner().invoke(app, [*words[:2], *override, *words[2:]])
        assert "loop.max_staleness was 1 and cannot become 2 in the same run" in str(done.exception)
        assert isinstance(done.exception, UsageError)
