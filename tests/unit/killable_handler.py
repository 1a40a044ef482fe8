"""What `test_killable` runs in a killable server: good calls and bombs."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

CALLS: list[int] = []


def warm_up() -> None:
    """Nothing to warm up."""


def handle(request: dict[str, Any]) -> Any:
    CALLS.append(1)
    match request["do"]:
        case "double":
            return 2 * request["n"]
        case "count":
            return len(CALLS)
        case "raise":
            raise ValueError("as asked")
        case "sleep":
            time.sleep(60)
        case "spin":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                pass
        case "power":
            return 9 ** (9**9)
        case "memory":
            return len([bytes(1 << 24) for _ in range(1000)])
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "flood":
            return "x" * 10_000_000
        case "exit":
            os._exit(0)
    return None
