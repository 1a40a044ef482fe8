"""What a competent first version would be: GRPO in a plain PyTorch loop over the Transformers model.

    rows --(sorted by length, right-padded, as many as fit)--> model(ids).logits --> log_softmax --> loss --> AdamW

The same weights, rows, loss and optimizer as the learner's; whole sequences through Transformers' own CPU path, logits for every
position over the whole vocabulary, every prompt as often as it has answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from learner.optimizer import BETAS
from rl_core.batching import num_loss_tokens
from rl_core.config import LearnerConfig
from rl_core.types import Trajectory


class PlainLoop:
    """One rank, without an MTP head: Transformers does not build one."""

    def __init__(self, path: Path, config: LearnerConfig, *, max_tokens: int) -> None:
        """`max_tokens`: padded tokens of a microbatch; a longer row goes alone."""
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").train()
        for name, module in self.model.named_modules():
            if hasattr(module, "time_step_limit"):  # as in the engine and the learner, see learner/mamba_scan.py
                module.time_step_limit = (0.0, float("inf"))
            if name.endswith("mixer.gate"):
                module.requires_grad_(False)
        self.config, self.max_tokens = config, max_tokens
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=BETAS, weight_decay=config.weight_decay)

    def accumulate(self, rows: Sequence[Trajectory]) -> float:
        """Gradients of the loss over `rows`; returns it."""
        total, count = 0.0, num_loss_tokens(rows)
        for part in self._microbatches(rows):
            loss = self._loss(part) / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def apply(self) -> None:
        """Clip, step, forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _microbatches(self, rows: Sequence[Trajectory]) -> Iterator[list[Trajectory]]:
        part: list[Trajectory] = []
        for row in sorted(rows, key=len, reverse=True):
            if part and (len(part) + 1) * len(part[0]) > self.max_tokens:
                yield part
                part = []
            part.append(row)
        yield part

    def _loss(self, rows: Sequence[Trajectory]) -> Tensor:
        """- sum of A r, r = e^(p - q), q = p without gradient: one step per batch, without importance correction."""
        ids, mask = (_padded([getattr(row, name) for row in rows]) for name in ("token_ids", "loss_mask"))
        logprobs = self.model(input_ids=ids.long(), use_cache=False).logits[:, :-1].float().log_softmax(-1)
        own = logprobs.gather(-1, ids[:, 1:, None].long()).squeeze(-1)
        ratio = (own - own.detach()).exp()
        advantages = torch.tensor([row.advantage for row in rows])[:, None]
        return -(mask[:, 1:] * advantages * ratio).sum()


def _padded(arrays: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(a) for a in arrays], batch_first=True)
