"""What a run tells the world while it goes: one flat event type, many sinks.

The loop emits events; the run store appends them to `events.jsonl`, the terminal view draws them, trackers forward them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

KINDS = (
    "run_started",  # data: run, config path, steps, environments
    "phase",  # data: name ("starting engines", "evaluating before", "training", "evaluating after", ...), detail
    "eval",  # data: version, label ("before"|"during"|"after"), environments: {id: EvalResult.to_json()}
    "step",  # data: version, metrics: {name: float}
    "note",  # data: text; something a person should see once (a restart, a breaker, a warning)
    "run_finished",  # data: outcome ("finished"|"stopped"|"failed"), reason, seconds
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened. JSON values only."""

    kind: str
    data: Mapping[str, Any]
    time: float = field(default_factory=time.time)  # seconds since the epoch

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"event kind {self.kind!r}, wanted one of {', '.join(KINDS)}")

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "time": self.time, "data": self.data})

    @staticmethod
    def from_json(line: str) -> Event:
        row = json.loads(line)
        return Event(kind=row["kind"], data=row["data"], time=row["time"])


class Sink(Protocol):
    """Where events go."""

    def emit(self, event: Event) -> None: ...
