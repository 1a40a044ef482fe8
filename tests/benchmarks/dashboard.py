"""How long the dashboard takes on a store of a million rollouts, of 64 a step and four environments.

QUESTION_first_s, QUESTION_then_s   seconds until a server that has just started has answered, and until it has answered again
curve_view_first_s, curve_view_then_s   of the curve view in a browser, from the link to the last chart; where Chromium is installed
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import httpx

from infra.dashboard.serving import serving
from tests.unit.dashboards import LARGE_RUN, environment_names, large_run

ROLLOUTS, ENVIRONMENTS = 1_000_000, 4
METRICS = 30
"""Of each environment and step, as docs/metrics.md lists them."""


def questions(envs: list[str]) -> dict[str, str]:
    """What -> path and query."""
    home = f"api/runs/{quote(LARGE_RUN)}"
    names = "&".join(f"name=env/{env}/reward" for env in envs)
    return {
        "summary": home,
        "reward_curves": f"{home}/series?{names}&smooth=9&points=400",
        "band": f"{home}/band?" + "&".join(f"env={env}" for env in envs),
        "newest_50_rollouts": f"{home}/rollouts",
        "page_200": f"{home}/rollouts?env={envs[0]}&offset=10000",
        "one_rollout": f"{home}/rollout?id=g000003-1",
        "text": f"{home}/rollouts?text=needle",
        "timeline": f"{home}/timeline",
    }


def browse(address: str, envs: int) -> float:
    """Seconds from the link to the last chart of the curve view."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address + "api/runs")  # the browser itself is warm
        began = time.perf_counter()
        page.goto(f"{address}#/run/{quote(LARGE_RUN)}/curves")
        page.locator(".card canvas").nth(envs - 1).wait_for()
        seconds = time.perf_counter() - began
        browser.close()
    return seconds


def bench() -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs_dir, envs = Path(folder), environment_names(ENVIRONMENTS)
        sizes = {"steps": ROLLOUTS // 64, "rollouts": ROLLOUTS, "metrics_per_environment": METRICS}
        large_run(runs_dir, environments=ENVIRONMENTS, **sizes)
        for what, path in questions(envs).items():
            with serving(runs_dir) as address:
                seconds = [ask(address + path) for _ in range(4)]
            figures |= {f"{what}_first_s": seconds[:1], f"{what}_then_s": seconds[1:]}
        if shutil.which("chromium"):
            with serving(runs_dir) as address:
                seconds = [browse(address, len(envs)) for _ in range(4)]
            figures |= {"curve_view_first_s": seconds[:1], "curve_view_then_s": seconds[1:]}
    return figures


def ask(url: str) -> float:
    began = time.perf_counter()
    httpx.get(url, timeout=120).raise_for_status()
    return time.perf_counter() - began
