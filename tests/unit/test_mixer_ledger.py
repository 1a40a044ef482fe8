"""Mixture and bookkeeping: the shares that were asked for, and a sum that adds up."""

from __future__ import annotations

import random
import sqlite3
from functools import partial
from pathlib import Path

import pytest

from rl_core.ledger import Ledger, LedgerError, State, group_id, read_balance
from rl_core.mixer import MIN_YIELD, Mixer
from tests.unit.fakes import tasks


def mixer(**shares: float) -> Mixer:
    return Mixer({name: partial(tasks, name) for name in shares}, shares)


def test_trained_shares_follow_the_request_though_environments_differ_in_latency_and_signal() -> None:
    mix, rng = mixer(fast=1.0, slow=1.0, rare=2.0), random.Random(0)
    running: list[tuple[float, str]] = []
    for now in range(4000):
        while len(running) < 24:
            env = mix.draw()[0].env
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
        for env in [mix.draw()[0].env for _ in range(8)]:
            draws[env] += 1
            if env == "good":
                mix.trained(env)
            else:
                mix.filtered(env)
    assert draws["solved"] / draws["good"] == pytest.approx(1 / MIN_YIELD, rel=0.1)


def test_drawn_tasks_carry_the_name_of_the_run_not_of_the_class() -> None:
    mix = Mixer({"math-easy": partial(tasks, "math")}, {"math-easy": 1.0})
    assert mix.draw()[0].env == "math-easy"
    assert mix.streams["math-easy"].position == 1


def test_a_resumed_mixer_goes_on_with_the_next_task_and_the_same_counts() -> None:
    mix = mixer(a=1.0, b=1.0)
    mix.resume("a", position=7, running=1, trained=4, filtered=2)
    assert mix.draw(among={"a"}) == (mix.task_at("a", 7), 7)
    assert mix.task_at("a", 3).key == "a-3"
    assert mix.trained_share("a") == 1.0
    assert mix.draw()[0].env == "b"


def drawn(ledger: Ledger, count: int) -> list[str]:
    source = tasks("math")
    return [group_id(ledger.draw(next(source), position)) for position in range(count)]


def test_the_ledger_adds_up_through_every_path(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    ids = drawn(ledger, 6)
    ledger.ready(ids[0])
    ledger.train([ids[0]], 1)
    ledger.ready(ids[1])
    ledger.filter(ids[2], "no signal")
    ledger.abandon(ids[3], "its task is gone")
    ledger.restart(ids[4], "the run was cut off")
    assert ledger.abandon_open("the run ended") == 3
    (balance,) = read_balance(tmp_path / "l.sqlite")
    assert (balance.drawn, balance.open, balance.trained, balance.filtered, balance.abandoned) == (6, 0, 1, 1, 4)
    assert balance.balanced
    assert balance.restarted == 1
    assert balance.reasons == {"filtered: no signal": 1, "abandoned: the run ended": 3, "abandoned: its task is gone": 1}


def test_a_lost_row_shows_in_the_balance(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    drawn(ledger, 3)
    ledger.close()
    with sqlite3.connect(tmp_path / "l.sqlite") as db:
        db.execute("DELETE FROM tasks WHERE ticket = 1")
    (balance,) = read_balance(tmp_path / "l.sqlite")
    assert not balance.balanced


def test_a_task_cannot_train_twice_or_out_of_a_final_state(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    (group,) = drawn(ledger, 1)
    with pytest.raises(RuntimeError, match="is drawn, wanted ready"):
        ledger.train([group], 1)
    ledger.ready(group)
    ledger.train([group], 1)
    with pytest.raises(RuntimeError, match=f"is {State.TRAINED}"):
        ledger.train([group], 2)
    with pytest.raises(RuntimeError, match="unknown"):
        ledger.ready("g999999")


def test_a_batch_trains_whole_or_not_at_all(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    first, second = drawn(ledger, 2)
    ledger.ready(first)
    with pytest.raises(LedgerError):
        ledger.train([first, second], 1)
    assert ledger.version == 0
    assert [e.state for e in ledger.open()] == [State.READY, State.DRAWN]


def test_a_reopened_ledger_goes_on_counting(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    drawn(ledger, 2)
    ledger.close()
    again = Ledger(tmp_path / "l.sqlite")
    assert again.draw(next(tasks("math")), 2) == 2
    assert again.counts()["math"]["position"] == 3
