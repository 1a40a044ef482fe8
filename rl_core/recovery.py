"""What an earlier process of this run left to do, from its ledger and its journal.

    ledger: ready            + journal -->  back into the queue
    ledger: drawn, finished  + journal -->  judged as the loop would have, then into the queue or filtered
    ledger: drawn, cut off             -->  the same task starts again, as its next attempt

Tickets stay, so the order of start stays, and with it the staleness bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from rl_core.journal import Journal
from rl_core.ledger import Ledger, State
from rl_core.mixer import Mixer
from rl_core.seams import GroupResult, Ref
from rl_core.types import Group, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """Where the loop takes up."""

    ready: dict[int, GroupResult] = field(default_factory=dict)  # by ticket
    cut_off: dict[int, Task] = field(default_factory=dict)  # by ticket; to be started again
    overtakers: tuple[int, ...] = ()
    reusable: tuple[GroupResult, ...] = ()  # trained, and may train once more

    @property
    def queue(self) -> dict[int, GroupResult | None]:
        """What the replay queue starts with."""
        return {**self.ready, **dict.fromkeys(self.cut_off)}


def recover(
    ledger: Ledger,
    journal: Journal,
    mixer: Mixer,
    *,
    own: Callable[[Group], Ref],
    unusable: Callable[[GroupResult], str],
    reusable: Mapping[str, int] | None = None,
) -> Unfinished:
    """Settle every open task of the ledger and bring the mixer to where it was. `own` makes a reference to a group.

    `reusable` are groups that have trained and may once more, with their uses.
    """
    entries, reusable = ledger.open(), reusable or {}
    groups = journal.read([*(e.group_id for e in entries), *reusable])
    again = [replace(GroupResult.of(groups[name], 0.0, own(groups[name])), uses=uses) for name, uses in reusable.items() if name in groups]
    ready: dict[int, GroupResult] = {}
    cut_off: dict[int, Task] = {}
    for entry in entries:
        group = groups.get(entry.group_id)
        if group is not None and (group.task.env, group.task.key) == (entry.env, entry.task_key):
            result = GroupResult.of(group, 0.0, own(group))
            if entry.state is State.DRAWN:
                if reason := unusable(result):
                    ledger.filter(entry.group_id, reason)
                    continue
                ledger.ready(entry.group_id)
            ready[entry.ticket] = result
            continue
        if entry.state is State.READY:
            raise RuntimeError(f"group {entry.group_id} is ready in the ledger and missing in the journal; its folder is damaged")
        task = mixer.task_at(entry.env, entry.position) if entry.env in mixer.streams else None
        if task is None or task.key != entry.task_key:
            ledger.abandon(entry.group_id, "its task source no longer gives this task")
            continue
        ledger.restart(entry.group_id, "the run was cut off")
        cut_off[entry.ticket] = task
    running = [e.env for e in entries if e.ticket in ready or e.ticket in cut_off]
    for env, counts in ledger.counts().items():
        if env in mixer.streams:
            mixer.resume(
                env, position=counts["position"], running=running.count(env), trained=counts[State.TRAINED], filtered=counts[State.FILTERED]
            )  # fmt: skip
    for env, stream in mixer.streams.items():
        if stream.curriculum is not None:
            stream.curriculum.restore(ledger.scores(env))
    oldest = min(cut_off, default=None)
    overtakers = () if oldest is None else tuple(ledger.trained_after(oldest))
    return Unfinished(ready=ready, cut_off=cut_off, overtakers=overtakers, reusable=tuple(again))
