"""What must hold in every run, whatever happens: kept by a bookkeeper who trusts none of the parts.

token      no trained token is older than max_staleness versions, and none comes from the future
slots      never more groups in flight than the budget has slots, and no slot is lost for ever
weights    a version that was published means the same weights in every engine and in every life
live       a publication has ended only when every engine has the weights
ledger     every task drawn is in exactly one state
lineage    the last weights are those of the ledger's steps, in order
steps      every step is recorded once
progress   a run ends, in bounded time and in a bounded number of lives
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rl_core.config import LoopConfig
from rl_core.ledger import Ledger, State, read_balance
from rl_core.types import Group

SLOTS_BACK_S = 150.0
"""Virtual seconds within which a free slot must be in use again while no environment is paused: worst queue and link, with a margin."""

PAUSED_S = 1500.0
"""For so long after the breaker paused an environment, idle slots say nothing."""


class Violation(AssertionError):
    """A rule was broken. The message begins with the rule's name."""


def rule(name: str, holds: bool, what: str) -> None:
    """Raise Violation unless `holds`."""
    if not holds:
        raise Violation(f"{name}: {what}")


def next_weights(weights: str, names: Iterable[str]) -> str:
    """The weights that a step over the groups `names` makes of `weights`: two histories never meet again in the same weights."""
    return hashlib.sha256(" ".join([weights, *names]).encode()).hexdigest()


class Witness:
    """Told by the parts what they do; knows the rules, not the code."""

    def __init__(self, cfg: LoopConfig) -> None:
        self._cfg = cfg
        fresh = cfg.groups_per_step - cfg.reuse
        window = min(cfg.window, cfg.max_staleness * fresh + 1)
        self._fresh, self._slots = fresh, (cfg.max_staleness + 1) * fresh - (window - 1)
        self._weights: dict[int, str] = {0: "seed"}
        self._in_flight: set[str] = set()
        self._training: dict[int, list[str]] = {}  # by the version that they made, until it is live
        self._went_back: dict[int, int] = {}
        self._short_since: float | None = None
        self._paused_until = 0.0
        self._now: Callable[[], float] = lambda: 0.0
        self.steps: list[int] = []

    def life_begins(self, ledger: Ledger, now: Callable[[], float]) -> None:
        """A new process of the driver, with what the ledger tells it."""
        self._in_flight = {entry.group_id for entry in ledger.open()}
        self._training.clear()
        self._now, self._short_since, self._paused_until = now, None, 0.0

    # --- slots ----------------------------------------------------------------------------------------------------------

    def drawn(self, name: str) -> None:
        self._in_flight.add(name)
        rule("slots", len(self._in_flight) <= self._slots, f"{len(self._in_flight)} groups in flight, there are {self._slots} slots")
        if len(self._in_flight) == self._slots:
            self._short_since = None

    def ended(self, names: Iterable[str]) -> None:
        """These groups are in no place of the machine any more."""
        self._in_flight -= set(names)
        if self._short_since is None:
            self._short_since = self._now()

    def paused(self) -> None:
        """The breaker paused an environment."""
        self._paused_until = self._now() + PAUSED_S

    def look(self) -> None:
        """Called now and then: is a slot lost?"""
        if self._short_since is None or self._now() < self._paused_until:
            return
        idle = self._now() - self._short_since
        rule("slots", idle < SLOTS_BACK_S, f"{self._slots - len(self._in_flight)} slots idle for {idle:.0f} s: they are lost")

    # --- weights and tokens ---------------------------------------------------------------------------------------------

    def loaded(self, version: int, weights: str) -> None:
        """An engine samples from `weights` under the name `version`."""
        known = self._weights.setdefault(version, weights)
        rule("weights", known == weights, f"version {version} means two different weights")

    def went_back(self, version: int, *, to: int) -> None:
        """The weights of `to` are to be `version` too."""
        known = self._went_back.setdefault(version, to)
        rule("weights", known == to, f"version {version} is a return to {to}, and was one to {known}")

    def trains(self, groups: Sequence[Group], version: int) -> None:
        """The learner computes gradients over `groups` on top of `version`."""
        self.look()
        for group in groups:
            for span in (s for r in group.rollouts for c in r.completions for s in c.spans):
                staleness = version - span.version
                rule("token", staleness >= 0, f"{group.id} has tokens of version {span.version}, the learner is at {version}")
                rule("token", staleness <= self._cfg.max_staleness, f"{group.id} has tokens that are {staleness} versions old")

    def trained(self, names: Sequence[str], version: int) -> None:
        """The ledger says so."""
        self._training[version] = list(names)

    def live(self, version: int, engines: Iterable[int | None]) -> None:
        """A publication ended while `engines` had these versions; None: it is down, and loads the newest before it serves."""
        versions = list(engines)
        rule("live", all(v in (version, None) for v in versions), f"version {version} is live, says the pool; the engines have {versions}")
        for older in [v for v in self._training if v <= version]:
            self.ended(self._training.pop(older))

    # --- the whole run --------------------------------------------------------------------------------------------------

    def step(self, version: int) -> None:
        """A step was recorded."""
        self.steps.append(version)

    def balance(self, path: Path) -> None:
        """The ledger adds up, at any moment."""
        for b in read_balance(path):
            total = f"{b.open} open + {b.trained} trained + {b.filtered} filtered + {b.abandoned} abandoned"
            rule("ledger", b.balanced, f"{b.env}: {b.drawn} drawn, but {total}")

    def end(self, ledger: Ledger, checkpoint: tuple[int, str]) -> None:
        """The run says that it is done; `checkpoint` is what is left of it."""
        cfg, lineage, uses = self._cfg, ["seed"], Counter[str]()
        for version in range(1, cfg.steps + 1):
            batch = ledger.batch(version)
            fresh = [name for name in batch if name not in uses]
            wanted = 0 if version in ledger.rollbacks else self._fresh
            rule("lineage", len(fresh) == wanted, f"step {version} has {len(fresh)} fresh groups, wanted {wanted}")
            rule("lineage", len(batch) - len(fresh) <= cfg.reuse, f"step {version} reuses {len(batch) - len(fresh)} groups")
            uses.update(batch)
            lineage.append(next_weights(lineage[-1], batch) if batch else lineage[self._went_back[version]])
        rule("lineage", checkpoint == (cfg.steps, lineage[-1]), "the last checkpoint does not hold what the ledger's steps make")
        most = cfg.max_uses if cfg.reuse else 1
        rule(
            "lineage",
            max(uses.values(), default=0) <= most,
            f"a group trained {max(uses.values(), default=0)} times, at most {most} wanted",
        )
        rule("steps", sorted(self.steps) == list(range(1, cfg.steps + 1)), f"recorded were {sorted(self.steps)}")
        rule("ledger", not ledger.open(), "tasks are left without a final state")
        trained = sum(counts[State.TRAINED] for counts in ledger.counts().values())
        rule("ledger", trained == (cfg.steps - len(ledger.rollbacks)) * self._fresh, f"{trained} groups trained")
