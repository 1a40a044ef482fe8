"""The figures as Ray metrics: Ray's agent serves them to Prometheus, and Grafana shows them (infra/grafana/polyrl.json).

    env/math/reward                    -->  ray_polyrl_env_reward{env="math"}
    env/code/component/tests           -->  ray_polyrl_env_component{env="code", name="tests"}
    env/math/curriculum/easy/solved    -->  ray_polyrl_env_curriculum_solved{env="math", name="easy"}
    learner/tokens_per_s               -->  ray_polyrl_learner_tokens_per_s

All are gauges, but for COUNTERS and, beside their gauges, HISTOGRAMS. Every series has the label `run`.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from infra.trackers.figures import figures
from rl_core.events import Event

log = logging.getLogger("polyrl")

COUNTERS = ("env/groups_trained", "env/groups_filtered")
"""Sums since the run began."""

HISTOGRAMS = {
    "step/seconds": [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500],
    "step/waited_s": [0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200],
    "sync/pause_ms": [1, 5, 10, 25, 50, 100, 250, 500, 1000, 5000],
    "env/group_seconds": [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500],
}
"""Distributions over steps, with the upper ends of their buckets; their names end in _hist."""

NAMED = re.compile(r"(component|curriculum)/(.+?)(?:/(solved|weight|passed))?")


def series(name: str) -> tuple[str, dict[str, str]]:
    """(name without environment and part, labels): env/math/component/exact -> ("env/component", {"env": "math", "name": "exact"})."""
    if not name.startswith("env/"):
        return name, {}
    _, env, rest = name.split("/", 2)
    if found := NAMED.fullmatch(rest):
        kind, part, figure = found.groups()
        return f"env/{kind}" + (f"_{figure}" if figure else ""), {"env": env, "name": part}
    return f"env/{rest}", {"env": env}


def exported(name: str) -> str:
    """The name in Ray, without the `ray_` that it puts before: polyrl_env_reward."""
    return "polyrl_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)


class RayMetrics:
    """An event sink. Values go into the memory of this process, from where Ray takes them; nothing waits."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._sums: dict[tuple[str, str], float] = {}
        self._works = True

    def emit(self, event: Event) -> None:
        said = figures(event) if self._works else None
        try:
            for name, value in (said[1] if said else {}).items():
                if value == value:  # a NaN is no point on a board
                    self._put(*series(name), value)
        except Exception:  # figures on a board are no reason to end a run
            self._works = False
            log.warning("Ray takes no metrics; Prometheus will not see this run", exc_info=True)

    def _put(self, name: str, labels: dict[str, str], value: float) -> None:
        labels = {"run": self._run, **labels}
        if name in COUNTERS:
            counter = self._metric(self._counters, Counter, name, labels)
            key = (name, labels["env"])
            if (more := value - self._sums.get(key, 0.0)) > 0:
                counter.inc(more, labels)
            self._sums[key] = value
            return
        self._metric(self._gauges, Gauge, name, labels).set(value, labels)
        if name in HISTOGRAMS:
            histogram = self._metric(self._histograms, Histogram, f"{name}_hist", labels, boundaries=HISTOGRAMS[name])
            histogram.observe(value, labels)

    @staticmethod
    def _metric(known: dict[str, Any], kind: type, name: str, labels: dict[str, str], **more: Any) -> Any:
        if name not in known:
            known[name] = kind(exported(name), description=f"{name} of docs/metrics.md", tag_keys=tuple(labels), **more)
        return known[name]
