"""The learner of a run, from its config."""

from __future__ import annotations

from pathlib import Path

import torch

from learner.learner import Learner
from learner.model import PolicyModel
from rl_core.config import RunConfig
from rl_core.overlong import Overlong


def make_learner(config: RunConfig, *, weights: str | Path | None = None, version: int = 0) -> Learner:
    """One rank, with the weights of model.path or of another checkpoint folder. Call `optimizer.connect` first."""

    def load(path: str | Path) -> PolicyModel:
        return PolicyModel.from_pretrained(path, dtype=getattr(torch, config.model.dtype))

    return Learner(
        load(weights or config.model.path),
        config.learner,
        temperatures={name: env.temperature for name, env in config.environments.items()},
        max_staleness=config.loop.max_staleness,
        version=version,
        overlong={
            name: Overlong(rule=env.overlong, limit=env.max_tokens, buffer=env.overlong_buffer, weight=env.overlong_weight)
            for name, env in config.environments.items()
        },
        reference=load(config.model.path) if config.learner.kl_weight else None,
    )
