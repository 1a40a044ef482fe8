"""The policy model: equal to Transformers, equal to its own checkpoint, and an MTP loss that leaves the trunk alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

from learner.model import PolicyModel, seed_config

torch.set_num_threads(1)
VOCAB = 64


def small_config(**changes: Any) -> NemotronHConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "moe"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 32,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "moe_latent_size": 16,
        "initializer_range": 0.2,
        "num_nextn_predict_layers": 1,
        "mtp_layers_block_type": ["full_attention", "moe"],
    }
    return NemotronHConfig(**(sizes | changes))


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **changes
    )  # fmt: skip


def ids_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference_of(path: Path) -> Any:
    """Transformers' own model, with the time step unclamped as in the engine (see learner/mamba_scan.py)."""
    model = NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32)
    for block in model.model.layers:
        if block.block_type == "linear_attention":
            block.mixer.time_step_limit = (0.0, float("inf"))
    return model


@pytest.fixture
def model() -> PolicyModel:
    return PolicyModel.from_config(small_config(), seed=3)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 3, 70])
def test_logits_and_gradients_equal_those_of_transformers(tmp_path: Path, length: int, groups: int) -> None:
    model = PolicyModel.from_config(small_config(n_groups=groups, routed_scaling_factor=1.5), seed=1)
    for block in model.lm.model.layers:
        if block.block_type == "moe":  # a balancing bias that changes the choice but not the weights
            block.mixer.gate.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    model.save_pretrained(tmp_path)
    reference = reference_of(tmp_path)
    ids = ids_of(2, length)
    ours, theirs = model.logits(model(ids)), reference(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * pull).sum().backward()
    (theirs * pull).sum().backward()
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in wanted.values() if grad is not None)
    for name, parameter in model.lm.named_parameters():
        if (grad := wanted[name]) is None or parameter.grad is None:  # an expert without tokens, a query with one key
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        scale = max(float(grad.abs().max()), 1e-2 * largest)  # some gradients are zero in theory and noise in practice
        torch.testing.assert_close(parameter.grad / scale, grad / scale, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_saved_model_loads_bit_equal_and_so_does_transformers(tmp_path: Path, model: PolicyModel) -> None:
    model.save_pretrained(tmp_path)
    again = PolicyModel.from_pretrained(tmp_path)
    before, after = model.engine_state(), again.engine_state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.has_mtp
    assert again.config.num_nextn_predict_layers == 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.lm.state_dict().items())


def test_engine_state_has_exactly_the_names_shapes_and_values_of_a_checkpoint(tmp_path: Path) -> None:
    """The checkpoint is written by Transformers, plus the MTP names that vLLM's NemotronHMTP reads."""
    config = small_config()
    NemotronHForCausalLM(config).save_pretrained(tmp_path)
    wanted = load_file(tmp_path / "model.safetensors")
    size, kv = 32, 16
    first, second, moe = "mtp.layers.0.", "mtp.layers.1.", "backbone.layers.1.mixer."
    wanted |= {first + name + ".weight": torch.rand(size) for name in ("enorm", "hnorm", "norm")}
    wanted |= {
        first + "mixer." + name + "_proj.weight": torch.rand(rows, size) for name, rows in (("q", 32), ("k", kv), ("v", kv), ("o", 32))
    }
    wanted |= {first + "eh_proj.weight": torch.rand(size, 2 * size)}
    wanted |= {second + name + ".weight": torch.rand(size) for name in ("norm", "final_layernorm")}
    wanted |= {second + "mixer." + name.removeprefix(moe): torch.rand_like(t) for name, t in list(wanted.items()) if name.startswith(moe)}
    save_file(wanted, tmp_path / "model.safetensors", metadata={"format": "pt"})

    state = PolicyModel.from_pretrained(tmp_path).engine_state()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_the_mtp_loss_gives_no_gradient_to_the_trunk_the_embedding_or_the_head(model: PolicyModel) -> None:
    ids = ids_of(2, 12)
    hidden = model(ids)
    drafts = model.mtp_hidden(hidden.detach(), ids)
    assert drafts.shape == (2, 11, 32)
    logprobs, _ = model.token_logprobs(drafts[:, :-1], ids[:, 2:], frozen_head=True)
    (-logprobs.mean()).backward()
    assert all(parameter.grad is None for parameter in model.lm.parameters())
    assert model.mtp is not None
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.mtp.parameters())


def test_the_mtp_head_computes_the_wiring_that_vllm_runs(model: PolicyModel) -> None:
    """Written out with plain operations: concatenation order, residuals and norms as in vLLM's NemotronHMTP."""
    ids = ids_of(1, 6)
    hidden = model(ids).detach()
    w = model.engine_state()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w[name + ".weight"]

    first, second = "mtp.layers.0.", "mtp.layers.1."
    embedded = w["backbone.embeddings.weight"][ids[0, 1:]]
    residual = torch.cat([norm(embedded, first + "enorm"), norm(hidden[0, :-1], first + "hnorm")], -1) @ w[first + "eh_proj.weight"].T
    x = norm(residual, first + "norm")
    q, k, v = ((x @ w[f"{first}mixer.{n}_proj.weight"].T).view(5, -1, 8).transpose(0, 1) for n in "qkv")
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    residual = residual + (scores.softmax(-1) @ v).transpose(0, 1).reshape(5, -1) @ w[first + "mixer.o_proj.weight"].T

    x, mixer = norm(residual, second + "norm"), second + "mixer."

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        return (x @ w[name + ".up_proj.weight"].T).relu().square() @ w[name + ".down_proj.weight"].T

    scores = (x @ w[mixer + "gate.weight"].T).sigmoid()
    weights, chosen = (scores + w[mixer + "gate.e_score_correction_bias"]).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    latent = x @ w[mixer + "fc1_latent_proj.weight"].T
    routed = torch.stack(
        [sum(weights[t, i] * mlp(latent[t], f"{mixer}experts.{int(chosen[t, i])}") for i in range(2)) for t in range(5)]  # type: ignore[misc]
    )
    out = norm(residual + routed @ w[mixer + "fc2_latent_proj.weight"].T + mlp(x, mixer + "shared_experts"), second + "final_layernorm")
    torch.testing.assert_close(model.mtp_hidden(hidden, ids)[0], out, atol=1e-5, rtol=1e-5)


def chain(model: PolicyModel, ids: torch.Tensor, start: int, depth: int) -> list[torch.Tensor]:
    """The head's outputs for the drafts behind position `start` of one row, as the engine computes them, one pass after the other.

    A sequence of trunk's states up to the start and the head's own outputs behind it, all gone through the head again each time.
    """
    states = list(model(ids[:, : start + 1])[0])
    outputs = []
    for j in range(depth):
        embedded = model.lm.get_input_embeddings()(ids[0, 1 : start + 2 + j])
        assert model.mtp is not None
        outputs.append(model.mtp(torch.stack(states)[None], embedded[None])[0, -1])
        states.append(outputs[-1])
    return outputs


@pytest.mark.parametrize("prefix", [0, 20])
def test_drafts_further_ahead_are_those_that_the_engine_makes_from_the_heads_own_outputs(model: PolicyModel, prefix: int) -> None:
    before, ids = ids_of(1, prefix, seed=1)[0], ids_of(3, 14, seed=2)
    ids[:, 0] = 7
    mask = torch.zeros(3, 14, dtype=torch.bool)
    mask[0, 3:9] = mask[1, 12:14] = mask[2, 2:4] = mask[2, 6:12] = True
    if prefix:
        seen, hidden = model.behind_prefix(before, ids[:, :-1])
        drafts = list(model.mtp_drafts(hidden, ids, mask, 3, prefix=(seen, before)))
    else:
        drafts = list(model.mtp_drafts(model(ids[:, :-1]), ids, mask, 3))
    whole = torch.cat([before.expand(3, -1), ids], 1)
    counted = [0, 0, 0]
    for row, column in (mask[:, 2:]).nonzero().tolist():
        reach = next((j for j in range(3) if column + 2 + j == 14 or not mask[row, column + 2 + j]), 3)
        outputs = chain(model, whole[row : row + 1], prefix + column, reach)
        for j in range(reach):
            drafted, targets, rows = (part[counted[j]] for part in drafts[j])
            counted[j] += 1
            assert (int(rows), int(targets)) == (row, int(ids[row, column + 2 + j]))
            torch.testing.assert_close(drafted, outputs[j], atol=1e-5, rtol=1e-5)
    assert counted == [len(targets) for _, targets, _ in drafts] == [6 + 2 + 2 + 6, 5 + 1 + 1 + 5, 4 + 4]


def test_a_loss_over_drafts_further_ahead_trains_the_mtp_head_alone(model: PolicyModel) -> None:
    ids = ids_of(2, 12)
    drafts = list(model.mtp_drafts(model(ids[:, :-1]).detach(), ids, torch.ones(2, 12, dtype=torch.bool), 3))
    for drafted, targets, _ in drafts[1:]:
        (-model.token_logprobs(drafted, targets, frozen_head=True)[0].mean()).backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in model.lm.parameters())
    assert model.mtp is not None
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.mtp.parameters())


def test_right_padding_changes_nothing_before_it(model: PolicyModel) -> None:
    ids = ids_of(1, 40)
    padded = torch.cat([ids, torch.zeros(1, 25, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded)[:, :40], model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [3, 20, 70])
def test_rows_behind_a_shared_prefix_are_the_rows_with_the_prefix_before_each(model: PolicyModel, prefix: int) -> None:
    before, rows = ids_of(1, prefix, seed=1)[0], ids_of(5, 9, seed=2)
    rows[:, 0] = 7  # the MTP head needs to know what follows the prefix
    grads = []
    for shared in (False, True):
        model.zero_grad()
        if shared:
            seen, hidden = model.behind_prefix(before, rows)
            drafted = model.mtp_hidden(hidden.detach(), rows, prefix=(seen.detach(), before))
        else:
            ids = torch.cat([before.expand(5, -1), rows], 1)
            everything = model(ids)
            hidden, drafted = everything[:, prefix:], model.mtp_hidden(everything.detach(), ids)[:, prefix:]
        logprobs = model.token_logprobs(hidden[:, :-1], rows[:, 1:])[0]
        mtp = model.token_logprobs(drafted[:, :-1], rows[:, 2:], frozen_head=True)[0]
        (logprobs.sum() + mtp.sum()).backward()
        grads.append(({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, logprobs.detach(), mtp.detach()))
    (wanted, *values), (got, *others) = grads
    torch.testing.assert_close(others, values, atol=1e-5, rtol=1e-5)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=2e-4, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("chunk", [7, 4096])
def test_token_logprobs_are_a_log_softmax_at_each_tokens_own_temperature(model: PolicyModel, chunk: int) -> None:
    ids = ids_of(3, 11)
    hidden = model(ids).detach().requires_grad_()
    temperature = torch.tensor([0.5, 1.0, 2.0]).unsqueeze(1).expand(3, 11)
    logprobs, entropy = model.token_logprobs(hidden, ids, temperature, chunk=chunk)
    full = (model.logits(hidden) / temperature.unsqueeze(-1)).log_softmax(-1)
    torch.testing.assert_close(logprobs, full.gather(-1, ids.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
    pull = torch.randn(3, 11, generator=torch.Generator().manual_seed(4))
    (ours,) = torch.autograd.grad((logprobs * pull).sum(), hidden)
    (theirs,) = torch.autograd.grad((full.gather(-1, ids.unsqueeze(-1)).squeeze(-1) * pull).sum(), hidden)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["hybrid", "llama"])
def test_layers_that_are_computed_twice_give_the_same_gradients(tmp_path: Path, model: PolicyModel, kind: str) -> None:
    if kind == "hybrid":
        model.save_pretrained(tmp_path)
    else:
        LlamaForCausalLM(llama_config(attention_dropout=0.5)).save_pretrained(tmp_path)  # dropout stays off, as in the engine
    grads, ids = [], ids_of(2, 9)
    for flag in (False, True):
        again, computed = PolicyModel.from_pretrained(tmp_path), []
        again.gradient_checkpointing = flag
        layers = [*again.lm.base_model.layers, *([again.mtp] if again.mtp else [])]
        for layer in layers:
            layer.register_forward_pre_hook(lambda layer, _, computed=computed: computed.append(layer))
        hidden = again(ids)
        loss = again.token_logprobs(hidden[:, :-1], ids[:, 1:])[0].sum()
        if again.has_mtp:
            loss = loss + again.token_logprobs(again.mtp_hidden(hidden.detach(), ids)[:, :-1], ids[:, 2:], frozen_head=True)[0].sum()
        loss.backward()
        assert len(computed) == len(layers) * (1 + flag)
        grads.append({name: p.grad for name, p in again.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_the_same_seed_makes_the_same_model_and_leaves_the_callers_randomness_alone() -> None:
    torch.manual_seed(5)
    first = PolicyModel.from_config(small_config(), seed=1).engine_state()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    second, other = (PolicyModel.from_config(small_config(), seed=seed).engine_state() for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_router_parameters_are_the_gates_of_trunk_and_mtp(model: PolicyModel) -> None:
    assert len(model.router_parameters()) == 3
    assert all(parameter.shape == (4, 32) for parameter in model.router_parameters())


def test_a_checkpoint_that_promises_mtp_weights_but_has_none_is_refused(tmp_path: Path) -> None:
    NemotronHForCausalLM(small_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no file holds `mtp"):
        PolicyModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_any_causal_lm_of_transformers_works_without_an_mtp_head(tmp_path: Path, tied: bool) -> None:
    lm = LlamaForCausalLM(llama_config(tie_word_embeddings=tied))
    lm.save_pretrained(tmp_path / "a")
    model = PolicyModel.from_pretrained(tmp_path / "a")
    ids = ids_of(2, 10)
    torch.testing.assert_close(model.logits(model(ids)), lm(ids).logits, atol=1e-5, rtol=1e-5)
    assert not model.has_mtp
    assert model.engine_state().keys() == load_file(tmp_path / "a" / "model.safetensors").keys()
    model.save_pretrained(tmp_path / "b")
    again = PolicyModel.from_pretrained(tmp_path / "b")
    assert all(torch.equal(tensor, again.engine_state()[name]) for name, tensor in model.engine_state().items())


def test_bfloat16_stays_close_to_float32(tmp_path: Path, model: PolicyModel) -> None:
    model.save_pretrained(tmp_path)
    half, ids = PolicyModel.from_pretrained(tmp_path, dtype=torch.bfloat16), ids_of(2, 20)
    assert half(ids).dtype is torch.bfloat16
    assert half.logits(half(ids)).dtype is torch.float32
    ours, theirs = half.token_logprobs(half(ids), ids)[0], model.token_logprobs(model(ids), ids)[0]
    assert (ours - theirs).abs().mean() < 0.1


def test_the_seed_model_is_small_and_has_an_mtp_head() -> None:
    model = PolicyModel.from_config(seed_config(768), seed=0)
    assert 5e5 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert model.has_mtp
    assert set(model.config.layers_block_type) == {"linear_attention", "full_attention", "moe"}
