"""The live terminal view of a run, drawn from its events alone: in the same process, or by whoever follows a job.

On a terminal a table that redraws itself; in a pipe one plain line per event.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from infra.run_state import EnvState, RunState, Score
from rl_core.events import Event

EVENT_MARK = "@polyrl "
"""Starts the one line per event that the driver of a job prints among its log lines."""

MAX_LISTED = 12
"""Environments that one line names."""

BARS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    """A sink that also shows log lines, and is closed at the end."""

    state: RunState

    def emit(self, event: Event) -> None: ...
    def log(self, line: str) -> None: ...
    def close(self) -> None: ...


def make_view(console: Console | None = None) -> View:
    """The view that fits where standard output goes."""
    console = console or Console(highlight=False)
    return LiveView(console) if console.is_terminal else PlainView(console)


class EventLines:
    """The sink of a job's driver: one line per event on standard output, for a follower to parse."""

    def emit(self, event: Event) -> None:
        sys.stdout.write(EVENT_MARK + event.to_json() + "\n")
        sys.stdout.flush()


def parse_line(line: str) -> Event | None:
    """The event that a line of a job's log carries; None if it is an ordinary line."""
    if not line.startswith(EVENT_MARK):
        return None
    try:
        return Event.from_json(line[len(EVENT_MARK) :])
    except (ValueError, KeyError, TypeError):
        return None  # the log was cut in mid-line


class PlainView:
    """One line per event, for pipes and log files."""

    def __init__(self, console: Console) -> None:
        self.state = RunState()
        self._console = console

    def emit(self, event: Event) -> None:
        self.state.apply(event)
        line = describe(event, self.state)
        if line:
            self._print(f"{time.strftime('%H:%M:%S', time.localtime(event.time))}  {line}")

    def log(self, line: str) -> None:
        self._print(line)

    def close(self) -> None:
        """Nothing is held back."""

    def _print(self, line: str) -> None:
        self._console.print(visible(line), markup=False, highlight=False, soft_wrap=True)


class LiveView:
    """A table that redraws itself once a second; log lines scroll above it."""

    def __init__(self, console: Console) -> None:
        self.state = RunState()
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()
        self._drawn = 0.0

    def emit(self, event: Event) -> None:
        self.state.apply(event)
        if time.monotonic() - self._drawn > 0.2 or event.kind != "step":
            self._draw()

    def log(self, line: str) -> None:
        self._live.console.print(Text(visible(line), style="dim"))

    def close(self) -> None:
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._live.update(render(self.state), refresh=True)


def render(state: RunState) -> RenderableType:
    """The whole view."""
    table = Table(box=None, padding=(0, 1), header_style="bold", expand=False)
    for title in ("environment", "reward", "", "held-out before", "after", "groups", "share", "tok/s", "stale", "MTP acc", "tok/step"):
        table.add_column(title, justify="left" if title in ("environment", "") else "right", no_wrap=True)
    for env in state.environments.values():
        table.add_row(*env_cells(env))
    notes = (Text(f"! {visible(note)}", style="yellow") for note in state.notes[-3:])
    return Group(header(state), table, Text(totals(state), style="dim"), *notes)


def header(state: RunState) -> RenderableType:
    """Run, phase, progress, time left."""
    row = Table.grid(padding=(0, 2))
    style = {"finished": "bold green", "failed": "bold red", "stopped": "bold yellow"}.get(state.outcome, "bold")
    elapsed = None if state.started is None or state.updated is None else state.updated - state.started
    row.add_row(
        Text(f"polyrl {state.run}", style="bold cyan"),
        Text(visible(f"{state.phase}{': ' if state.detail else ''}{state.detail}"), style=style),
        ProgressBar(total=max(state.steps, 1), completed=state.version, width=24),
        f"step {state.version}/{state.steps}",
        f"{clock(elapsed)} elapsed",
        f"{clock(state.last('progress/eta_s'))} of training left" if not state.outcome else "",
    )
    return row


def env_cells(env: EnvState) -> list[str]:
    """One environment as a row of the table."""
    staleness = [env.last("staleness_mean"), max(env.values("staleness_max"), default=None)]
    return [
        visible(env.name),
        number(env.recent("reward"), ".2f"),
        sparkline(env.values("reward"), 24),
        short(env.before),
        short(env.after or (env.during[-1] if env.during else None)),
        number(env.last("groups_trained"), ".0f"),
        f"{number(env.last('share'), '.0%')}/{env.share:.0%}",
        number(env.recent("tokens_per_s"), ",.0f"),
        f"{number(staleness[0], '.2f')}/{number(staleness[1], '.0f')}",
        number(env.recent("mtp_acceptance"), ".0%"),
        number(env.recent("tokens_per_engine_step"), ".2f"),
    ]


def totals(state: RunState) -> str:
    """The figures that belong to no one environment."""
    worst = max(state.values("sync/logprob_error_max"), default=None)
    return (
        f"learner {number(state.last('learner/tokens_per_s'), ',.0f')} tok/s"
        f", engines {number(state.last('rollout/tokens_per_s'), ',.0f')} tok/s"
        f" · logprob agreement {number(state.last('sync/logprob_error_mean'), '.1e')} mean, {number(worst, '.1e')} max nats"
        f" · pause {number(state.last('sync/pause_ms'), '.0f')} ms"
        f" · staleness {number(max(state.values('learner/staleness_max'), default=None), '.0f')} of at most {state.max_staleness}"
        f" · loss {number(state.last('learner/loss'), '.3f')}, gradient {number(state.last('learner/grad_norm'), '.2f')}"
    )


def describe(event: Event, state: RunState) -> str:
    """One event as one line; `state` already knows it."""
    return describe_step(state) if event.kind == "step" else describe_event(event)


def describe_event(event: Event) -> str:
    """One event, a step excepted, as one line."""
    data = event.data
    if event.kind == "run_started":
        return f"run {data['run']}: {data['steps']} steps over {_listed(list(data['environments']), ', ')}"
    if event.kind == "phase":
        return f"{data['name']}: {data['detail']}" if data.get("detail") else str(data["name"])
    if event.kind == "eval":
        scores = [f"{name} {Score.of(0, row)}" for name, row in data["environments"].items()]
        return f"held-out, {data['label']}, version {data['version']}: {_listed(scores, '; ')}"
    if event.kind == "note":
        return f"note: {data['text']}"
    assert event.kind == "run_finished", event.kind
    seconds = f" after {clock(data['seconds'])}" if data.get("seconds") is not None else ""
    return f"{data['outcome']}{seconds}" + (f": {data['reason']}" if data.get("reason") else "")


def _listed(names: Sequence[str], between: str) -> str:
    """The first ones, if there are very many."""
    more = f"{between}and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return between.join(names[:MAX_LISTED]) + more


def describe_step(state: RunState) -> str:
    """The last step as one line."""
    rewards = " ".join(f"{e.name}={number(e.recent('reward', 5), '.2f')}" for e in state.environments.values())
    return (
        f"step {state.version}/{state.steps}  reward {rewards}  stale<={number(state.last('learner/staleness_max'), '.0f')}"
        f"  logprobs {number(state.last('sync/logprob_error_mean'), '.1e')}"
        f"  {number(state.last('rollout/tokens_per_s'), ',.0f')} tok/s sampled"
        f"  {number(state.last('learner/tokens_per_s'), ',.0f')} trained  left {clock(state.last('progress/eta_s'))}"
    )


def sparkline(values: list[float], width: int, low: float = 0.0, high: float = 1.0) -> str:
    """`values` averaged into at most `width` cells, drawn between `low` and `high`."""
    if not values:
        return ""
    cells = min(width, len(values))
    means = []
    for i in range(cells):
        part = values[i * len(values) // cells : (i + 1) * len(values) // cells]
        means.append(sum(part) / len(part))
    return "".join(BARS[min(len(BARS) - 1, max(0, int((m - low) / (high - low) * len(BARS))))] for m in means)


def short(score: Score | None) -> str:
    """A score and half the width of its interval, in points."""
    if score is None:
        return "-"
    return f"{score.pass_rate:.0%} ±{(score.ci95[1] - score.ci95[0]) / 2:.0%}"


def number(value: float | None, spec: str) -> str:
    """A number, or a dash for what is not known."""
    return "-" if value is None else format(value, spec)


def clock(seconds: float | None) -> str:
    """Seconds as minutes and seconds."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def visible(text: str, keep: str = "") -> str:
    """`text` with nothing in it that a terminal obeys or hides: controls, ANSI, direction marks and surrogates become escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
