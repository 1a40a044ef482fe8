"""Parquet segments on disk: written whole or not at all, and, under `store.max_gib`, emptied again from the oldest on.

A segment that was emptied stays as a file without rows: whoever reads meanwhile finds every file that it has listed, and numbers are
given once. What a run learnt about held-out tasks is kept; the ledger, the journal and checkpoints are no segments.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

PASSING = ("train", "honeypot")
"""Labels of rollouts that may go."""

SPARE = 0.9
"""Part of the allowed bytes that a sweep leaves: it then comes once for many segments."""


def write_atomically(path: Path, table: pa.Table) -> None:
    """A Parquet file that appears whole or not at all, also if the machine stops now."""
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)


def list_segments(folder: Path) -> list[Path]:
    """Those that are whole, oldest first."""
    return sorted(folder.glob("part-*.parquet"), key=number_of)


def number_of(segment: Path) -> int:
    """part-00007.parquet -> 7."""
    return int(segment.stem.removeprefix("part-"))


class Retention:
    """Holds the segments of one folder under so many bytes, as far as that is possible without held-out rollouts."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        there = list_segments(folder)
        self._max, self._size = max_bytes, sum(p.stat().st_size for p in there)
        self._full = deque(there)  # oldest first; those that a sweep has been through are gone from here

    def written(self, segment: Path) -> str:
        """There is a new one. A sentence if others were emptied for it, else ""; the new one itself stays."""
        self._size += segment.stat().st_size
        rows = segments = freed = 0
        if self._size > self._max:
            while self._full and self._size > SPARE * self._max:
                gone, smaller = empty(self._full.popleft())
                rows, segments, freed = rows + gone, segments + bool(gone), freed + smaller
                self._size -= smaller
        self._full.append(segment)
        if not rows:
            return ""
        return (
            f"store.max_gib: {rows:,} rollouts of training were removed, the oldest, with {segments} segments and {freed / 2**20:.1f} MiB; "
            f"the ledger still says what became of each"
        )


def empty(segment: Path) -> tuple[int, int]:
    """Remove its rollouts of training: (how many, bytes that this made free). A segment without any is not touched."""
    table = pq.read_table(segment)
    kept = table.filter(pc.invert(pc.is_in(table["label"], pa.array(PASSING))))
    if kept.num_rows == table.num_rows:
        return 0, 0
    before = segment.stat().st_size
    write_atomically(segment, kept)
    return table.num_rows - kept.num_rows, before - segment.stat().st_size


__all__ = ["Retention", "list_segments", "number_of", "write_atomically"]
