"""The learner of a run, from its config."""

from __future__ import annotations

import torch

from learner.learner import Learner
from learner.model import PolicyModel
from rl_core.config import EnvironmentConfig, RunConfig
from rl_core.overlong import Overlong


def make_learner(config: RunConfig) -> Learner:
    """One rank, with the weights of model.path. Call `optimizer.connect` first."""

    def load() -> PolicyModel:
        return PolicyModel.from_pretrained(config.model.path, dtype=getattr(torch, config.model.dtype))

    return Learner(
        load(),
        config.learner,
        temperatures={name: env.temperature for name, env in config.environments.items()},
        max_staleness=config.loop.max_staleness,
        overlong={name: overlong_of(env) for name, env in config.environments.items()},
        reference=load() if config.learner.kl_weight else None,
    )


def overlong_of(env: EnvironmentConfig) -> Overlong:
    """How the learner treats overlong rollouts of an environment."""
    return Overlong(rule=env.overlong, limit=env.max_tokens, buffer=env.overlong_buffer, weight=env.overlong_weight)
