"""The objective against its formula, and the optimizer's two clips."""

from __future__ import annotations

import math

import pytest
import torch

from learner.losses import MAX_LOG_RATIO, importance_weights, k3, policy_loss
from learner.optimizer import GroupClippedAdamW, global_norm, parameter_groups


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_masked_tokens_weigh_nothing_and_the_others_their_ratio() -> None:
    behaviour = tensor(-1.0, -1.0, -1.0, -1.0)
    proximal = behaviour + tensor(0.1, 0.19, 0.2, 6.0).log()
    weights = importance_weights(proximal, behaviour, rule="masked", low=0.195, high=5.0)
    assert weights.weight.tolist() == pytest.approx([0, 0, 0.2, 0])
    assert weights.kept.tolist() == [False, False, True, False]


def test_a_logprob_that_is_not_a_number_is_masked() -> None:
    weights = importance_weights(tensor(-1.0, math.nan), tensor(math.nan, -1.0), rule="masked", low=0.2, high=5.0)
    assert weights.weight.tolist() == [0.0, 0.0]


def test_truncation_caps_the_ratio_and_none_ignores_it() -> None:
    proximal, behaviour = tensor(-1.0, -1.0), tensor(-1.0, -6.0)
    assert importance_weights(proximal, behaviour, rule="truncated", low=0.2, high=2.0).weight.tolist() == [1.0, 2.0]
    assert importance_weights(proximal, behaviour, rule="none", low=0.2, high=2.0).weight.tolist() == [1.0, 1.0]


def test_a_huge_ratio_stays_finite() -> None:
    weights = importance_weights(tensor(0.0), tensor(-1e6), rule="none", low=0.2, high=5.0)
    assert weights.ratio.item() == pytest.approx(math.exp(MAX_LOG_RATIO))


def test_an_unknown_rule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'tis', wanted one of masked, truncated, none"):
        importance_weights(tensor(0.0), tensor(0.0), rule="tis", low=0.2, high=5.0)


def test_on_policy_the_gradient_is_minus_weight_times_advantage() -> None:
    logprobs = tensor(-1.0, -2.0, -0.5).requires_grad_()
    advantages, weight = tensor(1.0, -2.0, 0.0), tensor(1.0, 0.5, 1.0)
    result = policy_loss(logprobs, logprobs.detach(), weight, advantages, clip_low=0.2, clip_high=0.28)
    result.loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx((-weight * advantages).tolist())
    assert not result.clipped.any()


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
    logprobs = (proximal + math.log(ratio)).requires_grad_()
    result = policy_loss(logprobs, proximal, tensor(1.0), tensor(advantage), clip_low=0.2, clip_high=0.28)
    assert result.loss.item() == pytest.approx(loss)
    assert result.clipped.item() is clipped
    result.loss.sum().backward()
    assert logprobs.grad is not None
    assert (logprobs.grad.item() == 0.0) is clipped


def test_a_masked_token_has_no_gradient_however_large_its_advantage() -> None:
    logprobs = tensor(-1.0, -1.0).requires_grad_()
    weights = importance_weights(logprobs, tensor(-9.0, -1.0), rule="masked", low=0.2, high=5.0)
    policy_loss(logprobs, logprobs.detach(), weights.weight, tensor(1e6, 1.0), clip_low=0.2, clip_high=0.28).loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, -1.0]


def test_k3_estimates_the_divergence_without_bias_and_is_never_negative() -> None:
    behaviour, train = torch.softmax(tensor(0.3, -0.5, 1.0), 0), torch.softmax(tensor(0.0, 0.2, 0.7), 0)
    log_ratio = train.log() - behaviour.log()
    expected = (behaviour * (behaviour.log() - train.log())).sum()
    assert (behaviour * k3(log_ratio)).sum().item() == pytest.approx(expected.item())
    assert (k3(torch.linspace(-5, 5, 101)) >= 0).all()


def test_importance_weights_make_the_behaviour_policys_samples_speak_for_the_proximal_policy() -> None:
    behaviour, train = torch.softmax(tensor(0.3, -0.5, 1.0), 0), torch.softmax(tensor(0.0, 0.2, 0.7), 0)
    weights = importance_weights(train.log(), behaviour.log(), rule="masked", low=0.2, high=5.0)
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
