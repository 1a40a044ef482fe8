"""Microbatches: nothing lost, nothing doubled, the same number on every rank, whatever the packing."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_core.batching import (
    LEAST_SHARED,
    MICROBATCH_COST,
    cheapest_cuts,
    microbatch_cost,
    microbatches,
    num_loss_tokens,
    num_mtp_tokens,
    trainable_length,
    trained_mask,
)
from rl_core.trajectories import trajectories
from rl_core.types import Trajectory
from tests.integration.learner_ranks import random_groups

ENVS = ("math", "tools")


def rows(seed: int, count: int = 3) -> list[Trajectory]:
    return [t for g in random_groups(count, vocab=50, seed=seed) for t in trajectories(g, "grpo")]


def row(length: int, trained: slice | int = slice(-2, None), env: str = "math") -> Trajectory:
    mask = np.zeros(length, bool)
    mask[trained] = True
    return Trajectory(
        env=env, token_ids=np.arange(length, dtype=np.int32), loss_mask=mask, logprobs=np.where(mask, -1, 0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32), advantage=1.0,
    )  # fmt: skip


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(20, 2000))
def test_every_trained_token_is_in_exactly_one_microbatch_whatever_the_packing(seed: int, num_ranks: int, max_tokens: int) -> None:
    all_rows = rows(seed)
    plan = microbatches(all_rows, envs=ENVS, max_tokens=max_tokens, num_ranks=num_ranks)
    wanted = Counter((r.env, int(t), float(lp), r.advantage) for r in all_rows for t, lp in zip(r.token_ids, r.logprobs, strict=True) if lp)
    got: Counter[tuple[str, int, float, float]] = Counter()
    for m in (m for rank in plan for m in rank):
        for b, t in zip(*m.loss_mask.nonzero(), strict=True):
            got[ENVS[m.envs[b]], int(m.token_ids[b, t]), float(m.logprobs[b, t]), float(m.advantages[b])] += 1
    assert got == wanted
    assert sum(got.values()) == num_loss_tokens(all_rows)


def group_of(size: int, prompt: int, answer: int, env: str = "tools", seed: int = 0) -> list[Trajectory]:
    """Rows that continue one prompt, each with another answer, a little longer than the one before."""
    rng = np.random.default_rng(seed)
    before = rng.integers(0, 50, prompt, np.int32)
    made = []
    for i in range(size):
        one = row(prompt + answer + i, slice(prompt, None), env)
        made.append(replace(one, token_ids=np.concatenate([before, rng.integers(0, 50, answer + i, np.int32)])))
    return made


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(300, 5000), st.integers(1, 900), st.sampled_from([1, 16, MICROBATCH_COST]))
def test_sharing_prefixes_loses_no_row_and_changes_none(seed: int, num_ranks: int, max_tokens: int, prompt: int, fixed_cost: int) -> None:
    all_rows = [*rows(seed), *group_of(8, prompt, 5, seed=seed), *group_of(3, 40, 2, "math", seed=seed + 1)]
    plan = microbatches(all_rows, envs=ENVS, max_tokens=max_tokens, num_ranks=num_ranks, share_prefixes=True, fixed_cost=fixed_cost)
    assert len({len(rank) for rank in plan}) == 1
    assert all(not len(m.prefix_ids) or len(m.prefix_ids) >= LEAST_SHARED for rank in plan for m in rank)
    whole = []
    for m in (m for rank in plan for m in rank if m.envs[0] >= 0):
        assert m.num_padded <= max_tokens or len(m.token_ids) == 1
        for ids, mask, logprobs, advantage, env in zip(m.token_ids, m.loss_mask, m.logprobs, m.advantages, m.envs, strict=True):
            end = int(mask.nonzero()[0][-1]) + 1
            if len(m.prefix_ids):
                assert not mask[:2].any()
            key = (ENVS[env], (*m.prefix_ids, *ids[:end]), tuple(logprobs[mask]), float(advantage))
            whole.append((*key, tuple(len(m.prefix_ids) + mask.nonzero()[0])))
    wanted = []
    for r in all_rows:
        if length := trainable_length(r):
            mask = trained_mask(r)
            wanted.append((r.env, tuple(r.token_ids[:length]), tuple(r.logprobs[mask]), r.advantage, tuple(mask.nonzero()[0])))
    assert Counter(whole) == Counter(wanted)


def test_a_long_prompt_is_computed_once_and_a_short_one_is_not_worth_it() -> None:
    long, short = group_of(8, 2000, 40), group_of(8, 40, 40, "math")
    (plan,) = microbatches([*long, *short], envs=ENVS, max_tokens=16384, share_prefixes=True)
    assert sorted(len(m.prefix_ids) for m in plan) == [0, 1998]
    shared = next(m for m in plan if len(m.prefix_ids))
    assert shared.num_padded == 1998 + 8 * (2 + 47)
    assert shared.num_shared == 7 * 1998
    (apart,) = microbatches([*long, *short], envs=ENVS, max_tokens=16384)
    assert sum(m.num_shared for m in apart) == 0


def test_what_is_worth_it_depends_on_what_a_token_costs() -> None:
    short = group_of(8, 40, 40)
    for parameters, on_gpu, shared in ((1_300_000, False, 0), (135_000_000, False, 38), (135_000_000, True, 0)):
        fixed_cost = microbatch_cost(parameters, on_gpu=on_gpu)
        (plan,) = microbatches(short, envs=ENVS, max_tokens=16384, share_prefixes=True, fixed_cost=fixed_cost)
        assert {len(m.prefix_ids) for m in plan} == {shared}


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(20, 2000))
def test_ranks_have_the_same_number_of_microbatches_within_the_budget(seed: int, num_ranks: int, max_tokens: int) -> None:
    plan = microbatches(rows(seed), envs=ENVS, max_tokens=max_tokens, num_ranks=num_ranks)
    assert len(plan) == num_ranks
    assert len({len(rank) for rank in plan}) == 1
    assert all(m.num_padded <= max_tokens or len(m.token_ids) == 1 for rank in plan for m in rank)


@given(st.lists(st.integers(2, 300), min_size=1, max_size=9), st.integers(10, 1500))
def test_cuts_are_the_cheapest_of_all(lengths: list[int], max_tokens: int) -> None:
    ordered = np.array(sorted(lengths, reverse=True))
    n = len(ordered)

    def cost(inner: tuple[int, ...]) -> float:
        total = 0.0
        for a, b in itertools.pairwise((0, *inner, n)):
            area = int(ordered[a]) * (b - a)
            total += area + MICROBATCH_COST if area <= max_tokens or b - a == 1 else float("inf")
        return total

    everything = (inner for k in range(n) for inner in itertools.combinations(range(1, n), k))
    cuts = cheapest_cuts(ordered, max_tokens)
    assert cost(tuple(a for a, _ in cuts[1:])) == min(map(cost, everything))


def test_ranks_share_the_work_evenly() -> None:
    plan = microbatches([row(n) for n in range(20, 420)], envs=ENVS, max_tokens=4096, num_ranks=4)
    work = [sum(m.num_padded for m in rank) for rank in plan]
    assert max(work) < 1.02 * min(work)


def test_a_rank_without_rows_gets_an_empty_microbatch_that_trains_nothing() -> None:
    first, second = microbatches([row(10)], envs=ENVS, max_tokens=100, num_ranks=2)
    assert first[0].loss_mask.sum() == 2
    assert not second[0].loss_mask.any()
    assert second[0].num_tokens == 0


def test_a_batch_without_a_token_to_train_still_has_a_microbatch_on_every_rank() -> None:
    plan = microbatches([], envs=ENVS, max_tokens=100, num_ranks=2)
    assert [len(rank) for rank in plan] == [1, 1]
    assert not plan[0][0].loss_mask.any()


def test_what_follows_the_last_trained_token_is_cut_off_and_the_first_token_never_trains() -> None:
    (microbatch,) = microbatches([row(100, slice(0, 3))], envs=ENVS, max_tokens=1000)[0]
    assert microbatch.token_ids.shape == (1, 3)
    assert microbatch.loss_mask.tolist() == [[False, True, True]]
    assert num_loss_tokens([row(100, slice(0, 3))]) == 2
    assert num_mtp_tokens([row(100, slice(0, 3))]) == 1


def test_a_row_longer_than_the_budget_stands_alone() -> None:
    plan = microbatches([row(500), row(40), row(40)], envs=ENVS, max_tokens=100)[0]
    assert [m.token_ids.shape for m in plan] == [(1, 500), (2, 40)]


def test_the_plan_is_the_same_every_time() -> None:
    first, second = (microbatches(rows(7), envs=ENVS, max_tokens=100, num_ranks=2) for _ in range(2))
    for a, b in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        assert np.array_equal(a.token_ids, b.token_ids)
        assert np.array_equal(a.loss_mask, b.loss_mask)


def test_an_environment_that_the_run_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown environment 'chess'; the run has math, tools"):
        microbatches([row(10, env="chess")], envs=ENVS, max_tokens=100)
