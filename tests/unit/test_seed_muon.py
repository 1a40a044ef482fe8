"""Muon: orthogonal steps for matrices and for stacks of them."""

from __future__ import annotations

import torch

from learner.model import PolicyModel, seed_config
from learner.seed.muon import Muon, orthogonalize
from learner.seed.train import make_optimizers


def test_singular_values_come_near_one_for_wide_and_tall_matrices() -> None:
    torch.manual_seed(0)
    for shape in ((16, 64), (64, 16), (3, 24, 24)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_a_stack_is_orthogonalised_matrix_by_matrix() -> None:
    torch.manual_seed(0)
    stack = torch.randn(4, 8, 12) * torch.tensor([1e-3, 1.0, 10.0, 1e3]).view(4, 1, 1)
    each = torch.stack([orthogonalize(matrix) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack), each, rtol=1e-3, atol=1e-4)


def test_it_minimises_a_quadratic() -> None:
    torch.manual_seed(0)
    target, weight = torch.randn(8, 8), torch.zeros(8, 8, requires_grad=True)
    optimizer = Muon([weight], lr=0.05, momentum=0.5)
    start = float((weight - target).square().sum().detach())
    for _ in range(200):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert float((weight - target).square().sum().detach()) < 0.1 * start


def test_every_parameter_of_the_seed_model_has_exactly_one_optimizer() -> None:
    model = PolicyModel.from_config(seed_config(64), 0)
    held = [id(p) for optimizer in make_optimizers(model) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
