"""The policy as the learner sees it: hidden states, logprobs, the MTP head, and weights under the engine's names.

Any causal LM that Transformers loads works. A NemotronH hybrid also gets fast paths for training without GPU kernels
(`mamba_scan`, `moe`) and its MTP head (`mtp`). Sequences are right-padded: the models are causal, so padding needs no mask,
and what stands at padded positions is for the caller to ignore.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

from learner import lora, mamba_scan, moe, norm, shared_prefix
from learner.mtp import MTPHead
from learner.norm import at_least_float32
from learner.shared_prefix import Shared
from learner.token_logprobs import head_logprobs

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


class PolicyModel(nn.Module):
    """A causal LM and, if the checkpoint has one, its MTP head. Made by `from_pretrained` or `from_config`."""

    def __init__(self, lm: Any, mtp: MTPHead | None) -> None:
        super().__init__()
        self.lm = lm
        self.mtp = mtp
        self.gradient_checkpointing = False
        """The backward pass gets each layer's input and computes the rest of it again; see learner.checkpoint_layers."""
        self.is_hybrid = isinstance(lm, NemotronHForCausalLM)
        head = lm.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ValueError(f"the LM head of {type(lm).__name__} is a {type(head).__name__}; wanted a plain Linear")
        head.forward = MethodType(_head_forward, head)
        self.shares_prefixes = self.is_hybrid or shared_prefix.install_registered(lm.config)
        """Whether `behind_prefix` works."""
        if self.is_hybrid:
            _install_fast_paths(lm)

    @staticmethod
    def from_pretrained(path: str | Path, *, dtype: torch.dtype = torch.float32) -> PolicyModel:
        """Load a Hugging Face checkpoint folder, with its `mtp.*` weights if it is a NemotronH that has them."""
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        mtp = None
        if isinstance(lm, NemotronHForCausalLM) and lm.config.num_nextn_predict_layers:
            stored = dict(_stored_tensors(Path(path), "mtp."))
            if not stored:
                raise ValueError(f"{path}: config.json promises an MTP layer (num_nextn_predict_layers), but no file holds `mtp.*` weights")
            mtp = MTPHead(lm.config)
            wanted = mtp.state_dict()
            mtp.load_state_dict(_stack_experts({name: tensor.to(dtype) for name, tensor in stored.items()}, wanted))
            mtp = cast(mtp, dtype)
        return PolicyModel(lm, mtp)

    @staticmethod
    def from_config(config: NemotronHConfig, seed: int) -> PolicyModel:
        """A new random float32 model, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lm = NemotronHForCausalLM(config)
            mtp = None
            if config.num_nextn_predict_layers:
                mtp = MTPHead(lm.config)
                mtp.initialise(config.initializer_range)
        return PolicyModel(lm, mtp)

    @property
    def has_mtp(self) -> bool:
        return self.mtp is not None

    @property
    def config(self) -> Any:
        return self.lm.config

    def forward(self, input_ids: Tensor) -> Tensor:
        """Final normed hidden states [B, L, D] of right-padded ids [B, L]."""
        return self._trunk(input_ids, None)

    def behind_prefix(self, prefix_ids: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of right-padded rows [B, S] that all continue one prefix [P], which is computed once. See `shares_prefixes`.

        Returns [P, D] and [B, S, D], what `forward` gives for the rows with the prefix before each. P must be at least the
        convolution's look-back (3 for a kernel of 4).
        """
        if not self.shares_prefixes:
            raise ValueError(f"{type(self.lm).__name__} cannot share a prefix; ask `shares_prefixes` first")
        shared = Shared(len(prefix_ids), len(input_ids))
        prefix, rows = shared.split(self._trunk(shared.join(prefix_ids[None], input_ids), shared))
        return prefix[0], rows

    def _trunk(self, input_ids: Tensor, shared: Shared | None) -> Tensor:
        if not self.is_hybrid:
            return self._transformers_trunk(input_ids, shared)
        trunk = self.lm.model
        hidden = trunk.embeddings(input_ids)
        layout = {} if shared is None else {"shared": shared}
        for block in trunk.layers:
            hidden = self._layer(block, hidden, **layout)
        return trunk.norm_f(hidden)

    def _transformers_trunk(self, input_ids: Tensor, shared: Shared | None) -> Tensor:
        if self.gradient_checkpointing and not self.lm.is_gradient_checkpointing:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in self.lm.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True  # it asks; what is within it stays in evaluation mode, without dropout
        layout: dict[str, Any] = {}
        if shared is not None:
            length = (input_ids.shape[1] - shared.prefix) // shared.rows
            layout = {"shared": shared, "position_ids": shared_prefix.positions(shared, length, input_ids.device)}
        hidden: Tensor = self.lm.base_model(input_ids=input_ids, use_cache=False, **layout).last_hidden_state
        return hidden

    def _layer(self, layer: nn.Module, *inputs: Any, **layout: Any) -> Tensor:
        """Its output."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(layer, *inputs, use_reentrant=False, **layout)
            return out
        return layer(*inputs, **layout)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor, *, frozen_head: bool = False) -> Tensor:
        """hidden [..., D] -> float32 logits [..., V]. With `frozen_head` the LM head gets no gradient (the MTP loss)."""
        return at_least_float32(self.lm.get_output_embeddings()(hidden, frozen=frozen_head))

    def token_logprobs(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float | Tensor = 1.0,
        *,
        chunk: int | None = None,
        frozen_head: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Logprobs of `targets` and the entropy of the whole distribution, in nats, float32, in the shape of `targets`.

        hidden [..., D]; targets [...]; temperature: a number, or one per target (broadcast to them). Positions go through
        the LM head `chunk` at a time (a good number by default). The entropy carries no gradient.
        """
        scale = None
        if isinstance(temperature, Tensor):
            scale = temperature.to(hidden.device).expand(targets.shape).reshape(-1)
        elif temperature != 1.0:
            scale = torch.full((targets.numel(),), float(temperature), device=hidden.device)
        flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
        logprobs, entropy = self.lm.get_output_embeddings()(flat, frozen=frozen_head, targets=ids, temperature=scale, rows=chunk)
        return logprobs.view(targets.shape), entropy.view(targets.shape)

    def mtp_hidden(self, hidden: Tensor, input_ids: Tensor, *, prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Hidden states of the MTP head: [B, L, D] and ids [B, L] -> [B, L-1, D]; position t predicts token t+2.

        Pass `hidden` detached, and the result to `logits` or `token_logprobs` with `frozen_head=True`: then the MTP loss
        trains the MTP head alone. The shared embedding is detached here. `prefix`: hidden states [P, D] (detached) and ids [P] of
        what stands before every row; the rows must begin with the same token.
        """
        hidden, embedded, shared = self._mtp_inputs(hidden, input_ids, prefix)
        drafted = self._layer(self.mtp, hidden, embedded, shared)  # type: ignore[arg-type]
        return drafted if shared is None else shared.split(drafted)[1]

    def mtp_drafts(
        self, hidden: Tensor, token_ids: Tensor, mask: Tensor, depth: int, *, prefix: tuple[Tensor, Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What the MTP head says of first, second, ... `depth`-th drafts: (its outputs [T_j, D], right tokens [T_j], rows [T_j]) of each.

        hidden [B, L - 1, D] of token_ids [B, L] without the last, detached, as for `mtp_hidden`. A j-th draft, of token t + 1 + j from
        position t, counts where `mask` [B, L] is True for it and for the drafts before it, which are taken to stand.
        """
        rows, columns = mask[:, 2:].nonzero(as_tuple=True)
        outputs = self.mtp_hidden(hidden, token_ids[:, :-1], prefix=prefix)
        yield outputs[rows, columns], token_ids[rows, columns + 2], rows
        if depth == 1:
            return
        if not len(rows):  # a rank without trained tokens takes its part in ZeRO 3 all the same, with a draft that does not count
            rows = columns = rows.new_zeros(1)
        reach = _runs(mask)[rows, columns + 2]  # [T] tokens in a row that count, from the first draft on
        inputs, embedded, shared = self._mtp_inputs(hidden, token_ids[:, :-1], prefix)
        embed, last = self.lm.get_input_embeddings(), token_ids.shape[1] - 1
        following = [embed(token_ids[rows, (columns + j).clamp(max=last)]).detach() for j in range(2, depth + 1)]
        assert self.mtp is not None
        for j, output in enumerate(self.mtp.ahead(inputs, embedded, outputs[rows, columns], following, (rows, columns), shared), 2):
            there = reach >= j
            yield output[there], token_ids[rows[there], columns[there] + 1 + j], rows[there]

    def _mtp_inputs(self, hidden: Tensor, input_ids: Tensor, prefix: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Shared | None]:
        """Hidden states, the embedded tokens behind them, and how the two are packed."""
        if self.mtp is None:
            raise ValueError("this model has no MTP head; ask `has_mtp` first")
        embed = self.lm.get_input_embeddings()
        if prefix is None:
            return hidden[:, :-1], embed(input_ids[:, 1:]).detach(), None
        before, before_ids = prefix
        shared = Shared(len(before), len(hidden))
        next_ids = shared.join(torch.cat([before_ids[1:], input_ids[0, :1]])[None], input_ids[:, 1:])
        return shared.join(before[None], hidden[:, :-1]), embed(next_ids).detach(), shared

    def expert_loads(self, real: Tensor) -> dict[int, Tensor]:
        """Tokens per expert [E] of each MoE layer of the trunk in the last forward pass; `real` [positions] is False at padding."""
        layers = enumerate(self.lm.model.layers) if self.is_hybrid else ()
        loads = {i: moe.load(block.mixer, real) for i, block in layers if block.block_type == "moe"}
        return {i: load for i, load in loads.items() if load is not None}

    def router_parameters(self) -> list[nn.Parameter]:
        """Weights that choose experts. Frozen in RL by default, so that learner and engine keep routing alike."""
        return [p for name, p in self.named_parameters() if name.endswith((".mixer.gate.weight", ".mlp.gate.weight"))]

    def engine_state(self) -> dict[str, Tensor]:
        """All weights, detached and on the model's device, under the checkpoint names that vLLM's `load_weights` wants.

        For a hybrid: `backbone.*`, experts one by one, `lm_head.weight`, `mtp.*`. Views where possible: copy before training on.
        """
        state = lora.merged_state(self.lm)
        if not self.is_hybrid:
            state = {name: tensor.detach() for name, tensor in revert_weight_conversion(self.lm, state).items()}
            if self.config.tie_word_embeddings:
                state.pop("lm_head.weight", None)
            return state
        trunk = {"backbone." + name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
        state = _unstack_experts(trunk) | {name: tensor for name, tensor in state.items() if not name.startswith("model.")}
        if self.mtp is not None:
            state |= _unstack_experts({"mtp." + name: tensor.detach() for name, tensor in self.mtp.state_dict().items()})
        return state

    def save_pretrained(self, path: str | Path, tokenizer_path: str | Path | None = None) -> None:
        """Write a checkpoint folder that Transformers, vLLM and `from_pretrained` load; with a tokenizer's files if given."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self.lm).__name__]
        self.config.dtype = next(self.lm.parameters()).dtype
        self.config.save_pretrained(path)
        state = {name: tensor.clone() for name, tensor in self.engine_state().items()}  # clone: experts are views of one tensor
        save_torch_state_dict(state, path)
        for name in TOKENIZER_FILES if tokenizer_path is not None else ():
            source = Path(tokenizer_path or "", name)
            if source.is_file() and source.resolve() != (path / name).resolve():
                shutil.copyfile(source, path / name)


def _runs(mask: Tensor) -> Tensor:
    """[B, L] int64: how many entries are True in a row, from each one on."""
    runs = mask.long()
    for column in range(mask.shape[1] - 2, -1, -1):
        runs[:, column] *= 1 + runs[:, column + 1]
    return runs


def seed_config(vocab_size: int) -> NemotronHConfig:
    """The small hybrid that ships with the project: 1 to 2 million parameters, fast on one CPU core."""
    return NemotronHConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        layers_block_type=["linear_attention", "moe", "full_attention", "linear_attention", "moe", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=32768,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=1,
        conv_kernel=4,
        chunk_size=64,
        n_routed_experts=24,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64,
        moe_latent_size=64,
        num_nextn_predict_layers=1,
        mtp_layers_block_type=["full_attention", "moe"],
        initializer_range=0.04,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def _head_forward(
    self: nn.Linear,
    hidden: Tensor,
    frozen: bool = False,
    targets: Tensor | None = None,
    temperature: Tensor | None = None,
    rows: int | None = None,
) -> Any:
    """Logits, or with `targets` their logprobs and entropies. The weight is read here, inside its owner, for the sake of hooks."""
    weight = self.weight.detach() if frozen else self.weight
    bias = self.bias.detach() if frozen and self.bias is not None else self.bias
    if targets is None:
        return F.linear(hidden, weight, bias)
    return head_logprobs(hidden, weight, bias, targets, temperature, rows=rows)


def _install_fast_paths(lm: Any) -> None:
    norm.install(lm.model.norm_f)
    for block in lm.model.layers:
        norm.install(block.norm)
        if block.block_type == "linear_attention":
            mamba_scan.install(block.mixer)
        elif block.block_type == "full_attention":
            shared_prefix.install(block.mixer)
        elif block.block_type == "moe":
            moe.install(block.mixer)


def cast(module: Any, dtype: torch.dtype) -> Any:
    """To `dtype`, except for the router's balancing bias, which is float32 everywhere."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _stored_tensors(path: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(name without prefix, tensor) of a checkpoint folder, reading only the files that hold such names."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({file for name, file in json.loads(index.read_text())["weight_map"].items() if name.startswith(prefix)})
    else:
        files = ["model.safetensors"]
    for file in files:
        with safe_open(path / file, framework="pt") as tensors:
            for name in list(tensors.keys()):
                if name.startswith(prefix):
                    yield name.removeprefix(prefix), tensors.get_tensor(name)


def _unstack_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`mixer.experts.up_proj` [E, ...] -> `mixer.experts.0.up_proj.weight` and so on, as checkpoints store experts."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, tail = name.rpartition(".")
        if head.endswith(".mixer.experts"):
            out |= {f"{head}.{expert}.{tail}.weight": part for expert, part in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


def _stack_experts(stored: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_unstack_experts`, for the names in `wanted`. A missing name is left for `load_state_dict` to report."""
    out = dict(stored)
    for name, tensor in wanted.items():
        head, _, tail = name.rpartition(".")
        parts = [f"{head}.{expert}.{tail}.weight" for expert in range(len(tensor))] if head.endswith(".mixer.experts") else []
        if parts and all(part in out for part in parts):
            out[name] = torch.stack([out.pop(part) for part in parts])
    return out
