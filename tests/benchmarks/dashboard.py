"""How long the dashboard takes on a store of a million rollouts, of 64 a step and four environments.

QUESTION_first_s, QUESTION_then_s   seconds until a server that has just started has answered, and until it has answered again
curve_view_first_s, curve_view_then_s   of the curve view in a browser, from the link to the last chart: the first view right after
                                        `polyrl dashboard` has printed its address, and the next one; where Chromium is installed
ready_s, ready_cpu_s                    from the start of `polyrl dashboard` until it prints its address, and processor time until then
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil

from infra.dashboard.serving import serving
from rl_core.run_store import SEGMENT_ROWS
from tests.unit.dashboards import LARGE_RUN, environment_names, large_run

ROLLOUTS, ENVIRONMENTS = 1_000_000, 4
VISITS = 5

CHROMIUM = shutil.which("chromium")

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


def browse(runs_dir: Path) -> dict[str, list[float]]:
    """Dashboards of their own process, each visited twice by a browser that is warm."""
    from playwright.sync_api import sync_playwright

    figures: dict[str, list[float]] = {name: [] for name in ("ready_s", "ready_cpu_s", "curve_view_first_s", "curve_view_then_s")}
    with sync_playwright() as playwright, closing(playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])) as browser:
        for _ in range(VISITS):
            page = browser.new_page()
            page.goto("about:blank")
            began = time.perf_counter()
            command = [sys.executable, "-c", "from infra.cli import main; main()", "dashboard", str(runs_dir), "--port", "0"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                address = process.stdout.readline().strip()
                figures["ready_s"].append(time.perf_counter() - began)
                used = psutil.Process(process.pid).cpu_times()
                figures["ready_cpu_s"].append(used.user + used.system)
                for figure in ("curve_view_first_s", "curve_view_then_s"):
                    began = time.perf_counter()
                    page.goto(f"{address}#/run/{quote(LARGE_RUN)}/curves")
                    page.locator(".card canvas").nth(ENVIRONMENTS - 1).wait_for()
                    figures[figure].append(time.perf_counter() - began)
                    page.goto("about:blank")
                page.close()
                process.send_signal(signal.SIGINT)
    return figures


def bench() -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs_dir, envs = Path(folder), environment_names(ENVIRONMENTS)
        sizes = {"steps": ROLLOUTS // 64, "rollouts": ROLLOUTS, "metrics_per_environment": METRICS, "segment": SEGMENT_ROWS}
        large_run(runs_dir, environments=ENVIRONMENTS, **sizes)
        for what, path in questions(envs).items():
            with serving(runs_dir) as address:
                seconds = [ask(address + path) for _ in range(4)]
            figures |= {f"{what}_first_s": seconds[:1], f"{what}_then_s": seconds[1:]}
        if CHROMIUM:
            figures |= browse(runs_dir)
    return figures


def ask(url: str) -> float:
    began = time.perf_counter()
    httpx.get(url, timeout=120).raise_for_status()
    return time.perf_counter() - began
