"""The protocol under every fault there is a name for; and the simulator itself, which must see bugs when there are some.

A sample runs here. The long study is `polyrl simulate --runs 10000`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import learner.checkpoint
import rl_core.breaker
import rl_core.durable
import rl_core.journal
import rl_core.ledger
import rl_core.loop
import rl_core.mixer
import rl_core.recovery
import rl_core.replay_queue
from infra.cli.main import app
from infra.errors import UsageError
from infra.simulation.faults import Fault
from infra.simulation.study import Tally, run_one, scratch
from tests.unit.mutants import plant

SAMPLE = 60
QUEUE_FAULTS = (Fault.QUEUE_DEATH_AFTER_CALL, Fault.SLOW_QUEUE, Fault.LATE_ANSWER)
ENOUGH = 300
"""Runs within which every planted bug must be seen; most take fewer than ten."""

BUGS: dict[str, tuple[ModuleType, str, str]] = {
    "slots released before the weights are live": (
        rl_core.loop,
        'receipts = await bounded(workers.load_weights(version, weights), cfg.stall_s, f"version {version} did not reach every engine")',
        "[slots.release() for _ in trained]; trained = (); receipts = await workers.load_weights(version, weights)",
    ),
    "one step's slots too many": (
        rl_core.loop,
        "(cfg.max_staleness + 1) * cfg.fresh_per_step -",
        "(cfg.max_staleness + 2) * cfg.fresh_per_step -",
    ),
    "the window costs no slots": (rl_core.loop, "- (window - 1), window=window)", ", window=window)"),
    "a filtered group keeps its slot": (rl_core.loop, "await queue.drop(ticket)\n            slots.release()", "await queue.drop(ticket)"),
    "a filtered group is not dropped from the queue": (rl_core.loop, "await queue.drop(ticket)\n", "pass\n"),
    "ready in the ledger before it is in the journal": (
        rl_core.loop,
        "await record.group(result)\n",
        "unusable(result) or ledger.ready(name); await record.group(result)\n",
    ),
    "published before the ledger knows": (
        rl_core.loop,
        "bad_steps.good()\n",
        "bad_steps.good(); await workers.load_weights(stats.version, weights)\n",
    ),
    "the optimizer steps before the engines have proved their weights": (
        rl_core.loop,
        "await prove_arrival(await publishing)\n        stats",
        "stats",
    ),
    "the queue forgets the window": (rl_core.replay_queue, "if len(overtakers) >= self._window:", "if False:"),
    "the queue takes a group twice": (
        rl_core.replay_queue,
        'raise ValueError(f"ticket {ticket} was put twice")',
        "insort(self._ready, ticket)",
    ),
    "the queue forgets who overtook": (
        rl_core.durable,
        "self._overtakers = [] if oldest is None else",
        "self._overtakers = [] if True else",
    ),
    "a new queue starts empty": (
        rl_core.durable,
        '        self._queue = self._make()\n        self._tell("restore", self._groups(),',
        '        self._queue = self._make()\n        self._tell("restore", {},',
    ),
    "a batch trains one by one": (
        rl_core.ledger,
        "with self._transaction(durable=True):\n            self._move(",
        "if True:\n            self._move(",
    ),
    "the last step is not flushed": (
        rl_core.ledger,
        "with self._transaction(durable=True):\n            self._move(",
        "with self._transaction(durable=False):\n            self._move(",
    ),
    "a resumed run draws from position 0": (
        rl_core.mixer,
        "self._sources[env](position), position\n        stream.running",
        "self._sources[env](0), 0\n        stream.running",
    ),
    "a resumed run forgets what was cut off": (rl_core.recovery, "cut_off[entry.ticket] = task", "pass"),
    "a new learner claims steps that it did not do": (
        rl_core.durable,
        "for version in range(learner.version + 1, self.version + 1):",
        "learner.version = self.version\n        for version in ():",
    ),
    "gradients die with their learner": (rl_core.durable, "self._pending = list(groups)", "pass"),
    "a checkpoint is named newest before it is whole": (
        learner.checkpoint,
        "(folder / STATE).write_text(",
        '(root / LATEST).write_text(f"step-{version:06d}"); (folder / STATE).write_text(',
    ),
    "the journal is pruned of what waits": (rl_core.journal, "if not held & kept]", "if True]"),
}
"""What is wrong: (module, a line of it, a wrong line in its place)."""


@pytest.fixture
def disk() -> Iterator[Path]:
    """Where runs write: in memory, since they flush thousands of times."""
    with scratch() as folder:
        yield folder


def first_failure(folder: Path, runs: int) -> str:
    """The first broken rule within `runs` runs; "" if all hold. Every other run has the faults of the queue alone, and many of them."""
    for seed in range(runs):
        queue_only = seed % 2 == 1
        outcome = run_one(seed, folder, intensity=5.0 if queue_only else 2.0, only=QUEUE_FAULTS if queue_only else ())
        if outcome.failure:
            return outcome.failure
    return ""


def test_every_rule_holds_in_a_sample_of_runs_with_every_fault(disk: Path) -> None:
    tally = Tally()
    for seed in range(1000, 1000 + SAMPLE):
        tally.add(run_one(seed, disk))
    assert not tally.failures
    assert all(tally.faults.values()), f"some fault never struck: {tally.faults}"
    assert tally.lives > 1.5 * SAMPLE, "too few deaths of the driver to mean anything"


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_breaks_a_rule(disk: Path, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    plant(monkeypatch, *BUGS[bug])
    assert first_failure(disk, ENOUGH)


@pytest.mark.parametrize("seed", range(5))
def test_a_run_without_faults_has_one_life(disk: Path, seed: int) -> None:
    outcome = run_one(seed, disk, intensity=0.0)
    assert (outcome.failure, outcome.lives, outcome.struck) == ("", 1, {})


def test_a_seed_gives_the_same_run_again(disk: Path) -> None:
    assert run_one(7, disk) == run_one(7, disk)


def test_the_command_exits_1_and_names_the_seed_and_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, *BUGS["one step's slots too many"])
    result = CliRunner().invoke(app, ["simulate", "--runs", "40", "--seed", "5", "--json"])
    failure = json.loads(result.stdout)["failures"][0]
    assert result.exit_code == 1
    assert failure["seed"] >= 5
    assert failure["failure"].startswith("Violation: slots: ")
    assert f"again: polyrl simulate --runs 1 --seed {failure['seed']}" in result.stderr


def test_the_command_counts_the_faults_of_runs_that_end_well() -> None:
    result = CliRunner().invoke(app, ["simulate", "--runs", "3", "--fault", "slow_link", "--fault", "driver_death", "--json"])
    tally = json.loads(result.stdout)
    assert result.exit_code == 0
    assert tally["runs"] == 3
    assert {name for name, count in tally["faults"].items() if count} <= {"slow_link", "driver_death"}


def test_a_fault_without_a_name_is_a_sentence() -> None:
    result = CliRunner().invoke(app, ["simulate", "--fault", "bad_luck"])
    assert isinstance(result.exception, UsageError)
    assert "torn_journal" in str(result.exception)
