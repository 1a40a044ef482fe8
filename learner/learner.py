"""One rank of the learner: groups in, new weights out.

    groups -> trajectories -> microbatches of all ranks (the same plan everywhere) -> mine -> forward, backward  =  accumulate
    gradients, averaged over ranks -> guard -> clip -> AdamW -> weights under the engine's names                 =  apply

Every rank sees all groups and makes the same plan, so denominators need no communication. What ranks exchange are gradients
(DeepSpeed) and one table of sums for the metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from learner import checkpoint, lora
from learner.guard import Guard
from learner.model import PolicyModel
from learner.objective import Batch, Objective, Sum, row_logprobs
from learner.optimizer import deepspeed, make_engine, measure, parameter_groups
from rl_core import seal
from rl_core.batching import Microbatch, microbatch_cost, microbatches, num_loss_tokens, num_mtp_tokens
from rl_core.config import LearnerConfig
from rl_core.overlong import Overlong
from rl_core.trajectories import LeftOut, left_out, trajectories
from rl_core.types import Agreement, Completion, Group, StepStats, Trajectory

Blob = NDArray[np.uint8]
"""The bytes of a safetensors file: policy and `mtp.*` tensors under checkpoint names, in the run's dtype."""


LEFT_OUT = {LeftOut.STALE: "stale_rollouts", LeftOut.TRUNCATED: "truncated_rollouts"}
"""Metrics that count rollouts whose reward is in the baseline and whose tokens do not train."""


class StalenessError(RuntimeError):
    """A token was about to train that is older than the run allows (invariant 2)."""


class Learner:
    """Weights and optimizer of one rank. Call `optimizer.connect` first; every rank makes the same calls in the same order."""

    def __init__(
        self,
        model: PolicyModel,
        config: LearnerConfig,
        *,
        temperatures: Mapping[str, float],
        max_staleness: int,
        version: int = 0,
        overlong: Mapping[str, Overlong] | None = None,
        reference: PolicyModel | None = None,
    ) -> None:
        """`temperatures`: sampling temperature of each environment of the run. `overlong`: what becomes of its cut-off rollouts.

        `reference`: the policy that learner.kl_weight pulls towards, whole on every rank and never trained.
        """
        if (reference is None) != (config.kl_weight == 0):
            raise ValueError(f"learner.kl_weight is {config.kl_weight} with{'out' if reference is None else ''} a reference policy")
        self.config, self.max_staleness, self.version = config, max_staleness, version
        self.overlong = dict(overlong or {})
        self.envs = tuple(sorted(temperatures))
        self.temperatures = dict(temperatures)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        model.gradient_checkpointing = config.checkpoint_layers
        if config.lora.rank:
            lora.install(model.lm, config.lora)
        if not config.train_router:
            for parameter in model.router_parameters():
                parameter.requires_grad_(False)
        self.objective = Objective(model, config, len(self.envs))
        if model.mtp is not None and not self.objective.trains_mtp:
            model.mtp.requires_grad_(False)
        mtp = [p for p in model.mtp.parameters() if p.requires_grad] if model.mtp is not None else []
        own = {id(p) for p in mtp}
        policy = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        dtype, num_parameters = next(model.parameters()).dtype, sum(p.numel() for p in model.parameters())
        buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
        self.engine, self.optimizer = make_engine(self.objective, parameter_groups(policy, mtp, config.max_grad_norm), config, dtype=dtype)
        self.device = self.engine.device
        self._microbatch_cost = microbatch_cost(num_parameters, on_gpu=self.device.type == "cuda")
        self.reference = None if reference is None else reference.to(self.device).requires_grad_(False).eval()
        for name, buffer in model.named_buffers():  # DeepSpeed casts all to the run's dtype; router biases stay in float32
            buffer.data = buffer.data.to(buffers[name])
        self.guard = Guard(config.spike_factor)
        self._pending: dict[str, float] | None = None

    @property
    def model(self) -> PolicyModel:
        return self.objective.model

    # --- a step -------------------------------------------------------------------------------------------------------

    def accumulate(self, groups: Sequence[Group]) -> dict[str, float]:
        """Gradients of the loss over `groups` under the current weights. Returns metrics; `apply` reports them again.

        Raises StalenessError before anything is computed if a token is too old.
        """
        if self._pending is not None:
            raise RuntimeError("accumulate() twice before apply(): the first gradients would be divided by the wrong number of tokens")
        began = time.monotonic()
        rows, kept_out = self._trajectories(groups)
        staleness = staleness_metrics(rows, version=self.version, bound=self.max_staleness)
        num_tokens, num_mtp = num_loss_tokens(rows), num_mtp_tokens(rows)
        if not num_tokens and not kept_out:
            raise ValueError(f"{len(groups)} groups without a single token to train; the loop must leave out groups that do not train")
        plan = microbatches(
            rows,
            envs=self.envs,
            max_tokens=self.config.microbatch_tokens,
            num_ranks=self.world_size,
            share_prefixes=self.model.shares_prefixes,
            fixed_cost=self._microbatch_cost,
        )
        sums = torch.zeros(len(self.envs), len(Sum), dtype=torch.float64, device=self.device)
        mine = plan[self.rank]
        for index, microbatch in enumerate(mine):
            self.engine.set_gradient_accumulation_boundary(index == len(mine) - 1)
            loss, part = self.engine(self._batch(microbatch), num_tokens, num_mtp)
            # DeepSpeed averages over ranks; denominators are global, so the shares must be added.
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
            sums += part
        dist.all_reduce(sums)
        metrics = loss_metrics(
            sums.cpu().numpy(), self.envs, mtp_weight=self.config.mtp_loss_weight if num_mtp else 0.0, kl_weight=self.config.kl_weight
        )
        metrics |= staleness | kept_out | self._expert_metrics()
        everything = [m for rank in plan for m in rank]
        metrics["learner/real_tokens"] = float(sum(m.num_tokens for m in everything))
        metrics["learner/shared_tokens"] = float(sum(m.num_shared for m in everything))
        metrics["learner/padded_tokens"] = float(sum(m.num_padded for m in everything))
        metrics["learner/microbatches"] = float(len(mine))
        metrics["learner/accumulate_s"] = time.monotonic() - began
        self._pending = metrics
        return dict(metrics)

    def _expert_metrics(self) -> dict[str, float]:
        """How evenly the batch went to the experts of each MoE layer."""
        metrics: dict[str, float] = {}
        loads, self.objective.expert_loads = self.objective.expert_loads, {}
        for layer, load in sorted(loads.items()):
            dist.all_reduce(load)
            metrics[f"learner/expert_load_max/{layer}"] = float(load.max() * len(load) / load.sum().clamp(min=1))
            metrics[f"learner/experts_idle/{layer}"] = float((load == 0).float().mean())
        return metrics

    def _trajectories(self, groups: Sequence[Group]) -> tuple[list[Trajectory], dict[str, float]]:
        """What trains of `groups`, and how many rollouts only lend their reward, by environment and reason."""
        oldest = None if self.config.train_staleness is None else self.version - self.config.train_staleness
        rows: list[Trajectory] = []
        kept_out: dict[str, float] = {}
        for group in groups:
            overlong = self.overlong.get(group.task.env, Overlong())
            rows += trajectories(group, self.config.advantage, overlong=overlong, oldest=oldest)
            for rollout in group.trainable:
                if reason := left_out(rollout, overlong=overlong, oldest=oldest):
                    name = f"env/{group.task.env}/{LEFT_OUT[reason]}"
                    kept_out[name] = kept_out.get(name, 0.0) + 1
        return rows, kept_out

    def apply(self, *, again: bool = False) -> StepStats:
        """The optimizer step over what `accumulate` gathered: the weights become those of the next version.

        A bad step (see `guard`) is skipped: weights, optimizer and version stay, and the answer says why. `again`: this step was taken
        before, by a learner that died since; whether it spikes is not asked a second time.
        """
        if self._pending is None:
            raise RuntimeError("apply() without accumulate(): there are no gradients")
        began = time.monotonic()
        metrics, self._pending = self._pending, None
        norms = measure(self.engine, self.optimizer)
        metrics["learner/grad_norm"] = norms["policy"]
        if "MTP head" in norms:
            metrics["learner/mtp_grad_norm"] = norms["MTP head"]
        skipped = self._agree(self.guard.judge(metrics["learner/loss"], norms, spikes=not again))
        self.optimizer.vetoed = bool(skipped)
        rate = self.config.learning_rate * min(1.0, (self.version + 1) / max(self.config.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        if skipped:
            return StepStats(version=self.version, metrics=metrics, skipped=skipped)
        self.guard.taken(norms)
        self.version += 1
        seconds = metrics["learner/accumulate_s"] + time.monotonic() - began
        metrics |= {
            "learner/learning_rate": rate,
            "learner/seconds": seconds,
            "learner/tokens_per_s": metrics["learner/real_tokens"] / seconds,
            "learner/padded_tokens_per_s": metrics["learner/padded_tokens"] / seconds,
        }
        return StepStats(version=self.version, metrics=metrics)

    def _agree(self, verdict: str) -> str:
        """Rank 0's verdict, on every rank: one that steps alone would part from the others without a word."""
        verdicts = [verdict]
        dist.broadcast_object_list(verdicts, src=0)
        return verdicts[0]

    # --- weights ------------------------------------------------------------------------------------------------------

    def weights(self) -> Blob | None:
        """The current weights for the engines, on rank 0; None elsewhere."""
        with self._gathered():
            if self.rank != 0:
                return None
            state = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in self.model.engine_state().items()}
        sealed = seal.metadata({name: tensor.view(-1).view(torch.uint8).numpy() for name, tensor in state.items()}, self.version)
        return np.frombuffer(safetensors.torch.save(state, metadata=sealed), np.uint8)

    @torch.no_grad()
    def agreement(self, completions: Sequence[Completion]) -> Agreement:
        """Recompute the logprobs of `completions`, sampled at temperature 1 under the current weights (invariant 3).

        Rows go through the model one by one, without padding. Any version may have sampled them: the caller knows.
        """
        errors = []
        for completion in completions:
            ids = np.concatenate([completion.prompt_ids, completion.token_ids])
            mask = np.arange(len(ids)) >= len(completion.prompt_ids)
            token_ids = torch.from_numpy(ids.astype(np.int64))[None].to(self.device)
            with self._gathered():
                logprobs = self.objective.logprobs(token_ids, torch.from_numpy(mask)[None].to(self.device), 1.0)
            errors.append(np.abs(logprobs.float().cpu().numpy() - completion.logprobs[-len(logprobs) :]))
        together = np.concatenate(errors) if errors else np.empty(0, np.float32)
        if not len(together):
            raise ValueError(f"{len(completions)} completions without a token: nothing to compare; the probe must sample at least one")
        return Agreement(mean=float(together.mean()), max=float(together.max()), num_tokens=len(together))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, root: Path, tokenizer_path: str | Path | None = None) -> Path:
        """Write the checkpoint of the current version under `root`; returns its folder. Not between `accumulate` and `apply`."""
        if self._pending is not None:
            raise RuntimeError("save() between accumulate() and apply(): gradients are not part of a checkpoint")
        if (newest := checkpoint.latest(root)) is not None and newest.name == checkpoint.folder_name(self.version):
            return newest  # replacing it would leave a moment without any
        folder = root / f".step-{self.version:06d}.partial"
        if self.rank == 0:
            folder = checkpoint.begin(root, self.version)
        dist.barrier()
        self.engine.save_checkpoint(str(folder), tag="optimizer", save_latest=False)
        torch.save({"rng": torch.get_rng_state(), "guard": self.guard.state()}, folder / f"rank-{self.rank}.pt")
        self.save_model(folder / "model", tokenizer_path)
        dist.barrier()
        if self.rank == 0:
            checkpoint.commit(root, folder, self.version, self._layout())
        dist.barrier()
        return root / checkpoint.folder_name(self.version)

    def save_model(self, folder: Path, tokenizer_path: str | Path | None = None) -> None:
        """Write the weights alone, as a checkpoint folder for Transformers and vLLM. Every rank calls this; rank 0 writes."""
        with self._gathered():
            if self.rank == 0:
                self.model.save_pretrained(folder, tokenizer_path)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint that `save` wrote: weights, optimizer, random state and version."""
        self.version = checkpoint.read_state(folder, self._layout())
        loaded, _ = self.engine.load_checkpoint(str(folder), tag="optimizer")
        if loaded is None:
            raise ValueError(
                f"{folder / 'optimizer'} cannot be read; take an older checkpoint by writing its name into {folder.parent / 'latest'}"
            )
        own = torch.load(folder / f"rank-{self.rank}.pt", weights_only=True)
        torch.set_rng_state(own["rng"])
        self.guard.restore(own["guard"])

    def _layout(self) -> dict[str, Any]:
        """What the optimizer's files depend on."""
        adapters = asdict(self.config.lora) if self.config.lora.rank else None
        return {"num_ranks": self.world_size, "zero_stage": self.config.zero_stage, "mtp": self.objective.trains_mtp, "lora": adapters}

    def _gathered(self) -> AbstractContextManager[None]:
        """All weights in full on this rank: ZeRO 3 holds only slices otherwise."""
        return _gather(self.model) if self.config.zero_stage == 3 else nullcontext()

    def _batch(self, microbatch: Microbatch) -> Batch:
        """To the device; microbatch.envs index `self.envs`."""
        by_env = np.array([self.temperatures[name] for name in self.envs] + [1.0], np.float32)  # -1, no environment, is the last

        def tensor(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(array).to(self.device)

        batch = Batch(
            prefix_ids=tensor(microbatch.prefix_ids.astype(np.int64)),
            token_ids=tensor(microbatch.token_ids.astype(np.int64)),
            loss_mask=tensor(microbatch.loss_mask),
            logprobs=tensor(microbatch.logprobs),
            advantages=tensor(microbatch.advantages),
            envs=tensor(microbatch.envs.astype(np.int64)),
            temperatures=tensor(by_env[microbatch.envs]),
        )
        return batch if self.reference is None else replace(batch, reference=row_logprobs(self.reference, batch))


@contextmanager
def _gather(model: PolicyModel) -> Iterator[None]:
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None):
        yield


def staleness_metrics(rows: Sequence[Trajectory], *, version: int, bound: int) -> dict[str, float]:
    """Mean and maximum of (learner version - token version) over trained tokens, per environment and overall.

    Raises StalenessError if a token is older than `bound` versions, or newer than the learner.
    """
    metrics: dict[str, float] = {}
    seen: list[NDArray[Any]] = []
    for env in sorted({r.env for r in rows}):
        ages = version - np.concatenate([r.versions[r.loss_mask] for r in rows if r.env == env])
        if not len(ages):
            continue
        if ages.max() > bound:
            raise StalenessError(
                f"{(ages > bound).sum()} of {len(ages)} tokens of {env!r} are too old to train: sampled by version {version - ages.max()}, "
                f"the learner is at version {version}, loop.max_staleness is {bound}; admission must prevent this, please report it"
            )
        if ages.min() < 0:
            raise StalenessError(f"tokens of {env!r} were sampled by version {version - ages.min()}, the learner is at version {version}")
        metrics[f"env/{env}/staleness_mean"], metrics[f"env/{env}/staleness_max"] = float(ages.mean()), float(ages.max())
        seen.append(ages)
    if seen:
        ages = np.concatenate(seen)
        metrics["learner/staleness_mean"], metrics["learner/staleness_max"] = float(ages.mean()), float(ages.max())
    return metrics


def loss_metrics(sums: NDArray[np.float64], envs: Sequence[str], *, mtp_weight: float, kl_weight: float = 0.0) -> dict[str, float]:
    """Figures from the sums [environments, len(Sum)] over all ranks: overall, and of each environment that was trained."""
    total = _figures(sums.sum(0), kl_weight)
    metrics = {f"learner/{name}": value for name, value in total.items()}
    policy_loss = float(sums[:, Sum.LOSS].sum() / max(sums[:, Sum.TOKENS].sum(), 1))
    metrics["learner/policy_loss"] = policy_loss
    metrics["learner/loss"] = policy_loss + mtp_weight * total.get("mtp_loss", 0.0)
    for env, row in zip(envs, sums, strict=True):
        if row[Sum.TOKENS]:
            metrics |= {f"env/{env}/{name}": value for name, value in _figures(row, kl_weight).items()}
    return metrics


def _figures(row: NDArray[np.float64], kl_weight: float) -> dict[str, float]:
    """Means over the trained tokens of one row of sums."""
    tokens = row[Sum.TOKENS]
    if not tokens:
        return {"trained_tokens": 0.0}
    figures = {
        "trained_tokens": tokens,
        "masked_share": row[Sum.DROPPED] / tokens,
        "clip_share": row[Sum.CLIPPED] / tokens,
        "entropy": row[Sum.ENTROPY] / tokens,
        "mismatch_kl": row[Sum.KL] / tokens,
        "ratio_mean": row[Sum.RATIO] / tokens,
        "ess": row[Sum.PULL] ** 2 / (tokens * max(row[Sum.PULL_SQUARED], 1e-12)),  # 1: every token counts the same
    }
    if kl_weight:
        figures["reference_kl"] = row[Sum.REFERENCE_KL] / tokens
    if row[Sum.MTP_TOKENS]:
        figures["mtp_loss"] = row[Sum.MTP_LOSS] / row[Sum.MTP_TOKENS]
    return {name: float(value) for name, value in figures.items()}
