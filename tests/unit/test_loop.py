"""The protocol: bounded staleness, nothing lost, every version proved, whatever the timing."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from rl_core.bad_steps import TooManyBadSteps
from rl_core.config import LoopConfig
from rl_core.ledger import Ledger, read_balance
from rl_core.loop import Budget, RunError, train
from rl_core.mixer import Mixer
from rl_core.replay_queue import ReplayQueue
from rl_core.seams import GroupResult
from rl_core.types import Agreement, Completion, Receipt
from tests.unit.fakes import SPEC, FakeLearner, FakeWorkers, LocalQueue, Recorder, probe, simulate, tasks

SHARES = {"math": 1.0, "code": 1.0, "tools": 2.0}


class Run:
    """One simulated run with real loop, queue, ledger and mixer."""

    def __init__(self, cfg: LoopConfig, folder: Path, *, seed: int = 0, error: float = 0.0, **workers: float) -> None:
        rng = random.Random(seed)
        self.cfg, self.path = cfg, folder / f"ledger-{seed}.sqlite"
        self.workers, self.learner, self.recorder = FakeWorkers(rng, **workers), FakeLearner(rng, error=error), Recorder()
        self.queue = LocalQueue(Budget.of(cfg).window)
        self.mixer = Mixer({name: partial(tasks, name) for name in SHARES}, SHARES)
        self.stop = asyncio.Event()

    async def _main(self) -> int:
        ledger = Ledger(self.path)
        try:
            return await train(
                self.cfg, mixer=self.mixer, specs=dict.fromkeys(SHARES, SPEC), workers=self.workers, queue=self.queue, learner=self.learner,
                ledger=ledger, record=self.recorder, weights=0, version=0, stop=self.stop, checkpoint_every=5,
            )  # fmt: skip
        finally:
            ledger.close()

    def go(self) -> int:
        return int(simulate(self._main()))


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("seed", range(6))
def test_staleness_stays_within_the_bound_and_every_task_ends_in_one_state(
    tmp_path: Path, max_staleness: int, window: int, seed: int
) -> None:
    cfg = LoopConfig(steps=12, groups_per_step=4, max_staleness=max_staleness, window=window)
    run = Run(cfg, tmp_path, seed=seed, signal=0.7, straggler=0.1)
    assert run.go() == 12  # check_staleness raises inside if the bound breaks
    assert run.workers.version == 12
    assert run.learner.proved == list(range(13))
    assert len(run.learner.trained) == len(set(run.learner.trained)) == 12 * 4
    balances = read_balance(run.path)
    assert all(b.balanced and b.open == 0 for b in balances)
    assert sum(b.trained for b in balances) == 48
    assert run.workers.running == 0
    assert run.workers.most_running <= Budget.of(cfg).slots


def test_zero_staleness_trains_only_tokens_of_the_current_version(tmp_path: Path) -> None:
    run = Run(LoopConfig(steps=8, groups_per_step=3, max_staleness=0), tmp_path, straggler=0.2)
    assert run.go() == 8
    versions = {g.group_id: g.min_version for g in run.recorder.groups}
    for index, group_id in enumerate(run.learner.trained):
        assert versions[group_id] == index // 3


def test_the_staleness_budget_is_used_not_only_kept(tmp_path: Path) -> None:
    run = Run(LoopConfig(steps=20, groups_per_step=4, max_staleness=2), tmp_path)
    run.go()
    versions = {g.group_id: g.min_version or 0 for g in run.recorder.groups}
    assert max(index // 4 - versions[g] for index, g in enumerate(run.learner.trained)) == 2


@pytest.mark.parametrize(
    "fault",
    ["one batch too many slots", "slots for reused groups too", "slots released before weights are live", "no order in the queue"],
)
def test_a_planted_bug_is_caught_by_the_assertion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    cfg = LoopConfig(steps=30, groups_per_step=4, max_staleness=1, window=1)
    if fault == "slots for reused groups too":
        cfg.reuse = 2
        monkeypatch.setattr(Budget, "of", staticmethod(lambda c: Budget(slots=2 * c.groups_per_step, window=1)))
    elif fault == "one batch too many slots":
        monkeypatch.setattr(Budget, "of", staticmethod(lambda c: Budget(slots=3 * c.groups_per_step, window=1)))
    elif fault == "slots released before weights are live":
        monkeypatch.setattr(FakeWorkers, "load_weights", _late_weights)
    else:
        monkeypatch.setattr(ReplayQueue, "take", _youngest_first)

    def ten_runs() -> None:
        for seed in range(10):
            Run(cfg, tmp_path, seed=seed, straggler=0.3).go()

    with pytest.raises(BaseExceptionGroup) as caught:
        ten_runs()
    assert caught.group_contains(RunError, match="staleness bound") or caught.group_contains(AssertionError)


def _youngest_first(self: ReplayQueue, count: int) -> list[GroupResult]:
    if len(self._ready) < count:
        return []
    taken, self._ready = self._ready[-count:], self._ready[:-count]
    return [self._results.pop(t) for t in taken]


async def _late_weights(self: FakeWorkers, version: int, weights: int):  # type: ignore[no-untyped-def]
    """An engine that says it has the weights at once and gets them two steps later."""
    self.version = max(self.version, version - 2)
    return [Receipt(worker="w0", version=version, pause_s=0.01, num_bytes=10, probe=(probe(version),))]


def test_logprobs_that_disagree_stop_the_run_naming_the_worker(tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        Run(LoopConfig(steps=3, groups_per_step=2), tmp_path, error=0.3).go()
    assert caught.group_contains(RunError, match="worker w0 does not sample from version 0")


def test_a_worker_that_comes_back_proves_its_weights_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(LoopConfig(steps=3, groups_per_step=2), tmp_path)
    right, run.workers.back = run.learner.agreement, [
        Receipt(worker="w9", version=version, pause_s=0.0, num_bytes=1, probe=(probe(version), probe(version))) for version in (7, 0)
    ]  # fmt: skip

    async def wrong_for_two(completions: Sequence[Completion]) -> Agreement:
        agreement = await right(completions)
        return replace(agreement, mean=0.3) if len(completions) == 2 else agreement

    monkeypatch.setattr(run.learner, "agreement", wrong_for_two)
    with pytest.raises(BaseExceptionGroup) as caught:
        run.go()
    assert caught.group_contains(RunError, match="worker w9 does not sample from version 0")


def test_a_nan_disagreement_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        Run(LoopConfig(steps=3, groups_per_step=2), tmp_path, error=float("nan")).go()
    assert caught.group_contains(RunError, match="does not sample")


def test_a_run_without_any_signal_says_so_and_stops(tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        Run(LoopConfig(steps=3, groups_per_step=2), tmp_path, signal=0.0).go()
    assert caught.group_contains(RunError, match="in a row could not train")


def test_a_worker_that_raises_ends_the_run_and_cancels_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(LoopConfig(steps=5, groups_per_step=2), tmp_path)

    async def broken(version: int, weights: int) -> list[object]:
        raise RuntimeError("the engine is gone")

    monkeypatch.setattr(run.workers, "load_weights", broken)
    with pytest.raises(BaseExceptionGroup) as caught:
        run.go()
    assert caught.group_contains(RuntimeError, match="the engine is gone")
    assert run.workers.running == 0


def test_a_hung_publication_ends_with_a_sentence_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(LoopConfig(steps=5, groups_per_step=2, stall_s=30), tmp_path)

    async def hung(version: int, weights: int) -> list[object]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(run.workers, "load_weights", hung)
    with pytest.raises(BaseExceptionGroup) as caught:
        run.go()
    assert caught.group_contains(RunError, match="version 0 did not reach every engine")


def test_a_stop_ends_after_the_current_step_with_a_balanced_ledger(tmp_path: Path) -> None:
    run = Run(LoopConfig(steps=1000, groups_per_step=2), tmp_path)
    original = run.recorder.step

    async def stop_at_three(step: int, version: int, metrics: dict[str, float]) -> None:
        await original(step, version, metrics)
        if version == 3:
            run.stop.set()

    run.recorder.step = stop_at_three  # type: ignore[method-assign]
    assert run.go() == 3
    assert all(b.balanced and b.abandoned == 0 for b in read_balance(run.path))  # what is open is for `polyrl resume`


def test_checkpoints_fall_between_steps(tmp_path: Path) -> None:
    run = Run(LoopConfig(steps=12, groups_per_step=2), tmp_path)
    run.go()
    assert run.learner.saved == [5, 10]


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_bad_steps_are_skipped_with_a_reason_and_several_in_a_row_go_back(tmp_path: Path, max_staleness: int) -> None:
    cfg = LoopConfig(steps=10, groups_per_step=3, max_staleness=max_staleness, bad_steps=3)
    run = Run(cfg, tmp_path, straggler=0.2)
    run.learner.bad = ["", "the loss is nan", "", "the loss is inf", "the gradient of the policy is nan", "the gradient of the policy is 9"]
    assert run.go() == 10
    assert run.learner.returns == [3]
    balances = read_balance(run.path)
    assert all(b.balanced and b.open == 0 for b in balances)
    assert sum(b.trained for b in balances) == 9 * 3, "one version of ten was made by no batch"
    reasons = [r for b in balances for r in b.reasons]
    assert {"filtered: bad step: the loss", "filtered: bad step: the gradient of the policy"} <= set(reasons)
    assert [s["progress/step"] for s in run.recorder.steps] == [float(v) for v in range(1, 11)]
    assert run.recorder.steps[2]["learner/rolled_back"] == 1.0
    assert [s["learner/skipped_steps"] for s in run.recorder.steps[:4]] == [0.0, 1.0, 3.0, 0.0]
    assert sum("is skipped" in note for note in run.recorder.notes) == 4
    assert run.workers.version == 10


def test_a_run_whose_steps_stay_bad_stops_with_a_sentence(tmp_path: Path) -> None:
    run = Run(LoopConfig(steps=10, groups_per_step=3, bad_steps=2, max_rollbacks=1), tmp_path)
    run.learner.bad = ["", *["the loss is nan"] * 4]
    with pytest.raises(BaseExceptionGroup) as caught:
        run.go()
    assert caught.group_contains(TooManyBadSteps, match="2 steps in a row were bad .*, after 1 returns")
    assert run.learner.returns == [2]
    assert all(b.balanced for b in read_balance(run.path))


def test_groups_are_reused_within_bounds_and_counted_once_as_tasks(tmp_path: Path) -> None:
    cfg = LoopConfig(steps=20, groups_per_step=4, max_staleness=2, reuse=2, max_uses=3)
    run = Run(cfg, tmp_path, signal=0.8, straggler=0.1)
    assert run.go() == 20  # check_staleness raises inside if a group is too old
    uses = Counter(run.learner.trained)
    assert max(uses.values()) == 3, "some train as often as they may, none more often"
    assert len(run.learner.trained) == 20 * 4 - 2, "the first step has nothing to reuse"
    balances = read_balance(run.path)
    assert sum(b.trained for b in balances) == 20 * 2 == len(uses)
    assert all(b.balanced and b.open == 0 for b in balances)
    assert sum(b.uses for b in balances) == 20 * 4 - 2
    ledger = Ledger(run.path)
    assert [name for version in range(1, 21) for name in ledger.batch(version)] == run.learner.trained
    assert ledger.reused == 20 * 2 - 2
    ledger.close()
    assert run.workers.most_running <= 3 * 2


def test_the_trained_mixture_is_the_requested_one_though_one_environment_rarely_has_signal(tmp_path: Path) -> None:
    run = Run(LoopConfig(steps=100, groups_per_step=4), tmp_path, signal=0.5)
    run.go()
    assert [run.mixer.trained_share(e) for e in SHARES] == pytest.approx([0.25, 0.25, 0.5], abs=0.03)
    assert run.recorder.steps[-1]["env/tools/share"] == pytest.approx(0.5, abs=0.03)
