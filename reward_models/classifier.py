"""A sequence-classification reward model: a checkpoint with one output, read as the logit of "better".

    Classifier.load("runs/rm").score([Answer(question="Say hello.", text="Hello!")])   ->   [0.83]

Torch and Transformers are imported when a checkpoint is loaded, so that this package stays light; in a run that happens in the model's own
actor (rollout_workers/rewards.py). Question and answer are framed by ids: nothing that the policy writes can open a turn of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reward_models.learned import Answer
from rl_core.chat import ChatML
from rl_core.types import Message, Turn

MAX_TOKENS = 4096
"""Of question and answer together. What is too long loses the beginning of its question, and an answer longer than that its beginning."""
BATCH_TOKENS = 16_384
"""Padded tokens of one forward pass."""


class Classifier:
    """Scores answers in batches, the same whatever else is in the batch."""

    def __init__(self, model: Any, chat: ChatML, version: str) -> None:
        self.model, self.chat, self.version = model, chat, version

    @staticmethod
    def load(path: str | Path) -> Classifier:
        """A folder with a sequence-classification checkpoint of one label and a ChatML tokenizer.json. Raises ValueError."""
        import torch
        from transformers import AutoModelForSequenceClassification

        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise ValueError(f"no reward model in {str(folder)!r}; train one with `polyrl reward train`, or give a checkpoint's folder")
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        if model.config.num_labels != 1 or model.config.pad_token_id is None:
            raise ValueError(
                f"{folder}: {model.config.num_labels} labels, pad token {model.config.pad_token_id}; wanted one label and a pad token"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Classifier(model.to(device).eval(), ChatML(folder), f"classifier/1:{fingerprint(folder)}")

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The chance that each answer is the better one of a pair with an average one: the sigmoid of its logit."""
        import torch

        rows = [encode(self.chat, answer) for answer in answers]
        scores = [0.0] * len(rows)
        with torch.inference_mode():
            for places in batches([len(row) for row in rows], BATCH_TOKENS):
                logits = forward(self.model, [rows[i] for i in places])
                for i, value in zip(places, torch.sigmoid(logits.float()).tolist(), strict=True):
                    scores[i] = value
        if not all(score == score for score in scores):
            raise ValueError("the reward model gives NaN; its checkpoint is broken")
        return scores


def encode(chat: ChatML, answer: Answer, limit: int = MAX_TOKENS) -> list[int]:
    """[<= limit] ids of the question as the user's turn and the answer as the assistant's, cut from the left."""
    ids = chat.prompt((Message(role="user", content=answer.question),)) + chat.assistant(Turn(content=answer.text))
    return ids[-limit:]


def forward(model: Any, rows: Sequence[Sequence[int]]) -> Any:
    """[N] logits of the right-padded rows, each read at its last token."""
    import torch

    width = max(len(row) for row in rows)
    pad = model.config.pad_token_id
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of rows of like lengths, together within `budget` padded tokens (a longer row goes alone)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def fingerprint(folder: Path) -> str:
    """Of the weights: two checkpoints never share a version."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:12]
