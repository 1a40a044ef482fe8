"""Drafts: rollouts that are under way, and finished ones of groups that are not, kept where the death of their worker does not reach.

    turn 0 --> turn 1 --> some tokens of turn 2 --> more of them --> turn 2 --> end (the verdict)        flushed twice a second

A group is written from the second flush on that comes upon it: one that ends within half a second is never written. Each worker writes a
file of its own, anew in each of its lives. Whoever takes up a group reads all files, and of each rollout the draft that was written last.
The tokens keep the versions and logprobs under which they were sampled. Files are not forced to disk: a power cut may take drafts, and
then rollouts start again; what a run cannot lose is in the journal.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rl_core.journal import SCHEMA, batch_completions, checksum, completion_batch, record_batches, rollout_header, to_rollout
from rl_core.types import CUT_OFF, Completion, Rollout, Task, VersionSpan, add_positions

SEGMENT_BYTES = 16 << 20
"""A worker begins another file beyond this size; older ones are deleted when all their groups have ended."""

Drafts = dict[int, "Draft"]
"""By the rollout's index in its group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What is left of one rollout."""

    completions: tuple[Completion, ...]
    """Its turns. The last may be cut off: then its finish reason is CUT_OFF."""
    at: float  # seconds since the epoch: when it was written
    end: dict[str, Any] | None = None
    """Set when the rollout was finished: its header (rl_core/journal.py)."""

    def rollout(self, task: Task) -> Rollout | None:
        """The finished rollout of `task`, or None. After a power cut a group's name may come again with another task."""
        if self.end is None or self.end["task"] != [task.env, task.key]:
            return None
        return to_rollout(self.end, self.completions, env=task.env, task_key=task.key)

    @property
    def min_version(self) -> int | None:
        return min((s.version for c in self.completions for s in c.spans), default=None)


@dataclass(frozen=True, slots=True)
class _Turn:
    """Some of a turn, or all."""

    index: int
    turn: int
    part: Completion
    known: int
    start: int

    def head(self) -> dict[str, Any]:
        return {"turn": self.turn, "start": self.start, "known": self.known}

    def row(self) -> Completion:
        return replace(self.part, prompt_ids=self.part.prompt_ids[:0] if self.start else self.part.prompt_ids[self.known :])


@dataclass(frozen=True, slots=True)
class _End:
    """A verdict."""

    index: int
    rollout: Rollout

    def head(self) -> dict[str, Any]:
        end = rollout_header(self.rollout) | {"task": [self.rollout.env, self.rollout.task_key]}
        return {"index": self.index, "turns": len(self.rollout.completions), "end": end}


class DraftFile:
    """The writer: one worker in one of its lives. What is added is on its way to the disk with the next flush()."""

    def __init__(self, folder: Path, worker: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._worker = folder, worker
        self._waiting: dict[str, list[_Turn | _End]] = defaultdict(list)  # by group
        self._met: set[str] = set()
        """Groups that a flush has come upon."""
        self._open()

    def add(self, group_id: str, index: int, turn: int, part: Completion, *, known: int = 0, start: int = 0) -> None:
        """Tokens of a turn: all, or those from `start` on. The first `known` ids of its prompt are those of the turns before."""
        self._waiting[group_id].append(_Turn(index, turn, part, known, start))

    def end(self, group_id: str, index: int, rollout: Rollout) -> None:
        """The rollout has its verdict; its turns have been added."""
        self._waiting[group_id].append(_End(index, rollout))

    def forget(self, group_id: str) -> None:
        """The group is whole and handed on: what of it is not written yet need not be."""
        self._waiting.pop(group_id, None)
        self._met.discard(group_id)

    def flush(self) -> None:
        """One record with all that waits, but for groups that no flush has come upon before."""
        ready = {name: self._waiting.pop(name) for name in self._met.intersection(self._waiting)}
        self._met.update(self._waiting)
        if not ready:
            return
        heads: list[dict[str, Any]] = []
        rows: list[tuple[int, Completion]] = []
        for group_id, entries in ready.items():
            for entry in entries:
                heads.append({"group": group_id, **entry.head()})
                if isinstance(entry, _Turn):
                    rows.append((entry.index, entry.row()))
        batch, text = completion_batch(rows), json.dumps({"at": time.time(), "heads": heads})
        self._writer.write_batch(batch, custom_metadata={"draft": text, "checksum": str(checksum(batch, text.encode()))})
        self._file.flush()
        if self._file.tell() > SEGMENT_BYTES:
            self.close()
            self._open()

    def close(self) -> None:
        self._writer.close()
        self._file.close()

    def _open(self) -> None:
        last = max((number(path) for path in self._folder.glob(f"{self._worker}.*.arrow")), default=-1)
        self._file: Any = (self._folder / f"{self._worker}.{last + 1:06d}.arrow").open("wb")
        self._writer: Any = pa.ipc.new_stream(self._file, SCHEMA)  # not compressed: 0.1 ms a record, not 0.4


def read_drafts(folder: Path, groups: Collection[str]) -> dict[str, Drafts]:
    """{group: {rollout's index: its newest draft}} of those of `groups` that have any."""
    newest: dict[str, Drafts] = {}
    for worker in {path.name.split(".")[0] for path in folder.glob("*.arrow")}:
        for (group_id, index), draft in read_worker(sorted(folder.glob(f"{worker}.*.arrow"), key=number), set(groups)).items():
            mine = newest.setdefault(group_id, {})
            if index not in mine or draft.at > mine[index].at:
                mine[index] = draft
    return newest


def read_worker(paths: Sequence[Path], groups: Collection[str]) -> dict[tuple[str, int], Draft]:
    """The drafts in one worker's files, oldest first, each folded from its records."""
    drafts: dict[tuple[str, int], Draft] = {}
    for at, head, row in (record for path in paths for record in records(path)):
        if head["group"] not in groups:
            continue
        if row is None:
            key = head["group"], head["index"]
            if (draft := drafts.get(key)) is not None and len(draft.completions) == head["turns"]:
                drafts[key] = replace(draft, end=head["end"], at=at)
            continue
        index, completion = row
        key = head["group"], index
        before = drafts[key].completions if key in drafts and drafts[key].end is None else ()
        if (turns := folded(before, completion, head["turn"], head["start"], head["known"])) is not None:
            drafts[key] = Draft(completions=turns, at=at)
        else:
            drafts.pop(key, None)
    return drafts


def records(path: Path) -> Iterator[tuple[float, dict[str, Any], tuple[int, Completion] | None]]:
    """(when, head, (rollout, tokens) of a turn or None of an end), in the order in which they happened."""
    for metadata, batch in record_batches(path):
        written, rows = json.loads(metadata["draft"]), batch_completions(batch)
        for head in written["heads"]:
            yield written["at"], head, None if "end" in head else next(rows)


def folded(before: tuple[Completion, ...], part: Completion, turn: int, start: int, known: int) -> tuple[Completion, ...] | None:
    """`before` with one record more, or None where what it goes on from is missing. A turn written again replaces it and all after it."""
    if start:
        follows = len(before) == turn + 1 and len(before[turn].token_ids) == start
        return (*before[:turn], joined(before[turn], part)) if follows else None
    if len(before) < turn or (known and not turn):
        return None
    if known:
        earlier = before[turn - 1]
        ids = np.concatenate([earlier.prompt_ids, earlier.token_ids])[:known]
        part = replace(part, prompt_ids=np.concatenate([ids, part.prompt_ids]))
    return (*before[:turn], part)


def prune(folder: Path, keep: Collection[str]) -> None:
    """Delete files that hold none of the groups in `keep`, but for the newest of each worker, which it may be writing."""
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("*.arrow"), key=number):
        newest[path.name.split(".")[0]] = path
    for path in set(folder.glob("*.arrow")) - set(newest.values()):
        if not any(head["group"] in keep for _, head, _ in records(path)):
            path.unlink(missing_ok=True)


def number(path: Path) -> int:
    return int(path.name.split(".")[1])


def joined(first: Completion, rest: Completion) -> Completion:
    """One turn from two engines' halves: ids, logprobs and versions of each as they were sampled."""
    split = len(first.token_ids)
    spans = list(first.spans)
    for s in rest.spans:
        if spans and spans[-1].version == s.version and spans[-1].stop == s.start + split:
            spans[-1] = replace(spans[-1], stop=s.stop + split)
        else:
            spans.append(VersionSpan(start=s.start + split, stop=s.stop + split, version=s.version))
    return Completion(
        prompt_ids=first.prompt_ids,
        token_ids=np.concatenate([first.token_ids, rest.token_ids]),
        logprobs=np.concatenate([first.logprobs, rest.logprobs]),
        spans=tuple(spans),
        finish_reason=rest.finish_reason,
        engine_steps=first.engine_steps + rest.engine_steps,
        drafted=first.drafted + rest.drafted,
        accepted=first.accepted + rest.accepted,
        forced=(*first.forced, *(split + place for place in rest.forced)),
        positions=add_positions([first.positions, rest.positions]),
        state_age_sum=first.state_age_sum + rest.state_age_sum,
        state_age_max=max(first.state_age_max, rest.state_age_max),
    )


__all__ = ["CUT_OFF", "Draft", "DraftFile", "Drafts", "joined", "prune", "read_drafts"]
