"""What is known of a run from its events alone: folded one by one, live or from the store.

event --> RunState.apply --> view (terminal), show, curves, report
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from rl_core.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One held-out evaluation of one environment."""

    version: int
    pass_rate: float
    mean_reward: float
    n: int
    ci95: tuple[float, float]
    pass_at: Mapping[str, float] = field(default_factory=dict)
    """k -> pass@k."""
    by_difficulty: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # {"pass_rate", "n"}
    by_length: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @staticmethod
    def of(version: int, data: Mapping[str, Any]) -> Score:
        low, high = data["ci95"]
        return Score(
            version=version,
            pass_rate=data["pass_rate"],
            mean_reward=data["mean_reward"],
            n=data["n"],
            ci95=(low, high),
            pass_at=data.get("pass_at", {}),
            by_difficulty=data.get("by_difficulty", {}),
            by_length=data.get("by_length", {}),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "pass_rate": self.pass_rate,
            "mean_reward": self.mean_reward,
            "n": self.n,
            "ci95": list(self.ci95),
            "pass_at": dict(self.pass_at),
            "by_difficulty": dict(self.by_difficulty),
            "by_length": dict(self.by_length),
        }

    def __str__(self) -> str:
        return f"{self.pass_rate:5.1%} [{self.ci95[0]:.1%}, {self.ci95[1]:.1%}]"


@dataclass(slots=True, kw_only=True)
class EnvState:
    """One environment of a run."""

    name: str
    share: float  # requested share of trained groups, normalised over the environments
    before: Score | None = None
    after: Score | None = None
    during: list[Score] = field(default_factory=list)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Metric name without `env/<id>/` -> [(policy version, value)]; a step without a value leaves no point."""

    def points(self, metric: str) -> list[tuple[int, float]]:
        return points(self.series, metric)

    def last(self, metric: str) -> float | None:
        found = points(self.series, metric)
        return found[-1][1] if found else None

    def values(self, metric: str) -> list[float]:
        return [value for _, value in points(self.series, metric)]

    def recent(self, metric: str, window: int = 10) -> float | None:
        """Mean of the last values: one step has few rollouts of one environment."""
        values = self.values(metric)[-window:]
        return fmean(values) if values else None

    def mean(self, metric: str) -> float | None:
        """Over all steps that had the metric."""
        values = self.values(metric)
        return fmean(values) if values else None

    @property
    def scores(self) -> list[Score]:
        """Held-out evaluations, in order."""
        return [s for s in (self.before, *self.during, self.after) if s is not None]

    @property
    def gain(self) -> float | None:
        """Points of pass rate gained on held-out tasks, 0.15 for fifteen; None while one end is missing."""
        return None if self.before is None or self.after is None else self.after.pass_rate - self.before.pass_rate

    def to_json(self) -> dict[str, Any]:
        acceptance, per_step = self.values("mtp_acceptance"), self.values("tokens_per_engine_step")
        return {
            "before": self.before and self.before.to_json(),
            "after": self.after and self.after.to_json(),
            "during": [s.to_json() for s in self.during],
            "gain": self.gain,
            "train_reward": {"first": _mean(self.values("reward")[:10]), "last": _mean(self.values("reward")[-10:])},
            "share": {"requested": self.share, "trained": self.last("share")},
            "groups_trained": self.last("groups_trained"),
            "tokens_per_s": _mean(self.values("tokens_per_s")),
            "mtp_acceptance": _mean(acceptance),
            "tokens_per_engine_step": _mean(per_step),
            "staleness": {"mean": _mean(self.values("staleness_mean")), "max": max(self.values("staleness_max"), default=None)},
        }


@dataclass(slots=True, kw_only=True)
class RunState:
    """A run, as far as its events have told."""

    run: str = ""
    phase: str = ""
    detail: str = ""
    outcome: str = ""  # "" while it goes on
    reason: str = ""
    started: float | None = None  # seconds since the epoch
    updated: float | None = None
    seconds: float | None = None  # whole run; None while it goes on
    version: int = 0
    steps: int = 0
    max_staleness: int | None = None  # the configured bound
    objective: str = ""  # the rules in force, in words
    environments: dict[str, EnvState] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Metric name, environments excepted -> [(policy version, value)]."""
    notes: list[str] = field(default_factory=list)

    def apply(self, event: Event) -> None:
        """Learn from one event. Events of one run come in order."""
        data = event.data
        self.updated = event.time
        if event.kind == "run_started":
            self._start(event)
        elif event.kind == "phase":
            self.phase, self.detail = str(data["name"]), str(data.get("detail", ""))
        elif event.kind == "eval":
            self._score(data)
        elif event.kind == "step":
            self._step(int(data["version"]), data["metrics"])
        elif event.kind == "note":
            self.notes.append(str(data["text"]))
        elif event.kind == "run_finished":
            self.outcome, self.reason, self.seconds = str(data["outcome"]), str(data.get("reason", "")), data.get("seconds")
            self.phase, self.detail = self.outcome, self.reason

    def last(self, metric: str) -> float | None:
        found = points(self.series, metric)
        return found[-1][1] if found else None

    def values(self, metric: str) -> list[float]:
        return [value for _, value in points(self.series, metric)]

    def env(self, name: str) -> EnvState:
        return self.environments.setdefault(name, EnvState(name=name, share=0.0))

    def _start(self, event: Event) -> None:
        data = event.data
        self.run, self.steps = str(data["run"]), int(data["steps"])
        self.started = self.started or event.time
        self.outcome, self.reason, self.seconds = "", "", None  # a resumed run goes on
        self.max_staleness = data.get("max_staleness")
        self.objective = str(data.get("objective", ""))
        shares: Mapping[str, float] = data["environments"]
        total = sum(shares.values()) or 1.0
        for name, share in shares.items():
            self.env(name).share = share / total

    def _score(self, data: Mapping[str, Any]) -> None:
        for name, result in data["environments"].items():
            env, score = self.env(name), Score.of(int(data["version"]), result)
            if data["label"] == "before":
                env.before = score
            elif data["label"] == "after":
                env.after = score
            else:
                env.during.append(score)

    def _step(self, version: int, metrics: Mapping[str, float]) -> None:
        self.version = version
        for name, value in metrics.items():
            if name.startswith("env/"):
                _, env, metric = name.split("/", 2)
                self.env(env).series.setdefault(metric, []).append((version, value))
            else:
                self.series.setdefault(name, []).append((version, value))

    def to_json(self) -> dict[str, Any]:
        """What `polyrl show --json` prints."""
        return {
            "run": self.run,
            "outcome": self.outcome or None,
            "reason": self.reason,
            "seconds": self.seconds,
            "step": self.version,
            "steps": self.steps,
            "objective": self.objective,
            "training_seconds": self.last("progress/elapsed_s"),
            "staleness": {"bound": self.max_staleness, "max": max(self.values("learner/staleness_max"), default=None)},
            "logprob_agreement_nats": {
                "mean": _mean(self.values("sync/logprob_error_mean")),
                "worst_mean": max(self.values("sync/logprob_error_mean"), default=None),
                "max": max(self.values("sync/logprob_error_max"), default=None),
            },
            "pause_ms": {"median": _median(self.values("sync/pause_ms")), "max": max(self.values("sync/pause_ms"), default=None)},
            "tokens_per_s": {
                "sampled": _median(self.values("rollout/tokens_per_s")),
                "trained": _median(self.values("learner/tokens_per_s")),
            },
            "environments": {name: env.to_json() for name, env in self.environments.items()},
        }


def fold(events: Iterable[Event]) -> RunState:
    """The state after all of `events`."""
    state = RunState()
    for event in events:
        state.apply(event)
    return state


def points(series: dict[str, list[tuple[int, float]]], metric: str) -> list[tuple[int, float]]:
    """Of one metric; none if no step had it. (A dict that makes its series when asked, `Feed.folded`, has no use for `get`.)"""
    try:
        return series[metric]
    except KeyError:
        return []


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _median(values: list[float]) -> float | None:
    return median(values) if values else None
