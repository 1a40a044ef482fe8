"""Teach the MTP head of a seed checkpoint to draft further ahead, and leave its policy as it is, to the bit.

python -m learner.seed.drafts configs/models/seed 0 700      # folder, seed, steps; about 7 minutes of one core
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from learner.model import PolicyModel
from learner.seed.curriculum import FINAL, Phase, steps_of
from learner.seed.train import MAX_GRAD_NORM, MTP_DEPTH, REPORT_EVERY_S, draft_loss, learning_rate, located, make_optimizers
from rl_core.chat import ChatML

LEARNING_RATE = 0.3  # of the whole model's in its training


def train_drafts(folder: Path, *, seed: int, steps: int, step_tokens: int, report: Callable[[str], None]) -> None:
    """Train the MTP head of the checkpoint in `folder` alone. The policy stays as it is, to the bit."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model, chat = PolicyModel.from_pretrained(folder), ChatML(folder)
    model.lm.requires_grad_(False)
    optimizers = make_optimizers(model)
    peaks = [(group, group["lr"] * LEARNING_RATE) for optimizer in optimizers for group in optimizer.param_groups]
    phase = Phase(until=1.0, courses=tuple(located(c, folder) for c in FINAL))
    stream = steps_of(phase, chat, pad=int(chat.tokenizer.token_to_id("<|pad|>") or 0), step_tokens=step_tokens, seed=10_007 * seed + 99)
    since = time.monotonic()
    for step in range(steps):
        for group, peak in peaks:
            group["lr"] = peak * learning_rate(step, steps)
        batches = [(torch.from_numpy(b.token_ids), torch.from_numpy(b.loss_mask)) for b in next(stream)]
        count, loss = sum(int(mask.sum()) for _, mask in batches), 0.0
        for ids, mask in batches:
            with torch.no_grad():
                hidden = model(ids)
            nll = draft_loss(model, hidden, ids, mask) / count
            nll.backward()
            loss += float(nll.detach())
        torch.nn.utils.clip_grad_norm_(model.mtp.parameters(), MAX_GRAD_NORM)  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if time.monotonic() - since > REPORT_EVERY_S or step == steps - 1:
            since = time.monotonic()
            report(f"drafts {step + 1}/{steps}  {loss:.3f} nats over {MTP_DEPTH} drafts")
    model.save_pretrained(folder, folder)


if __name__ == "__main__":
    train_drafts(
        Path(sys.argv[1]), seed=int(sys.argv[2]), steps=int(sys.argv[3]), step_tokens=3072, report=lambda line: print(line, flush=True)
    )
