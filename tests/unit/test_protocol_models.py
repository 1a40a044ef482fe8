"""The replay queue and the ledger against models that are too simple to be wrong, in whatever order hypothesis thinks of."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rl_core.ledger import Ledger, LedgerError, State, group_id, read_balance
from rl_core.replay_queue import ReplayQueue
from rl_core.types import Task
from tests.unit.fakes import group_result

FEW = settings(max_examples=40, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])


class QueueModel(RuleBasedStateMachine):
    """The model is one list of [ticket, state] in order of start; it counts overtaking over all of history."""

    @initialize(window=st.integers(1, 4))
    def begin(self, window: int) -> None:
        self.window, self.queue = window, ReplayQueue(window)
        self.state: dict[int, str] = {}  # running, ready, dropped, taken

    def those(self, state: str) -> list[int]:
        return [t for t, s in self.state.items() if s == state]

    @rule(gap=st.integers(1, 3))
    def start(self, gap: int) -> None:
        ticket = max(self.state, default=-1) + gap
        self.queue.start(ticket)
        self.state[ticket] = "running"

    @precondition(lambda self: self.those("running"))
    @rule(data=st.data(), dies=st.booleans())
    def finish(self, data: st.DataObject, dies: bool) -> None:
        ticket = data.draw(st.sampled_from(self.those("running")))
        if dies:
            self.queue.drop(ticket)
        else:
            self.queue.put(ticket, group_result(group_id=f"g{ticket}"))
        self.state[ticket] = "dropped" if dies else "ready"

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        oldest = min(self.those("running"), default=None)
        wanted = self.those("ready")[:count]
        overtakers = [] if oldest is None else [t for t in (*self.those("taken"), *wanted) if t > oldest]
        if len(wanted) < count or len(overtakers) >= self.window:
            wanted = []
        assert [r.group_id for r in self.queue.take(count)] == [f"g{t}" for t in wanted]
        self.state |= dict.fromkeys(wanted, "taken")

    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        """What is not running can be neither put nor dropped, and no ticket starts twice."""
        others = [t for t, s in self.state.items() if s != "running"]
        if others:
            ticket = data.draw(st.sampled_from(others))
            for call in (lambda: self.queue.put(ticket, group_result()), lambda: self.queue.drop(ticket), lambda: self.queue.start(ticket)):
                with pytest.raises(ValueError, match=str(ticket)):
                    call()

    @rule()
    def another_process(self) -> None:
        """A queue that is restored from what the driver knows goes on alike."""
        oldest = min(self.those("running"), default=None)
        groups = {t: None if s == "running" else group_result(group_id=f"g{t}") for t, s in self.state.items() if s in ("running", "ready")}
        self.queue = ReplayQueue(self.window)
        self.queue.restore(groups, [] if oldest is None else [t for t in self.those("taken") if t > oldest])
        for ticket in [t for t in self.state if t > max(groups, default=-1)]:
            del self.state[ticket]  # it may be started again; its number is not known to the new queue

    @invariant()
    def depth_is_the_models(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.depth() == (len(self.those("ready")), len(self.those("running")))


class LedgerModel(RuleBasedStateMachine):
    """The model is a dict from name to state. Every move that the table does not allow must be refused and change nothing."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "ledger.sqlite"
        self.ledger = Ledger(self.path)
        self.state: dict[str, State] = {}
        self.version = 0

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
            shutil.rmtree(self.folder)

    @rule()
    def draw(self) -> None:
        position = len(self.state)
        ticket = self.ledger.draw(Task(env="math", key=f"k{position}", split="train", seed=0, public={}), position)
        assert group_id(ticket) not in self.state
        self.state[group_id(ticket)] = State.DRAWN

    @precondition(lambda self: self.state)
    @rule(data=st.data(), to=st.sampled_from([State.READY, State.FILTERED, State.ABANDONED]))
    def move(self, data: st.DataObject, to: State) -> None:
        name = data.draw(st.sampled_from(sorted(self.state)))
        call = {State.READY: self.ledger.ready, State.FILTERED: self.ledger.filter, State.ABANDONED: self.ledger.abandon}[to]
        arguments = (name,) if to is State.READY else (name, "because")
        if self.state[name] is State.DRAWN:
            call(*arguments)
            self.state[name] = to
        else:
            with pytest.raises(LedgerError, match=name):
                call(*arguments)

    @precondition(lambda self: self.state)
    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.state)), min_size=1, max_size=4))
        possible = len(set(names)) == len(names) and all(self.state[n] is State.READY for n in names)
        if not possible:
            with pytest.raises(LedgerError):
                self.ledger.train(names, self.version + 1)
            return
        self.version += 1
        self.ledger.train(names, self.version)
        self.state |= dict.fromkeys(names, State.TRAINED)
        assert sorted(self.ledger.batch(self.version)) == sorted(names)

    @rule()
    def another_process(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(self.path)

    @invariant()
    def it_says_what_the_model_says(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert self.ledger.version == self.version
        assert {e.group_id: e.state for e in self.ledger.open()} == {
            n: s for n, s in self.state.items() if s in (State.DRAWN, State.READY)
        }  # fmt: skip
        for balance in read_balance(self.path):
            counted = [balance.open, balance.trained, balance.filtered, balance.abandoned]
            states = list(self.state.values())
            model = [states.count(s) for s in (State.TRAINED, State.FILTERED, State.ABANDONED)]
            assert balance.balanced
            assert counted == [len(states) - sum(model), *model]


TestReplayQueueAgainstItsModel = QueueModel.TestCase
TestReplayQueueAgainstItsModel.settings = FEW
TestLedgerAgainstItsModel = LedgerModel.TestCase
TestLedgerAgainstItsModel.settings = settings(FEW, max_examples=15)
