"""The config of a run: a tree of dataclasses, merged by OmegaConf from YAML and `key=value` overrides.

A typo, a wrong type or a value out of range is a `ConfigError` with one sentence that says what to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl_core.rules import ADVANTAGES, IMPORTANCE, OVERLONG, POLICY_LOSSES, PROXIMAL, PROXIMAL_RATIO


class ConfigError(ValueError):
    """The user's config cannot run. The message is one sentence: what it got, what it wanted, what to do."""


@dataclass
class ModelConfig:
    """Which checkpoint to start from."""

    path: str = "configs/models/seed"
    """Checkpoint folder that Transformers and vLLM load. Relative paths are taken from the working directory."""
    dtype: str = "float32"
    """float32 or bfloat16; the same for engine and learner."""


@dataclass
class CurriculumConfig:
    """Which tasks of an environment are drawn: rather those that are solved sometimes than those that are solved always or never."""

    enabled: bool = False
    """Off: every task of the stream is drawn."""
    floor: float = 0.1
    """Weight of what is always or never solved, relative to what is solved half of the time."""
    levels: list[dict[str, Any]] = field(default_factory=list)
    """Options of the task source that are added to `options`, for one task of the stream after another: [{digits: 2}, {digits: 4}].
    Each level is a pool. Without levels, the environment's own difficulty buckets are the pools. Evaluation uses `options` alone."""


@dataclass
class RewardConfig:
    """One component of an environment's reward. The key in `rewards` is the component's name."""

    kind: str = "component"
    """component (one of the environment's verdict, or tokens, or turns), classifier (a reward model), judge (grades answers), pairwise
    (compares them, GenRM), length (group-relative length control), or verified (the environment's own verdict, to give it another
    role or weight)."""
    role: str = "weight"
    """weight (adds weight x score), gate (multiplies the sum by the score), metric (is only stored)."""
    at_least: float = 0.0
    """gate: the score from which on everything is earned, and below which nothing is; 0 multiplies by the score itself."""
    normalise: str = "none"
    """weight: none, group (z-score over the task's rollouts) or running (over the environment's rollouts so far)."""
    weight: float = 1.0
    """Weight in the sum; of length control, its coefficient for thoughts and for answers."""
    bonus: float = 0.0
    """length: what the shortest of the best answers of a group gets on top."""
    model: str = ""
    """Checkpoint folder of a reward model, or of a judge on an engine of ours; with `url`, the model's name there."""
    url: str = ""
    """judge, pairwise: base URL of an OpenAI-compatible endpoint, such as http://host:8000/v1; "" is an engine of ours."""
    api_key_env: str = ""
    """Name of the environment variable that holds the endpoint's key."""
    timeout_s: float = 60.0
    """Wall time of one call, after which it is tried again."""
    retries: int = 2
    """judge, pairwise: further attempts when a reply is no verdict. Then the rollout is masked, never scored 0."""
    opponents: int = 1
    """pairwise: answers that each one is compared with to its right in a ring; costs 2 calls each."""
    criteria: str = ""
    """judge, pairwise: what a good answer is, in words."""
    calibration: str = ""
    """judge, pairwise: JSONL file of pairs with a known better answer (question, good, bad); "" takes a few built-in ones."""


@dataclass
class EnvironmentConfig:
    """One environment of the mixture. The key in `environments` is its id, unless `id` says otherwise."""

    id: str = ""
    """Registered id or `module:Class`; "" means the key itself."""
    share: float = 1.0
    """Wanted share of trained groups, relative to the other environments' shares."""
    group_size: int = 8
    """G: rollouts per task."""
    max_tokens: int = 128
    """Tokens per turn."""
    max_turns: int = 1
    """Assistant turns per episode."""
    max_total_tokens: int = 4096
    """Prompt and sampled tokens of a whole episode; must fit rollout.max_model_len."""
    temperature: float = 1.0
    """Sampling temperature; the learner trains against the same."""
    timeout_s: float = 120.0
    """Wall time of one episode in seconds, after which it counts as an infrastructure error."""
    call_timeout_s: float = 60.0
    """Longest that one call into the environment may take (open, step, truncate, close), after which its episode is no result."""
    concurrency: int = 0
    """Episodes of this environment at the same time, over all workers; 0 is as many as the engines take."""
    overlong: str = "keep"
    """Rollouts that the token budget cut off: keep (train as any other), mask (their reward counts in the baseline, their tokens do
    not train), penalty (the reward falls within the last tokens of a turn's budget)."""
    overlong_buffer: float = 0.25
    """penalty: the share of max_tokens over which the reward falls."""
    overlong_weight: float = 1.0
    """penalty: how much of the reward is lost at max_tokens."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the environment's task source and constructor: difficulty knobs."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    """Components of the reward, by name; none: the environment's verdict alone. Where a component of the verdict is named, what is named
    makes the reward; otherwise the environment's own reward counts as well, with weight 1."""


@dataclass
class LoopConfig:
    """The asynchronous protocol. Counts are of groups."""

    steps: int = 100
    """Optimizer steps to run."""
    groups_per_step: int = 16
    """P: groups with a learning signal per optimizer step."""
    max_staleness: int = 1
    """Policy versions that a trained token may lag the learner. 0 is exactly synchronous on-policy training."""
    window: int = 4
    """W: a batch takes the first ready groups among the W oldest; 1 is strict first in, first out. Costs W - 1 slots."""
    reuse: int = 0
    """R: groups of each step that have trained before (P - R are fresh), as long as they are within max_staleness; 0 is off."""
    max_uses: int = 2
    """Steps that one group may train in, if loop.reuse is on."""
    bad_steps: int = 3
    """Skipped steps in a row (see learner.spike_factor) after which weights and optimizer go back to the newest checkpoint."""
    max_rollbacks: int = 2
    """Such returns in one run; when steps are bad again after them, the run stops."""
    stall_s: float = 300.0
    """Seconds without a finished group, step or publication after which the run stops and says why."""

    @property
    def fresh_per_step(self) -> int:
        """P - R: groups that train for the first time in each step."""
        return self.groups_per_step - self.reuse


@dataclass
class RolloutConfig:
    """The engines."""

    num_workers: int = 1
    """Rollout workers, one vLLM engine each."""
    max_num_seqs: int = 64
    """Sequences that one engine decodes at the same time."""
    max_model_len: int = 4608
    """Longest sequence in tokens."""
    max_batched_tokens: int = 4096
    """Tokens per engine step, prefill included."""
    speculative_tokens: int = 2
    """k: draft tokens per step from the MTP head; 0 turns speculation off."""
    kv_cache_gib: float = 1.0
    """Memory for attention and Mamba state on CPU engines."""
    num_threads: int = 1
    """CPU threads per engine."""
    env_hosts: int = 1
    """Environment host processes."""
    env_threads: int = 32
    """Calls of one environment that one host runs at the same time; an episode that waits for its policy needs none."""
    env_host_memory_gib: float = 4.0
    """Memory beyond which a host is replaced between episodes, and beyond twice which at once: an environment leaks."""


@dataclass
class ImportanceConfig:
    """Correction for the difference between the policy that sampled and the policy that trains."""

    rule: str = "masked"
    """masked, icepop, truncated, sequence_mask, geometric_mask, dppo or none; docs/objective.md has the formulas."""
    low: float | None = None
    """Lower bound of what the rule measures; null is the rule's own default (masked: 0.2)."""
    high: float | None = None
    """Upper bound of what the rule measures; null is the rule's own default (masked: 5.0)."""

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) that are in force."""
        own = IMPORTANCE[self.rule]
        return own.low if self.low is None else self.low, own.high if self.high is None else self.high


@dataclass
class LearnerConfig:
    """GRPO and its optimizer."""

    learning_rate: float = 3e-4
    warmup_steps: int = 2
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    spike_factor: float = 10.0
    """A step whose gradient norm is above this many times the median of the last 32 is skipped; 0 skips only what is not finite."""
    num_ranks: int = 1
    """DeepSpeed ranks, one Ray actor each."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 1 to 3."""
    num_threads: int = 1
    """CPU threads per rank."""
    microbatch_tokens: int = 16384
    """Padded tokens per microbatch."""
    advantage: str = "grpo"
    """grpo (divide by the group's standard deviation), mean (do not), leave_one_out."""
    policy_loss: str = "ppo"
    """ppo (GRPO's clipped surrogate), gspo (sequence ratios), cispo (clipped weights, no token without a gradient)."""
    proximal: str = "recomputed"
    """The policy that the clip is around: recomputed (the learner's own at the start of the step), behaviour (the one that sampled)."""
    clip_low: float | None = None
    """The train/proximal ratio is clipped below 1 - clip_low; null is the policy loss's own default (ppo: 0.2)."""
    clip_high: float | None = None
    """The train/proximal ratio is clipped above 1 + clip_high; null is the policy loss's own default (ppo: 0.28, clip-higher)."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    kl_weight: float = 0.0
    """Weight of the KL to the reference policy, the checkpoint that the run started from; 0 keeps no reference in memory."""
    train_staleness: int | None = None
    """Policy versions that the oldest token of a rollout may lag to be trained. An older rollout keeps its reward in its group's
    baseline; its tokens do not train. null is whatever loop.max_staleness admits."""
    mtp_loss_weight: float = 0.3
    """Weight of the MTP head's loss on the policy's own rollouts; the trunk gets no gradient from it."""
    train_router: bool = False
    """Whether MoE router weights are trained; frozen by default, as routers drift in RL."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step is always saved."""
    keep_batches: int | str = 0
    """Batches that stay on disk after a checkpoint covers them, for `polyrl replay`: of the last so many steps, or all."""

    @property
    def clip(self) -> tuple[float, float]:
        """(low, high) of the clip range 1 - low ... 1 + high that is in force."""
        own = POLICY_LOSSES[self.policy_loss]
        return own.low if self.clip_low is None else self.clip_low, own.high if self.clip_high is None else self.clip_high

    @property
    def objective(self) -> str:
        """The rules that are in force, in words."""
        (low, high), rule = self.importance.bounds, self.importance.rule
        bounds = f" importance, {IMPORTANCE[rule].measures} in [{low:g}, {high:g}]" if rule != "none" else " importance correction"
        return (
            f"{self.policy_loss} clip -{self.clip[0]:g}/+{self.clip[1]:g} around the {self.proximal} policy; {self.advantage} advantages; "
            f"{rule}{bounds}" + (f"; KL to the reference x {self.kl_weight:g}" if self.kl_weight else "")
        )


@dataclass
class EvalConfig:
    """Held-out evaluation before the first and after the last step."""

    tasks: int = 128
    """Held-out tasks per environment."""
    samples: int = 1
    """Rollouts per held-out task; with more than one, pass@k is estimated as well."""
    every: int = 0
    """Also evaluate every this many steps, beside training; 0 is never."""
    every_tasks: int = 32
    """Held-out tasks per environment for these intermediate evaluations."""
    seed: int = 1234
    """Sampling seed of evaluation: the same tasks and the same dice before and after."""


@dataclass
class AuditConfig:
    """What watches the reward while the run goes. `polyrl audit` looks at a stored run, whatever stands here."""

    honeypots: float = 0.0
    """Groups of honeypot tasks, which only a cheat can solve, sampled for each training group; stored, never trained. 0.05 is plenty."""
    gate: str = "off"
    """What an alarm does: off (nobody looks), note, penalty (named answers earn 0), quarantine (the environment is masked), stop."""
    every: int = 64
    """Rollouts of an environment between two looks."""


@dataclass
class RunConfig:
    """Everything about one run."""

    name: str = "run"
    runs_dir: str = "runs"
    """Where run folders are made."""
    seed: int = 0
    sandbox: str = "auto"
    """auto, docker or bubblewrap."""
    model: ModelConfig = field(default_factory=ModelConfig)
    environments: dict[str, EnvironmentConfig] = field(default_factory=dict)
    loop: LoopConfig = field(default_factory=LoopConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key=value` overrides, check everything. Raises ConfigError."""
    file = Path(path)
    if not file.is_file():
        near = sorted(str(p) for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        raise ConfigError(f"no config file {str(path)!r}" + (f"; there are {', '.join(near)}" if near else f" and no folder {file.parent}"))
    try:
        loaded = OmegaConf.load(file)
    except Exception as error:  # yaml's own errors have many classes
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, wanted a mapping of keys such as `model:` and `environments:`")
    return parse_config(loaded, overrides, source=str(path))


def parse_config(tree: DictConfig | dict[str, Any], overrides: Iterable[str] = (), *, source: str = "config") -> RunConfig:
    """As `load_config`, from a mapping."""
    merged = OmegaConf.merge(OmegaConf.create(tree), _dotlist(overrides))
    plain = OmegaConf.to_container(merged, resolve=False)
    assert isinstance(plain, dict)
    check_keys(plain, RunConfig, "", source)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        reason = " ".join(str(getattr(error, "msg", None) or error).split("\n")[0].split())
        raise ConfigError(f"{source}: {key}: {reason}; see `polyrl config show`") from error
    assert isinstance(config, RunConfig)
    validate(config)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved config, as it is stored in the run folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _dotlist(overrides: Iterable[str]) -> DictConfig:
    items = list(overrides)
    for item in items:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"override {item!r}: wanted key=value, for example loop.steps=20")
    return OmegaConf.from_dotlist(items)


def check_keys(tree: dict[Any, Any], cls: type, prefix: str, source: str) -> None:
    """Raise ConfigError for the first key that the dataclass does not have, with the nearest one that it has."""
    known = {f.name: get_type_hints(cls)[f.name] for f in fields(cls)}
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {prefix}{key}; {hint}")
        if isinstance(value, dict) and is_dataclass(known[key]):
            check_keys(value, known[key], f"{prefix}{key}.", source)  # type: ignore[arg-type]
        elif isinstance(value, dict) and key == "environments":
            for name, child in value.items():
                if not isinstance(child, dict):
                    raise ConfigError(f"{source}: environments.{name} is {child!r}, wanted a mapping such as {{share: 1.0}}")
                check_keys(child, EnvironmentConfig, f"environments.{name}.", source)
        elif isinstance(value, dict) and cls is EnvironmentConfig and key == "rewards":
            for name, child in value.items():
                if not isinstance(child, dict):
                    raise ConfigError(
                        f"{source}: {prefix}rewards.{name} is {child!r}, wanted a mapping such as {{kind: judge, model: ...}}"
                    )
                check_keys(child, RewardConfig, f"{prefix}rewards.{name}.", source)


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
    _above("rollout.kv_cache_gib", rollout.kv_cache_gib, 0)
    _above("rollout.env_host_memory_gib", rollout.env_host_memory_gib, 0)
    for name in ("num_ranks", "zero_stage", "num_threads", "microbatch_tokens", "checkpoint_every"):
        _at_least(f"learner.{name}", getattr(learner, name), 1)
    _above("learner.learning_rate", learner.learning_rate, 0)
    _above("learner.max_grad_norm", learner.max_grad_norm, 0)
    if learner.spike_factor and learner.spike_factor <= 1:
        raise ConfigError(f"learner.spike_factor is {learner.spike_factor}, wanted more than 1, or 0 to skip only what is not finite")
    _one_of("learner.zero_stage", learner.zero_stage, (1, 2, 3))
    check_objective(learner, loop)
    _at_least("learner.mtp_loss_weight", learner.mtp_loss_weight, 0)
    _one_of("model.dtype", c.model.dtype, ("float32", "bfloat16"))
    _one_of("sandbox", c.sandbox, ("auto", "docker", "bubblewrap"))
    _at_least("eval.tasks", c.eval.tasks, 0)
    _at_least("eval.samples", c.eval.samples, 1)
    _at_least("eval.every", c.eval.every, 0)
    _at_least("eval.every_tasks", c.eval.every_tasks, 1)
    _at_least("audit.honeypots", c.audit.honeypots, 0, "0.05 is one group in twenty")
    if c.audit.honeypots > 1:
        raise ConfigError(f"audit.honeypots is {c.audit.honeypots}, wanted at most 1: they take the engines' time and train nothing")
    _one_of("audit.gate", c.audit.gate, ("off", "note", "penalty", "quarantine", "stop"))
    _at_least("audit.every", c.audit.every, 1)
    if not c.environments:
        raise ConfigError("environments is empty; name at least one, for example `environments: {math: {}}`, and see `polyrl envs list`")
    for name, env in c.environments.items():
        at = f"environments.{name}."
        _above(at + "share", env.share, 0)
        _at_least(at + "group_size", env.group_size, 2, "advantages are relative within a group")
        for knob in ("max_tokens", "max_turns", "max_total_tokens"):
            _at_least(at + knob, getattr(env, knob), 1)
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
            f"or make the small one with `polyrl model seed`"
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


def reference(cls: type = RunConfig, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, type, default) of every key, for the configuration reference."""
    rows: list[tuple[str, str, str]] = []
    hints = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            rows += reference(hints[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]
        elif f.name == "environments":
            rows += reference(EnvironmentConfig, f"{prefix}environments.<name>.")
        elif f.name == "rewards":
            rows += reference(RewardConfig, f"{prefix}rewards.<name>.")
        else:
            default = f.default if f.default is not NO_DEFAULT else f.default_factory()  # type: ignore[misc, operator]
            rows.append((f"{prefix}{f.name}", getattr(hints[f.name], "__name__", str(hints[f.name])), repr(default)))
    return rows
