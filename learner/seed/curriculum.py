"""What the seed policy is taught, in which shares, and in which order: long documents come last, since they cost the most.

Shares are of tokens. `working` is the share of demonstrations that show their working; it ends up as the probability that the
seed policy works a task out, and so, nearly, as its pass rate: direct answers are too hard for a model of this size. As only
the first token of a turn decides the style, most of the training shows the working style, and the last phase settles how
often the policy chooses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from environments.registry import resolve
from learner.seed.demonstrations import Course, Demonstration, demonstrations
from rl_core.chat import ChatML

LEARN, SETTLE = 0.8, 0.4
"""Share of working demonstrations: first to learn how, at the end to settle how often."""


OPTIONS: dict[str, dict[str, Any]] = {
    "math": {"digits": 3, "kinds": ["add", "sub", "chain"], "terms": 5},
    "code": {"kinds": ["ints", "stdin", "lists"], "num_steps": 3, "digits": 2},
    "tools": {"kinds": ["stock", "points", "move", "refund"], "distractors": 0, "failure_rate": 0.0},
    "long_context": {"kinds": ["needle", "overwritten", "join"], "records": 12, "min_tokens": 1024, "max_tokens": 4096},
}
"""As in configs/quickstart.yaml, which a test compares: the seed policy is for the tasks of that run."""


TAUGHT_RECORDS = 16
"""Records of a document in demonstrations, more than in the run: each one is also a follow-up question, so a document teaches more."""


def _short(working: float) -> tuple[Course, ...]:
    return (
        Course(env="math", share=0.30, working=working, options=OPTIONS["math"]),
        Course(env="code", share=0.20, working=working, options=OPTIONS["code"]),
        Course(env="tools", share=0.45, working=working, options=OPTIONS["tools"], max_turns=6),
    )


def _documents(share: float, low: int, high: int, *, follow_ups: int = 0, working: float = LEARN) -> Course:
    options = {**OPTIONS["long_context"], "records": TAUGHT_RECORDS, "min_tokens": low, "max_tokens": high}
    return Course(env="long_context", share=share, working=working, options=options, follow_ups=follow_ups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Courses that are taught together, up to `until`: a fraction of all steps."""

    until: float
    courses: tuple[Course, ...]


PHASES = (
    Phase(until=0.25, courses=(*_short(LEARN), _documents(0.60, 32, 128))),
    Phase(until=0.45, courses=(*_short(LEARN), _documents(0.75, 64, 512, follow_ups=8))),
    Phase(until=0.80, courses=(*_short(LEARN), _documents(1.10, 256, 4096, follow_ups=16))),
    Phase(until=1.0, courses=(*_short(SETTLE), _documents(0.90, 512, 4096, follow_ups=16, working=SETTLE))),
)
"""Retrieval is learned soonest from many tiny documents with one question each. It does not carry over to long ones by itself: those
take many questions each, or the few tokens that teach drown in the thousands that are only read."""

FINAL = (*_short(SETTLE), _documents(1.0, 1024, 4096, working=SETTLE))
"""What is measured at the end: the environments as a run meets them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Right-padded demonstrations of like length: ids [B, L], mask [B, L], and whose they are."""

    token_ids: np.ndarray  # int64 [B, L]
    loss_mask: np.ndarray  # bool [B, L]
    envs: tuple[str, ...]  # [B]

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.size)


FILLED = 0.8
"""A batch is closed when another, longer sequence would leave less than this share of it unpadded."""


def steps_of(phase: Phase, chat: ChatML, *, pad: int, step_tokens: int, seed: int) -> Iterator[list[Batch]]:
    """The batches of one optimizer step after another, without end and the same for the same arguments.

    Every step holds about `step_tokens` tokens and every course its share, as far as whole demonstrations allow: a long
    document is drawn once its course has saved up for it. What is alike in length is padded together.
    """
    streams = [demonstrations(c, resolve(c.env), chat, split="train", seed=seed + 1000 * i) for i, c in enumerate(phase.courses)]
    total_share = sum(c.share for c in phase.courses)
    saved = [0.0] * len(streams)
    while True:
        drawn: list[Demonstration] = []
        for i, (course, stream) in enumerate(zip(phase.courses, streams, strict=True)):
            saved[i] += course.share / total_share * step_tokens
            while saved[i] > 0:
                drawn.append(next(stream))
                saved[i] -= len(drawn[-1])
        yield list(_cut(sorted(drawn, key=len), pad))


def _cut(drawn: list[Demonstration], pad: int) -> Iterator[Batch]:
    """`drawn` goes from short to long, so the newest sequence is the width of its batch."""
    rows: list[Demonstration] = []
    tokens = 0
    for demonstration in drawn:
        if rows and tokens + len(demonstration) < FILLED * len(demonstration) * (len(rows) + 1):
            yield collate(rows, pad)
            rows, tokens = [], 0
        rows.append(demonstration)
        tokens += len(demonstration)
    if rows:
        yield collate(rows, pad)


def collate(rows: list[Demonstration], pad: int) -> Batch:
    width = max(len(r) for r in rows)
    ids = np.full((len(rows), width), pad, np.int64)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.token_ids
        mask[i, : len(row)] = row.loss_mask
    return Batch(token_ids=ids, loss_mask=mask, envs=tuple(r.env for r in rows))
