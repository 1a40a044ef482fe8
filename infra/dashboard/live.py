"""Server-sent events: a tick whenever something that the page shows has changed on disk. The page then asks again for what it shows.

A tick says only that there is news, so nothing is lost when one is missed, and a slow reader holds nothing back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

LOOK_SECONDS = 0.5
HEARTBEAT_SECONDS = 15.0
"""A line without meaning, so that a connection that died is noticed on both sides."""


def fingerprint(folder: Path) -> dict[str, float]:
    """Changes when a run does, or any run of a folder of runs."""
    marks: dict[str, float] = {}
    for name in ("events.jsonl", "rollouts", "ledger.sqlite", "ledger.sqlite-wal", "."):
        try:
            stat = (folder / name).stat()
        except OSError:
            continue
        marks[name] = float(stat.st_size if name == "events.jsonl" else stat.st_mtime_ns)
    for path in folder.glob("*/events.jsonl"):  # of a folder of runs
        with suppress(FileNotFoundError):  # removed since it was listed
            marks[path.parent.name] = float(path.stat().st_size)
    return marks


async def ticks(
    look: Callable[[], dict[str, float]], gone: Callable[[], Awaitable[bool]], *, seconds: float = LOOK_SECONDS
) -> AsyncIterator[str]:
    """The body of an event stream: one tick at once, then one per change."""
    seen: dict[str, float] | None = None
    quiet = 0.0
    yield "retry: 2000\n\n"
    while not await gone():
        now = await asyncio.to_thread(look)
        if now != seen:
            seen, quiet = now, 0.0
            yield f"event: tick\ndata: {json.dumps({'size': now.get('events.jsonl', 0.0)})}\n\n"
        elif quiet >= HEARTBEAT_SECONDS:
            quiet = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(seconds)
        quiet += seconds


__all__ = ["fingerprint", "ticks"]
