"""From trajectories to microbatches: rectangles of right-padded rows, the same count on every rank.

    trajectories --(rows of one long prompt together)--> units --(sort by cost, deal out to ranks like cards)--> units of a rank
        --(rows alone: cut where padding is cheapest)--> microbatches

How rows are packed never changes the gradient: the loss divides by counts over the whole batch, which every rank knows
beforehand (`num_loss_tokens`). Nothing here is random, so that a stored batch replays to the same microbatches (invariant 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rl_core.types import Floats, Ids, Trajectory

MICROBATCH_COST = 512
"""Fixed cost of one more microbatch, as so many padded tokens: kernel launches and Python against arithmetic. Of a model of a million
parameters on a CPU, or a large one on a GPU."""

PAD_ID = 0
"""Any valid id: models are causal and padding stands on the right, so nothing that is trained looks at it."""

LEAST_SHARED = 8
"""Positions of a prompt worth sharing: more than a convolution of the hybrid looks back."""

CONTEXT = 2
"""Tokens of a shared prompt that stay in the rows: what predicts the first trained token, for policy and MTP head, is a row's own."""

EMPTY_LENGTH = 4
"""Width of a microbatch without content; long enough for a next token and for the MTP head's token after that."""


def microbatch_cost(num_parameters: int, *, on_gpu: bool) -> int:
    """MICROBATCH_COST for a model of this size: on a CPU a token's arithmetic grows with the parameters, and the fixed cost hardly does."""
    return MICROBATCH_COST if on_gpu else max(16, MICROBATCH_COST * 2_000_000 // max(num_parameters, 2_000_000))


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """B rows of L positions, right-padded, behind one prefix. A row ends at its last trained token: what comes after cannot matter."""

    prefix_ids: Ids  # [P] what stands before every row; empty unless a group's long prompt is shared
    token_ids: Ids  # [B, L]
    loss_mask: NDArray[np.bool_]  # [B, L] True on tokens to train; never at position 0, which nothing predicts
    logprobs: Floats  # [B, L] behaviour logprobs in nats; 0 where loss_mask is False
    advantages: Floats  # [B]
    envs: Ids  # [B] index into the caller's list of environments; -1 in an empty microbatch
    num_tokens: int  # without padding, prefix included once

    @property
    def num_padded(self) -> int:
        """Tokens with padding: what the model computes."""
        return self.token_ids.size + len(self.prefix_ids)

    @property
    def num_shared(self) -> int:
        """Tokens that need no computation because rows share their prefix."""
        return len(self.prefix_ids) * (len(self.token_ids) - 1)


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows that go to one rank together: one alone, or those behind one prompt."""

    rows: tuple[int, ...]
    prefix: int  # positions that all rows share; 0 for a row alone
    cost: int  # padded tokens


def trainable_length(trajectory: Trajectory) -> int:
    """Positions up to and with the last trained token; 0 if there is none."""
    mask = trajectory.loss_mask
    last = len(mask) - 1 - int(mask[::-1].argmax()) if len(mask) else 0  # argmax finds the first True, or 0
    return last + 1 if last > 0 and mask[last] else 0


def trained_mask(trajectory: Trajectory) -> NDArray[np.bool_]:
    """[L] the loss mask without position 0."""
    mask = trajectory.loss_mask.copy()
    mask[:1] = False
    return mask


def num_loss_tokens(trajectories: Sequence[Trajectory]) -> int:
    """The normaliser of the policy loss: trained tokens over all ranks and microbatches."""
    return sum(int(trained_mask(t).sum()) for t in trajectories)


def num_mtp_tokens(trajectories: Sequence[Trajectory]) -> int:
    """The normaliser of the MTP loss: trained tokens that have two tokens before them."""
    return sum(int(t.loss_mask[2:].sum()) for t in trajectories)


def microbatches(
    trajectories: Sequence[Trajectory],
    *,
    envs: Sequence[str],
    max_tokens: int,
    num_ranks: int = 1,
    share_prefixes: bool = False,
    fixed_cost: int = MICROBATCH_COST,
) -> list[list[Microbatch]]:
    """[num_ranks] lists of equal length, at least 1. A row longer than `max_tokens` padded tokens gets a microbatch of its own.

    Units are dealt out by cost in turns that go back and forth, so that ranks do nearly the same work in the same shapes.
    `share_prefixes`: a prompt that several rows begin with is computed once, where that saves more tokens than `fixed_cost`, what one
    more microbatch costs (`microbatch_cost`).
    """
    lengths = [trainable_length(t) for t in trajectories]
    index = {name: i for i, name in enumerate(envs)}
    if unknown := {t.env for t in trajectories} - set(index):
        raise ValueError(f"trajectories of unknown environment {sorted(unknown)[0]!r}; the run has {', '.join(envs)}")
    units = sorted(_units(trajectories, lengths, max_tokens, fixed_cost if share_prefixes else None), key=lambda u: (-u.cost, u.rows))
    hands: list[list[Unit]] = [[] for _ in range(num_ranks)]
    for turn, unit in enumerate(units):
        lap, seat = divmod(turn, num_ranks)
        hands[seat if lap % 2 == 0 else num_ranks - 1 - seat].append(unit)
    ranks = []
    for hand in hands:
        alone = [u.rows[0] for u in hand if not u.prefix]
        cuts = cheapest_cuts(np.array([lengths[i] for i in alone], np.int64), max_tokens, fixed_cost)
        batches = [(u.rows, u.prefix) for u in hand if u.prefix] + [(tuple(alone[a:b]), 0) for a, b in cuts]
        ranks.append([_pad([trajectories[i] for i in rows], [lengths[i] for i in rows], prefix, index) for rows, prefix in batches])
    most = max(1, *(len(r) for r in ranks))  # a batch without a token to train is still a step
    for rank in ranks:
        rank += [_empty() for _ in range(most - len(rank))]
    return ranks


def _units(trajectories: Sequence[Trajectory], lengths: Sequence[int], max_tokens: int, cost: int | None) -> list[Unit]:
    """Every row that trains, in exactly one unit. A prompt is shared where that saves more tokens than `cost`; None: never."""
    if cost is None:
        return [Unit((i,), 0, length) for i, length in enumerate(lengths) if length]
    by_prompt: dict[bytes, list[int]] = {}
    for i, length in enumerate(lengths):
        if length:
            prompt = trajectories[i].token_ids[: int(trained_mask(trajectories[i]).argmax())]
            by_prompt.setdefault(prompt.tobytes(), []).append(i)
    units = []
    for rows in by_prompt.values():
        prefix = int(trained_mask(trajectories[rows[0]]).argmax()) - CONTEXT
        longest = max(lengths[i] for i in rows) - prefix
        size = max(1, (max_tokens - prefix) // longest)  # rows that fit behind one copy of the prefix
        if prefix >= LEAST_SHARED and (min(size, len(rows)) - 1) * prefix > cost:
            parts = [tuple(rows[a : a + size]) for a in range(0, len(rows), size)]
            units += [Unit(part, prefix, prefix + len(part) * longest) for part in parts]
        else:
            units += [Unit((i,), 0, lengths[i]) for i in rows]
    return units


def cheapest_cuts(lengths: NDArray[np.int64], max_tokens: int, fixed_cost: int = MICROBATCH_COST) -> list[tuple[int, int]]:
    """Cut rows of descending `lengths` [n] into consecutive [start, stop) so that padded tokens + `fixed_cost` each is least.

    Exact, by dynamic programming: best[j] = min over i of best[i] + lengths[i] * (j - i) + fixed_cost.
    """
    n = len(lengths)
    best, cut_at = np.zeros(n + 1), np.zeros(n + 1, np.int64)
    for j in range(1, n + 1):
        first = max(0, min(j - 1, j - max_tokens // max(int(lengths[j - 1]), 1)))  # more rows than that do not fit: they are no shorter
        start = np.arange(first, j)
        area = lengths[first:j] * (j - start)
        cost = np.where((area <= max_tokens) | (start == j - 1), best[first:j] + area + fixed_cost, np.inf)
        cut_at[j] = first + int(cost.argmin())
        best[j] = cost[cut_at[j] - first]
    cuts: list[tuple[int, int]] = []
    j = n
    while j:
        cuts.append((int(cut_at[j]), j))
        j = int(cut_at[j])
    return cuts[::-1]


def _pad(rows: Sequence[Trajectory], lengths: Sequence[int], prefix: int, index: dict[str, int]) -> Microbatch:
    shape = (len(rows), max(lengths) - prefix)
    token_ids, loss_mask, logprobs = np.full(shape, PAD_ID, np.int32), np.zeros(shape, bool), np.zeros(shape, np.float32)
    for b, (row, end) in enumerate(zip(rows, lengths, strict=True)):
        n, own = end - prefix, slice(prefix, end)
        token_ids[b, :n], loss_mask[b, :n], logprobs[b, :n] = row.token_ids[own], row.loss_mask[own], row.logprobs[own]
    if not prefix:
        loss_mask[:, 0] = False  # as in `trained_mask`
    return Microbatch(
        prefix_ids=rows[0].token_ids[:prefix].astype(np.int32),
        token_ids=token_ids,
        loss_mask=loss_mask,
        logprobs=logprobs,
        advantages=np.array([r.advantage for r in rows], np.float32),
        envs=np.array([index[r.env] for r in rows], np.int32),
        num_tokens=prefix + sum(n - prefix for n in lengths),
    )


def _empty() -> Microbatch:
    """Computes and adds nothing; a rank that has no rows left must still take part in collective operations."""
    shape = (1, EMPTY_LENGTH)
    return Microbatch(
        prefix_ids=np.empty(0, np.int32),
        token_ids=np.full(shape, PAD_ID, np.int32),
        loss_mask=np.zeros(shape, bool),
        logprobs=np.zeros(shape, np.float32),
        advantages=np.zeros(1, np.float32),
        envs=np.full(1, -1, np.int32),
        num_tokens=0,
    )
