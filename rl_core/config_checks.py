"""What a config may say: values in range, and values that go together. Each refusal is one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_core.config import ConfigError, LearnerConfig, LoopConfig, RewardConfig, RunConfig
from rl_core.rules import ADVANTAGES, IMPORTANCE, OVERLONG, POLICY_LOSSES, PROXIMAL, PROXIMAL_RATIO


def validate(config: RunConfig) -> None:
    """Raise ConfigError for the first value out of range."""
    c, loop, rollout, learner = config, config.loop, config.rollout, config.learner
    _at_least("loop.steps", loop.steps, 0)
    _at_least("loop.groups_per_step", loop.groups_per_step, 1)
    _at_least("loop.max_staleness", loop.max_staleness, 0, "0 is synchronous on-policy training, 1 to 4 is usual")
    _at_least("loop.window", loop.window, 1)
    _at_least("loop.reuse", loop.reuse, 0)
    _at_least("loop.max_uses", loop.max_uses, 2 if loop.reuse else 1)
    if loop.reuse and not (loop.max_staleness and loop.reuse < loop.groups_per_step):
        raise ConfigError(
            f"loop.reuse is {loop.reuse}, with groups_per_step={loop.groups_per_step} and max_staleness={loop.max_staleness}; "
            f"wanted fewer than all groups of a step, and a max_staleness of 1 or more: what has trained is a version old"
        )
    _at_least("loop.bad_steps", loop.bad_steps, 1)
    _at_least("loop.max_rollbacks", loop.max_rollbacks, 0)
    _above("loop.stall_s", loop.stall_s, 0)
    for name in ("num_workers", "max_num_seqs", "max_model_len", "max_batched_tokens", "num_threads", "env_hosts", "env_threads"):
        _at_least(f"rollout.{name}", getattr(rollout, name), 1)
    _at_least("rollout.speculative_tokens", rollout.speculative_tokens, 0)
    _one_of("rollout.in_flight", rollout.in_flight, ("keep", "restart"))
    _above("rollout.kv_cache_gib", rollout.kv_cache_gib, 0)
    _above("rollout.env_host_memory_gib", rollout.env_host_memory_gib, 0)
    for name in ("num_ranks", "zero_stage", "num_threads", "microbatch_tokens", "checkpoint_every"):
        _at_least(f"learner.{name}", getattr(learner, name), 1)
    _above("learner.learning_rate", learner.learning_rate, 0)
    _above("learner.max_grad_norm", learner.max_grad_norm, 0)
    if learner.spike_factor and learner.spike_factor <= 1:
        raise ConfigError(f"learner.spike_factor is {learner.spike_factor}, wanted more than 1, or 0 to skip only what is not finite")
    _one_of("learner.zero_stage", learner.zero_stage, (1, 2, 3))
    _at_least("learner.lora.rank", learner.lora.rank, 0, "0 trains all weights, 8 to 64 is usual")
    _above("learner.lora.alpha", learner.lora.alpha, 0)
    if learner.lora.rank and (learner.train_router or not learner.lora.targets):
        raise ConfigError(
            "learner.lora trains what learner.lora.targets names and nothing else; name some there, and leave train_router off"
        )
    check_objective(learner, loop)
    _at_least("learner.mtp_loss_weight", learner.mtp_loss_weight, 0)
    _at_least("learner.mtp_depth", learner.mtp_depth, 1)
    _one_of("model.dtype", c.model.dtype, ("float32", "bfloat16"))
    _one_of("model.tool_format", c.model.tool_format, ("auto", "hermes", "xml"))
    _one_of("sandbox", c.sandbox, ("auto", "docker", "bubblewrap"))
    _at_least("store.max_gib", c.store.max_gib, 0, "0 keeps all")
    _at_least("eval.tasks", c.eval.tasks, 0)
    _at_least("eval.samples", c.eval.samples, 1)
    _at_least("eval.every", c.eval.every, 0)
    _at_least("eval.every_tasks", c.eval.every_tasks, 1)
    _at_least("audit.honeypots", c.audit.honeypots, 0, "0.05 is one group in twenty")
    if c.audit.honeypots > 1:
        raise ConfigError(f"audit.honeypots is {c.audit.honeypots}, wanted at most 1: they take the engines' time and train nothing")
    _one_of("audit.gate", c.audit.gate, ("off", "note", "penalty", "quarantine", "stop"))
    _at_least("audit.every", c.audit.every, 1)
    for name in c.trackers.use:
        _one_of("trackers.use", name, ("tensorboard", "wandb", "mlflow"))
    _one_of("trackers.wandb_mode", c.trackers.wandb_mode, ("online", "offline"))
    if not c.environments:
        raise ConfigError("environments is empty; name at least one, for example `environments: {math: {}}`, and see `polyrl envs list`")
    for name, env in c.environments.items():
        at = f"environments.{name}."
        _above(at + "share", env.share, 0)
        _at_least(at + "group_size", env.group_size, 2, "advantages are relative within a group")
        for knob in ("max_tokens", "max_turns", "max_total_tokens"):
            _at_least(at + knob, getattr(env, knob), 1)
        if env.thinking_budget is not None:
            _at_least(at + "thinking_budget", env.thinking_budget, 0, "0 closes every thought at once, null is no cap")
        _above(at + "timeout_s", env.timeout_s, 0)
        _above(at + "call_timeout_s", env.call_timeout_s, 0)
        _at_least(at + "concurrency", env.concurrency, 0, "0 is no cap")
        _above(at + "temperature", env.temperature, 0)
        if not 0 < env.curriculum.floor <= 1:
            raise ConfigError(
                f"{at}curriculum.floor is {env.curriculum.floor}, wanted more than 0 and at most 1: no task is dropped for ever"
            )
        _one_of(at + "overlong", env.overlong, OVERLONG)
        _within(at + "overlong_buffer", env.overlong_buffer, 0, 1)
        _at_least(at + "overlong_weight", env.overlong_weight, 0)
        if env.max_total_tokens > rollout.max_model_len:
            raise ConfigError(
                f"{at}max_total_tokens is {env.max_total_tokens}, more than rollout.max_model_len={rollout.max_model_len}; "
                f"raise the latter or lower the former"
            )
        if (
            env.rewards
            and all(r.role == "metric" for r in env.rewards.values())
            and any(r.kind == "component" for r in env.rewards.values())
        ):
            raise ConfigError(f"{at}rewards has metrics only, so that every rollout would earn the same; name one such as correct: {{}}")
        for reward_name, reward in env.rewards.items():
            _check_reward(f"{at}rewards.{reward_name}.", reward)
    if not Path(c.model.path, "config.json").is_file():
        raise ConfigError(
            f"model.path: no checkpoint in {c.model.path!r} (config.json is missing); give the folder of a Hugging Face checkpoint, "
            f"or make one with `polyrl model seed` or `polyrl model import smollm2`"
        )


REWARD_KINDS = ("classifier", "judge", "pairwise", "length", "verified", "component")


def _check_reward(at: str, reward: RewardConfig) -> None:
    """Raise ConfigError for the first value of one reward component that is out of range."""
    _one_of(at + "kind", reward.kind, REWARD_KINDS)
    _one_of(at + "role", reward.role, ("weight", "gate", "metric"))
    _one_of(at + "normalise", reward.normalise, ("none", "group", "running"))
    if reward.normalise != "none" and (reward.role != "weight" or reward.kind in ("length", "verified")):
        raise ConfigError(f"{at}normalise is {reward.normalise!r}, which means something for components and models of the role weight only")
    if reward.at_least != 0.0 and reward.role != "gate":
        raise ConfigError(f"{at}at_least is {reward.at_least}, but only the role gate has a limit to pass; leave it out")
    _at_least(at + "retries", reward.retries, 0)
    _at_least(at + "opponents", reward.opponents, 1)
    _above(at + "timeout_s", reward.timeout_s, 0)
    if reward.kind in ("classifier", "judge", "pairwise") and not reward.model:
        raise ConfigError(
            f"{at}model is empty, wanted a checkpoint folder" + ("" if reward.kind == "classifier" else " or, with url, a name")
        )
    if reward.kind in REWARD_KINDS[:3] and not reward.url and not Path(reward.model, "config.json").is_file():
        raise ConfigError(f"{at}model: no checkpoint in {reward.model!r} (config.json is missing); for an endpoint give its url, too")
    if reward.kind == "component" and (reward.model or reward.url):
        raise ConfigError(f"{at}kind is component, which takes no model and no url; for a model say kind: classifier, judge or pairwise")
    if reward.kind == "length" and reward.role != "weight":
        raise ConfigError(f"{at}role is {reward.role!r}: length control is added to the reward; leave out the role, or set weight=0")


def check_objective(learner: LearnerConfig, loop: LoopConfig) -> None:
    """Raise ConfigError for the first rule that there is not, or that cannot mean anything with these numbers."""
    importance = learner.importance
    _one_of("learner.advantage", learner.advantage, ADVANTAGES)
    _one_of("learner.policy_loss", learner.policy_loss, tuple(POLICY_LOSSES))
    _one_of("learner.proximal", learner.proximal, PROXIMAL)
    _one_of("learner.importance.rule", importance.rule, tuple(IMPORTANCE))
    own, (low, high) = IMPORTANCE[importance.rule], importance.bounds
    least = own.centre - 1
    if not least <= low < own.centre < high:
        raise ConfigError(
            f"learner.importance: low={low}, high={high}; they bound the {own.measures}, so wanted "
            f"{least:g} <= low < {own.centre:g} < high, for example {own.low:g} and {own.high:g}"
        )
    if own.measures == PROXIMAL_RATIO and learner.proximal == "behaviour":
        raise ConfigError(
            f"learner.importance.rule={importance.rule} compares the proximal with the behaviour policy, and learner.proximal=behaviour "
            f"makes them the same; use importance.rule=masked, or proximal=recomputed"
        )
    _within("learner.clip_low", learner.clip[0], 0, 1)
    _above("learner.clip_high", learner.clip[1], 0)
    _at_least("learner.kl_weight", learner.kl_weight, 0)
    if learner.train_staleness is not None and not 0 <= learner.train_staleness <= loop.max_staleness:
        raise ConfigError(
            f"learner.train_staleness is {learner.train_staleness}, wanted 0 to loop.max_staleness={loop.max_staleness}, or null "
            f"for the latter"
        )
    keep = learner.keep_batches
    if keep != "all" and not (isinstance(keep, int) and keep >= 0):
        raise ConfigError(f"learner.keep_batches is {keep!r}, wanted a number of steps, 0 or more, or all")


def _at_least(key: str, value: float, low: float, hint: str = "") -> None:
    if not value >= low:
        raise ConfigError(f"{key} is {value}, wanted {low} or more" + (f" ({hint})" if hint else ""))


def _above(key: str, value: float, low: float) -> None:
    if not value > low:
        raise ConfigError(f"{key} is {value}, wanted more than {low}")


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low < value <= high:
        raise ConfigError(f"{key} is {value}, wanted more than {low} and at most {high}")


def _one_of(key: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), [str(k) for k in known], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key} is {value!r}, wanted one of {', '.join(map(str, known))}{hint}")
