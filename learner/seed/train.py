"""Train the seed policy from nothing: tokenizer, supervised steps on demonstrations, MTP head beside the policy, checkpoint.

    train_seed("configs/models/seed", seed=0, steps=2200)

The MTP head learns from detached hidden states and a frozen LM head, so that it follows the policy and does not steer it.
Everything random comes from `seed`; on the same machine and versions, the same arguments give the same weights.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from environments.registry import resolve
from learner.model import PolicyModel, seed_config
from learner.seed.curriculum import FINAL, PHASES, Batch, Phase, steps_of
from learner.seed.demonstrations import Course, texts
from learner.seed.measure import Measured, measure
from learner.seed.muon import Muon
from learner.seed.tokenizer import VOCAB_SIZE, train_tokenizer
from rl_core.chat import ChatML

MUON_LEARNING_RATE = 0.02
ADAM_LEARNING_RATE = 4e-3
ADAM_NAMES = ("embeddings", "lm_head", "gate", "conv1d")
WARMUP_STEPS = 100
DECAY_SHARE = 0.3  # of the steps, at the end, in which the learning rate falls linearly to zero
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
MTP_WEIGHT = 0.5
MTP_DEPTH = 4
"""Drafts ahead that the MTP head learns to make, the later ones from its own outputs."""
TOKENIZER_EPISODES = 2000
REPORT_EVERY_S = 10.0


@dataclass
class Progress:
    """Sums since the last report."""

    tokens: int = 0
    since: float = field(default_factory=time.monotonic)
    loss: dict[str, float] = field(default_factory=dict)
    count: Counter[str] = field(default_factory=Counter)
    mtp: float = 0.0
    steps: int = 0


def train_seed(
    out: str | Path,
    *,
    seed: int = 0,
    steps: int = 2200,
    step_tokens: int = 3072,
    threads: int = 1,
    measure_every: int = 1000,
    report: Callable[[str], None] = print,
) -> list[Measured]:
    """Make the seed checkpoint in folder `out` and return its held-out measurements. Ctrl-C ends training early and saves what there is."""
    folder = Path(out)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # moments that decay to denormal numbers slow a CPU down tenfold
    learn_tokenizer(folder, seed)
    chat = ChatML(folder)
    model = PolicyModel.from_config(seed_config(VOCAB_SIZE), seed)
    report(f"seed model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {steps} steps of {step_tokens} tokens")
    began = time.monotonic()
    done = 0
    try:
        for done in fit(model, chat, folder, seed=seed, steps=steps, step_tokens=step_tokens, report=report):
            if measure_every and done % measure_every == 0 and done < steps:
                model.save_pretrained(folder, folder)
                for course in FINAL:
                    report(f"  step {done}: {measure(model, located(course, folder), chat, tasks=32)}")
    except KeyboardInterrupt:
        report(f"stopped at step {done}; saving")
    model.save_pretrained(folder, folder)
    results = [measure(model, located(course, folder), chat, tasks=128) for course in FINAL]
    for result in results:
        report(f"  final: {result}")
    record = {
        "seed": seed, "steps": done, "planned_steps": steps, "step_tokens": step_tokens, "threads": threads,
        "minutes": round((time.monotonic() - began) / 60, 1), "held_out": [asdict(r) for r in results],
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return results


def learn_tokenizer(folder: Path, seed: int) -> None:
    """Long documents are left to their short forms: the same words, in less time."""
    courses = {course.env: course for phase in PHASES for course in reversed(phase.courses)}
    shortest = {course.env: course for course in reversed(PHASES[0].courses)}
    found = [t for env in courses for t in texts(shortest[env], resolve(env), count=TOKENIZER_EPISODES, seed=seed)]
    train_tokenizer(found, folder, vocab_size=VOCAB_SIZE)


def fit(
    model: PolicyModel, chat: ChatML, folder: Path, *, seed: int, steps: int, step_tokens: int, report: Callable[[str], None]
) -> Iterator[int]:
    """Train, yielding the number of steps done after each one."""
    optimizers = make_optimizers(model)
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    pad = int(chat.tokenizer.token_to_id("<|pad|>") or 0)
    progress = Progress()
    step = 0
    for number, phase in enumerate(PHASES):
        here = Phase(until=phase.until, courses=tuple(located(c, folder) for c in phase.courses))
        stream = steps_of(here, chat, pad=pad, step_tokens=step_tokens, seed=10_007 * seed + number)
        while step < int(phase.until * steps):
            for group, peak in peaks:
                group["lr"] = peak * learning_rate(step, steps)
            learn(model, optimizers, next(stream), progress)
            step += 1
            if time.monotonic() - progress.since > REPORT_EVERY_S:
                report(describe(progress, step, steps))
                progress = Progress()
            yield step


def learn(model: PolicyModel, optimizers: list[torch.optim.Optimizer], step_batches: list[Batch], progress: Progress) -> None:
    """One optimizer step.

    An environment with n target tokens in this step weighs sqrt(n): long documents with short answers are neither drowned by
    the many tokens of the others, nor as loud as if their few tokens said as much.
    """
    counts: Counter[str] = Counter()
    for batch in step_batches:
        for env, row in zip(batch.envs, batch.loss_mask, strict=True):
            counts[env] += int(row.sum())
    total = sum(n**0.5 for n in counts.values())
    weights = {env: n**-0.5 / total for env, n in counts.items()}
    mtp_weight = MTP_WEIGHT / sum(counts.values())
    for batch in step_batches:
        ids, mask = torch.from_numpy(batch.token_ids), torch.from_numpy(batch.loss_mask)
        hidden = model(ids)
        targets = mask[:, 1:]
        nll = F.cross_entropy(model.logits(hidden[:, :-1][targets]), ids[:, 1:][targets], reduction="none")
        row_weights = torch.tensor([weights[env] for env in batch.envs])
        mtp_nll = draft_loss(model, hidden.detach(), ids, mask)
        rows = targets.nonzero()[:, 0]
        (torch.dot(nll, row_weights[rows]) + mtp_weight * mtp_nll).backward()
        for nll_sum, env in zip(torch.zeros(len(batch.envs)).index_add_(0, rows, nll.detach()).tolist(), batch.envs, strict=True):
            progress.loss[env] = progress.loss.get(env, 0.0) + nll_sum
        progress.mtp += float(mtp_nll.detach())
        progress.tokens += batch.num_tokens
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    progress.count.update(counts)
    progress.steps += 1


def draft_loss(model: PolicyModel, hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the MTP head, the mean over MTP_DEPTH drafts of their sums over tokens; hidden [B, L, D] is detached."""
    drafts = model.mtp_drafts(hidden[:, :-1], ids, mask, MTP_DEPTH)
    losses = [F.cross_entropy(model.logits(h, frozen_head=True), targets, reduction="sum") for h, targets, _ in drafts]
    return torch.stack(losses).mean()


def make_optimizers(model: PolicyModel) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices; AdamW for embedding, LM head, routers, convolutions and vectors."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in trained if p.ndim >= 2 and not any(part in name for part in ADAM_NAMES)]
    rest = [p for name, p in trained if p.ndim < 2 or any(part in name for part in ADAM_NAMES)]
    return [
        Muon(hidden, lr=MUON_LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, foreach=True),
    ]


def learning_rate(step: int, steps: int) -> float:
    """Relative to the peak: warm up, stay, decay linearly to zero over the last DECAY_SHARE of `steps`."""
    warm = min(1.0, (step + 1) / min(WARMUP_STEPS, max(1, steps // 10)))
    left = (steps - step) / max(1.0, DECAY_SHARE * steps)
    return min(warm, left, 1.0)


def describe(progress: Progress, step: int, steps: int) -> str:
    """One line for people: losses in nats per token."""
    seconds = time.monotonic() - progress.since
    losses = "  ".join(f"{env} {progress.loss[env] / max(1, progress.count[env]):.3f}" for env in sorted(progress.loss))
    minutes_left = (steps - step) * seconds / max(1, progress.steps) / 60
    draft = progress.mtp / max(1, progress.count.total())
    return f"step {step}/{steps}  {losses}  MTP {draft:.3f}  {progress.tokens / seconds:,.0f} tok/s  {minutes_left:.1f} min left"


def located(course: Course, folder: Path) -> Course:
    """The course with the environment's option `tokenizer` set, where it has one: documents are measured in the model's own tokens."""
    if course.env != "long_context":
        return course
    return replace(course, options={**course.options, "tokenizer": str(folder)})


if __name__ == "__main__":
    train_seed(sys.argv[1], seed=int(sys.argv[2]), steps=int(sys.argv[3]), report=lambda line: print(line, flush=True))
