"""The dashboard in a real browser: every view, live, with 200 environments and 100,000 rollouts, against hostile text."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from infra.dashboard.serving import serving
from rl_core.events import Event
from rl_core.run_store import RunStore
from tests.unit.dashboards import (
    ANSI,
    HOSTILE_RUN,
    IMAGE,
    LARGE_RUN,
    OVERRIDE,
    SCRIPT,
    environment_names,
    hostile_run,
    large_run,
    large_step,
)

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements/dev.txt)")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")]

expect = sync_api.expect
WAIT_MS = 30_000
"""For what must come; a busy machine may take its time."""
expect.set_options(timeout=WAIT_MS)

VIEWS = ("curves", "mixture", "staleness", "mtp", "time", "events", "ledger", "rollouts")
LARGE, HOSTILE = (f"#/run/{quote(run)}" for run in (LARGE_RUN, HOSTILE_RUN))


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    hostile_run(folder)
    large_run(folder)
    return folder


@pytest.fixture(scope="module")
def address(runs_dir: Path) -> Iterator[str]:
    with serving(runs_dir) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        args = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's own sandbox refuses root
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield found
        found.close()


class Visitor:
    """A page, and all that it said and asked for."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.said: list[str] = []
        self.asked: list[str] = []
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, view: str, *, fresh: bool = False) -> Any:
        """A view by its link: in a page that knows nothing yet, or in the one that is open. Its content, when it is whole."""
        if fresh:
            self.page.goto("about:blank")
        self.page.goto(self.address + view)
        expect(self.page.locator("#main")).to_have_attribute("data-ready", view)
        expect(self.page.locator("#error")).to_be_hidden()
        return self.page.locator("#content")

    def check(self) -> None:
        """Nothing was complained of, nothing left this machine, nothing hostile ran."""
        assert self.said == []
        foreign = [url for url in self.asked if not url.startswith((self.address, "data:", "about:"))]
        assert foreign == []
        assert self.page.evaluate("() => window.hacked === undefined")


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found = Visitor(context.new_page(), address)
    yield found
    found.check()
    context.close()


def test_the_list_of_runs_leads_to_every_view_with_the_keyboard_alone(visitor: Visitor) -> None:
    content = visitor.open("#/runs")
    content.get_by_role("link", name=LARGE_RUN).focus()
    visitor.page.keyboard.press("Enter")
    for view in VIEWS:
        tab = visitor.page.locator(f"#tabs a[href$='/{view}']")
        tab.focus()
        visitor.page.keyboard.press("Enter")
        expect(visitor.page.locator(f"#tabs a[href$='/{view}']")).to_have_attribute("aria-current", "page")
        expect(content.locator("canvas, svg, table, .empty").first).to_be_visible()
        expect(visitor.page.locator("#error")).to_be_hidden()


def test_two_hundred_environments_are_searched_and_paged(visitor: Visitor) -> None:
    content = visitor.open(f"{LARGE}/curves")
    expect(content.locator(".card canvas")).to_have_count(24)
    expect(content).to_contain_text("1 to 24 of 200 environments")
    content.get_by_role("button", name="Next").click()
    expect(content.locator("h3").first).to_have_text("env_024")
    visitor.page.get_by_role("searchbox", name="Environments").fill("env_19")
    expect(content.locator(".card")).to_have_count(10)
    content.get_by_role("link", name="env_197").click()
    expect(content.locator("h2").first).to_have_text("env_197")
    visitor.page.go_back()
    expect(content.locator(".card")).to_have_count(10)


def test_a_link_restores_the_whole_view(visitor: Visitor) -> None:
    content = visitor.open(f"{LARGE}/curves?q=env_00&metric=mtp_acceptance&x=time&smooth=25", fresh=True)
    expect(content.locator(".card")).to_have_count(10)
    assert visitor.page.get_by_role("searchbox", name="Environments").input_value() == "env_00"
    for label, value in (("Metric", "mtp_acceptance"), ("x axis", "time"), ("Smoothing", "25")):
        assert visitor.page.get_by_label(label).input_value() == value


def test_a_hundred_thousand_rollouts_are_filtered_and_paged_by_the_server(visitor: Visitor) -> None:
    content = visitor.open(f"{LARGE}/rollouts")
    expect(content).to_contain_text("1 to 50 of 100,000 rollouts")
    visitor.page.get_by_role("searchbox", name="Text").fill("needle")
    expect(content).to_contain_text("1 to 50 of 100 rollouts")
    visitor.page.get_by_label("Reward from").fill("0.5")
    visitor.page.get_by_label("Reward from").press("Enter")
    expect(content.locator(".pager")).to_have_text("33 rollouts")
    expect(content.locator("tbody tr")).to_have_count(33)
    content.locator("tbody a").first.click()
    expect(content.locator(".turn pre")).to_contain_text("needle")
    expect(content).to_contain_text("keeps no tokens")


def test_an_event_that_is_appended_appears_by_itself(visitor: Visitor, runs_dir: Path) -> None:
    visitor.open(f"{LARGE}/curves?env=env_000")
    expect(visitor.page.locator("#live")).to_have_text("live")
    expect(visitor.page.locator("#run-state")).to_contain_text("step 50 of 100")
    store = RunStore(runs_dir / LARGE_RUN)
    try:
        store.emit(large_step(51, environment_names(200)))
        expect(visitor.page.locator("#run-state")).to_contain_text("step 51 of 100")
        expect(visitor.page.locator("#run-state")).to_contain_text("running")
        visitor.page.locator("#tabs a", has_text="Events").click()
        store.emit(Event(kind="note", data={"text": "env_007 is broken, 3 groups in a row (host died)"}))
        expect(visitor.page.locator("#content")).to_contain_text("env_007 is broken")
    finally:
        store.close()


def test_hostile_names_and_texts_are_shown_as_text_in_every_view(visitor: Visitor) -> None:
    for view in VIEWS:
        content = visitor.open(f"{HOSTILE}/{view}")
        expect(content.locator("script, img, iframe, object")).to_have_count(0)
        expect(content.locator("[onload], [onerror]")).to_have_count(0)
    visitor.open("#/runs")
    visitor.open(f"#/compare?run={quote(HOSTILE_RUN)}&run={quote(LARGE_RUN)}")


@pytest.mark.parametrize("colour", ["logprob", "version", "ratio", "mask"])
def test_a_hostile_rollout_is_inspected_as_it_was_written(visitor: Visitor, colour: str) -> None:
    content = visitor.open(f"{HOSTILE}/rollout?id=g000000-0&label=train&colour={colour}")
    said = content.locator(".turn.assistant pre").first.inner_text()
    assert SCRIPT in said
    assert IMAGE in said
    assert ANSI.replace("\x1b", "⟨ESC⟩") in said
    assert OVERRIDE.replace("\u202e", "⟨U+202E⟩").replace("\u202c", "⟨U+202C⟩") in said
    assert content.locator("dd pre").first.inner_text() == said, "the evidence is shown the same way"
    expect(content.locator(".tokens > span")).to_have_count(3)
    if colour in ("ratio", "mask"):
        expect(content).to_contain_text("not recorded per token")


def test_a_narrow_window_scrolls_tables_and_not_the_page(browser: Any, address: str) -> None:
    context = browser.new_context(viewport={"width": 420, "height": 800}, color_scheme="dark")
    visitor = Visitor(context.new_page(), address)
    for view in VIEWS:
        visitor.open(f"{LARGE}/{view}")
        assert visitor.page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth"), view
    assert visitor.page.evaluate("() => document.documentElement.classList.contains('dark')")
    visitor.check()
    context.close()


def test_what_is_not_there_is_said_in_one_sentence(browser: Any, address: str, tmp_path: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{address}#/run/none/curves")
    expect(page.get_by_role("alert")).to_contain_text("no run of that name")
    with serving(tmp_path) as empty:
        page.goto(f"{empty}#/runs")
        expect(page.locator("#content")).to_contain_text("polyrl run configs/quickstart.yaml")
    context.close()


def test_the_first_link_lets_a_browser_in_and_no_other_does(browser: Any, runs_dir: Path) -> None:
    with serving(runs_dir, token="sesame") as address:
        context = browser.new_context()
        page = context.new_page()
        assert page.goto(address).status == 401
        page.goto(f"{address}?token=sesame#/runs")
        expect(page.locator("#content")).to_contain_text(LARGE_RUN)
        assert "sesame" not in page.url
        context.close()
