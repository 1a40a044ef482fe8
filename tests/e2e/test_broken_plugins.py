"""One run of a built-in, an installed plugin and seven broken ones: the broken ones harm only themselves, and the run says how they broke.

The plugin is what `polyrl envs new` makes, installed into another folder and found by its entry point; the broken ones are files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from infra.scaffold import scaffold
from rl_core.ledger import read_balance
from rl_core.run_store import StoredRun
from tests.e2e.test_main_job import ROOT, Started, alive, show

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BROKEN = Path(__file__).parent / "broken_plugins"
STEPS = 4
NEVER_TRAIN = {
    "raises_on_import": "libfoo.so.3 is not on this machine",
    "hangs": "took longer than 1 s",
    "returns_nan": "wanted a finite number",
    "cannot_draw": "row 17 has no answer",
    "forks": "",
}
"""Environments of which no episode can end well, and what the breaker's note says of the cause; a host that died has no last words."""
MAY_TRAIN = ("leaks", "prints")
"""Their episodes are good: it is the machine that they must not harm."""
HEALTHY = ("math", "word_sums")
GIB = 2**30

CONFIG = (
    f"""
name: broken
model: {{path: {ROOT}/configs/models/seed}}
environments:
  math: {{max_tokens: 64, max_total_tokens: 128, options: {{digits: 3, kinds: [add, sub, chain], terms: 5}}}}
  word_sums: {{max_tokens: 64, max_total_tokens: 128, options: {{digits: 3}}}}
"""
    + "".join(
        f"  {name}: {{id: '{BROKEN}/{name}.py:Env', share: 0.2, group_size: 4, max_tokens: 16, max_total_tokens: 64,"
        f" call_timeout_s: {1 if name == 'hangs' else 20}}}\n"
        for name in (*NEVER_TRAIN, *MAY_TRAIN)
    )
    + f"""
loop: {{steps: {STEPS}, groups_per_step: 8, max_staleness: 1}}
rollout: {{max_num_seqs: 32, max_model_len: 256, speculative_tokens: 2, env_host_memory_gib: 1.0}}
eval: {{tasks: 2, every: 0}}
"""
)


@dataclass
class Finished:
    run: Path
    left: list[psutil.Process]
    log_bytes: int
    largest: int  # resident bytes of the largest process that was seen


def resident(process: psutil.Process) -> int:
    """Bytes; 0 once it has gone, which it may do while one looks."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("broken")
    site, plugin = folder / "site", scaffold("word_sums", folder)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(site), str(plugin)], check=True, capture_output=True)
    (folder / "broken.yaml").write_text(CONFIG, encoding="utf-8")
    ray_files = Path(tempfile.mkdtemp(prefix="ray-"))  # short: a socket's path has at most 107 bytes
    before = os.environ.get("PYTHONPATH"), os.environ.get("RAY_TMPDIR")
    os.environ |= {"PYTHONPATH": os.pathsep.join(p for p in (str(site), before[0]) if p), "RAY_TMPDIR": str(ray_files)}
    job, largest = Started(folder, "run", "broken.yaml"), 0
    try:
        while job.process.poll() is None:
            try:
                job.watch(until="\0never", seconds=1)
            except AssertionError:
                largest = max([largest, *map(resident, job.family)])
                assert job.process.create_time() + 540 > time.time(), job.text
        assert job.process.returncode == 0, job.text
        (run,) = (p for p in (folder / "runs").iterdir() if p.is_dir())
        logs = sum(
            p.stat().st_size for root in (ray_files, run) for p in root.rglob("*") if p.is_file() and p.suffix in (".out", ".err", ".log")
        )
        yield Finished(run, alive(job.family), logs, largest)
    finally:
        job.end()
        shutil.rmtree(ray_files, ignore_errors=True)
        for name, value in zip(("PYTHONPATH", "RAY_TMPDIR"), before, strict=True):
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_the_run_ends_well_and_what_works_has_trained(finished: Finished) -> None:
    shown = show(finished.run)
    assert (shown["outcome"], shown["step"]) == ("finished", STEPS)
    for name in HEALTHY:
        assert shown["environments"][name]["groups_trained"] > 0, name
        assert shown["environments"][name]["after"]["n"] > 0, name
    for name in NEVER_TRAIN:
        assert shown["environments"][name]["groups_trained"] == 0, name


def test_no_episode_of_a_healthy_environment_was_lost(finished: Finished) -> None:
    lost = StoredRun(finished.run).sql(
        "select env, status, count(*) as n from rollouts where status not in ('ok', 'invalid_output') group by all"
    )
    assert {row["env"] for row in lost} <= {*NEVER_TRAIN, *MAY_TRAIN}, lost
    assert {row["env"] for row in lost} >= set(NEVER_TRAIN), lost


def test_the_breaker_says_which_environment_broke_and_how(finished: Finished) -> None:
    notes = [str(e.data["text"]) for e in StoredRun(finished.run).events() if e.kind == "note"]
    for name, cause in NEVER_TRAIN.items():
        of_it = [note for note in notes if note.startswith(f"{name} is broken")]
        assert of_it, (name, notes)
        assert any(cause in note for note in of_it), (name, of_it)
    assert not [note for note in notes if note.startswith(tuple(f"{name} is broken" for name in HEALTHY))]


def test_neither_memory_nor_disk_nor_processes_are_taken(finished: Finished) -> None:
    assert finished.largest < 4 * GIB
    assert finished.log_bytes < 64 << 20
    assert not finished.left


def test_every_task_is_accounted_for(finished: Finished) -> None:
    balances = read_balance(finished.run / "ledger.sqlite")
    assert {b.env for b in balances} == {*HEALTHY, *NEVER_TRAIN, *MAY_TRAIN}
    assert all(b.balanced for b in balances)
