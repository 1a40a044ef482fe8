"""From task to batch: the types that flow through a run, in the order in which they come to be.

    Task --(episode)--> Completion*, Message* --(verifier)--> Verdict  =  Rollout
    G Rollouts of one Task  =  Group  --(advantages)-->  Trajectory*  --(packing)-->  microbatches

Token payloads are numpy arrays, so that Ray hands them on without copying. Every type is frozen: a thing that is known
is never edited, only a later thing is made from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_core.thinking import Thinking

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]


class Status(StrEnum):
    """How an episode ended. Decided by trusted code alone, never from text that the policy wrote."""

    OK = "ok"
    INVALID_OUTPUT = "invalid_output"  # broken markup, unknown tool, no answer, cut off by the token budget: the policy's fault
    TIMEOUT_MODEL = "timeout_model"  # the policy's program or answer ran too long: the policy's fault
    INFRA_ERROR = "infra_error"  # a process, host or sandbox of ours failed
    ENV_ERROR = "env_error"  # the environment's own code raised, or broke its contract
    VERIFIER_ERROR = "verifier_error"  # our verifier failed, or its gold answer is unusable
    HACK_SUSPECTED = "hack_suspected"  # a trusted signal says the reward was not earned

    @property
    def trains(self) -> bool:
        """Whether a rollout that ended so may enter the loss and its group's baseline (invariant 5)."""
        return self in (Status.OK, Status.INVALID_OUTPUT, Status.TIMEOUT_MODEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message. `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A tool call as the policy wrote it; `arguments` is checked against the tool's schema by the environment."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """An assistant turn, parsed from sampled ids: what an environment's `step` gets as its action.

    <think>3+4 is 7</think>The answer is 7.   ->   thought="3+4 is 7", content="The answer is 7."
    """

    content: str
    """What stands after the thought, without tool-call markup. The only part that a verifier may read for an answer."""
    thought: str = ""
    """What stands between the thinking markers; "" if there is none."""
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: str = ""
    """What is wrong with the markup, in words ("unclosed <think>", "tool call is not JSON"); "" if nothing is."""

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Turn:
        """The turn that `dataclasses.asdict` took apart, after any number of trips through JSON."""
        calls = tuple(ToolCall(name=c["name"], arguments=c["arguments"]) for c in data["tool_calls"])
        return Turn(content=data["content"], thought=data["thought"], tool_calls=calls, malformed=data["malformed"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row of one environment's task source: what an episode is about."""

    env: str  # id of the environment in the config, for example "math"
    key: str  # content hash: stable across runs, processes and machines
    split: str  # "train" or "eval"; no key is in both
    seed: int  # everything random within the episode comes from it
    public: Mapping[str, Any]
    """What the prompt is made of. JSON values."""
    private: Mapping[str, Any] = field(default_factory=dict)
    """Gold answers, hidden inputs. JSON values; no prompt, tool or sandbox may see them."""
    difficulty: str = ""
    """Name of the difficulty bucket, for curves and curricula; "" if the environment has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an episode is worth, and why."""

    status: Status
    reward: float | None
    """In [0, 1] by convention. None exactly when `status` does not train: a failure of ours cannot become a zero."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Named scores, unweighted: {"correct": 1.0, "format": 0.0}."""
    evidence: Mapping[str, str] = field(default_factory=dict)
    """Extracted answer, first failing case, capped logs. For people; never parsed again."""
    verifier_version: str = ""
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if self.status.trains == (self.reward is None):
            raise ValueError(
                f"verdict with status {self.status.value!r} and reward {self.reward}: a status that trains needs a reward, "
                f"any other must have reward=None"
            )
        if self.reward is not None and not np.isfinite(self.reward):
            raise ValueError(f"verdict with reward {self.reward}: wanted a finite number")

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Verdict:
        """The verdict that `dataclasses.asdict` took apart, after any number of trips through JSON."""
        return Verdict(**{**data, "status": Status(data["status"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Output tokens [start, stop) of a completion were sampled under policy `version`."""

    start: int
    stop: int
    version: int


CUT_OFF = "cut off"
"""The finish reason of a completion whose engine went away before it ended. Only drafts hold such (rl_core/drafts.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one call to the engine returned. Exact ids; text is never tokenized twice (invariant 1).

    A completion of T tokens:  token_ids [T], logprobs [T], spans that cover [0, T) without gaps.
    """

    prompt_ids: Ids  # [P] all ids before the sampled ones, earlier turns included
    token_ids: Ids  # [T] as sampled, the stop token included
    logprobs: Floats  # [T] behaviour logprobs, nats, of the processed distribution that was sampled from
    spans: tuple[VersionSpan, ...]
    finish_reason: str  # "stop", "length", or CUT_OFF
    engine_steps: int = 0
    """Forward passes of the policy that sampled these tokens; T / engine_steps is the gain of speculation. 0: not reported."""
    drafted: int = 0  # draft tokens proposed by the MTP head for this completion
    accepted: int = 0  # of these, how many the policy accepted
    forced: tuple[int, ...] = ()
    """Places in [0, T), ascending, of tokens that we wrote into the turn to close a thought (rl_core/thinking.py). The policy read them
    and did not sample them: their logprob is 0 by convention, their version that of the token before, and they never train."""
    positions: tuple[tuple[int, int], ...] = ()
    """(drafted, accepted) of first drafts, of second ones, ...; where k was 2 in one step and 1 in another: ((2, 1), (1, 1))."""

    state_age_sum: int = 0
    """Over the sampled tokens: policy version that sampled the token, less the oldest one that may have computed the KV or recurrent
    state behind it. 0 for all tokens of a request that no update came into."""
    state_age_max: int = 0  # of the oldest such token, policy versions

    def __post_init__(self) -> None:
        covered = sum(s.stop - s.start for s in self.spans)
        if not len(self.token_ids) == len(self.logprobs) == covered:
            raise ValueError(f"ragged completion: {len(self.token_ids)} ids, {len(self.logprobs)} logprobs, spans cover {covered} tokens")
        if self.forced and not 0 <= min(self.forced) <= max(self.forced) < covered:
            raise ValueError(f"forced tokens at {self.forced} of a completion of {covered}")

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """[T] whether the policy sampled the token. False where we wrote it."""
        mask = np.ones(len(self.token_ids), bool)
        mask[list(self.forced)] = False
        return mask

    @property
    def versions(self) -> Ids:
        """[T] policy version of each sampled token."""
        return np.concatenate([np.full(s.stop - s.start, s.version, np.int32) for s in self.spans] or [np.empty(0, np.int32)])


def flat(value: Any) -> dict[str, Any]:
    """A dataclass's fields by name, as they are: what is written at once need not be copied, as `dataclasses.asdict` does."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _plain(value: Any) -> Any:
    """Our dataclasses, and NumPy's numbers, which environments like to return."""
    if is_dataclass(value) and not isinstance(value, type):
        return flat(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__}")


_ENCODE = json.JSONEncoder(default=_plain, separators=(",", ":")).encode


def to_json(value: Any) -> bytes:
    """In ASCII, so that half a surrogate pair, which a policy may write, is text like any other. Raises TypeError for what is no data."""
    return _ENCODE(value).encode()


def add_positions(counts: Iterable[Sequence[Sequence[int]]]) -> tuple[tuple[int, int], ...]:
    """Position by position: [((2, 1), (1, 1)), ((3, 3),)] -> ((5, 4), (1, 1))."""
    columns = zip_longest(*counts, fillvalue=(0, 0))
    return tuple((sum(drafted for drafted, _ in column), sum(accepted for _, accepted in column)) for column in columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One attempt at one task."""

    id: str
    env: str
    task_key: str
    completions: tuple[Completion, ...]
    messages: tuple[Message, ...]
    """The conversation as people read it, the policy's turns included. Never tokenized."""
    verdict: Verdict
    turns: tuple[Turn, ...] = ()
    """The environment's actions, as it got them: with the task, they lead to the same verdict again (invariant 7)."""
    truncated: bool = False
    """A budget ended the episode: the verdict is that of `truncate`, after the turns."""
    thinking_tokens: int = 0
    """Sampled within thoughts. 0 as well where the tokenizer has no thinking markers."""
    worker: str = ""
    started_at: float = 0.0  # seconds since the epoch
    seconds: float = 0.0  # wall time from start to verdict

    @property
    def num_sampled(self) -> int:
        return sum(len(c.token_ids) for c in self.completions) - self.thoughts_closed

    @property
    def thoughts_closed(self) -> int:
        """Thoughts that reached their budget and were closed by us, with a token each."""
        return sum(len(c.forced) for c in self.completions)

    @property
    def num_prompt(self) -> int:
        """Tokens of the conversation that the policy read and did not write."""
        if not self.completions:
            return 0
        last = self.completions[-1]
        return len(last.prompt_ids) + len(last.token_ids) - self.num_sampled

    @property
    def min_version(self) -> int | None:
        """Policy version of the oldest sampled token; None if nothing was sampled."""
        return min((s.version for c in self.completions for s in c.spans), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """G rollouts of one task; advantages are relative within it."""

    id: str
    task: Task
    rollouts: tuple[Rollout, ...]  # [G]

    @property
    def trainable(self) -> tuple[Rollout, ...]:
        return tuple(r for r in self.rollouts if r.verdict.status.trains)

    @property
    def has_signal(self) -> bool:
        """False when every reward is equal: all advantages would be zero."""
        return len({r.verdict.reward for r in self.trainable}) > 1

    @property
    def min_version(self) -> int | None:
        return min((v for r in self.rollouts if (v := r.min_version) is not None), default=None)

    @property
    def max_version(self) -> int | None:
        return max((s.version for r in self.rollouts for c in r.completions for s in c.spans), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The token view of a rollout that the loss sees. All arrays have length L; targets are not shifted.

    Two turns, prompt P0, reply A0, tool output E0, reply A1, advantage a:

        token_ids  = P0         + A0           + E0         + A1
        loss_mask  = 0 * |P0|   + 1 * |A0|     + 0 * |E0|   + 1 * |A1|
        logprobs   = 0 * |P0|   + logprobs(A0) + 0 * |E0|   + logprobs(A1)
        versions   = -1 * |P0|  + versions(A0) + -1 * |E0|  + versions(A1)

    Within A0 and A1, tokens that we forced (`Completion.forced`) are as if the environment had said them.
    A rollout gives one trajectory when each prompt extends the ids before it, and one more for each turn where it does not.
    """

    env: str
    token_ids: Ids  # [L]
    loss_mask: NDArray[np.bool_]  # [L] True on tokens that the policy sampled and that may train
    logprobs: Floats  # [L] behaviour logprobs; 0 where loss_mask is False
    versions: Ids  # [L] policy version that sampled the token; -1 where loss_mask is False
    advantage: float  # the same for every sampled token of the rollout

    def __post_init__(self) -> None:
        lengths = {len(a) for a in (self.token_ids, self.loss_mask, self.logprobs, self.versions)}
        if len(lengths) != 1:
            raise ValueError(f"ragged trajectory of {self.env!r}: lengths {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How an engine samples one completion."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    seed: int | None = None
    """Fixes the sampled tokens for evaluation; None in training."""
    thinking: Thinking | None = None
    """Where the engine must stop for a thought to be closed, with finish reason THOUGHT_FULL; None: nowhere. Set by the episode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSpec:
    """Everything that a rollout worker needs to know to roll out one group, except the task."""

    group_size: int
    sampling: SamplingParams  # max_tokens is per turn
    max_turns: int
    max_total_tokens: int  # prompt and sampled tokens of the whole episode
    timeout_s: float  # wall time of one episode, sampling included
    concurrency: int = 0  # episodes of this environment at the same time in one worker; 0: no cap
    thinking_budget: int | None = None  # reasoning tokens of one turn, after which its thought is closed; None: no cap


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one optimizer step reports. Per-environment figures sit under `env/<id>/...` (see docs/metrics.md)."""

    version: int  # policy version that the step made
    metrics: Mapping[str, float]
    skipped: str = ""
    """Why the step was not taken; then `version` and the weights are those of before. "" if it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One engine's proof that it samples from `version`."""

    worker: str
    version: int
    pause_s: float  # how long running sequences stood still, from the end of the step under way
    num_bytes: int  # bytes loaded, policy and draft
    stage_s: float = 0.0  # of building and checking the new weights beside the old ones, while sampling went on
    checksums: Mapping[str, int] = field(default_factory=dict)
    """Of each parameter and buffer, as verified: {"policy model.norm_f.weight": 0x3a51}. Empty: an engine that loads in place."""
    probe: tuple[Completion, ...]
    """Fresh completions sampled entirely under `version`, with speculation on: the learner recomputes their logprobs (invariant 3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far the engines' logprobs are from the learner's recomputation under the same weights, in nats."""

    mean: float
    max: float
    num_tokens: int


Messages = Sequence[Message]
