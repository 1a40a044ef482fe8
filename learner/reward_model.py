"""Trains a reward model on pairs: which of two answers is better (Bradley and Terry 1952; Christiano et al. 2017, arXiv:1706.03741).

    P(chosen is better) = sigmoid(r(chosen) - r(rejected))          loss = -log P, mean over the pairs

Only differences of r matter to the loss, so r may drift as a whole; a small penalty on (r(chosen) + r(rejected))^2 keeps it around 0
(Eisenstein et al. 2023, arXiv:2312.09244), and with it the sigmoid of a single r has a meaning: better than an average answer.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from reward_models.classifier import encode, forward
from reward_models.learned import Answer
from rl_core.chat import ChatML

CENTRE = 0.01
"""Weight of the penalty that keeps rewards around 0."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """One question, and which of two answers is better."""

    question: str
    chosen: str
    rejected: str


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Scalar loss of rewards [N] of the better and [N] of the worse answers."""
    return (-logsigmoid(chosen - rejected) + CENTRE * (chosen + rejected) ** 2).mean()


def tiny_model(chat: ChatML, *, hidden: int = 64, layers: int = 2) -> Any:
    """A small model from scratch over a tokenizer's ids, for tests and first steps."""
    pad = chat.tokenizer.token_to_id("<|pad|>")
    if pad is None:
        raise ValueError("the tokenizer has no <|pad|> token; start from a sequence-classification checkpoint with --base instead")
    config = LlamaConfig(
        vocab_size=chat.tokenizer.get_vocab_size(), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=8192, pad_token_id=pad, num_labels=1,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def train_reward_model(
    pairs: Sequence[Preference],
    out: Path,
    *,
    tokenizer: Path,
    base: Path | None = None,
    epochs: int = 3,
    batch: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Train on `pairs` from the checkpoint `base`, or a tiny model from scratch; write a folder that `Classifier.load` reads."""
    torch.manual_seed(seed)
    chat, rng = ChatML(tokenizer), random.Random(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32) if base else tiny_model(chat)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    steps = max(1, epochs * -(-len(pairs) // batch))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    for epoch in range(epochs):
        order = rng.sample(list(pairs), len(pairs))
        losses = []
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            rows = [encode(chat, Answer(question=p.question, text=text)) for p in part for text in (p.chosen, p.rejected)]
            logits = forward(model, rows)
            loss = bradley_terry(logits[0::2], logits[1::2])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        say(f"epoch {epoch + 1} of {epochs}: loss {sum(losses) / len(losses):.4f}")
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, out / name)


def read_preferences(path: Path) -> list[Preference]:
    """Pairs of a JSONL file with question, chosen and rejected on each line. Raises ValueError."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            pairs.append(Preference(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f'{path}:{number}: {error}; wanted {{"question": ..., "chosen": ..., "rejected": ...}}') from None
    if not pairs:
        raise ValueError(f"{path} holds no pairs")
    return pairs
