"""The learner in a run: one Ray actor per DeepSpeed rank, and `LearnerGroup`, which the loop talks to.

Payloads come and go as object references: ranks fetch groups themselves, and weights go from rank 0 to the engines without
passing through the driver. Actors are not detached, so they end with the run, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef

from rl_core.config import RunConfig
from rl_core.process_env import cpu_environment
from rl_core.seams import Ref
from rl_core.types import Agreement, Completion, StepStats

START_TIMEOUT_S = 600.0
"""Bound on loading the model and on ranks finding each other; large checkpoints load for minutes."""


class LearnerRank:
    """The actor around one `Learner`. Torch and DeepSpeed are imported here, within the actor's process, not in the driver."""

    def __init__(self, config: RunConfig, run_dir: Path, rank: int) -> None:
        self.config, self.run_dir, self.rank = config, run_dir, rank

    def address(self) -> tuple[str, int]:
        """Host and a free port of this rank, where the others find it."""
        with socket.socket() as sock:
            sock.bind(("", 0))
            return ray.util.get_node_ip_address(), sock.getsockname()[1]

    def start(self, address: str, port: int) -> int:
        """Load model and optimizer, or the newest checkpoint of the run folder; returns the policy version."""
        import torch

        from learner.checkpoint import latest
        from learner.make import make_learner
        from learner.optimizer import connect

        config = self.config
        torch.set_num_threads(config.learner.num_threads)
        torch.manual_seed(config.seed + self.rank)
        connect(
            rank=self.rank,
            world_size=config.learner.num_ranks,
            address=address,
            port=port,
            timeout_s=max(config.loop.stall_s, START_TIMEOUT_S),
        )
        self.learner = make_learner(config)
        if (folder := latest(self.checkpoints)) is not None:
            self.learner.load(folder)
        return self.learner.version

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def accumulate(self, groups: list[ObjectRef]) -> dict[str, float]:
        return self.learner.accumulate(ray.get(groups))

    def agreement(self, completions: list[Completion]) -> Agreement:
        return self.learner.agreement(completions)

    def apply(self, again: bool) -> tuple[StepStats, Any]:
        """(statistics, weights): two objects, so that the driver fetches only the first."""
        stats = self.learner.apply(again=again)
        return stats, None if stats.skipped else self.learner.weights()

    def snapshot(self) -> tuple[int, Any]:
        return self.learner.version, self.learner.weights()

    def save(self) -> str:
        return str(self.learner.save(self.checkpoints, self.config.model.path))

    def adopt(self, version: int) -> None:
        self.learner.version = version
        self.learner.save(self.checkpoints, self.config.model.path)

    def pid(self) -> int:
        return os.getpid()


class LearnerGroup:
    """All ranks together. Implements `rl_core.seams.Learner`."""

    def __init__(self, ranks: Sequence[Any], version: int) -> None:
        self._ranks = list(ranks)
        self.version = version

    @staticmethod
    async def start(config: RunConfig, run_dir: Path) -> LearnerGroup:
        """Start the ranks; a run folder that has checkpoints goes on from the newest."""
        options: dict[str, Any] = {
            "num_cpus": config.learner.num_threads,
            "num_gpus": 1 if ray.cluster_resources().get("GPU") else 0,
            "max_restarts": 0,  # a rank that dies takes its gradients along: the run ends, and resumes from a checkpoint
            "runtime_env": {"env_vars": cpu_environment(config.learner.num_threads)},
        }
        actor = ray.remote(LearnerRank)
        ranks = [actor.options(**options).remote(config, run_dir.absolute(), rank) for rank in range(config.learner.num_ranks)]
        try:
            address, port = await ranks[0].address.remote()
            versions = await _all([r.start.remote(address, port) for r in ranks])
        except BaseException:
            _kill(ranks)
            raise
        assert len(set(versions)) == 1, f"ranks start from different versions: {versions}"
        return LearnerGroup(ranks, versions[0])

    async def accumulate(self, groups: Sequence[Ref]) -> dict[str, float]:
        """Gradients over the groups behind these references."""
        return (await _all([r.accumulate.remote(list(groups)) for r in self._ranks]))[0]

    async def agreement(self, completions: Sequence[Completion]) -> Agreement:
        """Every rank recomputes, since under ZeRO 3 none can alone; all get the same."""
        argument = ray.put(list(completions))
        return (await _all([r.agreement.remote(argument) for r in self._ranks]))[0]

    async def apply(self, *, again: bool = False) -> tuple[StepStats, Ref]:
        """The optimizer step; the reference leads to the bytes of a safetensors file as a uint8 array. See `Learner.apply`."""
        answers = [r.apply.options(num_returns=2).remote(again) for r in self._ranks]
        stats: StepStats = (await _all([stats for stats, _ in answers]))[0]
        self.version = stats.version
        return stats, answers[0][1]

    async def snapshot(self) -> tuple[int, Ref]:
        """The current version and its weights, as `apply` returns them."""
        answers = [r.snapshot.options(num_returns=2).remote() for r in self._ranks]
        return (await _all([version for version, _ in answers]))[0], answers[0][1]

    async def save(self) -> str:
        """Write a checkpoint of the current version into the run folder; returns its path."""
        return (await _all([r.save.remote() for r in self._ranks]))[0]

    async def adopt(self, version: int) -> None:
        """Call the weights and optimizer of now `version`, and make them the newest checkpoint."""
        await _all([r.adopt.remote(version) for r in self._ranks])
        self.version = version

    async def aclose(self) -> None:
        """End the ranks. What is not saved is lost."""
        _kill(self._ranks)


async def _all(refs: Sequence[Any]) -> list[Any]:
    """All results, or the first error at once: the other ranks would wait for the broken one."""
    return list(await asyncio.gather(*refs))


def _kill(ranks: Sequence[Any]) -> None:
    for rank in ranks:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(rank)
