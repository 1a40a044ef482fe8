"""A dashboard in this process: for the command, for tests and for the script that takes its pictures."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from infra.dashboard.app import make_app
from infra.dashboard.library import Library

START_SECONDS = 30.0

READ_AHEAD_SECONDS = 1.0
"""A server is ready at the latest so long after its start, whether the newest run has been read or not."""


def listen(host: str, port: int) -> socket.socket:
    """The port is taken before anything else is made, so that it is known, and free. Raises OSError."""
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def make_server(runs_dir: Path, listener: socket.socket, *, host: str, token: str = "") -> uvicorn.Server:
    """Raises ValueError where `host` needs a token."""
    library = Library(runs_dir.absolute())
    page = make_app(library, host=host, port=listener.getsockname()[1], token=token)
    library.read_ahead(READ_AHEAD_SECONDS)
    config = uvicorn.Config(page, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1)
    return uvicorn.Server(config)


@contextmanager
def serving(runs_dir: Path, *, token: str = "") -> Iterator[str]:
    """A dashboard on loopback in a thread of this process; its address, with a slash at the end."""
    with listen("127.0.0.1", 0) as listener:
        server = make_server(runs_dir, listener, host="127.0.0.1", token=token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="dashboard", daemon=True)
        thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the dashboard did not start")
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


__all__ = ["listen", "make_server", "serving"]
