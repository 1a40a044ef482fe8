"""Drafting with the MTP head on CPU, in one small routine.

    all new tokens     --> keys and values of the head's attention, nothing more
    last accepted one  --> attention --> experts --> logits --> draft 1 --> the head again --> draft 2 ... k

Cost upstream (vLLM 0.32): each draft rebuilds attention metadata, forward context and slot mapping through some hundred Python
calls, and the first pass takes all tokens of the step (a whole prompt, at first) through attention, experts and output layer, of
which one row per sequence is read. With a small model that is most of a step. What is computed here is the same, less what nobody reads.

Serves one MTP layer of an attention and an expert block, as every NemotronH has it, in one process. Anything else is left to vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_workers.vllm_plugin import auto_k
from rollout_workers.vllm_plugin.auto_k import AUTO_VARIABLE, CHOOSERS
from rollout_workers.vllm_plugin.latent_moe import FEW_OPERATIONS
from rollout_workers.vllm_plugin.raw_weights import Views, raw_weight

LEAST_CHANCE = 0.1
"""Where k is chosen, a draft is verified if it stands with this chance, by the head's own probabilities of it and of those before it.

A draft that is rejected still costs a place in the policy's pass: a small chance brings less than that.
"""
NEXT_CHANCE = 0.2
"""The same for another draft behind it, which costs a pass through the head as well."""


class Doubt(NamedTuple):
    """The chances, by the head's own word, below which a draft is not verified and no other is made behind it."""

    verify: float = 0.0
    go_on: float = 0.0


class Batch(NamedTuple):
    """B sequences about to be drafted for."""

    seq_lens: Tensor  # [B] int32 up to the last accepted token; grows by one with each draft
    blocks: Tensor  # [B, max blocks] int32
    starts: Tensor  # [B + 1] int32: 0, 1, ... B


class Head:
    """vLLM's NemotronHMTP, called without its layers' ceremony. Weights are looked up at each call, since updates may replace them."""

    def __init__(self, model: Any, block_size: int, dtype: torch.dtype, split_kv: bool, doubt: Doubt) -> None:
        first, second = model.model.layers["0"], model.model.layers["1"]
        self.embed, self.lm_head, self.vocab = model.model.embed_tokens, model.lm_head, model.config.vocab_size
        self.first, self.second, self.mixer, self.experts = first, second, first.mixer, second.mixer
        self.block_size, self.dtype, self.split_kv, self.doubt = block_size, dtype, split_kv, doubt
        blocks, heads, size, _ = self.mixer.attn.kv_cache.shape
        assert size == block_size, f"attention blocks of {size} tokens, drafts placed in blocks of {block_size}"
        self.keys, self.values = self.mixer.attn.kv_cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        layers, moe = (self.embed, self.lm_head, first.eh_proj, self.mixer.qkv_proj, self.mixer.o_proj), self.experts
        weights = [raw_weight(layer) for layer in layers if getattr(layer, "bias", None) is None]  # `layer.weight` is empty where packed
        known = [weight for weight in weights if weight is not None]
        self.is_compiled = len(known) == len(layers) and getattr(moe, "is_compiled", False)
        """Whether kernels.py serves it, for few tokens."""
        self.operations = sum(weight.numel() for weight in known[1:]) + getattr(moe, "operations", 0)
        """Multiply-adds per token, where it does; an embedding has none."""
        self.epsilon = first.norm.variance_epsilon
        entering = (self.embed, first.enorm, first.hnorm, first.eh_proj, first.norm, self.mixer.qkv_proj)
        leaving = (self.mixer.o_proj, second.norm, second.final_layernorm, self.lm_head)
        if self.is_compiled:
            self.entering, self.leaving = (Views(*((layer, "weight") for layer in half)) for half in (entering, leaving))

    def few(self, count: int) -> bool:
        return self.is_compiled and count * self.operations <= FEW_OPERATIONS

    def enter(self, ids: Tensor, hidden: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Token t + 1 and hidden state t [N, D]: their keys and values go to `slots`; returns residual [N, D] and queries [N, H, P]."""
        m, first = self.mixer, self.first
        if self.few(len(ids)):
            from rollout_workers.vllm_plugin import kernels

            x, qkv = torch.empty(hidden.shape), torch.empty(len(ids), m.q_size + 2 * m.kv_size)
            asked = kernels.views(ids.long(), hidden.contiguous())
            kernels.head_enter(*asked, *self.entering.now(), self.epsilon, *kernels.views(x, qkv))
        else:
            embedded = F.embedding(ids, self.embed.weight)
            x = linear(first.eh_proj, torch.cat([norm(first.enorm, embedded), norm(first.hnorm, hidden)], -1))
            qkv = linear(m.qkv_proj, norm(first.norm, x))
        q, k, v = qkv.split([m.q_size, m.kv_size, m.kv_size], -1)
        k, v = k.view(len(x), m.num_kv_heads, m.head_dim), v.view(len(x), m.num_kv_heads, m.head_dim)
        a = m.attn
        torch.ops._C.cpu_attn_reshape_and_cache(
            k, v, self.keys, self.values, slots, a.isa, a._k_scale_float, a._v_scale_float, a.impl.kv_cache_dtype
        )
        return x, q.view(len(x), m.num_heads, m.head_dim)

    def leave(self, x: Tensor, q: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """From residual and queries of one token per sequence to the head's output [B, D], the next draft [B] and its log-probability."""
        attended = self._attend(q, batch).view(len(x), -1)
        if self.few(len(x)):
            from rollout_workers.vllm_plugin import kernels

            hidden, draft, logprob = torch.empty(x.shape), torch.empty(len(x), dtype=torch.int64), torch.empty(len(x))
            o_proj, before, after, lm_head = self.leaving.now()
            kernels.head_leave(
                *kernels.views(x.contiguous(), attended.contiguous()), o_proj, before, *self.experts.weights(), after,
                lm_head[: self.vocab], self.epsilon, *kernels.views(hidden, draft, logprob),
            )  # fmt: skip
            return hidden, draft, logprob
        x = x + linear(self.mixer.o_proj, attended)
        hidden = norm(self.second.final_layernorm, x + self.experts(norm(self.second.norm, x)))
        logits = linear(self.lm_head, hidden)[:, : self.vocab].float()
        best, draft = logits.max(-1)
        return hidden, draft, best - logits.logsumexp(-1)

    def follow(self, draft: Tensor, hidden: Tensor, batch: Batch, longest: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `leave` says behind one more draft of each sequence."""
        x, q = self.enter(draft, hidden, self.slots(batch, longest))
        batch.seq_lens.add_(1).clamp_(max=longest)
        return self.leave(x, q, batch)

    def slots(self, batch: Batch, longest: int) -> Tensor:
        """[B] int64: where the token at position `seq_lens` belongs; -1, which is nowhere, beyond the longest sequence."""
        position, blocks = batch.seq_lens.numpy(), batch.blocks.numpy()
        column, within = np.divmod(position, self.block_size)
        slot = blocks[np.arange(len(position)), np.minimum(column, blocks.shape[1] - 1)] * self.block_size + within
        return torch.from_numpy(np.where(position < longest, slot, -1).astype(np.int64))

    def _attend(self, q: Tensor, batch: Batch) -> Tensor:
        m, a = self.mixer, self.mixer.attn
        plan = torch.ops._C.get_scheduler_metadata(
            len(q), m.num_heads, m.num_kv_heads, m.head_dim, batch.seq_lens, self.dtype, batch.starts, True, a.impl.sliding_window,
            a.isa, self.split_kv, None, a.impl.kv_cache_dtype,
        )  # fmt: skip
        out = torch.empty_like(q)
        torch.ops._C.cpu_attention_with_kv_cache(
            q, self.keys, self.values, out, batch.starts, batch.seq_lens, a.impl.scale, True, None, a.impl.sliding_window, batch.blocks,
            a.impl.logits_soft_cap, plan, None, None, a._k_scale_float, a._v_scale_float, a.impl.kv_cache_dtype,
        )  # fmt: skip
        return out


def linear(layer: Any, x: Tensor) -> Tensor:
    """A vLLM linear layer's own CPU kernel."""
    return layer.cpu_linear(x, layer.weight, None)  # type: ignore[no-any-return]


def norm(layer: Any, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, layer.weight, layer.variance_epsilon)
    return out


def propose(
    self: Any, num_speculative_tokens: int, target_token_ids: Tensor, target_positions: Tensor, target_hidden_states: Tensor,
    next_token_ids: Tensor, token_indices_to_sample: Tensor | None, common_attn_metadata: Any, sampling_metadata: Any,
    mm_embed_inputs: Any = None, num_rejected_tokens_gpu: Tensor | None = None, slot_mappings: Any = None,
) -> Tensor | list[list[int]]:  # fmt: skip
    """vLLM's `SpecDecodeBaseProposer.propose`: up to k drafts of each sequence, to verify in the next step."""
    head, meta, k = head_of(self), common_attn_metadata, num_speculative_tokens
    self.num_speculative_tokens = k
    count = len(target_token_ids)
    last = (meta.query_start_loc[1:] - 1 if token_indices_to_sample is None else token_indices_to_sample).numpy()
    ids = np.roll(target_token_ids.numpy(), -1).astype(np.int64)
    ids[last] = next_token_ids.numpy()
    # Also where k is 0, and now: later these slots may be those of another sequence, or of another layer's state.
    x, q = head.enter(torch.from_numpy(ids), target_hidden_states, meta.slot_mapping[:count])
    if k == 0:
        return torch.empty((len(last), 0), dtype=torch.int64)
    # Behind the last accepted token stand rejected drafts; the next step writes over them.
    seq_lens = meta.seq_lens.clone() if num_rejected_tokens_gpu is None else meta.seq_lens - num_rejected_tokens_gpu
    batch = Batch(seq_lens=seq_lens, blocks=meta.block_table_tensor, starts=self.arange[: len(last) + 1])
    if len(last) < len(x):
        rows = torch.from_numpy(last)
        x, q = x.index_select(0, rows), q.index_select(0, rows)  # of any type: NumPy has no bfloat16
    return likeliest(head, head.leave(x, q, batch), batch, k, self.max_model_len)


def likeliest(head: Head, first: tuple[Tensor, Tensor, Tensor], batch: Batch, k: int, longest: int) -> list[list[int]]:
    """The most likely tokens of each sequence, as long as the head thinks that all of them up to here may well stand (`head.doubt`).

    How many there are depends on what stands before them and on nothing that is sampled later, so what is verified keeps the policy's
    distribution.
    """
    hidden, draft, logprob = first
    doubt = head.doubt if auto_k.held is None else Doubt()
    drafts, counts = [draft.numpy()], np.zeros(len(hidden), np.int64)
    chance, going_on = np.ones(len(hidden), np.float32), np.ones(len(hidden), bool)
    while True:
        chance = chance * np.exp(logprob.numpy())
        counts += going_on & (chance >= doubt.verify)
        going_on &= chance >= doubt.go_on
        if len(drafts) == k or not going_on.any():
            break
        hidden, draft, logprob = head.follow(draft, hidden, batch, longest)
        drafts.append(draft.numpy())
    return [ids[:count] for ids, count in zip(np.stack(drafts, 1).tolist(), counts.tolist(), strict=True)]


def last_tokens(self: Any, sampled: Tensor, requests: Any, batch: Any, discarded: Tensor) -> tuple[Tensor, Tensor] | None:
    """vLLM's `prepare_next_token_ids_padded`: each sequence's last token and how many there are, of [B, 1 + k] padded with -1.

    None where a prompt is not read to its end yet: its next token is known, and vLLM looks it up.
    """
    tokens = sampled.numpy()
    if discarded.numpy()[: len(tokens)].any():
        return None
    counts = ((tokens >= 0) & (tokens < batch.vocab_size)).sum(1, dtype=np.int32)
    if not counts.min():
        return None
    return torch.from_numpy(tokens[np.arange(len(tokens)), counts - 1].astype(np.int32)), torch.from_numpy(counts)


def last_places(self: Any, meta: Any, drafts: Any, counts: Tensor) -> tuple[Any, Tensor, Tensor] | None:
    """vLLM's `prepare_inputs_padded`: where each sequence's last token that stands is, [B], and how many drafts behind it do not, [B]."""
    starts = meta.query_start_loc.numpy()
    if starts[-1] != meta.num_actual_tokens:
        return None
    drafted = np.array(drafts.num_draft_tokens, np.int32)
    rejected = np.where(drafted > 0, drafted + 1 - counts.numpy(), 0).astype(np.int32)
    return meta, torch.from_numpy(starts[1:] - 1 - rejected), torch.from_numpy(rejected)


def head_of(proposer: Any) -> Head:
    if getattr(proposer, "polyrl_head", None) is None:
        import vllm.envs as envs

        is_chosen = os.environ.get(AUTO_VARIABLE) in CHOOSERS
        doubt = Doubt(LEAST_CHANCE, NEXT_CHANCE) if is_chosen else Doubt()  # a fixed k means k drafts, come what may
        proposer.polyrl_head = Head(proposer.model, proposer.block_size, proposer.dtype, envs.VLLM_CPU_ATTN_SPLIT_KV, doubt)
    return proposer.polyrl_head  # type: ignore[no-any-return]


def serves(proposer: Any) -> bool:
    """Whether the proposer's draft is one that `Head` computes."""
    model = proposer.model
    return (
        type(model).__name__ == "NemotronHMTP"
        and model.model.pattern_str == "*E"
        and proposer.vllm_config.parallel_config.world_size == 1
        and not proposer.supports_mm_inputs
        and not proposer._enable_probabilistic_draft_probs
        and not proposer.use_heterogeneous_vocab
        and hasattr(model.lm_head, "cpu_linear")
    )


def install() -> None:
    """Replace the stock routines for the drafts that `Head` serves."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    if hasattr(SpecDecodeBaseProposer, "polyrl_head"):
        return
    SpecDecodeBaseProposer.polyrl_head = None
    routines: dict[str, Callable[..., Any]] = {
        "propose": propose, "prepare_next_token_ids_padded": last_tokens, "prepare_inputs_padded": last_places,
    }  # fmt: skip
    for name, ours in routines.items():
        setattr(SpecDecodeBaseProposer, name, or_else(ours, getattr(SpecDecodeBaseProposer, name)))


def or_else(ours: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` for the drafts that it serves, unless it says None; else `stock`."""

    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "polyrl_serves"):
            self.polyrl_serves = serves(self)
        answer = ours(self, *args, **kwargs) if self.polyrl_serves else None
        return stock(self, *args, **kwargs) if answer is None else answer

    return chosen
