"""polyrl dashboard: the runs of a folder in a browser, live."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from infra.errors import UsageError

Runs = Annotated[Path, typer.Argument(metavar="[RUNS_DIR]", help="The folder of runs, or of one run.", envvar="POLYRL_RUNS_DIR")]


def register(app: typer.Typer) -> None:
    app.command("dashboard")(dashboard)


def dashboard(
    runs_dir: Runs = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs a token.")] = "127.0.0.1",
    token: Annotated[str, typer.Option(envvar="POLYRL_DASHBOARD_TOKEN", help="Asked of whoever opens the page.")] = "",
) -> None:
    """Look at runs in a browser: curves, comparison, timeline, events, every rollout. Read-only; live while a run goes.

    Example: polyrl dashboard runs --port 8080
    """
    from infra.dashboard.serving import listen, make_server  # FastAPI and DuckDB take a second

    if not runs_dir.is_dir():
        raise UsageError(f"there is no folder {str(runs_dir)!r}; name the folder of your runs: polyrl dashboard RUNS_DIR")
    try:
        listener = listen(host, port)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --port") from error
    with listener:
        try:
            server = make_server(runs_dir, listener, host=host, token=token)
        except ValueError as error:
            raise UsageError(str(error)) from error
        name = f"[{host}]" if ":" in host else host
        typer.echo(f"http://{name}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else ""))
        with suppress(KeyboardInterrupt):  # Ctrl-C is how one leaves it
            server.run(sockets=[listener])
