"""The journal: finished groups, on disk before anybody counts on them.

    group --> append (flushed) --> ledger: ready --> queue --> trained --> checkpoint --> pruned

With the ledger it makes a run restartable: groups that waited in the queue go back there, and steps after the last checkpoint
are done again from the very groups that made them. Arrow stream files: appended to, readable up to where a crash cut them off.
One record batch for each group, one row for each completion; the rest is JSON beside it. Nothing here is ever executed.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from rl_core.types import Completion, Group, Message, Rollout, Task, Turn, Verdict, VersionSpan, add_positions, flat

SEGMENT_BYTES = 64 << 20
"""A segment is closed beyond this size; only closed ones can be pruned."""

SCHEMA = pa.schema(
    [
        ("rollout", pa.int32()),  # index within the group
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("meta", pa.string()),  # JSON: spans, finish_reason, engine_steps, drafted, accepted, forced, state ages
    ]
)
OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)


class Journal(Protocol):
    """Where finished groups survive."""

    def append(self, group: Group) -> None:
        """Durable when this returns. A group appended again replaces the earlier one."""
        ...

    def read(self, names: Collection[str]) -> dict[str, Group]:
        """Those of the groups `names` that are there."""
        ...

    def prune(self, keep: Collection[str]) -> None:
        """Free what holds none of the groups in `keep`."""
        ...


class GroupJournal:
    """Segments in a folder. Thread-safe; one process writes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        self._file: Any = None
        self._writer: Any = None
        self._held: dict[Path, set[str]] = {path: {name for name, _ in read_segment(path, None)} for path in segments(folder)}

    def append(self, group: Group) -> None:
        with self._lock:
            if self._writer is None or self._file.tell() > SEGMENT_BYTES:
                self._roll()
            batch, text = to_batch(group), header(group)
            self._writer.write_batch(batch, custom_metadata={"group": text, "checksum": str(checksum(batch, text.encode()))})
            self._file.flush()
            os.fsync(self._file.fileno())
            self._held[Path(self._file.name)].add(group.id)

    def read(self, names: Collection[str]) -> dict[str, Group]:
        wanted = set(names)
        found: dict[str, Group | None] = {}
        with self._lock:
            for path, held in self._held.items():  # oldest first: what was appended last counts
                if wanted & held:
                    found |= dict(read_segment(path, wanted))
        return {name: group for name, group in found.items() if group is not None}

    def prune(self, keep: Collection[str]) -> None:
        kept = set(keep)
        with self._lock:
            self._close_segment()
            for path in [p for p, held in self._held.items() if not held & kept]:
                path.unlink(missing_ok=True)
                del self._held[path]

    def close(self) -> None:
        with self._lock:
            self._close_segment()

    def _roll(self) -> None:
        self._close_segment()
        last = max((int(p.stem) for p in self._held), default=-1)
        path = self._folder / f"{last + 1:06d}.arrow"
        self._file = path.open("wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA, options=OPTIONS)
        self._held[path] = set()

    def _close_segment(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._writer = self._file = None


def read_groups(folder: Path, names: Collection[str]) -> dict[str, Group]:
    """Those of the groups `names` that are in the journal in `folder`, whoever writes it."""
    wanted = set(names)
    found = {name: group for path in segments(folder) for name, group in read_segment(path, wanted) if group is not None}
    return {name: found[name] for name in names if name in found}


def segments(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("*.arrow"))


def read_segment(path: Path, wanted: Collection[str] | None) -> Iterator[tuple[str, Group | None]]:
    """(name, group) of every whole group in a segment; the group itself only of those `wanted`. Stops where a crash cut it off."""
    for metadata, batch in record_batches(path):
        head = json.loads(metadata["group"])
        name = str(head["id"])
        yield name, from_batch(head, batch) if wanted is not None and name in wanted else None


def record_batches(path: Path) -> Iterator[tuple[Any, pa.RecordBatch]]:
    """(metadata, batch) of every whole record batch of an Arrow stream file up to where a crash tore it.

    A process that dies leaves half a batch; a power cut may leave zeros in place of one.
    """
    with pa.OSFile(str(path)) as file:
        try:
            reader = pa.ipc.open_stream(file, options=pa.ipc.IpcReadOptions(use_threads=False))
            while True:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
                batch.validate(full=True)  # offsets that lead nowhere would crash whoever follows them
                text = b"".join(value for key, value in metadata.items() if key != b"checksum")
                if int(metadata["checksum"]) != checksum(batch, text):
                    return
                yield metadata, batch
        except (StopIteration, pa.ArrowException, OSError, ValueError, KeyError):
            return


def checksum(batch: pa.RecordBatch, text: bytes) -> int:
    """CRC of a batch and of the text beside it."""
    crc = zlib.crc32(text)
    for name in ("prompt_ids", "token_ids", "logprobs"):
        for numbers in (batch[name].offsets, batch[name].values):
            crc = zlib.crc32(numbers.to_numpy(zero_copy_only=False).tobytes(), crc)
    # As a list each: joined, two texts whose border moved would look the same.
    return zlib.crc32(repr((batch["rollout"].to_pylist(), batch["meta"].to_pylist())).encode(), crc)


def header(group: Group) -> str:
    """All of a group but its tokens."""
    return json.dumps({"id": group.id, "task": flat(group.task), "rollouts": [rollout_header(r) for r in group.rollouts]})


def rollout_header(rollout: Rollout) -> dict[str, Any]:
    """All of a rollout but its tokens and its task, as JSON values."""
    return {
        "id": rollout.id, "worker": rollout.worker, "started_at": rollout.started_at, "seconds": rollout.seconds,
        "verdict": flat(rollout.verdict), "messages": [[m.role, m.content] for m in rollout.messages],
        "turns": [flat(t) | {"tool_calls": [flat(c) for c in t.tool_calls]} for t in rollout.turns],
        "truncated": rollout.truncated, "thinking_tokens": rollout.thinking_tokens,
    }  # fmt: skip


def to_rollout(head: dict[str, Any], completions: Sequence[Completion], *, env: str, task_key: str) -> Rollout:
    """A rollout from its header and its tokens."""
    return Rollout(
        id=head["id"],
        env=env,
        task_key=task_key,
        completions=tuple(completions),
        messages=tuple(Message(role=role, content=content) for role, content in head["messages"]),
        verdict=Verdict.from_dict(head["verdict"]),
        turns=tuple(Turn.from_dict(t) for t in head["turns"]),
        truncated=head["truncated"],
        thinking_tokens=head["thinking_tokens"],
        worker=head["worker"],
        started_at=head["started_at"],
        seconds=head["seconds"],
    )


def to_batch(group: Group) -> pa.RecordBatch:
    """One row for each completion."""
    return completion_batch([(index, c) for index, r in enumerate(group.rollouts) for c in r.completions])


def completion_batch(rows: Sequence[tuple[int, Completion]]) -> pa.RecordBatch:
    """(rollout, completion) as rows of SCHEMA."""
    meta = [
        json.dumps(
            {
                "spans": [[s.start, s.stop, s.version] for s in c.spans], "finish_reason": c.finish_reason,
                "engine_steps": c.engine_steps, "drafted": c.drafted, "accepted": c.accepted, "forced": list(c.forced),
                "positions": c.positions,
                "state_age_sum": c.state_age_sum, "state_age_max": c.state_age_max,
            }
        )
        for _, c in rows
    ]  # fmt: skip
    columns = [
        pa.array([index for index, _ in rows], pa.int32()),
        lists([c.prompt_ids for _, c in rows], np.int32),
        lists([c.token_ids for _, c in rows], np.int32),
        lists([c.logprobs for _, c in rows], np.float32),
        pa.array(meta, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def batch_completions(batch: pa.RecordBatch) -> Iterator[tuple[int, Completion]]:
    """(rollout, completion) of each row."""
    for i, (index, meta) in enumerate(zip(batch["rollout"].to_pylist(), batch["meta"].to_pylist(), strict=True)):
        values = json.loads(meta)
        spans = tuple(VersionSpan(start=a, stop=b, version=v) for a, b, v in values.pop("spans"))
        forced = tuple(values.pop("forced"))
        ids = {name: batch[name][i].values.to_numpy(zero_copy_only=False).copy() for name in ("prompt_ids", "token_ids", "logprobs")}
        positions = add_positions([values.pop("positions")])
        yield index, Completion(**ids, spans=spans, forced=forced, positions=positions, **values)


def lists(arrays: Sequence[Any], dtype: Any) -> pa.ListArray:
    """A column of lists, without a Python object per number."""
    offsets = np.cumsum([0, *(len(a) for a in arrays)], dtype=np.int32)
    values = np.concatenate([np.asarray(a, dtype) for a in arrays]) if arrays else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def from_batch(head: dict[str, Any], batch: pa.RecordBatch) -> Group:
    """The group again, number for number."""
    completions: list[list[Completion]] = [[] for _ in head["rollouts"]]
    for index, completion in batch_completions(batch):
        completions[index].append(completion)
    task = Task(**head["task"])
    rollouts = [to_rollout(r, mine, env=task.env, task_key=task.key) for r, mine in zip(head["rollouts"], completions, strict=True)]
    return Group(id=head["id"], task=task, rollouts=tuple(rollouts))


__all__ = ["GroupJournal", "Journal"]
