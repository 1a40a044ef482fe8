"""Reuse: groups that have trained, and are young enough to train once more. Off by default (loop.reuse = 0).

    batch = P - R fresh groups from the queue  +  the R best of these:   priority = signal * 0.5 ** age / uses

signal is the standard deviation of the group's rewards, which is what its advantages are made of; age counts versions from its oldest
token; uses, the times that it has trained. So what taught much and is recent comes first, and nothing comes for ever. (Schaul et
al. 2016, "Prioritized Experience Replay", sample by such a priority; here the best are taken, and the importance weights of the loss
correct for the policy's age.)

The staleness bound holds for these like for any: a group that is too old is forgotten. Slots, and with them the bound of fresh groups, are
counted in fresh groups: P - R of them make a version.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from statistics import pstdev

from rl_core.config import LoopConfig
from rl_core.seams import GroupResult


class Reuse:
    """What has trained lately. Metadata and references, at most max_staleness + 1 batches of them."""

    def __init__(self, cfg: LoopConfig, trained: Iterable[GroupResult] = ()) -> None:
        self._cfg = cfg
        self._groups = {group.group_id: group for group in trained if cfg.reuse}

    def pick(self, version: int) -> list[GroupResult]:
        """Up to R groups for the batch that follows `version`, the best first."""
        self._groups = {name: g for name, g in self._groups.items() if age(g, version) <= self._cfg.max_staleness}
        return sorted(self._groups.values(), key=lambda g: (-priority(g, version), g.group_id))[: self._cfg.reuse]

    def trained(self, batch: Iterable[GroupResult]) -> None:
        """A step over `batch` was taken."""
        for group in batch if self._cfg.reuse else ():
            self._groups[group.group_id] = used = replace(group, uses=group.uses + 1)
            if used.uses >= self._cfg.max_uses:
                del self._groups[group.group_id]


def age(group: GroupResult, version: int) -> int:
    """Versions since its oldest token was sampled."""
    return version - (version if group.min_version is None else group.min_version)


def priority(group: GroupResult, version: int) -> float:
    """What training once more on a group that trained before is worth."""
    return float(pstdev(group.rewards)) * 0.5 ** age(group, version) / group.uses
