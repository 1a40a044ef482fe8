"""A tracker beside a run: it may be slow, raise or hang; the run neither waits nor stops, and a person is told once.

emit(event) --> queue of at most QUEUE_SIZE --> thread --> tracker
                full: the event is dropped                 raises: the tracker is closed, later events are dropped
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from infra.trackers.figures import figures
from rl_core.config import ConfigError, RunConfig
from rl_core.events import Event

QUEUE_SIZE = 4096
"""Events; some kilobytes each. A run makes one per step."""

CLOSE_S = 20.0
"""How long the end of a run waits for what its trackers still have to write, all together."""


class Tracker(Protocol):
    """Where figures go. Called from one thread; whatever it raises is told once, and it is not called again."""

    def log(self, version: int, metrics: Mapping[str, float]) -> None:
        """Figures of a policy version; versions of evaluations may come late."""

    def finish(self, outcome: str) -> None:
        """The run is over: "finished", "stopped" or "failed"."""


class Background:
    """An event sink that feeds one tracker. `note` is called from `emit` and `close`, in the caller's thread, at most once."""

    def __init__(self, name: str, make: Callable[[], Tracker], note: Callable[[str], None]) -> None:
        self.name, self._make, self._note = name, make, note
        self._events: queue.Queue[Event | None] = queue.Queue(QUEUE_SIZE)
        self._warning = ""  # what a person is still to be told
        self._warned = False
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def emit(self, event: Event) -> None:
        """Returns at once."""
        if figures(event) is not None or event.kind == "run_finished":
            try:
                self._events.put_nowait(event)
            except queue.Full:
                self._dropped += 1
                self._warn(f"tracker {self.name} is slower than the run: figures are left out; the run's own store has them all")
        self._tell()

    def close(self, seconds: float = CLOSE_S) -> None:
        """Wait until the tracker has written what it was given, but no longer than `seconds`."""
        try:
            self._events.put_nowait(None)
        except queue.Full:
            seconds = 0.0  # it has not kept up so far
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"tracker {self.name} had not written everything when the run ended")
        self._tell()

    def _work(self) -> None:
        """In the thread."""
        try:
            tracker = self._make()
            while (event := self._events.get()) is not None:
                if said := figures(event):
                    tracker.log(*said)
                elif event.kind == "run_finished":
                    tracker.finish(str(event.data["outcome"]))
        except Exception as error:  # noqa: BLE001 (a library of others, on a network of others: whatever it is, the run goes on)
            said_error = " ".join(str(error).split())[:300]
            self._warn(f"tracker {self.name} failed and is left out: {type(error).__name__}: {said_error}")
            while self._events.get() is not None:  # what still comes has nowhere to go, and must not fill the queue
                pass

    def _warn(self, text: str) -> None:
        self._warning = self._warning or text

    def _tell(self) -> None:
        """`note` makes an event of its own, which comes back here: by then there is nothing left to tell."""
        if self._warning and not self._warned:
            self._warned = True
            self._note(self._warning)


TRACKERS = {
    "tensorboard": ("infra.trackers.tensorboard", "TensorBoard", "tensorboardX"),
    "wandb": ("infra.trackers.wandb", "WeightsAndBiases", "wandb"),
    "mlflow": ("infra.trackers.mlflow", "MLflow", "mlflow"),
}
"""Name in the config -> module and class, imported when they are wanted, and the package that they need."""


def check_trackers(config: RunConfig) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in config.trackers.use:
        package = TRACKERS[name][2]
        if find_spec(package) is None:
            raise ConfigError(f"trackers.use names {name}, but {package} is not installed; pip install 'polyrl[trackers]'")


def open_trackers(config: RunConfig, run_dir: Path, settings: dict[str, Any], note: Callable[[str], None]) -> list[Background]:
    """A sink for each tracker of the config. `settings` are what the tracker shows as the run's configuration."""

    def make(name: str) -> Tracker:
        module, kind, _ = TRACKERS[name]
        tracker: Tracker = getattr(import_module(module), kind)(config, run_dir, settings)
        return tracker

    return [Background(name, partial(make, name), note) for name in config.trackers.use]
