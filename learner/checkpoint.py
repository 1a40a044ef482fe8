"""Checkpoints that are whole or not there.

    checkpoints/
        step-000050/
            model/        what Transformers and vLLM load, tokenizer included
            optimizer/    DeepSpeed's own files, one per rank: optimizer state and full-precision weights
            rank-0.pt     random state of each rank, and the gradient norms that its next steps are judged by
            state.json    version, and what the files above depend on
        latest            name of the newest complete folder; written last

A folder is written under a temporary name, flushed to disk and renamed. A crash at any moment leaves `latest` on a good one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LATEST = "latest"
STATE = "state.json"


def folder_name(version: int) -> str:
    """Of a version's folder."""
    return f"step-{version:06d}"


def begin(root: Path, version: int) -> Path:
    """An empty temporary folder for the checkpoint of `version`; what crashes left over is removed."""
    for old in root.glob(".step-*.partial"):
        shutil.rmtree(old, ignore_errors=True)
    folder = root / f".step-{version:06d}.partial"
    folder.mkdir(parents=True)
    return folder


def to_disk(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(root: Path, folder: Path, version: int, state: Mapping[str, Any], *, flush: Callable[[Path], None] = to_disk) -> Path:
    """Make what `begin` returned the newest checkpoint; returns its final folder. `flush` forces a file or folder to the disk."""
    (folder / STATE).write_text(json.dumps({"version": version, **state}, indent=1))
    for directory, _, files in os.walk(folder):
        for name in files:
            flush(Path(directory, name))
        flush(Path(directory))
    final = root / folder_name(version)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    flush(root)
    pointer = root / f".{LATEST}.partial"
    pointer.write_text(final.name)
    flush(pointer)
    pointer.rename(root / LATEST)
    flush(root)
    return final


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`, or None if there is none."""
    pointer = root / LATEST
    if not pointer.is_file():
        return None
    folder = root / pointer.read_text().strip()
    if not (folder / STATE).is_file():
        raise ValueError(f"{pointer} names {folder.name!r}, which is not a checkpoint; write the name of another folder of {root} into it")
    return folder


def read_state(folder: Path, wanted: Mapping[str, Any]) -> int:
    """The version of the checkpoint in `folder`. ValueError if its files do not fit a run with the settings `wanted`."""
    state = json.loads((folder / STATE).read_text())
    for key, value in wanted.items():
        if state.get(key) != value:
            raise ValueError(
                f"checkpoint {folder} was written with {key}={state.get(key)}, the run has {value}; go on with the former, "
                f"or start a new run from its weights with model.path={folder / 'model'}"
            )
    return int(state["version"])
