"""Every rule of the objective against formulas written out by hand in float64, and the optimizer's two clips."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from learner.importance import MAX_LOG_RATIO, RULES, Tokens, importance_weights
from learner.losses import LOSSES, TokenLosses, k3, token_losses
from learner.optimizer import GroupClippedAdamW, global_norm, parameter_groups
from rl_core.config import ImportanceConfig, LearnerConfig
from rl_core.rules import ADVANTAGES, IMPORTANCE, POLICY_LOSSES
from tests.unit.reference_objective import Settings, Token, losses_and_gradients

MASK_HALF = {
    "masked": (0.6, 1.6), "icepop": (0.6, 1.6), "truncated": (0.0, 1.2), "sequence_mask": (0.2, 3.0), "geometric_mask": (0.85, 1.15),
    "dppo": (-0.02, 0.02), "none": (0.0, math.inf),
}  # fmt: skip
"""Bounds at which a good part of the random tokens below is masked, and a good part is not."""


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tokens(train: torch.Tensor, behaviour: torch.Tensor, proximal: torch.Tensor | None = None, **more: Any) -> Tokens:
    """One trajectory per token unless `rows` says otherwise; advantages 1."""
    defaults: dict[str, Any] = {"advantages": torch.ones_like(behaviour), "rows": torch.arange(len(train)), "num_rows": len(train)}
    return Tokens(train=train, behaviour=behaviour, proximal=train.detach() if proximal is None else proximal, **(defaults | more))


def random_trajectories(seed: int, count: int = 60) -> list[tuple[float, list[Token]]]:
    rng = random.Random(seed)
    made = []
    for index in range(count):
        drift, row = rng.gauss(0, 0.15), []
        for _ in range(rng.randint(1, 6)):
            p = -rng.expovariate(1.0) - 0.01
            row.append(Token(p=p, q=p + rng.gauss(0, 0.3), b=p + drift + rng.gauss(0, 0.4), f=p + rng.gauss(0, 0.5)))
        made.append((0.0 if index == 7 else rng.gauss(0, 1), row))
    return made


def computed(trajectories: list[tuple[float, list[Token]]], config: LearnerConfig) -> tuple[TokenLosses, torch.Tensor]:
    """(losses, gradients by the train logprobs) as the learner computes them."""
    flat = [(index, advantage, t) for index, (advantage, row) in enumerate(trajectories) for t in row]
    train = tensor(*(t.p for _, _, t in flat)).requires_grad_()
    result = token_losses(
        tokens(
            train, tensor(*(t.b for _, _, t in flat)), tensor(*(t.q for _, _, t in flat)), advantages=tensor(*(a for _, a, _ in flat)),
            rows=torch.tensor([i for i, _, _ in flat]), num_rows=len(trajectories),
        ),
        config,
        reference=tensor(*(t.f for _, _, t in flat)) if config.kl_weight else None,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.loss.sum(), train)
    return result, gradient


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("policy_loss", list(LOSSES))
@pytest.mark.parametrize("rule", list(RULES))
def test_loss_mask_and_gradient_of_every_rule_are_those_of_its_formula(rule: str, policy_loss: str, kl_weight: float) -> None:
    low, high = MASK_HALF[rule]
    clip = {"ppo": (0.2, 0.28), "gspo": (0.1, 0.12), "cispo": (0.5, 0.3)}[policy_loss]
    config = LearnerConfig(
        policy_loss=policy_loss, clip_low=clip[0], clip_high=clip[1], kl_weight=kl_weight,
        importance=ImportanceConfig(rule=rule, low=low, high=high),
    )  # fmt: skip
    trajectories = random_trajectories(seed=sorted(RULES).index(rule))
    result, gradient = computed(trajectories, config)
    wanted = losses_and_gradients(trajectories, Settings(rule, low, high, policy_loss, *clip, kl_weight))
    assert result.loss.tolist() == pytest.approx([loss for loss, _, _ in wanted], rel=1e-12, abs=1e-14)
    assert gradient.tolist() == pytest.approx([g for _, g, _ in wanted], rel=1e-12, abs=1e-14)
    assert (~result.weights.kept).tolist() == [masked for _, _, masked in wanted]
    share = sum(masked for _, _, masked in wanted) / len(wanted)
    assert 0.1 < share < 0.9 or rule == "none", f"{share:.0%} masked: the bounds do not test the rule"
    assert 1 < int(result.clipped.sum()) < len(wanted) - 1, "the clip range does not test the clip"


@pytest.mark.parametrize("policy_loss", list(LOSSES))
@pytest.mark.parametrize("rule", list(RULES))
def test_the_reported_pull_is_what_the_gradient_really_weighs_a_token_with(rule: str, policy_loss: str) -> None:
    low, high = MASK_HALF[rule]
    config = LearnerConfig(policy_loss=policy_loss, importance=ImportanceConfig(rule=rule, low=low, high=high))
    trajectories = random_trajectories(seed=1)
    result, gradient = computed(trajectories, config)
    advantages = [advantage for advantage, row in trajectories for _ in row]
    assert gradient.tolist() == pytest.approx([-c * a for c, a in zip(result.pull.tolist(), advantages, strict=True)])


def test_the_registries_of_formulas_and_of_configs_name_the_same_rules() -> None:
    from rl_core.advantages import RULES as ADVANTAGE_RULES

    assert tuple(RULES) == tuple(IMPORTANCE)
    assert tuple(LOSSES) == tuple(POLICY_LOSSES)
    assert tuple(ADVANTAGE_RULES) == ADVANTAGES


@pytest.mark.parametrize("rule", [r for r in RULES if r != "none"])
@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_a_behaviour_logprob_that_is_not_finite_counts_for_nothing_and_poisons_nothing(rule: str, broken: float) -> None:
    train = tensor(-1.0, -1.0).requires_grad_()
    result = token_losses(tokens(train, tensor(broken, -1.0)), LearnerConfig(importance=ImportanceConfig(rule=rule)))
    (gradient,) = torch.autograd.grad(result.loss.sum(), train)
    assert gradient.tolist() == [0.0, -1.0]
    assert result.weights.kept.tolist() == [False, True]


def test_a_huge_ratio_stays_finite() -> None:
    weights = importance_weights(tokens(tensor(0.0), tensor(-1e6)), rule="dppo", low=-1.0, high=1.0)
    assert weights.ratio.item() == pytest.approx(math.exp(MAX_LOG_RATIO))


def test_unknown_rules_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'tis', wanted one of masked, icepop, truncated"):
        importance_weights(tokens(tensor(0.0), tensor(0.0)), rule="tis", low=0.2, high=5.0)
    with pytest.raises(ValueError, match=r"'dapo', wanted one of ppo, gspo, cispo"):
        token_losses(tokens(tensor(0.0), tensor(0.0)), LearnerConfig(policy_loss="dapo", clip_low=0.1, clip_high=0.1))


@pytest.mark.parametrize("policy_loss", list(LOSSES))
def test_on_policy_every_policy_loss_has_the_plain_policy_gradient(policy_loss: str) -> None:
    train = tensor(-1.0, -2.0, -0.5).requires_grad_()
    advantages = tensor(1.0, -2.0, 0.0)
    result = token_losses(tokens(train, train.detach(), advantages=advantages), LearnerConfig(policy_loss=policy_loss))
    (gradient,) = torch.autograd.grad(result.loss.sum(), train)
    assert gradient.tolist() == pytest.approx((-advantages).tolist())
    assert not result.clipped.any()
    assert result.weights.kept.all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped", "loss"),
    [
        (1.2, 1.0, False, -1.2),
        (1.5, 1.0, True, -1.28),  # clip-higher: 1 + 0.28
        (0.5, 1.0, False, -0.5),  # pessimistic: moving back is never clipped
        (0.9, -1.0, False, 0.9),
        (0.5, -1.0, True, 0.8),
        (1.5, -1.0, False, 1.5),
    ],
)
def test_the_clip_binds_only_where_the_policy_would_run_further_away(ratio: float, advantage: float, clipped: bool, loss: float) -> None:
    proximal = tensor(-1.0)
    train = (proximal + math.log(ratio)).requires_grad_()
    result = LOSSES["ppo"](tokens(train, proximal, proximal, advantages=tensor(advantage)), 0.2, 0.28)
    assert result.loss.item() == pytest.approx(loss)
    assert result.clipped.item() is clipped
    result.loss.sum().backward()
    assert train.grad is not None
    assert (train.grad.item() == 0.0) is clipped


def test_a_masked_token_has_no_gradient_however_large_its_advantage() -> None:
    train = tensor(-1.0, -1.0).requires_grad_()
    result = token_losses(tokens(train, tensor(-9.0, -1.0), advantages=tensor(1e6, 1.0)), LearnerConfig())
    result.loss.sum().backward()
    assert train.grad is not None
    assert train.grad.tolist() == [0.0, -1.0]


def test_k3_estimates_the_divergence_without_bias_and_is_never_negative() -> None:
    behaviour, train = torch.softmax(tensor(0.3, -0.5, 1.0), 0), torch.softmax(tensor(0.0, 0.2, 0.7), 0)
    log_ratio = train.log() - behaviour.log()
    expected = (behaviour * (behaviour.log() - train.log())).sum()
    assert (behaviour * k3(log_ratio)).sum().item() == pytest.approx(expected.item())
    assert (k3(torch.linspace(-5, 5, 101)) >= 0).all()


def test_the_kl_term_has_the_gradient_of_the_kl_whoever_sampled() -> None:
    """In expectation over tokens of another policy, with exact importance weights and no reward."""
    logits = tensor(0.3, -0.5, 1.0).requires_grad_()
    behaviour, reference = torch.softmax(tensor(0.0, 0.2, 0.7), 0), torch.softmax(tensor(-0.4, 0.1, 0.2), 0)
    train = logits.log_softmax(0)
    config = LearnerConfig(kl_weight=1.0, importance=ImportanceConfig(low=0.0, high=1e9))
    result = token_losses(tokens(train, behaviour.log(), advantages=torch.zeros(3, dtype=torch.float64)), config, reference.log())
    (ours,) = torch.autograd.grad((behaviour * result.loss).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((train.exp() * (train - reference.log())).sum(), logits)
    assert ours.tolist() == pytest.approx(exact.tolist())


@pytest.mark.parametrize("rule", ["masked", "sequence_mask"])
def test_importance_weights_make_the_behaviour_policys_samples_speak_for_the_train_policy(rule: str) -> None:
    behaviour, train = torch.softmax(tensor(0.3, -0.5, 1.0), 0), torch.softmax(tensor(0.0, 0.2, 0.7), 0)
    weights = importance_weights(tokens(train.log(), behaviour.log()), rule=rule, low=0.2, high=5.0)
    value = tensor(1.0, -3.0, 2.0)
    assert (behaviour * weights.weight * value).sum().item() == pytest.approx((train * value).sum().item())


def a_step(optimizer: GroupClippedAdamW) -> None:
    """As the learner takes one: measure, then step."""
    gradients = {group["name"]: [p.grad for p in group["params"]] for group in optimizer.param_groups}
    optimizer.norms = {name: global_norm(found, torch.device("cpu")) for name, found in gradients.items()}
    optimizer.step()


def test_policy_and_mtp_head_are_clipped_apart_and_then_stepped_as_by_adamw() -> None:
    ours = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    theirs = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = GroupClippedAdamW(parameter_groups(ours[:1], ours[1:], max_norm=1.0), lr=0.1, weight_decay=0.01)
    plain = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.01, betas=(0.9, 0.95), eps=1e-8)
    for scale in (1.0, 100.0, 0.1):
        for group in (ours, theirs):
            group[0].grad, group[1].grad = torch.tensor([0.3, 0.0, 0.4]), scale * torch.tensor([0.6, 0.8])
        for parameter in theirs:
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        a_step(optimizer)
        plain.step()
        assert optimizer.norms == pytest.approx({"policy": 0.5, "MTP head": scale})
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_vetoed_step_changes_neither_weights_nor_state() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = GroupClippedAdamW(parameter_groups([], [parameter], max_norm=1.0), lr=0.1, weight_decay=0.0)
    parameter.grad = torch.tensor([1.0, math.inf])
    optimizer.vetoed = True
    a_step(optimizer)
    assert optimizer.norms == {"MTP head": math.inf}
    assert parameter.tolist() == [1.0, 1.0]
    assert not optimizer.state
