"""polyrl jobs, logs, stop: what goes on in a cluster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.common import Json, RunsDir, print_json
from infra.errors import UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

Address = Annotated[
    str | None,
    typer.Option(envvar="RAY_ADDRESS", help="Ray's job API, http://HOST:8265. Without it, the head that `polyrl submit` started."),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, a unique part of it, or latest.")]


def register(app: typer.Typer) -> None:
    app.command("jobs")(jobs)
    app.command("logs")(logs)
    app.command("stop")(stop)


def jobs(address: Address = None, runs_dir: RunsDir = Path("runs"), json: Json = False) -> None:
    """List the cluster's polyrl jobs."""
    rows = [
        {
            "job": job.submission_id,
            "status": job.status.value,
            "run": (job.metadata or {}).get("run", ""),
            "config": (job.metadata or {}).get("config", ""),
            "commit": (job.metadata or {}).get("commit", ""),
            "started": (job.start_time or 0) / 1000,
            "entrypoint": job.entrypoint,
        }
        for job in sorted(_client(address, runs_dir).list_jobs(), key=lambda job: job.start_time or 0)
        if job.submission_id
    ]
    if json:
        print_json(rows)
        return
    for row in rows:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["started"]))
        typer.echo(f"{row['job']}  {row['status']:<10} {started}  {row['config']:<20} {row['commit']}  {row['run']}".rstrip())
    if not rows:
        typer.echo("no jobs")


def logs(
    job: Job = "latest",
    address: Address = None,
    runs_dir: RunsDir = Path("runs"),
    follow: Annotated[bool, typer.Option("--follow/--no-follow", "-f", help="Stay until the job ends. Ctrl-C leaves it running.")] = False,
) -> None:
    """Print a job's log, events as plain lines; with --follow, draw it live."""
    from infra.jobs import show_line, tail
    from infra.view import PlainView, make_view

    client = _client(address, runs_dir)
    name = _find(client, job)
    if follow:
        import asyncio

        view = make_view()
        try:
            asyncio.run(tail(client, name, view))
        finally:
            view.close()
        return
    from rich.console import Console

    plain = PlainView(Console(highlight=False))
    for line in client.get_job_logs(name).splitlines():
        show_line(plain, line)


def stop(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Id of a job, a unique part of it, or latest.")] = None,
    address: Address = None,
    runs_dir: RunsDir = Path("runs"),
    head: Annotated[bool, typer.Option("--head", help="Also end the Ray head that `polyrl submit --no-follow` started here.")] = False,
) -> None:
    """Stop a job: its current step ends and is saved."""
    from infra.jobs import Head, await_end, head_note, stop_head

    if job is None and not head:
        raise UsageError("nothing to stop: name a job (see `polyrl jobs`), or give --head to end the local Ray head")
    if job is not None:
        client = _client(address, runs_dir)
        name = _find(client, job)
        client.stop_job(name)
        typer.echo(f"{name}: {await_end(client, name).lower()}")
    if head:
        note = head_note(runs_dir)
        running = Head.load(note)
        if running is None:
            raise UsageError(f"no Ray head of ours runs here (looked into {str(note)!r})")
        stop_head(running)
        note.unlink(missing_ok=True)
        typer.echo("the local Ray head has ended")


def _client(address: str | None, runs_dir: Path) -> JobSubmissionClient:
    """Of the named cluster, or of our own head on this machine."""
    from infra.jobs import Head, client, head_note

    cluster = address or Head.load(head_note(runs_dir))
    if cluster is None:
        raise UsageError("no cluster: give --address http://HOST:8265 or set RAY_ADDRESS; no head that `polyrl submit` started runs here")
    return client(cluster)


def _find(client: JobSubmissionClient, name: str) -> str:
    """The id of one job."""
    known = [str(job.submission_id) for job in sorted(client.list_jobs(), key=lambda job: job.start_time or 0) if job.submission_id]
    if name == "latest" and known:
        return known[-1]
    matches = [j for j in known if j == name] or [j for j in known if name in j]
    if len(matches) != 1:
        raise UsageError(f"{'several jobs match' if matches else 'no job'} {name!r}; known: {', '.join(matches or known) or 'none'}")
    return matches[0]
