"""Mixture and bookkeeping: the shares that were asked for, and a sum that adds up."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rl_core.ledger import Ledger, State, read_balance
from rl_core.mixer import MIN_YIELD, Mixer
from tests.unit.fakes import tasks


def mixer(**shares: float) -> Mixer:
    return Mixer({name: tasks(name) for name in shares}, shares)


def test_trained_shares_follow_the_request_though_environments_differ_in_latency_and_signal() -> None:
    mix, rng = mixer(fast=1.0, slow=1.0, rare=2.0), random.Random(0)
    running: list[tuple[float, str]] = []
    for now in range(4000):
        while len(running) < 24:
            env = mix.draw().env
            running.append((now + rng.expovariate(1 / (20.0 if env == "slow" else 2.0)), env))
        running.sort()
        _, env = running.pop(0)
        if env == "rare" and rng.random() < 0.6:
            mix.filtered(env)
        else:
            mix.trained(env)
    assert [mix.trained_share(e) for e in ("fast", "slow", "rare")] == pytest.approx([0.25, 0.25, 0.5], abs=0.02)


def test_an_environment_without_signal_takes_a_bounded_part_of_the_sampling() -> None:
    mix = mixer(good=1.0, solved=1.0)
    draws = {"good": 0, "solved": 0}
    for _ in range(500):
        for env in [mix.draw().env for _ in range(8)]:
            draws[env] += 1
            if env == "good":
                mix.trained(env)
            else:
                mix.filtered(env)
    assert draws["solved"] / draws["good"] == pytest.approx(1 / MIN_YIELD, rel=0.1)


def test_drawn_tasks_carry_the_name_of_the_run_not_of_the_class() -> None:
    mix = Mixer({"math-easy": tasks("math")}, {"math-easy": 1.0})
    assert mix.draw().env == "math-easy"
    assert mix.positions() == {"math-easy": 1}


def test_the_ledger_adds_up_through_every_path(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    source = tasks("math")
    ids = [ledger.draw(next(source)) for _ in range(5)]
    ledger.ready(ids[0])
    ledger.train(ids[0], 1)
    ledger.ready(ids[1])
    ledger.filter(ids[2], "no signal")
    assert ledger.abandon_open("the run ended") == 3
    (balance,) = read_balance(tmp_path / "l.sqlite")
    assert (balance.drawn, balance.open, balance.trained, balance.filtered, balance.abandoned) == (5, 0, 1, 1, 3)
    assert balance.balanced
    assert balance.reasons == {"filtered: no signal": 1, "abandoned: the run ended": 3}


def test_a_task_cannot_train_twice_or_out_of_a_final_state(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    group = ledger.draw(next(tasks("math")))
    with pytest.raises(RuntimeError, match="is drawn, wanted ready"):
        ledger.train(group, 1)
    ledger.ready(group)
    ledger.train(group, 1)
    with pytest.raises(RuntimeError, match=f"is {State.TRAINED}"):
        ledger.train(group, 2)
    with pytest.raises(RuntimeError, match="unknown"):
        ledger.ready("g999999")


def test_a_reopened_ledger_goes_on_counting(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    first = ledger.draw(next(tasks("math")))
    ledger.close()
    again = Ledger(tmp_path / "l.sqlite")
    assert again.draw(next(tasks("math"))) > first
