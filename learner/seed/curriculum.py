"""What the seed policy is taught, in which shares, and in which order: long documents come last, since they cost the most.

Shares are of tokens. `working` is the share of demonstrations that show their working; it ends up as the probability that the
seed policy works a task out, and so, nearly, as its pass rate: direct answers are too hard for a model of this size. As only
the first token of a turn decides the style, most of the training shows the working style, and the last phase settles how
often the policy chooses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from environments.registry import resolve
from learner.seed.demonstrations import Course, Demonstration, demonstrations
from rl_core.chat import ChatML

LEARN, SETTLE = 0.8, 0.4
"""Share of working demonstrations: first to learn how, at the end to settle how often."""


def _short(working: float) -> tuple[Course, ...]:
    return (
        Course(env="math", share=0.30, working=working),
        Course(env="code", share=0.20, working=working),
        Course(env="tools", share=0.25, working=working, max_turns=6),
    )


def _documents(share: float, low: int, high: int, *, questions: int = 1, working: float = LEARN) -> Course:
    return Course(env="long_context", share=share, working=working, options={"min_tokens": low, "max_tokens": high, "questions": questions})


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Courses that are taught together, up to `until`: a fraction of all steps."""

    until: float
    courses: tuple[Course, ...]


PHASES = (
    Phase(until=0.50, courses=(*_short(LEARN), _documents(0.25, 64, 256, questions=4), _documents(0.1, 48, 192))),
    Phase(until=0.75, courses=(*_short(LEARN), _documents(0.15, 128, 512, questions=3), _documents(0.25, 128, 768))),
    Phase(until=1.0, courses=(*_short(SETTLE), _documents(0.75, 512, 4096, working=SETTLE))),
)
"""Several questions at once give many look-ups per token, from which retrieval is learned soonest."""

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


def batches(phase: Phase, chat: ChatML, *, pad: int, batch_tokens: int, seed: int, pool: int = 24) -> Iterator[Batch]:
    """Batches of at most `batch_tokens` padded tokens (or one longer sequence), without end and the same for the same arguments.

    Demonstrations are drawn `pool` batches at a time and sorted by length, so that little is padding; then the batches are shuffled.
    """
    rng = np.random.default_rng(seed)
    streams = [demonstrations(c, resolve(c.env), chat, split="train", seed=seed + 1000 * i) for i, c in enumerate(phase.courses)]
    shares = np.array([c.share for c in phase.courses])
    given = np.zeros(len(streams))
    while True:
        drawn: list[Demonstration] = []
        total = 0
        while total < pool * batch_tokens:
            course = int(np.argmin(given / shares))
            drawn.append(next(streams[course]))
            given[course] += len(drawn[-1])
            total += len(drawn[-1])
        drawn.sort(key=len)
        made = list(_cut(drawn, batch_tokens, pad))
        for i in rng.permutation(len(made)):
            yield made[i]


def _cut(drawn: Iterable[Demonstration], batch_tokens: int, pad: int) -> Iterator[Batch]:
    """`drawn` goes from short to long, so the newest sequence is the width of its batch."""
    rows: list[Demonstration] = []
    for demonstration in drawn:
        if rows and len(demonstration) * (len(rows) + 1) > batch_tokens:
            yield collate(rows, pad)
            rows = []
        rows.append(demonstration)
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
