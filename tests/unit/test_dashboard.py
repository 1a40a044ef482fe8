from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

import infra.dashboard
from infra.cli.main import app as cli
from infra.dashboard.app import make_app
from infra.dashboard.feed import Feed, moving_mean
from infra.dashboard.guard import Guard
from infra.dashboard.library import Library
from infra.dashboard.live import fingerprint, ticks
from infra.dashboard.rollouts import Filter, Rollouts, busy
from infra.errors import UsageError
from rl_core.events import Event
from rl_core.ledger import Ledger
from rl_core.run_store import RunStore, StoredRun
from rl_core.types import Task
from tests.unit.dashboards import HOSTILE, HOSTILE_RUN, LARGE_RUN, hostile_run, large_run
from tests.unit.stored_runs import events, group, store_run

STATIC = Path(infra.dashboard.__file__).parent / "static"


def client(runs_dir: Path, *, host: str = "127.0.0.1", token: str = "") -> TestClient:
    page = make_app(Library(runs_dir), host=host, port=8080, token=token)
    return TestClient(page, base_url="http://127.0.0.1:8080", follow_redirects=False, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    store_run(folder / "demo", groups=tuple(group(f"g00000{i}", "math" if i % 2 else "code", (1.0, 0.0, None)) for i in range(6)))
    hostile_run(folder)
    return folder


@pytest.fixture(scope="module")
def page(runs_dir: Path) -> Iterator[TestClient]:
    with client(runs_dir) as found:
        yield found


def error(response: httpx.Response) -> str:
    return str(response.json()["error"])


# Who may read.


def test_loopback_needs_no_token_and_anything_else_does(tmp_path: Path) -> None:
    assert client(tmp_path).get("/").status_code == 200
    with pytest.raises(ValueError, match="give a token"):
        make_app(Library(tmp_path), host="0.0.0.0", port=8080)
    with pytest.raises(ValueError, match="give a token"):
        make_app(Library(tmp_path), host="10.0.0.7", port=8080)


def test_the_command_says_in_a_sentence_what_is_wrong(tmp_path: Path) -> None:
    for arguments, words in (([str(tmp_path), "--host", "0.0.0.0", "--port", "0"], "token"), ([str(tmp_path / "none")], "no folder")):
        result = CliRunner().invoke(cli, ["dashboard", *arguments])
        assert isinstance(result.exception, UsageError)
        assert words in str(result.exception)


def test_the_first_link_is_answered_with_a_cookie_and_the_link_without_its_token(tmp_path: Path) -> None:
    page = client(tmp_path, token="sesame")
    assert page.get("/api/runs").status_code == 401
    assert page.get("/?token=wrong").status_code == 401
    first = page.get("/?token=sesame&a=1")
    assert (first.status_code, first.headers["location"]) == (303, "/?a=1")
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()
    assert "sesame" not in cookie
    assert page.get("/api/runs").status_code == 200  # the client sends the cookie back


def test_a_token_may_come_as_a_bearer_and_never_as_a_cookie_of_itself(tmp_path: Path) -> None:
    page = client(tmp_path, token="sesame")
    assert page.get("/api/runs", headers={"authorization": "Bearer sesame"}).status_code == 200
    assert page.get("/api/runs", headers={"authorization": "Bearer sesam"}).status_code == 401
    assert page.get("/api/runs", headers={"cookie": "polyrl-8080=sesame"}).status_code == 401
    assert page.get("/api/runs", headers={"authorization": "Bearer é".encode("latin-1")}).status_code == 401


@pytest.mark.parametrize("path", ["//elsewhere.example", "/%5C%5Celsewhere.example", "/%2F%2Felsewhere.example"])
def test_the_redirect_stays_on_this_host(tmp_path: Path, path: str) -> None:
    location = client(tmp_path, token="t").get(f"http://127.0.0.1:8080{path}?token=t").headers["location"]
    assert re.match(r"/[^/\\]", location), location


def test_the_command_prints_its_address_serves_there_and_leaves_quietly(tmp_path: Path) -> None:
    program = "from infra.cli.main import main; main()"
    command = [sys.executable, "-c", program, "dashboard", str(tmp_path), "--port", "0", "--token", "sesame"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=sesame", address)
            with httpx.Client(follow_redirects=True, timeout=60) as browser:
                assert "<title>polyrl</title>" in browser.get(address).text
            process.send_signal(signal.SIGINT)
            _, complaints = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, complaints) == (0, "")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.9", "", "localhost.evil.example:8080"])
def test_a_foreign_host_header_is_refused_on_loopback(page: TestClient, host: str) -> None:
    assert page.get("/api/runs", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:8080", "[::1]:8080", "LOCALHOST"])
def test_our_own_names_are_let_in(page: TestClient, host: str) -> None:
    assert page.get("/api/runs", headers={"host": host}).status_code == 200


def test_bound_to_all_addresses_a_name_of_others_is_refused_though_the_token_is_right(tmp_path: Path) -> None:
    page = client(tmp_path, host="0.0.0.0", token="t")
    right = {"authorization": "Bearer t"}
    assert page.get("/api/runs", headers=right | {"host": "192.168.1.5:8080"}).status_code == 200
    assert page.get("/api/runs", headers=right | {"host": "evil.example"}).status_code == 421


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_reads(page: TestClient, method: str) -> None:
    assert page.request(method, "/api/runs").status_code == 405


def test_every_answer_forbids_inline_and_foreign_scripts(page: TestClient) -> None:
    for path in ("/", "/static/app.js", "/api/runs", "/api/runs/none", "/nowhere"):
        policy = page.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
    assert page.get("/", headers={"host": "evil.example"}).headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd", "/static/%2Fetc%2Fpasswd", "/static/",
        "/api/runs/..", "/api/runs/%2e%2e", "/api/runs/..%2f..%2fetc", "/api/runs/demo%2f..%2fdemo", "/api/runs/%00", "/api/runs/latest",
        "/api/stream?run=../demo", "/docs", "/openapi.json",
    ],
)  # fmt: skip
def test_no_path_of_a_request_reaches_the_file_system(page: TestClient, path: str) -> None:
    assert page.get(path).status_code == 404


# What it answers.


def test_the_list_of_runs_has_their_scores_and_states(page: TestClient) -> None:
    rows = {row["run"]: row for row in page.get("/api/runs").json()["runs"]}
    assert set(rows) == {"demo", HOSTILE_RUN}
    assert (rows["demo"]["state"], rows["demo"]["step"], rows["demo"]["steps"]) == ("finished", 4, 4)
    math = rows["demo"]["environments"][0]
    assert (math["name"], math["before"]["pass_rate"], math["after"]["pass_rate"]) == ("math", 0.3, 0.8)


def test_an_unknown_run_or_rollout_is_one_sentence(page: TestClient) -> None:
    unknown = page.get("/api/runs/none/series")
    assert unknown.status_code == 404
    assert "no run of that name" in error(unknown)
    assert "no rollout of that id" in error(page.get("/api/runs/demo/rollout?id=none"))
    assert "limit" in error(page.get("/api/runs/demo/rollouts?limit=100000"))
    assert "sort" in error(page.get("/api/runs/demo/rollouts?sort=1;drop table"))


def test_curves_are_columns_with_null_where_a_step_has_no_value(page: TestClient) -> None:
    series = page.get("/api/runs/demo/series", params={"name": ["env/code/reward", "env/math/reward", "none"], "smooth": 3}).json()
    assert series["steps"] == [1, 2, 3, 4]
    assert series["values"]["env/code/reward"] == [0.2, None, 0.2, 0.2]
    assert series["smooth"]["env/math/reward"] == pytest.approx([0.45, 0.5, 0.6, 0.65])
    assert "none" not in series["values"]


def test_many_steps_are_thinned_to_the_means_of_bins(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for version in range(1, 1001):
        store.emit(
            Event(kind="step", data={"version": version, "metrics": {"learner/loss": float(version), "learner/trained_tokens": 2.0}})
        )
    store.close()
    series = Feed(StoredRun(tmp_path)).refresh().series(["learner/loss"], points=100)
    assert series["steps"] == list(range(10, 1001, 10))
    assert series["values"]["learner/loss"] == [step - 4.5 for step in series["steps"]]
    assert series["tokens"] == [2 * step for step in series["steps"]]


def test_a_feed_reads_on_from_where_it_was_and_leaves_half_a_line(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for event in events(finished=False):
        store.emit(event)
    feed = Feed(StoredRun(tmp_path)).refresh()
    before = feed.summary()["step"]
    line = Event(kind="step", data={"version": 5, "metrics": {"env/math/reward": float("nan"), "learner/new": 7.0}}).to_json()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(line[:20])
        file.flush()
        assert feed.refresh().summary()["step"] == before
        file.write(line[20:] + "\n")
    columns = feed.refresh().columns(["learner/new", "env/math/reward"])
    assert columns["version"].tolist() == [1, 2, 3, 4, 5]
    assert columns["learner/new"].tolist()[4] == 7.0
    assert np.isnan(columns["learner/new"][:4]).all()
    assert feed.summary()["state"] == "running"
    store.close()
    assert feed.refresh().summary()["state"] == "killed"


def test_the_newest_run_is_read_before_anybody_asks(tmp_path: Path) -> None:
    store_run(tmp_path / "old")
    store_run(tmp_path / "new")
    library = Library(tmp_path)
    library.read_ahead(60.0)
    assert (library.find("new").feed.state.version, library.find("old").feed.state.version) == (4, 0)
    Library(tmp_path / "none").read_ahead(60.0)


def test_steps_that_a_resumed_run_takes_again_replace_those_before(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for version, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0)):
        store.emit(Event(kind="step", data={"version": version, "metrics": {"learner/loss": value}}))
    store.close()
    columns = Feed(StoredRun(tmp_path)).refresh().columns(["learner/loss"])
    assert (columns["version"].tolist(), columns["learner/loss"].tolist()) == ([1, 2, 3], [1.0, 20.0, 30.0])


def test_a_moving_mean_leaves_out_what_is_missing() -> None:
    assert moving_mean(np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan]), 3)[:4].tolist() == [1.0, 2.0, 3.0, 3.0]
    assert np.isnan(moving_mean(np.array([1.0, np.nan, np.nan]), 1)[1])


def test_pages_of_rollouts_partition_what_a_filter_finds(page: TestClient) -> None:
    def ask(**parameters: object) -> dict[str, list[dict[str, object]]]:
        return page.get("/api/runs/demo/rollouts", params=parameters).json()  # type: ignore[arg-type, no-any-return]

    whole = ask(limit=200)
    assert whole["total"] == 18
    pages = [row["rollout_id"] for offset in range(0, 18, 5) for row in ask(limit=5, offset=offset)["rows"]]
    assert pages == [row["rollout_id"] for row in whole["rows"]]
    assert len(set(pages)) == 18
    assert ask(env="math")["total"] == 9
    assert ask(env="math", min_reward=0.5)["total"] == 3
    assert ask(status="infra_error")["total"] == 6
    assert ask(group="g000001")["total"] == 3
    assert ask(env="x' OR '1'='1")["total"] == 0
    assert ask(text="%")["total"] == 0


def test_text_is_found_as_it_was_written(page: TestClient) -> None:
    path = f"/api/runs/{quote(HOSTILE_RUN, safe='')}/rollouts"
    for text in ("<SCRIPT>", "\x1b[31m", "\u202e", "\"' onload"):
        assert page.get(path, params={"text": text}).json()["total"] == 3, text


def test_a_rollout_comes_back_as_data_with_its_tokens_and_versions(page: TestClient) -> None:
    answer = page.get(f"/api/runs/{quote(HOSTILE_RUN, safe='')}/rollout", params={"id": "g000000-0", "label": "train"})
    assert answer.headers["content-type"] == "application/json"
    row = answer.json()
    assert row["messages"][1]["content"] == HOSTILE
    assert row["evidence"]["answer"] == HOSTILE
    assert row["state"] == "filtered"
    assert [s["rollout_id"] for s in row["siblings"]] == ["g000000-0", "g000000-1", "g000000-2"]
    completion = row["tokens"]["completions"][0]
    assert completion["ids"] == [0, 1, 2]
    assert completion["logprobs"] == [-0.5, -0.5, -0.5]
    assert completion["versions"] == [2, 3, 3]
    assert completion["forced"] == []
    assert page.get("/api/runs/demo/rollout?id=g000000-0").json()["tokens"]["kept"] is False


def test_the_filter_by_step_is_by_the_step_that_trained_the_group(tmp_path: Path) -> None:
    store_run(tmp_path / "run")
    store = RunStore(tmp_path / "run")
    store.add_groups([group("g000000"), group("g000001")], "train")
    store.close()
    ledger = Ledger(tmp_path / "run" / "ledger.sqlite")
    for position in range(2):
        ledger.draw(Task(env="math", key=f"k{position}", split="train", seed=1, public={}, private={}), position)
        ledger.ready(f"g00000{position}")
    ledger.train(["g000000"], 4, [])
    rollouts = Rollouts(StoredRun(tmp_path / "run"))
    assert {r["group_id"] for r in rollouts.page(Filter(min_step=4, max_step=4))["rows"]} == {"g000000"}
    assert rollouts.staleness() == [{"env": "math", "staleness": 1, "rollouts": 2, "tokens": 6}]
    ledger.train(["g000001"], 5, [])
    assert rollouts.page(Filter(min_step=5))["total"] == 2, "the ledger's news are seen"
    ledger.close()


def test_how_busy_a_worker_was_is_the_mean_over_a_bin() -> None:
    spans = {"w0": np.array([[0.0, 10.0], [5.0, 10.0], [-5.0, 2.5]])}
    assert busy(spans, np.array([0.0, 5.0, 10.0, 20.0])) == {"w0": [1.5, 2.0, 0.0]}


def test_the_learners_time_adds_up_to_its_steps(tmp_path: Path) -> None:
    large_run(tmp_path, environments=1, steps=20, rollouts=2000)
    line = client(tmp_path).get(f"/api/runs/{LARGE_RUN}/timeline").json()
    assert line["steps"] == 20
    parts = sum(line["shares"][part] for part in ("waited", "gradients", "proof", "optimizer"))
    assert parts == pytest.approx(20.0)
    assert line["shares"]["waited"] == pytest.approx(10.0)
    assert sum(line["workers"]["w0"]) > 0
    for step in line["segments"]:
        assert step["begin"] <= step["waited"] <= step["gradients"] <= step["proof"] <= step["optimizer"]


@pytest.mark.parametrize("path", ["", "/metrics", "/events", "/ledger", "/facets", "/staleness", "/timeline", "/rollouts", "/histogram"])
def test_every_question_has_an_answer_for_a_run_that_has_nothing_yet(tmp_path: Path, path: str) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("name: new\n")
    answer = client(tmp_path).get(f"/api/runs/new{path}")
    assert answer.status_code == 200, answer.text


# Live.


async def test_a_tick_comes_for_each_change_and_none_without(tmp_path: Path) -> None:
    marks = [{"events.jsonl": 1.0}, {"events.jsonl": 1.0}, {"events.jsonl": 2.0}, {"events.jsonl": 2.0}]
    looks = iter(marks)
    left = len(marks)

    async def gone() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    found = [chunk async for chunk in ticks(lambda: next(looks), gone, seconds=0)]
    sizes = [json.loads(chunk.split("data: ")[1])["size"] for chunk in found if "data: " in chunk]
    assert sizes == [1.0, 2.0]


async def test_an_event_a_segment_and_the_ledger_each_change_the_fingerprint(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    seen = [fingerprint(tmp_path)]
    store.emit(events()[0])
    seen.append(fingerprint(tmp_path))
    store.add_groups([group()], "train")
    await asyncio.to_thread(store.close)
    seen.append(fingerprint(tmp_path))
    Ledger(tmp_path / "ledger.sqlite").close()
    seen.append(fingerprint(tmp_path))
    assert len({json.dumps(marks) for marks in seen}) == 4


async def test_news_of_any_run_change_the_fingerprint_of_their_folder(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    before = fingerprint(tmp_path)
    store.emit(events()[0])
    assert fingerprint(tmp_path) != before
    store.close()


# The page itself.


def test_the_page_never_turns_text_into_markup_and_names_no_other_place() -> None:
    ours = [path for path in STATIC.rglob("*") if path.suffix in (".js", ".html", ".css") and path.parent.name != "vendor"]
    assert len(ours) > 15
    for path in ours:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        for forbidden in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "DOMParser",
            "srcdoc",
            "http:",
            "https:",
        ):
            assert forbidden not in text, f"{path.name}: {forbidden}"
    html = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|style=|<style", html)


def test_the_guard_leaves_web_sockets_alone() -> None:
    async def fail(*_: object) -> None:
        raise AssertionError("a web socket passed")

    guard = Guard(fail, host="127.0.0.1", port=1)  # type: ignore[arg-type]
    asyncio.run(guard({"type": "websocket"}, fail, fail))  # type: ignore[arg-type]
