"""An environment that breaks is paused and probed; the others go on."""

from __future__ import annotations

import asyncio

import pytest

from rl_core.breaker import BROKEN_IN_A_ROW, FIRST_PAUSE_S, AllBroken, Breaker
from tests.unit.fakes import simulate


def test_a_breaking_environment_is_left_alone_probed_and_taken_back() -> None:
    async def main() -> None:
        notes: list[str] = []
        breaker = Breaker(["a", "b"], now=asyncio.get_running_loop().time, note=notes.append)
        for _ in range(BROKEN_IN_A_ROW):
            assert await breaker.usable() == {"a", "b"}
            breaker.drawn("a")
            breaker.finished("a", broken="sandbox gone")
        assert await breaker.usable() == {"b"}
        await asyncio.sleep(FIRST_PAUSE_S)
        assert await breaker.usable() == {"a", "b"}
        breaker.drawn("a")
        assert await breaker.usable() == {"b"}, "one probe at a time"
        breaker.finished("a", broken="sandbox gone")
        await asyncio.sleep(1.5 * FIRST_PAUSE_S)
        assert await breaker.usable() == {"b"}, "a failed probe doubles the pause"
        await asyncio.sleep(FIRST_PAUSE_S)
        breaker.drawn("a")
        breaker.finished("a")
        assert await breaker.usable() == {"a", "b"}
        assert "sandbox gone" in notes[0]
        assert "works again" in notes[-1]

    simulate(main())


def test_good_groups_between_broken_ones_keep_it_closed() -> None:
    async def main() -> None:
        breaker = Breaker(["a"], now=asyncio.get_running_loop().time)
        for _ in range(10):
            breaker.finished("a", broken="x")
            breaker.finished("a")
        assert await breaker.usable() == {"a"}

    simulate(main())


def test_a_run_whose_environments_are_all_broken_ends_with_the_reasons() -> None:
    async def main() -> None:
        breaker = Breaker(["a"], now=asyncio.get_running_loop().time)
        while True:
            await breaker.usable()
            breaker.drawn("a")
            breaker.finished("a", broken="no disk")

    with pytest.raises(AllBroken, match="a: no disk"):
        simulate(main())
