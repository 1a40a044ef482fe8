"""One microbatch through the model: the loss to differentiate, and the sums that metrics are made of.

    ids --> trunk --> hidden --(positions that predict a trained token)--> LM head --> logprobs --> policy loss --> trunk
                        |
                        +--(detached)--> MTP head --(the same, one token further)--> cross-entropy --> MTP head alone

The LM head is the widest part of a small model. It runs only where a trained token is predicted: a 4k-token prompt with a
50-token answer costs 50 rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto

import torch
from torch import Tensor, nn

from learner.importance import Tokens
from learner.losses import k3, token_losses
from learner.model import PolicyModel
from rl_core.config import LearnerConfig


class Sum(IntEnum):
    """Columns of the sums [environments, len(Sum)] over trained tokens, that ranks and microbatches add up."""

    TOKENS = 0
    LOSS = auto()  # as trained, weights and KL included
    DROPPED = auto()  # tokens that the importance rule masked or capped
    CLIPPED = auto()
    ENTROPY = auto()  # nats
    KL = auto()  # behaviour, train; nats, k3
    RATIO = auto()
    PULL = auto()  # the whole weight of a token in the gradient
    PULL_SQUARED = auto()
    REFERENCE_KL = auto()  # train, reference; nats, k3
    MTP_TOKENS = auto()
    MTP_LOSS = auto()  # nats, mean over drafts


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A `Microbatch` on the device."""

    prefix_ids: Tensor  # [P] int64, before every row; often empty
    token_ids: Tensor  # [B, L] int64
    loss_mask: Tensor  # [B, L] bool
    logprobs: Tensor  # [B, L] behaviour, nats
    advantages: Tensor  # [B]
    envs: Tensor  # [B] int64; -1 where the row has no environment
    temperatures: Tensor  # [B]
    reference: Tensor | None = None  # [B, L] logprobs under the reference policy, nats; only where loss_mask is True


class Objective(nn.Module):
    """Policy and loss in one module, so that DeepSpeed sees a single forward pass (ZeRO 3 gathers weights around it)."""

    def __init__(self, model: PolicyModel, config: LearnerConfig, num_envs: int) -> None:
        super().__init__()
        self.model, self.config, self.num_envs = model, config, num_envs
        self.trains_mtp = model.has_mtp and config.mtp_loss_weight > 0
        self.expert_loads: dict[int, Tensor] = {}
        """Tokens per expert [E] of each MoE layer since whoever measures it last emptied this."""

    def forward(self, batch: Batch, num_loss_tokens: int, num_mtp_tokens: int) -> tuple[Tensor, Tensor]:
        """(this microbatch's share of the loss, its sums [num_envs, len(Sum)]). Shares of all microbatches and ranks add up to the loss."""
        hidden, prefix = hidden_states(self.model, batch)
        for layer, load in self.model.expert_loads(real_inputs(batch)).items():
            self.expert_loads[layer] = self.expert_loads.get(layer, 0) + load
        loss, sums = self._policy(batch, hidden)
        loss = loss / max(num_loss_tokens, 1)
        if self.trains_mtp:
            mtp_loss, mtp_sums = self._mtp(batch, hidden.detach(), prefix)
            loss = loss + self.config.mtp_loss_weight * mtp_loss / max(num_mtp_tokens, 1)
            sums = sums + mtp_sums
        return loss, sums

    def logprobs(self, token_ids: Tensor, mask: Tensor, temperature: float) -> Tensor:
        """Logprobs [T] of the tokens where `mask` [B, L] is True, row by row."""
        rows, columns = mask[:, 1:].nonzero(as_tuple=True)
        hidden = self.model(token_ids[:, :-1])
        return self.model.token_logprobs(hidden[rows, columns], token_ids[rows, columns + 1], temperature)[0]

    def _policy(self, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of token losses, with gradient, and the policy's columns of the sums."""
        rows, columns = batch.loss_mask[:, 1:].nonzero(as_tuple=True)  # column t predicts token t + 1
        targets, behaviour = batch.token_ids[rows, columns + 1], batch.logprobs[rows, columns + 1]
        train, entropy = self.model.token_logprobs(hidden[rows, columns], targets, batch.temperatures[rows])
        tokens = Tokens(
            train=train,
            proximal=self._proximal(train, behaviour),
            behaviour=behaviour,
            advantages=batch.advantages[rows],
            rows=rows,
            num_rows=len(batch.token_ids),
        )
        reference = None if batch.reference is None else batch.reference[rows, columns + 1]
        result = token_losses(tokens, self.config, reference)
        columns_of = {
            Sum.TOKENS: torch.ones_like(entropy),
            Sum.LOSS: result.loss,
            Sum.DROPPED: ~result.weights.kept,
            Sum.CLIPPED: result.clipped,
            Sum.ENTROPY: entropy,
            Sum.KL: torch.where(behaviour.isfinite(), k3(train.detach() - behaviour), 0.0),
            Sum.RATIO: result.weights.ratio,
            Sum.PULL: result.pull,
            Sum.PULL_SQUARED: result.pull.square(),
        }
        if result.reference_kl is not None:
            columns_of[Sum.REFERENCE_KL] = result.reference_kl
        return result.loss.sum(), self._sums(batch.envs[rows], columns_of)

    def _proximal(self, train: Tensor, behaviour: Tensor) -> Tensor:
        """One optimizer step per batch: what a forward pass before it would recompute is what this one computes."""
        if self.config.proximal == "recomputed":
            return train.detach()
        return torch.where(behaviour.isfinite(), behaviour.to(train.dtype), train.detach())

    def _mtp(self, batch: Batch, hidden: Tensor, prefix: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the MTP head on the policy's own tokens. `hidden` is detached and the LM head frozen: the trunk gets nothing.

        Position t sees hidden t and token t + 1, and predicts token t + 2, as in the engine's draft; with `mtp_depth` also the tokens
        behind it, from its own outputs. The loss is the mean over depths of sums over tokens.
        """
        depth = self.config.mtp_depth
        total, sums = hidden.new_zeros(()), torch.zeros(self.num_envs, len(Sum), dtype=torch.float64, device=hidden.device)
        drafts = self.model.mtp_drafts(hidden, batch.token_ids, batch.loss_mask, depth, prefix=prefix)
        for j, (drafted, targets, rows) in enumerate(drafts):
            logprobs, _ = self.model.token_logprobs(drafted, targets, 1.0, frozen_head=True)
            loss = -logprobs / depth
            total = total + loss.sum()
            columns = {Sum.MTP_LOSS: loss} | ({Sum.MTP_TOKENS: torch.ones_like(loss)} if j == 0 else {})
            sums = sums + self._sums(batch.envs[rows], columns)
        return total, sums

    def _sums(self, envs: Tensor, columns: dict[Sum, Tensor]) -> Tensor:
        """[num_envs, len(Sum)] float64: each column added up per environment."""
        sums = torch.zeros(self.num_envs, len(Sum), dtype=torch.float64, device=envs.device)
        for column, values in columns.items():
            sums[:, column].index_add_(0, envs, values.detach().to(torch.float64))
        return sums


def real_inputs(batch: Batch) -> Tensor:
    """[P + B * (L - 1)] bool: what goes through the model and is no padding. A row ends at its last trained token."""
    rows = batch.loss_mask[:, 1:].flip(1).cumsum(1).flip(1) > 0
    return torch.cat([torch.ones(len(batch.prefix_ids), dtype=torch.bool, device=rows.device), rows.flatten()])


def hidden_states(model: PolicyModel, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Hidden states [B, L - 1, D] of the rows, and those of their prefix (detached) with its ids, if they have one."""
    inputs = batch.token_ids[:, :-1]
    if not len(batch.prefix_ids):
        return model(inputs), None
    before, hidden = model.behind_prefix(batch.prefix_ids, inputs)
    return hidden, (before.detach(), batch.prefix_ids)


@torch.no_grad()
def row_logprobs(model: PolicyModel, batch: Batch) -> Tensor:
    """[B, L] logprobs of the trained tokens under another model of the same vocabulary; 0 elsewhere."""
    rows, columns = batch.loss_mask[:, 1:].nonzero(as_tuple=True)
    hidden, _ = hidden_states(model, batch)
    logprobs, _ = model.token_logprobs(hidden[rows, columns], batch.token_ids[rows, columns + 1], batch.temperatures[rows])
    found = logprobs.new_zeros(batch.token_ids.shape)
    found[rows, columns + 1] = logprobs
    return found
