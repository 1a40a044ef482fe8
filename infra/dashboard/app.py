"""The routes. Each is thin: a request becomes a call of Feed, Rollouts or timeline, whose answer becomes JSON."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from infra.dashboard.feed import Feed
from infra.dashboard.guard import Guard
from infra.dashboard.library import Library
from infra.dashboard.live import fingerprint, ticks
from infra.dashboard.rollouts import Filter, TooSlow
from infra.dashboard.timeline import timeline
from infra.dashboard.tokens import token_view
from infra.strict_json import dumps
from infra.view import describe_event
from rl_core.ledger import read_balance
from rl_core.run_store import NoSuchRun

log = logging.getLogger(__name__)

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".txt": "text/plain"}

Names = Annotated[list[str], Query(max_length=400)]
Page = Annotated[int, Query(ge=0, le=10_000_000)]


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return dumps(content, separators=(",", ":")).encode("ascii")


def make_app(library: Library, *, host: str = "127.0.0.1", port: int, token: str = "") -> ASGIApp:
    """The whole dashboard, guarded. Raises ValueError where `host` needs a token."""
    app = FastAPI(title="polyrl dashboard", docs_url=None, redoc_url=None, openapi_url=None, default_response_class=Json)
    _serve_page(app)
    _serve_curves(app, library)
    _serve_questions(app, library)
    _serve_rollouts(app, library)
    _serve_ticks(app, library)
    _answer_errors(app)
    return Guard(app, host=host, port=port, token=token)


def _serve_page(app: FastAPI) -> None:
    """The files of static/, read once: no path of a request is ever opened."""
    files = dict(_static_files())

    def answer(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "there is no such file")
        return Response(files[name], media_type=TYPES[Path(name).suffix])

    @app.get("/")
    def index() -> Response:
        return answer("index.html")

    @app.get("/static/{name:path}")
    def static(name: str) -> Response:
        return answer(name)


def _serve_curves(app: FastAPI, library: Library) -> None:
    """Everything that comes from events."""

    def feed(run: str) -> Feed:
        return library.find(run).feed.refresh()

    @app.get("/api/runs")
    def runs() -> Any:
        return Json({"runs": library.overview(), "folder": str(library.runs_dir)})

    @app.get("/api/runs/{run}")
    def summary(run: str) -> Any:
        return Json(feed(run).summary())

    @app.get("/api/runs/{run}/series")
    def series(
        run: str,
        name: Names = [],  # noqa: B006 - FastAPI copies it
        points: Annotated[int, Query(ge=2, le=5000)] = 600,
        smooth: Annotated[int, Query(ge=1, le=1001)] = 1,
    ) -> Any:
        return Json(feed(run).series(name, points=points, smooth=smooth))

    @app.get("/api/runs/{run}/metrics")
    def metrics(run: str) -> Any:
        return Json(feed(run).metrics())

    @app.get("/api/runs/{run}/scores")
    def scores(run: str, env: Names = []) -> Any:  # noqa: B006
        return Json(feed(run).scores(env))

    @app.get("/api/runs/{run}/latest")
    def latest(run: str, metric: Names = [], window: Annotated[int, Query(ge=1, le=1000)] = 10) -> Any:  # noqa: B006
        known = feed(run)
        return Json({name: known.latest(name, window) for name in metric})

    @app.get("/api/runs/{run}/totals")
    def totals(run: str, metric: Names = []) -> Any:  # noqa: B006
        known = feed(run)
        return Json({name: known.totals(name) for name in metric})

    @app.get("/api/runs/{run}/histogram")
    def histogram(run: str, name: Names = [], bins: Annotated[int, Query(ge=2, le=200)] = 24, log: bool = False) -> Any:  # noqa: B006
        return Json(_histogram(feed(run), name, bins, log))

    @app.get("/api/runs/{run}/events")
    def events(run: str) -> Any:
        happened = feed(run).happened[-5000:]
        return Json([{"kind": e.kind, "time": e.time, "text": describe_event(e)} for e in happened])


def _serve_questions(app: FastAPI, library: Library) -> None:
    """What needs the ledger, or events and rollouts together."""

    @app.get("/api/runs/{run}/timeline")
    def time_line(run: str, start: float | None = None, end: float | None = None) -> Any:
        known = library.find(run)
        return Json(timeline(known.feed.refresh(), known.rollouts, start, end))

    @app.get("/api/runs/{run}/ledger")
    def ledger(run: str) -> Any:
        path = library.find(run).stored.run_dir / "ledger.sqlite"
        if not path.is_file():
            return Json([])
        names = ("env", "drawn", "open", "trained", "filtered", "abandoned", "passed", "restarted", "uses", "balanced", "reasons")
        return Json([{name: getattr(b, name) for name in names} for b in read_balance(path)])

    @app.get("/api/runs/{run}/staleness")
    def staleness(run: str) -> Any:
        return Json(library.find(run).rollouts.staleness())

    @app.get("/api/runs/{run}/band")
    def band(run: str, env: Names = []) -> Any:  # noqa: B006
        return Json(library.find(run).rollouts.band(env))


def _serve_rollouts(app: FastAPI, library: Library) -> None:
    """The inspector."""

    @app.get("/api/runs/{run}/facets")
    def facets(run: str) -> Any:
        return Json(library.find(run).rollouts.facets())

    @app.get("/api/runs/{run}/rollouts")
    def rollouts(
        run: str, env: str = "", label: str = "", status: str = "", state: str = "", difficulty: str = "", group: str = "",
        worker: str = "", text: Annotated[str, Query(max_length=2000)] = "",
        min_reward: float | None = None, max_reward: float | None = None, min_step: int | None = None, max_step: int | None = None,
        sort: str = "newest", offset: Page = 0, limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> Any:  # fmt: skip
        wanted = Filter(
            env=env, label=label, status=status, state=state, difficulty=difficulty, group=group, worker=worker, text=text,
            min_reward=min_reward, max_reward=max_reward, min_step=min_step, max_step=max_step,
        )  # fmt: skip
        return Json(library.find(run).rollouts.page(wanted, sort=sort, offset=offset, limit=limit))

    @app.get("/api/runs/{run}/rollout")
    def rollout(run: str, id: str, label: str = "") -> Any:
        known = library.find(run)
        row = known.rollouts.one(id, label)
        if row is None:
            raise HTTPException(404, "there is no rollout of that id in this run, or it is not written yet")
        row["tokens"] = token_view(known.stored, row)
        for name in ("prompt_ids", "token_ids", "logprobs", "versions", "forced"):
            row.pop(name, None)
        return Json(row)


def _serve_ticks(app: FastAPI, library: Library) -> None:
    @app.get("/api/stream")
    async def stream(request: Request, run: str = "") -> Response:
        folder = library.find(run).stored.run_dir if run else library.runs_dir
        body = ticks(lambda: fingerprint(folder), request.is_disconnected)
        return StreamingResponse(body, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


def _answer_errors(app: FastAPI) -> None:
    """Every error is one sentence: {"error": ...}."""

    def sentence(status: int) -> Callable[[Request, Exception], Response]:
        return lambda request, error: Json({"error": str(error)}, status_code=status)

    def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return Json({"error": str(error.detail)}, status_code=error.status_code)

    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return Json({"error": f"{first['loc'][-1]}: {first['msg']}"}, status_code=422)

    def broken(request: Request, error: Exception) -> Response:
        log.exception("a view could not be made", exc_info=error)
        return Json({"error": f"this could not be read: {type(error).__name__}; the dashboard's log says more"}, status_code=500)

    app.add_exception_handler(NoSuchRun, sentence(404))
    app.add_exception_handler(TooSlow, sentence(503))
    app.add_exception_handler(ValueError, sentence(422))
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, broken)


def _static_files() -> list[tuple[str, bytes]]:
    root = resources.files("infra.dashboard") / "static"
    found: list[tuple[str, bytes]] = []

    def walk(folder: Any, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif Path(entry.name).suffix in TYPES:
                found.append((prefix + entry.name, entry.read_bytes()))

    walk(root, "")
    return found


def _histogram(feed: Feed, names: list[str], bins: int, logarithmic: bool) -> dict[str, Any]:
    """Steps by the value of each metric, over common bins. With `logarithmic`, values of zero or less are counted apart."""
    columns = {name: values[~np.isnan(values)] for name, values in feed.columns(names).items() if name in names}
    used = {name: np.log10(v[v > 0]) if logarithmic else v for name, v in columns.items()}
    everything = np.concatenate([*used.values(), np.zeros(0)])
    if not len(everything):
        return {"edges": [], "counts": {}, "not_positive": {}}
    edges = np.histogram_bin_edges(everything, bins)
    return {
        "edges": [float(f"{e:.6g}") for e in (10**edges if logarithmic else edges)],
        "counts": {name: np.histogram(v, edges)[0].tolist() for name, v in used.items()},
        "not_positive": {name: int((v <= 0).sum()) for name, v in columns.items()} if logarithmic else {},
    }


__all__ = ["make_app"]
