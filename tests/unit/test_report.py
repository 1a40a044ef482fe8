from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from infra.dashboard.feed import moving_mean, read_state
from infra.report import draw_curves, write_report
from infra.run_state import RunState, fold
from infra.view import EVENT_MARK, LiveView, PlainView, clock, describe, parse_line, render, sparkline
from rl_core.events import Event
from rl_core.run_store import StoredRun
from tests.unit.stored_runs import events, group, store_run


class Tags(HTMLParser):
    """Every tag of a page, and whether they nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_state_of_a_run_is_the_sum_of_its_events() -> None:
    state = fold(events())
    assert (state.run, state.version, state.steps, state.outcome) == ("demo", 4, 4, "finished")
    math, code = state.environments["math"], state.environments["code"]
    assert (math.share, code.share) == (0.75, 0.25)
    assert math.gain == pytest.approx(0.5)
    assert [v for v, _ in code.series["reward"]] == [1, 3, 4], "a step without groups of an environment leaves no point"
    figures = state.to_json()
    assert figures["environments"]["math"]["before"] == {
        "version": 0, "pass_rate": 0.3, "mean_reward": 0.3, "n": 128, "ci95": [0.22, 0.38], "pass_at": {},
        "by_difficulty": {}, "by_length": {},
    }  # fmt: skip
    assert figures["environments"]["math"]["after"]["pass_rate"] == 0.8
    assert figures["staleness"] == {"bound": 1, "max": 1.0}
    assert figures["logprob_agreement_nats"]["mean"] == pytest.approx(5e-6)
    assert figures["logprob_agreement_nats"]["worst_mean"] == pytest.approx(8e-6)


def test_the_fast_reader_says_what_the_sum_of_events_says(tmp_path: Path) -> None:
    run = StoredRun(store_run(tmp_path / "run"))
    quick, slow = read_state(run), fold(run.events())
    assert quick.to_json() == slow.to_json()
    assert quick.notes == slow.notes
    for name, env in slow.environments.items():
        assert {metric: quick.environments[name].points(metric) for metric in env.series} == env.series
    assert {metric: quick.values(metric) for metric in slow.series} == {metric: slow.values(metric) for metric in slow.series}
    assert quick.values("no such metric") == []
    assert run.state == quick.outcome == "finished"


def test_a_run_that_was_stopped_has_no_after() -> None:
    figures = fold(events(finished=False)).to_json()
    assert figures["outcome"] is None
    assert figures["environments"]["math"]["after"] is None
    assert figures["environments"]["math"]["gain"] is None


def test_curves_are_a_png_with_a_panel_for_each_environment() -> None:
    picture = draw_curves(fold(events()))
    assert picture.startswith(b"\x89PNG")
    assert draw_curves(fold(events(finished=False))) != picture


def test_curves_of_a_run_without_a_step_are_drawn_all_the_same() -> None:
    assert draw_curves(fold(events()[:2])).startswith(b"\x89PNG")
    assert draw_curves(RunState()).startswith(b"\x89PNG")


def test_the_report_holds_everything_within_one_file(tmp_path: Path) -> None:
    run = StoredRun(store_run(tmp_path / "demo"))
    page = write_report(run).read_text()
    tags = Tags(page)
    assert tags.open == []
    assert not {"script", "link", "iframe", "a"} & set(tags.seen)
    assert re.findall(r"src='([^']{0,22})", page) == ["data:image/png;base64,"]
    assert (run.run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "30.0% [22.0%, 38.0%]" in page
    assert "80.0% [72.0%, 88.0%]" in page
    assert "+50.0" in page
    assert "at most 1" in page


def test_what_the_policy_wrote_stays_text(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>'\"&\udc80"
    run = StoredRun(store_run(tmp_path / "demo", groups=(group(text=attack, split="eval"),)))
    page = write_report(run).read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert Tags(page).seen.count("img") == 1


def test_an_environment_named_like_sql_is_only_a_name(tmp_path: Path) -> None:
    run = StoredRun(store_run(tmp_path / "demo", groups=(group(env="it's; DROP"),)))
    assert run.sql("SELECT count(*) AS n FROM rollouts")[0]["n"] == 2
    from infra.report import _samples

    sample = "".join(_samples(run, ["it's; DROP"]))
    assert "it&#x27;s; DROP" in sample
    assert sample.count("<details>") == 2


def test_a_picture_is_drawn_whatever_an_environment_is_called() -> None:
    state = fold(events())
    state.environments["$x_{$ \ud800"] = state.environments.pop("math")
    assert draw_curves(state).startswith(b"\x89PNG")


def test_long_documents_are_cut_in_the_middle(tmp_path: Path) -> None:
    run = StoredRun(store_run(tmp_path / "demo", groups=(group(text="a" * 9000 + "END", split="eval"),)))
    page = write_report(run).read_text()
    assert "END</pre>" in page
    assert "[... 7503 characters ...]" in page


def test_smoothing_keeps_the_length_and_the_mean_of_a_constant() -> None:
    assert moving_mean(np.full(7, 0.5), 5).tolist() == [0.5] * 7
    assert moving_mean(np.array([0.0, 1.0]), 9).tolist() == [0.5, 0.5]


def test_a_sparkline_rises_with_its_values_and_never_overflows() -> None:
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert len(sparkline([0.1] * 1000, 20)) == 20
    assert sparkline([-3.0, 9.0], 10) == "▁█"
    assert sparkline([], 10) == ""


def test_an_event_travels_through_a_log_line_and_other_lines_do_not_become_events() -> None:
    event = events()[2]
    assert parse_line(EVENT_MARK + event.to_json()) == event
    for line in ("hello", EVENT_MARK, EVENT_MARK + "{", EVENT_MARK + "[]", EVENT_MARK + '{"kind": "x", "data": {}, "time": 0}'):
        assert parse_line(line) is None


def test_the_plain_view_says_one_line_for_each_event() -> None:
    console = Console(record=True, width=300, force_terminal=False)
    view = PlainView(console)
    for event in events():
        view.emit(event)
    view.log("[red]a log line[/red]")
    view.close()
    lines = console.export_text().splitlines()
    assert len(lines) == len(events()) + 1
    assert "run demo: 4 steps over math, code" in lines[0]
    assert "held-out, before, version 0: math 30.0% [22.0%, 38.0%]" in lines[2]
    assert "step 4/4" in lines[6]
    assert "finished after 1:01" in lines[-2]
    assert lines[-1] == "[red]a log line[/red]"


def test_the_live_view_shows_each_environment_and_the_totals() -> None:
    console = Console(record=True, width=200, force_terminal=True)
    view = LiveView(console)
    for event in events():
        view.emit(event)
    view.close()
    text = console.export_text()
    for piece in ("math", "code", "step 4/4", "30% ±8%", "80% ±8%", "75%/75%", "8.0e-06 mean", "pause 44 ms", "staleness 1 of at most 1"):
        assert piece in text


def test_the_view_draws_before_anything_is_known() -> None:
    console = Console(record=True, width=200)
    console.print(render(RunState()))
    assert "step 0/0" in console.export_text()


def test_every_kind_of_event_has_a_line() -> None:
    state = RunState()
    for event in [*events(), Event(kind="note", data={"text": "an engine was restarted"})]:
        state.apply(event)
        assert describe(event, state)


def test_clock() -> None:
    assert [clock(s) for s in (None, 5, 65, 3661)] == ["-", "0:05", "1:05", "1:01:01"]
