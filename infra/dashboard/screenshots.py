"""Pictures of every view, from a real run: `python -m infra.dashboard.screenshots RUNS_DIR RUN`; they go to docs/images/dashboard.

Needs Chromium, and the packages of requirements/dev.txt.
"""

from __future__ import annotations

import argparse
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from infra.dashboard.library import Library
from infra.dashboard.rollouts import Filter
from infra.dashboard.serving import serving

FOLDER = Path("docs/images/dashboard")
WIDTH, HEIGHT = 1280, 860


def views(library: Library, run: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """picture -> (address of the view, options of its browser context)."""
    home = f"#/run/{quote(run)}"
    known = library.find(run)
    envs = [e["name"] for e in known.feed.refresh().summary()["environments"]]
    turns = known.rollouts.page(Filter(label="train", env="tools" if "tools" in envs else envs[0]), sort="longest", limit=1)["rows"]
    runs = "&".join(f"run={quote(r.id)}" for r in library.stored()[:3])
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "runs": ("#/runs", {}),
        "curves": (f"{home}/curves?band=1", {}),
        "curves-dark": (f"{home}/curves?env={quote(envs[0])}&x=time", {"color_scheme": "dark"}),
        "comparison": (f"#/compare?{runs}", {}),
        "mixture": (f"{home}/mixture", {}),
        "staleness": (f"{home}/staleness", {}),
        "mtp": (f"{home}/mtp", {}),
        "time": (f"{home}/time", {}),
        "events": (f"{home}/events", {}),
        "ledger": (f"{home}/ledger", {}),
        "rollouts": (f"{home}/rollouts?label=train&sort=worst", {}),
        "narrow": (f"{home}/curves", {"viewport": {"width": 420, "height": 800}}),
    }
    if turns:
        found["rollout"] = (f"{home}/rollout?id={quote(turns[0]['rollout_id'])}&label=train", {})
    return found


def take(runs_dir: Path, run: str, folder: Path) -> list[Path]:
    """Open each view and write its picture."""
    from playwright.sync_api import sync_playwright

    library = Library(runs_dir)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with serving(runs_dir) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (view, options) in views(library, run).items():
            context = browser.new_context(**({"viewport": {"width": WIDTH, "height": HEIGHT}, "reduced_motion": "reduce"} | options))
            page = context.new_page()
            page.on("console", lambda message: print(message.text))
            page.on("pageerror", lambda error: print(error.stack))
            page.goto(address + view)
            page.locator("#main[data-ready]").wait_for()
            page.locator("#live.on").wait_for()
            page.wait_for_timeout(400)  # charts are drawn after their first layout
            path = folder / f"{name}.png"
            path.write_bytes(_small(page.screenshot()))
            written.append(path)
            context.close()
        browser.close()
    return written


def _small(picture: bytes) -> bytes:
    """With a palette of 128 colours: a third of the bytes, and no difference that one sees."""
    from PIL import Image

    smaller = BytesIO()
    Image.open(BytesIO(picture)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("run")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    for path in take(args.runs_dir, args.run, args.folder):
        print(f"{path.stat().st_size:>8}  {path}")


if __name__ == "__main__":
    main()
