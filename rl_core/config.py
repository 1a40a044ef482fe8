"""The config of a run: a tree of dataclasses. Read from YAML by rl_core/config_files.py, checked by rl_core/config_checks.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rl_core.rules import IMPORTANCE, POLICY_LOSSES


class ConfigError(ValueError):
    """The user's config cannot run. The message is one sentence: what it got, what it wanted, what to do."""


@dataclass
class ModelConfig:
    """Which checkpoint to start from."""

    path: str = "configs/models/seed"
    """Checkpoint folder that Transformers and vLLM load. Relative paths are taken from the working directory."""
    dtype: str = "float32"
    """float32 or bfloat16; the same for engine and learner."""
    tool_format: str = "auto"
    """How tool calls are spelled: hermes (JSON), xml (Nemotron-3, Qwen3-Coder), or auto, what the checkpoint's chat template writes."""


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
    thinking_budget: int | None = None
    """Reasoning tokens per turn, after which the thought is closed and the turn goes on; 0 closes it at once, null is no cap."""
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
    """k: draft tokens per sequence and step from the MTP head; 0 turns speculation off."""
    auto_k: bool = False
    """Whether each engine chooses how many it drafts, from 0 to `speculative_tokens`, by what it measures (docs/speculation.md). Then a
    fixed sampling seed no longer fixes the tokens: which dice they take depends on k."""
    in_flight: str = "keep"
    """Sequences under way when new weights come: keep (go on, with the state that older weights computed) or restart (their turn is
    sampled again from its prompt, under the new weights)."""
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
class LoraConfig:
    """Train low-rank additions to some matrices in place of the policy's weights. The MTP head trains in full beside them."""

    rank: int = 0
    """Rank of the additions; 0 is no LoRA: all weights train."""
    alpha: float = 16.0
    """The additions are multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Last parts of the names of the linear layers that get one."""


@dataclass
class LearnerConfig:
    """GRPO and its optimizer."""

    learning_rate: float = 3e-4
    """Of AdamW, after the warm-up."""
    warmup_steps: int = 2
    """Steps over which the learning rate rises linearly."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; those of the MTP head by their own."""
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
    checkpoint_layers: bool = False
    """The backward pass keeps each layer's input and computes the rest of it again: a fraction of the memory (docs/learner.md has the
    formula), about a third more time. For long sequences."""
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
    mtp_depth: int = 1
    """Drafts ahead that the loss covers: 1 is what is trained in pretraining; with more the head also learns to go on from its own output,
    as it must with rollout.speculative_tokens above 1."""
    lora: LoraConfig = field(default_factory=LoraConfig)
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
class TrackersConfig:
    """Where the figures go besides the run's own store. A tracker that is slow or fails never delays or stops a run."""

    use: list[str] = field(default_factory=list)
    """Any of tensorboard, wandb and mlflow; their packages are the extra `trackers`."""
    project: str = "polyrl"
    """Project of Weights & Biases, experiment of MLflow."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run there."""
    wandb_mode: str = "online"
    """online, or offline: files in the run's folder, for `wandb sync`."""
    wandb_entity: str = ""
    """Team or user; "" is the default of the account."""
    mlflow_uri: str = ""
    """Tracking server or store of MLflow; "" is the folder mlruns beside the runs."""
    prometheus: bool = True
    """Also as Ray metrics, which Prometheus reads from the cluster."""


@dataclass
class StoreConfig:
    """What a run's folder keeps."""

    keep_tokens: bool = False
    """Whether the ids, logprobs and policy versions of every token are stored with its rollout: what the dashboard's token view shows."""
    max_gib: float = 0.0
    """GiB of rollouts that a run keeps: beyond them its oldest rollouts of training are removed, with a note; 0 keeps all. Held-out
    rollouts stay, and so does everything that `polyrl ledger` or a resumed run needs."""

    @property
    def max_bytes(self) -> int | None:
        """None keeps all."""
        return int(self.max_gib * 2**30) if self.max_gib else None


@dataclass
class RunConfig:
    """Everything about one run."""

    name: str = "run"
    """The run's id is the time of its start and this name."""
    runs_dir: str = "runs"
    """Where run folders are made."""
    seed: int = 0
    """Of task sources and of the engines' sampling."""
    sandbox: str = "auto"
    """auto, docker or bubblewrap."""
    model: ModelConfig = field(default_factory=ModelConfig)
    environments: dict[str, EnvironmentConfig] = field(default_factory=dict)
    loop: LoopConfig = field(default_factory=LoopConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)
