"""How long the dashboard takes on a store of a million rollouts: `python -m tests.benchmarks.dashboard`.

The store has 64 rollouts a step and the metrics of four environments. Each answer is asked of a server that has just started, and
again; the curve view is also opened in a browser, from the link to the last chart.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import httpx

from infra.dashboard.serving import serving
from tests.unit.dashboards import LARGE_RUN, environment_names, large_run

METRICS = 30
"""Of each environment and step, as docs/metrics.md lists them."""


def questions(envs: list[str]) -> dict[str, str]:
    """What -> path and query."""
    home = f"api/runs/{quote(LARGE_RUN)}"
    names = "&".join(f"name=env/{env}/reward" for env in envs)
    return {
        "summary": home,
        "reward curves": f"{home}/series?{names}&smooth=9&points=400",
        "band over groups": f"{home}/band?" + "&".join(f"env={env}" for env in envs),
        "newest 50 rollouts": f"{home}/rollouts",
        "one environment, page 200": f"{home}/rollouts?env={envs[0]}&offset=10000",
        "one rollout": f"{home}/rollout?id=g000003-1",
        "text in every rollout": f"{home}/rollouts?text=needle",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=1_000_000)
    parser.add_argument("--environments", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs_dir, envs = Path(folder), environment_names(args.environments)
        run = large_run(
            runs_dir, environments=args.environments, steps=args.rollouts // 64, rollouts=args.rollouts, metrics_per_environment=METRICS
        )
        print(f"{args.rollouts:,} rollouts, {args.rollouts // 64:,} steps, {(run / 'events.jsonl').stat().st_size / 1e6:.0f} MB of events")
        for what, path in questions(envs).items():
            with serving(runs_dir) as address:
                seconds = []
                for _ in range(4):
                    began = time.perf_counter()
                    httpx.get(address + path, timeout=120).raise_for_status()
                    seconds.append(time.perf_counter() - began)
            print(f"{what:<28} first {seconds[0]:6.2f} s   then {statistics.median(seconds[1:]):6.3f} s")
        if shutil.which("chromium"):
            with serving(runs_dir) as address:
                print(
                    f"{'curve view in a browser':<28} first {browse(address, len(envs)):6.2f} s   then {browse(address, len(envs)):6.3f} s"
                )


if __name__ == "__main__":
    main()
