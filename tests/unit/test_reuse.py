"""Which groups train once more."""

from __future__ import annotations

from typing import Any

import pytest

from rl_core.config import ConfigError, LoopConfig
from rl_core.config_files import parse_config
from rl_core.reuse import Reuse
from rl_core.seams import GroupResult
from tests.unit.fakes import group_result

CFG = LoopConfig(groups_per_step=4, max_staleness=2, reuse=2, max_uses=2)


def group(name: str, rewards: tuple[float, ...] = (0.0, 1.0), version: int = 0, **changes: Any) -> GroupResult:
    return group_result(group_id=name, rewards=rewards, min_version=version, **changes)


def names(reuse: Reuse, version: int) -> list[str]:
    return [g.group_id for g in reuse.pick(version)]


def test_what_taught_much_and_is_recent_comes_first() -> None:
    reuse = Reuse(CFG)
    reuse.trained([group("clear", (0.0, 1.0), 1), group("dull", (0.0, 0.0, 0.0, 1.0), 1), group("old", (0.0, 1.0), 0)])
    assert names(reuse, 2) == ["clear", "dull"]
    assert names(reuse, 2) == ["clear", "dull"], "picking does not use up: a step that is skipped trained nothing"


def test_a_group_that_is_too_old_or_used_up_is_forgotten() -> None:
    reuse = Reuse(CFG)
    reuse.trained([group("a", version=0), group("b", version=1)])
    assert names(reuse, 2) == ["b", "a"]
    reuse.trained(reuse.pick(2)[:1])
    assert names(reuse, 2) == ["a"]
    assert names(reuse, 3) == []


def test_nothing_is_kept_when_it_is_off() -> None:
    reuse = Reuse(LoopConfig(max_staleness=2), [group("a", uses=1)])
    reuse.trained([group("b")])
    assert names(reuse, 0) == []


@pytest.mark.parametrize("loop", [{"reuse": 1, "max_staleness": 0}, {"reuse": 16}, {"reuse": 1, "max_uses": 1}])
def test_reuse_that_cannot_be_is_refused(loop: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"loop\.(reuse|max_uses)"):
        parse_config({"environments": {"math": {}}, "loop": loop})
