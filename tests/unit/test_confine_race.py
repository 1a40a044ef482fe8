"""A process that is to end takes along what it has started, even while one of its threads goes on starting more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

START = """
import os, subprocess, sys, threading, time
from environments.confine import Confinement

own = Confinement()
if own._group is None and os.getuid() == 0:
    os._exit(77)  # nothing here can refuse a process of root
"""

FORKS_ON = """
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
if "let_end" in sys.argv:
    own.let_end()
os._exit(75)
"""

STARTS_A_THREAD = """
if own._group is None:
    os._exit(77)

def starts():
    try:
        threading.Thread(target=int).start()
    except RuntimeError:
        return False
    return True

child = subprocess.Popen(["sleep", "600"])
own.kill_others()
assert child.wait(5) == -9
assert not starts()
own.let_end()
assert starts()
os._exit(75)
"""


def run(program: str, *arguments: str) -> None:
    command = [sys.executable, "-c", START + program, *arguments]
    done = subprocess.run(command, timeout=60, check=False, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE)
    if done.returncode == 77:
        pytest.skip("no control group can be made here, and nothing else bounds root")
    assert done.returncode == 75, done.stderr


def test_ray_can_start_the_thread_with_which_it_ends_a_host() -> None:
    run(STARTS_A_THREAD)


@pytest.mark.parametrize("end", ["by itself", "let_end"])
def test_a_host_that_ends_leaves_no_process_behind_while_its_threads_fork(tmp_path: Path, end: str) -> None:
    mark = f"--mark={tmp_path.name}-{id(tmp_path)}"
    run(FORKS_ON, mark, end)
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
