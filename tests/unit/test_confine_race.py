"""A process that is to end takes along what it has started, even while one of its threads goes on starting more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, threading, time
from environments.confine import Confinement

own = Confinement()
if own._group is None and os.getuid() == 0:
    os._exit(77)  # nothing here can refuse a process of root

def fork_on():
    while True:
        try:
            if os.fork() == 0:
                time.sleep(600)
                os._exit(0)
        except OSError:
            time.sleep(0.001)

for _ in range(2):
    threading.Thread(target=fork_on, daemon=True).start()
time.sleep(0.3)
own.kill_others()
os._exit(75)
"""


def test_a_host_that_ends_leaves_no_process_behind_while_its_threads_fork(tmp_path: Path) -> None:
    mark = f"--mark={tmp_path.name}-{id(tmp_path)}"
    done = subprocess.run([sys.executable, "-c", PROGRAM, mark], timeout=60, check=False, cwd=Path(__file__).parents[2])
    if done.returncode == 77:
        pytest.skip("no control group can be made here, and nothing else bounds root")
    assert done.returncode == 75
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in read(p) and state(p.parent) not in "ZX"]
    for path in left:
        subprocess.run(["kill", "-9", path.parent.name], check=False)
    assert not left


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def state(folder: Path) -> str:
    try:
        return (folder / "stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return "X"
