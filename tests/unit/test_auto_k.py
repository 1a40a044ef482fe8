"""The number of drafts follows what is measured, and finding out costs next to nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from rollout_workers.vllm_plugin.auto_k import STINT, AutoK, only_decodes, watch


class Machine:
    """Steps of 1 + cost * k time units that bring 1 + accepted[k] tokens per sequence, with noise; the clock is its own."""

    def __init__(self, cost: float, accepted: dict[int, float], seed: int = 0) -> None:
        self.cost, self.accepted, self.noise = cost, accepted, np.random.default_rng(seed)
        self.tokens, self.seconds = 0.0, 0.0

    def rate(self, k: int) -> float:
        return (1 + self.accepted[k]) / (1 + self.cost * k)

    def run(self, auto: AutoK, batch: int, steps: int) -> list[int]:
        chosen = []
        for _ in range(steps):
            k = auto.choose(batch)
            seconds = (1 + self.cost * k) * self.noise.lognormal(-0.02, 0.2)
            tokens = batch + int(self.noise.binomial(batch * k, self.accepted[k] / max(k, 1)))
            auto.record(batch, k, tokens, seconds)
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
            chosen.append(k)
        return chosen


GOOD = {0: 0.0, 1: 0.8, 2: 1.4, 4: 2.0}
BAD = {0: 0.0, 1: 0.1, 2: 0.11, 4: 0.11}


@pytest.mark.parametrize(("accepted", "cost"), [(GOOD, 0.1), (GOOD, 0.3), (BAD, 0.2), (GOOD, 0.9)])
@pytest.mark.parametrize("batch", [1, 16])
def test_after_its_first_trials_it_runs_within_three_percent_of_the_best(accepted: dict[int, float], cost: float, batch: int) -> None:
    auto, machine = AutoK(4), Machine(cost, accepted)
    machine.run(auto, batch, 2000)
    machine.tokens = machine.seconds = 0.0
    machine.run(auto, batch, 8000)
    best = max(machine.rate(k) for k in accepted)
    assert machine.tokens / machine.seconds / batch > 0.97 * best


def worth(machine: Machine, chosen: list[int]) -> float:
    """Mean speed of what was chosen over that of the best number."""
    return float(np.mean([machine.rate(k) for k in chosen])) / max(machine.rate(k) for k in machine.accepted)


def test_where_drafts_are_rejected_it_stops_drafting_and_where_they_pay_it_drafts() -> None:
    never, always = Machine(0.2, BAD).run(AutoK(4), 4, 4000)[2000:], Machine(0.05, GOOD).run(AutoK(4), 4, 4000)[2000:]
    assert np.mean(np.array(never) == 0) > 0.9
    assert np.mean(np.array(always) == 4) > 0.8


def test_it_follows_a_policy_whose_drafts_get_better_and_worse() -> None:
    auto = AutoK(4)
    for accepted in (BAD, GOOD, BAD):
        machine = Machine(0.2, accepted)
        assert worth(machine, machine.run(auto, 4, 12_000)[-1000:]) > 0.95


def test_each_batch_size_has_a_number_of_its_own() -> None:
    auto = AutoK(4)
    for _ in range(30):
        Machine(0.1, GOOD).run(auto, 1, 200)
        Machine(0.9, GOOD).run(auto, 64, 200)
    assert auto.choose(1) == 4
    assert auto.choose(64) == 0


def test_a_number_is_kept_for_a_stint_and_one_hiccup_of_the_machine_changes_nothing() -> None:
    auto, machine = AutoK(4), Machine(0.1, GOOD)
    chosen = machine.run(auto, 2, 4000)
    changes = np.flatnonzero(np.diff(chosen))
    assert np.diff(changes).min() >= STINT
    while auto.choose(2) != 4:
        machine.run(auto, 2, 1)
    auto.record(2, 4, 6, 1000.0)
    assert np.mean(np.array(machine.run(auto, 2, 500)) == 4) > 0.8


@pytest.mark.parametrize(("max_k", "numbers"), [(1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2, 3]), (4, [0, 1, 2, 4]), (8, [0, 1, 2, 4, 6, 8])])
def test_numbers_range_from_none_to_the_most(max_k: int, numbers: list[int]) -> None:
    assert AutoK(max_k).numbers == numbers


def planned(drafts: dict[str, int], scheduled: dict[str, int]) -> SimpleNamespace:
    return SimpleNamespace(
        num_scheduled_tokens=scheduled, total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens={name: [7] * count for name, count in drafts.items() if count},
    )  # fmt: skip


def test_only_steps_that_read_no_prompt_are_measured() -> None:
    assert only_decodes(planned({"a": 2, "b": 1}, {"a": 3, "b": 2}))
    assert only_decodes(planned({}, {"a": 1, "b": 1}))
    assert not only_decodes(planned({"a": 2}, {"a": 3, "b": 9}))


class Scheduler:
    """Two sequences, each step of which samples one token more than it verifies drafts."""

    dynamic_sd_lookup: AutoK

    def schedule(self) -> SimpleNamespace:
        k = self.dynamic_sd_lookup[2]
        step = planned({"a": k, "b": k}, {"a": 1 + k, "b": 1 + k})
        step.num_spec_tokens_to_schedule = k
        return step

    def update_from_output(self, step: SimpleNamespace, output: None) -> dict[int, SimpleNamespace]:
        return {0: SimpleNamespace(outputs=[SimpleNamespace(new_token_ids=[7] * (1 + step.num_spec_tokens_to_schedule))] * 2)}


def test_a_watched_scheduler_tells_what_each_number_brought() -> None:
    scheduler, auto = Scheduler(), AutoK(2)
    watch(scheduler, auto)
    for _ in range(5 * STINT):
        scheduler.update_from_output(scheduler.schedule(), None)
    rates = auto._buckets[1].rates
    assert all(rate.steps for rate in rates.values())
    for k, rate in rates.items():
        assert rate.tokens / rate.steps == pytest.approx(2 * (1 + k)), "a step that began under another number would show"
