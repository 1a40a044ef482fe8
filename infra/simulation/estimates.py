"""The numbers of a plan: guessed from a config, measured in a stored run, or given by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from statistics import median

from infra.errors import UsageError
from infra.simulation.planner import EnvPlan, Plan
from rl_core.config import EnvironmentConfig, RunConfig
from rl_core.run_store import StoredRun

PLANNED_STEPS = 40


def from_config(config: RunConfig) -> Plan:
    """What a config says, and guesses for what it cannot know: say better with --set or --from."""
    return Plan(
        loop=replace(config.loop, steps=min(config.loop.steps, PLANNED_STEPS)),
        environments={name: env_from_config(env) for name, env in config.environments.items()},
        workers=config.rollout.num_workers,
        max_sequences=config.rollout.max_num_seqs,
        seed=config.seed,
    )


def env_from_config(env: EnvironmentConfig) -> EnvPlan:
    """Half of the tokens that an episode may have."""
    most = min(env.max_tokens * env.max_turns, env.max_total_tokens)
    return EnvPlan(
        share=env.share, group_size=env.group_size, mean_tokens=most / 2, max_tokens=most, turns=env.max_turns, step_s=0.02,
    )  # fmt: skip


def from_run(config: RunConfig, run: StoredRun) -> Plan:
    """As `from_config`, with lengths, turns' latency, signal, engine and learner times of a run of the same environments."""
    plan = from_config(config)
    rows = run.sql(
        "SELECT env, avg(num_sampled_tokens) AS mean_tokens, coalesce(stddev(ln(num_sampled_tokens)), 0) AS spread, count(*) AS n "
        "FROM rollouts WHERE label = 'train' AND num_sampled_tokens > 0 GROUP BY env"
    )
    signals = run.sql(
        "SELECT env, avg(CASE WHEN low < high THEN 1 ELSE 0 END) AS signal FROM (SELECT env, group_id, min(reward) AS low, "
        "max(reward) AS high FROM rollouts WHERE label = 'train' AND reward IS NOT NULL GROUP BY env, group_id) GROUP BY env"
    )
    steps = [event.data["metrics"] for event in run.events() if event.kind == "step" and "step/seconds" in event.data["metrics"]]
    if not rows or not steps:
        raise UsageError(f"run {run.id} holds no training rollouts or steps to measure; plan from the config alone, without --from")
    signal = {row["env"]: float(row["signal"]) for row in signals}
    environments = dict(plan.environments)
    for row in rows:
        if (name := row["env"]) in environments:
            environments[name] = replace(
                environments[name], mean_tokens=float(row["mean_tokens"]), spread=float(row["spread"]), signal=signal.get(name, 0.7)
            )
    rate = median(float(step["rollout/tokens_per_s"]) for step in steps) / plan.workers  # tokens per second of one engine
    busy = [float(step["step/seconds"]) - float(step["step/waited_s"]) for step in steps]
    in_flight = median(float(step["queue/in_flight"]) for step in steps) * median(e.group_size for e in environments.values())
    sequences = max(1.0, min(plan.max_sequences, in_flight / plan.workers))
    step_s = sequences / max(rate, 1e-9)  # of one engine step over so many sequences; half of it is taken to be the same for one
    return replace(
        plan, environments=environments, base_s=step_s / 2, per_sequence_s=step_s / 2 / sequences, learner_step_s=max(median(busy), 1e-3),
    )  # fmt: skip


def changed(plan: Plan, items: Sequence[str]) -> Plan:
    """`plan` with `NAME=NUMBER` for all of it, `ENV.NAME=NUMBER` for one environment, or NAME of an environment's for all of them."""
    whole = {f.name for f in fields(Plan)} - {"loop", "environments"}
    each = {f.name for f in fields(EnvPlan)}
    for item in items:
        key, _, text = item.partition("=")
        env, _, name = key.rpartition(".")
        value = number(item, text)
        if not env and name in whole:
            plan = replace(plan, **{name: type(getattr(plan, name))(value)})
        elif name in each and (not env or env in plan.environments):
            new = {n: replace(e, **{name: type(getattr(e, name))(value)}) if env in ("", n) else e for n, e in plan.environments.items()}
            plan = replace(plan, environments=new)
        else:
            known = ", ".join(sorted(whole | each))
            raise UsageError(f"--set {item!r}: wanted [ENV.]NAME=NUMBER with a name of {known}, and ENV of {', '.join(plan.environments)}")
    return plan


def number(item: str, text: str) -> float:
    """A number that a plan can use."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise UsageError(f"--set {item!r}: {text!r} is no number of at least 0")
    return value
