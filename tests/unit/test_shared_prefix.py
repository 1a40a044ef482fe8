"""Transformers models with attention alone: rows behind a shared prompt are what they are with the prompt before each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from learner.model import PolicyModel
from rl_core.architectures import FULL_ATTENTION, has_full_attention_only

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip


def model_of(kind: str, **changes: Any) -> PolicyModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | changes)
    return PolicyModel(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double(), None)


def ids_of(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", FULL_ATTENTION)
def test_sharing_a_prompt_changes_neither_hidden_states_nor_gradients(kind: str, checkpointed: bool) -> None:
    model = model_of(kind)
    assert model.shares_prefixes
    model.gradient_checkpointing = checkpointed
    before, rows = ids_of(1, 21, 1)[0], ids_of(5, 9, 2)
    weigh = torch.randn(5, 9, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    seen = []
    for shared in (False, True):
        model.zero_grad()
        if shared:
            prefix, hidden = model.behind_prefix(before, rows)
        else:
            everything = model(torch.cat([before.expand(5, -1), rows], 1))
            prefix, hidden = everything[0, :21], everything[:, 21:]
        (hidden * weigh).sum().backward()
        seen.append((prefix.detach(), hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (prefix, hidden, grads), (other_prefix, other_hidden, other_grads) = seen
    torch.testing.assert_close(other_prefix, prefix, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(other_hidden, hidden, atol=1e-10, rtol=1e-10)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", FULL_ATTENTION)
def test_without_a_shared_prompt_the_model_is_that_of_transformers(kind: str) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES), attn_implementation="eager").double()
    ids = ids_of(3, 17, 4)
    torch.testing.assert_close(model_of(kind)(ids), plain.base_model(ids).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_does_not_name_our_attention(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path)
    assert "polyrl" not in (tmp_path / "config.json").read_text()
    again = PolicyModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.shares_prefixes
    torch.testing.assert_close(again(ids_of(2, 9, 5)), model_of("llama")(ids_of(2, 9, 5)))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 8}),
    ],
)
def test_a_model_that_looks_along_the_sequence_in_another_way_does_not_share(kind: str, changes: dict[str, Any]) -> None:
    model = model_of(kind, **changes)
    assert not model.shares_prefixes
    assert model(ids_of(2, 9, 6)).shape == (2, 9, 32)
    with pytest.raises(ValueError, match="cannot share a prefix"):
        model.behind_prefix(ids_of(1, 5, 7)[0], ids_of(2, 3, 8))


def test_the_shipped_hybrid_is_not_attention_alone() -> None:
    config = json.loads((Path(__file__).parents[2] / "configs" / "models" / "seed" / "config.json").read_text())
    assert not has_full_attention_only(config)
