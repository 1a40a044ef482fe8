"""polyrl sql and polyrl rollouts: answers, what they refuse, and that a policy's text cannot steer a terminal."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.cli.main import main
from infra.errors import UsageError
from infra.sql import EXAMPLES, VIEWS, ask, describe, named
from infra.view import visible
from rl_core.events import Event
from rl_core.ledger import Ledger
from rl_core.run_store import RunStore, StoredRun
from rl_core.types import Task
from tests.unit.dashboards import HOSTILE_RUN, hostile_run
from tests.unit.stored_runs import events, group

Call = Callable[..., tuple[int, str, str]]

RUN = "20260103-000000-demo"


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hostile run, and one of two groups: g000000 trained by step 1, g000001 filtered."""
    folder = tmp_path_factory.mktemp("runs")
    hostile_run(folder)
    run = folder / RUN
    run.mkdir()
    (run / "config.yaml").write_text("name: demo\n")
    store = RunStore(run, keep_tokens=True)
    for event in events():
        store.emit(event)
    store.emit(Event(kind="step", data={"version": 5, "metrics": {"env/math/reward": float("nan"), "learner/loss": 0.5}}, time=9.0))
    store.add_groups([group("g000000"), group("g000001", rewards=(0.0, 0.0))], "train")
    store.close()
    ledger = Ledger(run / "ledger.sqlite")
    for i in range(2):
        ledger.draw(Task(env="math", key=f"key-g{i:06d}", split="train", seed=1, public={}, private={}), i)
    ledger.ready("g000000")
    ledger.train(["g000000"], 1)
    ledger.filter("g000001", "no signal")
    ledger.close()
    return folder


@pytest.fixture
def polyrl(runs_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls a command on the demo run; returns exit code, standard output, standard error."""

    def call(command: str, *args: str, run: str = RUN) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polyrl", command, run, *args, "--runs-dir", str(runs_dir)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("run", [RUN, HOSTILE_RUN])
def test_every_ready_question_has_an_answer(runs_dir: Path, run: str) -> None:
    assert len(EXAMPLES) == 10
    answered = 0
    for example in EXAMPLES:
        with ask(StoredRun(runs_dir / run), example.sql) as answer:
            assert answer.names
            answered += bool(list(answer))
    assert answered >= 5
    assert {view for e in EXAMPLES for view in named(e.sql)} == set(VIEWS) - {"tokens", "events"}


ANSWERS = {
    "SELECT count(*) FROM rollouts": [[4]],
    "SELECT group_id, reward, rollouts FROM tasks ORDER BY 1": [["g000000", 0.5, 2], ["g000001", 0.0, 2]],
    "SELECT sum(value) FROM components WHERE name = 'correct'": [[1.0]],
    "SELECT rollout_id, count(*), min(version), max(version) FROM tokens GROUP BY 1 ORDER BY 1 LIMIT 1": [["g000000-0", 3, 2, 3]],
    "SELECT group_id, state, reason FROM ledger ORDER BY 1": [["g000000", "trained", ""], ["g000001", "filtered", "no signal"]],
    "SELECT * EXCLUDE (difficulty) FROM batches": [[1, "g000000", "math", "key-g000000", False]],
    "SELECT version, groups FROM versions ORDER BY 1 LIMIT 2": [[1, 1], [2, 0]],
    "SELECT version, env, name, value FROM steps WHERE metric = 'env/code/reward' ORDER BY 1 LIMIT 2":
        [[1, "code", "reward", 0.2], [3, "code", "reward", 0.2]],
    "SELECT count(*) FILTER (env IS NULL) > 0, count(*) FILTER (isnan(value)) FROM steps": [[True, 0]],
    "SELECT data ->> '$.metrics.\"learner/loss\"' FROM events WHERE kind = 'step' ORDER BY time LIMIT 1": [["0.5"]],
}  # fmt: skip


@pytest.mark.parametrize("question", ANSWERS)
def test_what_the_views_say(runs_dir: Path, question: str) -> None:
    with ask(StoredRun(runs_dir / RUN), question) as answer:
        assert list(answer) == ANSWERS[question]


def test_a_run_that_has_nothing_yet(tmp_path: Path) -> None:
    for view in VIEWS:
        with ask(StoredRun(tmp_path), f"SELECT * FROM {view}") as answer:
            assert answer.names
            assert list(answer) == []


def test_what_is_being_written_is_seen(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    try:
        store.emit(events()[0])
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write('{"kind": "note", "time": 1.0, "da')  # a write in progress
        with ask(StoredRun(tmp_path), "SELECT kind FROM events") as answer:
            assert list(answer) == [["run_started"]]
    finally:
        store.close()


def test_segments_of_two_versions_of_the_program_are_one_store(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    store = RunStore(tmp_path)
    store.add_groups([group("g000000")], "train")
    store.close()
    old = tmp_path / "rollouts" / "part-00000.parquet"
    table = pq.read_table(old)
    pq.write_table(table.drop_columns(["worker"]), old)
    pq.write_table(table, tmp_path / "rollouts" / "part-00001.parquet")
    with ask(StoredRun(tmp_path), "SELECT worker, count(*) FROM rollouts GROUP BY 1 ORDER BY 1") as answer:
        assert list(answer) == [["w0", 2], [None, 2]]


def test_only_named_views_are_made() -> None:
    assert named("select count(*) from Rollouts") == ["rollouts"]
    assert named("SELECT 1") == []
    assert named("show tables") == list(VIEWS)


REFUSED = {
    "SELECT * FROM read_text('{outside}')": "disabled by configuration",
    "SELECT * FROM '{outside}'": "disabled by configuration",
    "SELECT * FROM read_csv('https://127.0.0.1:9/x.csv')": "",
    "COPY (SELECT 1) TO '{inside}/rollouts/part-99999.parquet'": "only SELECT is answered, got COPY",
    "ATTACH '{inside}/x.db'": "only SELECT is answered, got ATTACH",
    "SET enable_external_access = true": "only SELECT is answered, got SET",
    "INSTALL httpfs": "only SELECT is answered",
    "SELECT 1; SELECT 2": "one question at a time, got 2",
    "SELECT rewar FROM rollouts": '"rewar" not found',
    "SELEC 1": "syntax error",
    "SELECT * FROM run": "does not exist",
}


@pytest.mark.parametrize("question", REFUSED)
def test_a_question_reads_this_run_and_nothing_else(runs_dir: Path, tmp_path: Path, question: str) -> None:
    outside = tmp_path / "secret.csv"
    outside.write_text("secret\n1\n")
    inside = runs_dir / RUN
    before = sorted(inside.rglob("*"))
    text = question.format(outside=outside, inside=inside)
    with pytest.raises(UsageError, match=r"^SQL: ") as caught, ask(StoredRun(inside), text) as answer:
        list(answer)
    assert REFUSED[question] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(inside.rglob("*")) == before


def test_no_view_breaks_on_what_a_policy_wrote(tmp_path: Path) -> None:
    """A lone surrogate, which json.dumps writes, is no JSON to DuckDB; one such rollout must not hide the others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rl_core.run_store import SCHEMA

    (tmp_path / "rollouts").mkdir()
    turns = json.dumps([{"content": "a\ud800\x00b", "thought": "", "tool_calls": [{"x": "\udfff"}], "malformed": ""}])
    components = json.dumps({'a"b.c$': 0.5, "n": float("nan")})
    rows = [{"rollout_id": "r0", "turns": turns, "components": components}, {"rollout_id": "r1", "turns": "[{}]", "components": "{}"}]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "rollouts" / "part-00000.parquet")
    with ask(StoredRun(tmp_path), "SELECT rollout_id, content FROM turns ORDER BY 1") as answer:
        assert list(answer) == [["r0", "a\ufffd\x00b"], ["r1", None]]
    with ask(StoredRun(tmp_path), "SELECT name, value FROM components ORDER BY 1") as answer:
        assert list(answer) == [['a"b.c$', 0.5], ["n", None]]


def test_sql_prints_a_table_json_and_csv(polyrl: Call) -> None:
    question = "SELECT group_id, reward FROM tasks ORDER BY 1"
    assert polyrl("sql", question)[1].split() == ["group_id", "reward", "--------", "------", "g000000", "0.5", "g000001", "0"]
    assert json.loads(polyrl("sql", question, "--json")[1]) == [
        {"group_id": "g000000", "reward": 0.5},
        {"group_id": "g000001", "reward": 0.0},
    ]
    assert list(csv.reader(io.StringIO(polyrl("sql", question, "--csv")[1])))[1:] == [["g000000", "0.5"], ["g000001", "0.0"]]
    code, out, err = polyrl("sql", "SELECT nothing FROM rollouts")
    assert (code, out) == (2, "")
    assert err.startswith("polyrl: SQL: ")
    assert err.count("\n") == 1
    assert polyrl("sql", "--examples")[1].count(";\n") == 10
    assert set(json.loads(polyrl("sql", "--json")[1])) == set(VIEWS)
    assert "first 200 rows" in polyrl("sql", "SELECT * FROM range(300)")[1]


def test_rollouts_lists_what_was_asked_for(polyrl: Call) -> None:
    def ids(*args: str) -> list[str]:
        return [row["rollout_id"] for row in json.loads(polyrl("rollouts", *args, "--json")[1])["rows"]]

    assert ids("--min-reward", "1") == ["g000000-0"]
    assert ids("--step", "1", "--sort", "worst") == ["g000000-1", "g000000-0"]
    assert ids("--max-reward", "0", "--limit", "2") == ["g000000-1", "g000001-0"]
    assert ids("--env", "code") == ids("--status", "truncated") == ids("--search", "nowhere") == ids("--label", "before") == []
    assert len(ids("--search", "3+4", "--label", "train", "--env", "math", "--status", "ok")) == 4
    assert polyrl("rollouts")[1].splitlines()[-1] == "4 in all"
    for wrong in (["--sort", "x"], ["--label", "x"], ["--show", "x"]):
        code, out, err = polyrl("rollouts", *wrong)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1


def test_a_rollout_is_shown_whole(polyrl: Call) -> None:
    code, out, _ = polyrl("rollouts", "--show", "g000000-0")
    assert code == 0
    for part in ("g000000-0", "reward 1", "trained", "evidence answer: 7", "--- user\n3+4", "--- assistant\n7", "-0.5000", "g000000-1 (0)"):
        assert part in out, part
    assert json.loads(polyrl("rollouts", "--show", "g000000-0", "--json")[1])["messages"][0] == {"role": "user", "content": "3+4"}


OBEYED = ("\x1b", "\x07", "\r", "\x9b", "\u202e", "\u2066", "\ud800")

HOSTILE_CALLS = (
    ("show",),
    ("show", "--json"),
    ("curves",),
    ("ledger",),
    ("ledger", "--json"),
    ("rollouts",),
    ("rollouts", "--json"),
    ("rollouts", "--show", "g000000-0"),
    ("rollouts", "--show", "g000000-0", "--json"),
    ("sql", "SELECT env, evidence, messages FROM rollouts"),
    ("sql", "SELECT reason FROM ledger"),
    ("sql", "SELECT chr(27) || '[31m' AS red, chr(8238) AS \"\u202e\"", "--json"),
    ("sql", "SELECT chr(27) || '[31m' AS red, chr(8238) AS \"\u202e\""),
    ("sql", "SELECT error(chr(27) || '[31m')"),
    ("rollouts", "--show", "\x1b[31m"),
)


@pytest.mark.parametrize("args", HOSTILE_CALLS)
def test_no_text_steers_the_terminal(polyrl: Call, args: tuple[str, ...]) -> None:
    _, out, err = polyrl(*args, run=HOSTILE_RUN)
    assert out + err
    assert not [hex(ord(c)) for c in OBEYED if c in out + err]


def test_csv_is_escaped_where_a_person_looks_on(polyrl: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    question = "SELECT chr(27) || '[31m' AS red"
    assert polyrl("sql", question, "--csv")[1] == "red\n\x1b[31m\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert polyrl("sql", question, "--csv")[1] == "red\n\\x1b[31m\n"


def test_visible() -> None:
    assert visible("plain, Grüße, 漢字") == "plain, Grüße, 漢字"
    assert visible("a\nb\x1b[0m\x9b\u202e\ud800") == "a\\nb\\x1b[0m\\x9b\\u202e\\ud800"
    assert visible("a\nb\r", keep="\n") == "a\nb\\r"


def test_the_page_names_every_view_and_column(runs_dir: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "run-store.md").read_text(encoding="utf-8")
    rows = {cells[1].strip("` "): cells[3].strip().split(", ") for line in page.splitlines() if len(cells := line.split("|")) == 5}
    views = describe(StoredRun(runs_dir / RUN))
    assert {name: rows[name] for name in VIEWS if name != "rollouts"} == {
        name: [column for column, _ in columns] for name, columns in views.items() if name != "rollouts"
    }
