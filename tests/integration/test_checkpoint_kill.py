"""SIGKILL while a checkpoint is written: the newest one is always whole, and a learner that goes on from it does not know of any death."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.integration.learner_ranks import ROOT

KILLS = 200 if os.environ.get("POLYRL_LONG_TESTS") else 4


def test_learners_killed_while_they_save_end_where_one_that_nobody_disturbed_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.killed_saves", str(tmp_path), str(KILLS), "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60 + 30 * KILLS, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    deaths = json.loads(done.stdout.splitlines()[-1])
    assert deaths["killed"] >= KILLS // 2, "those at a file operation of the save cannot miss it"
    assert deaths["amid"] > 0, "some saves had begun and not come to their end"

    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    wanted = {row["version"]: row for row in seen if row["who"] == "undisturbed"}
    saved = 0
    for row in seen:
        if row["who"] == "born":
            assert row["version"] >= saved, "a checkpoint that was saved is gone"
        if row["who"] == "saved":
            saved = row["version"]
        assert row["digest"] == wanted[row["version"]]["digest"], row
        assert row.get("loss", wanted[row["version"]]["loss"] if row["version"] else None) == wanted[row["version"]].get("loss"), row
    assert sum(row["who"] == "born" for row in seen) == KILLS + 1
