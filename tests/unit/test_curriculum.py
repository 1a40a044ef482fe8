"""A curriculum draws what is solved sometimes, never drops a task for good, records what it passes over, and resumes."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from environments.levels import leveled_tasks
from environments.math import MathEnv
from rl_core.config import ConfigError, LoopConfig
from rl_core.config_files import parse_config
from rl_core.curriculum import Curriculum
from rl_core.ledger import Ledger, State, group_id, read_balance
from rl_core.loop import Budget
from rl_core.loop import train as run_loop
from rl_core.mixer import Mixer
from rl_core.seams import GroupResult
from rl_core.types import EpisodeSpec, Task
from tests.unit.fakes import SPEC, FakeLearner, FakeWorkers, LocalQueue, Recorder, group_result, simulate

POOLS = {"easy": 0.97, "middle": 0.5, "hard": 0.02}


def pooled(start: int = 0) -> Iterator[Task]:
    index = start
    while True:
        yield Task(env="e", key=f"k{index}", split="train", seed=index, public={}, difficulty=list(POOLS)[index % 3])
        index += 1


def mixer(curriculum: Curriculum) -> Mixer:
    return Mixer({"e": pooled}, {"e": 1.0}, {"e": curriculum})


def train(mix: Mixer, ledger: Ledger, count: int, rng: random.Random) -> Counter[str]:
    """Draw and score `count` groups of eight."""
    drawn: Counter[str] = Counter()
    for _ in range(count):
        task, position = mix.draw(None, ledger.pass_over)
        name = group_id(ledger.draw(task, position))
        rewards = tuple(float(rng.random() < POOLS[task.difficulty]) for _ in range(8))
        result = group_result(env="e", rewards=rewards)
        ledger.score(name, result.success)
        mix.scored(task, result)
        ledger.filter(name, "no signal") if len(set(rewards)) == 1 else ledger.ready(name)
        (mix.filtered if len(set(rewards)) == 1 else mix.trained)("e")
        drawn[task.difficulty] += 1
    return drawn


def test_the_middle_is_drawn_most_and_no_pool_is_forgotten(tmp_path: Path) -> None:
    curriculum = Curriculum(seed=0)
    drawn = train(mixer(curriculum), Ledger(tmp_path / "l.sqlite"), 1500, random.Random(0))
    assert drawn["middle"] / 1500 > 0.7
    assert drawn["easy"] > 75
    assert drawn["hard"] > 75
    assert curriculum.pools == pytest.approx(POOLS, abs=0.15)


def test_every_position_is_in_the_ledger_and_what_was_passed_over_says_why(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    mix = mixer(Curriculum(seed=0))
    train(mix, ledger, 300, random.Random(0))
    (balance,) = read_balance(tmp_path / "l.sqlite")
    assert balance.balanced
    assert balance.drawn == mix.streams["e"].position
    assert balance.passed == balance.drawn - 300
    assert set(balance.reasons) >= {"passed: curriculum: solved too often", "passed: curriculum: solved too rarely"}
    assert sum(mix.streams["e"].curriculum.passed.values()) == balance.passed  # type: ignore[union-attr]
    assert ledger.counts()["e"][State.PASSED] == balance.passed


def test_a_resumed_curriculum_knows_what_it_knew_and_goes_on_at_the_next_position(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    first = mixer(Curriculum(seed=0))
    train(first, ledger, 200, random.Random(0))
    again = Curriculum(seed=0)
    again.restore(ledger.scores("e"))
    second = mixer(again)
    second.resume("e", position=ledger.counts()["e"]["position"], running=0, trained=0, filtered=0)
    assert again.pools == pytest.approx(first.streams["e"].curriculum.pools)  # type: ignore[union-attr]
    assert [second.draw()[1] for _ in range(20)] == [first.draw()[1] for _ in range(20)]


def test_a_task_that_comes_back_is_judged_by_its_own_rate() -> None:
    curriculum = Curriculum(seed=0)
    mine, other = (Task(env="e", key=k, split="train", seed=0, public={}, difficulty="middle") for k in ("mine", "other"))
    for key in ("other", "x", "mine") * 3:
        curriculum.scored("middle", key, 1.0 if key == "mine" else 0.25)
    assert curriculum.chance(mine) == pytest.approx(curriculum.floor, rel=0.2)
    assert curriculum.chance(other) > 0.7


def test_the_weight_is_the_variance_of_the_reward_and_never_zero() -> None:
    curriculum = Curriculum(seed=0, floor=0.05)
    assert [curriculum.weight(p) for p in (0.0, 0.25, 0.5, 1.0)] == [0.05, 0.75, 1.0, 0.05]


def test_levels_take_turns_resume_and_keep_the_splits_apart() -> None:
    levels = [{"digits": 2}, {"digits": 4}]
    stream = partial(leveled_tasks, MathEnv, "train", 0, {"kinds": ["add"]}, levels)
    drawn = list(islice(stream(), 200))
    assert [t.difficulty for t in drawn[:3]] == ["digits=2", "digits=4", "digits=2"]
    assert {len(str(t.public["a"])) for t in drawn[1::2]} == {4}
    assert list(islice(stream(start=7), 5)) == drawn[7:12]
    held_out = {t.key for level in levels for t in islice(MathEnv.tasks("eval", 0, {"kinds": ["add"], **level}), 100)}
    assert not held_out & {t.key for t in drawn}


def test_a_floor_of_zero_is_refused() -> None:
    tree = {"model": {"path": "configs/models/seed"}, "environments": {"math": {"curriculum": {"enabled": True, "floor": 0}}}}
    with pytest.raises(ConfigError, match="no task is dropped for ever"):
        parse_config(tree)
    tree["environments"]["math"]["curriculum"] = {"enabled": True, "levels": [{"digits": 2}, {"digits": 3}]}  # type: ignore[index]
    assert parse_config(tree).environments["math"].curriculum.levels[1] == {"digits": 3}


@pytest.mark.parametrize("seed", range(3))
def test_the_loop_trains_with_a_curriculum_within_the_bound_and_the_ledger_adds_up(tmp_path: Path, seed: int) -> None:
    class Pooled(FakeWorkers):
        async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult:
            result = await super().run_group(group_id, task, spec)
            rewards = tuple(float(self.rng.random() < POOLS[task.difficulty]) for _ in range(8))
            return replace(result, rewards=rewards, has_signal=len(set(rewards)) > 1)

    rng, path = random.Random(seed), tmp_path / "ledger.sqlite"
    cfg, recorder = LoopConfig(steps=20, groups_per_step=4, max_staleness=2), Recorder()
    mix = mixer(Curriculum(seed=seed))

    async def main() -> int:
        ledger = Ledger(path)
        try:
            return await run_loop(
                cfg, mixer=mix, specs={"e": SPEC}, workers=Pooled(rng, straggler=0.1), queue=LocalQueue(Budget.of(cfg).window),
                learner=FakeLearner(rng), ledger=ledger, record=recorder, weights=0, version=0, stop=asyncio.Event(),
            )  # fmt: skip
        finally:
            ledger.close()

    assert simulate(main()) == 20
    (balance,) = read_balance(path)
    assert balance.balanced
    assert balance.trained == 80
    assert balance.passed > 0
    assert set(recorder.steps[-1]) >= {f"env/e/curriculum/{pool}/{what}" for pool in POOLS for what in ("solved", "weight", "passed")}
