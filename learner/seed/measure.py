"""How good is the seed policy? Exact probabilities of the oracle's two answers, instead of noisy samples.

At temperature 1, the probability that the policy says exactly what the oracle says is the product of its token
probabilities. A task is passed at least as often as the policy gives the oracle's working answer or its direct one:

    pass rate  >=  P(working answer) + P(direct answer)

One forward pass per style replaces hundreds of samples. Other right answers (another right program, say) are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from environments.registry import resolve
from learner.model import PolicyModel
from learner.seed.curriculum import collate
from learner.seed.demonstrations import Course, Demonstration, demonstrations
from rl_core.chat import ChatML


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Means over held-out tasks, at temperature 1."""

    env: str
    tasks: int
    pass_rate: float  # a lower bound
    works: float  # probability that the policy starts as the working oracle does
    working_right: float  # P(right | it works the task out)
    direct_right: float  # P(right | it answers at once)
    mtp: float  # share of the tokens after the next that the MTP head's most likely guess gets right

    def __str__(self) -> str:
        return (
            f"{self.env:13s} pass {self.pass_rate:5.1%}   works it out {self.works:5.1%}, then right {self.working_right:5.1%}; "
            f"direct right {self.direct_right:5.1%}   MTP {self.mtp:5.1%}   ({self.tasks} tasks)"
        )


@torch.no_grad()
def measure(model: PolicyModel, course: Course, chat: ChatML, *, tasks: int, seed: int = 99, batch_tokens: int = 16_384) -> Measured:
    """Probabilities of the oracle's answers to `tasks` held-out tasks. Tools never fail here, so that both styles are one line each."""
    options = dict(course.options)
    if course.env == "tools":
        options["failure_rate"] = 0.0
    course = replace(course, options=options)
    totals: dict[bool, list[float]] = {}
    firsts: dict[bool, list[float]] = {}
    hits = guesses = 0
    for working in (True, False):
        stream = demonstrations(course, resolve(course.env), chat, split="eval", seed=seed, working=float(working))
        rows = [next(stream) for _ in range(tasks)]
        totals[working], firsts[working] = [0.0] * tasks, [0.0] * tasks
        order = sorted(range(tasks), key=lambda i: len(rows[i]))
        while order:
            width = len(rows[order[-1]])
            take, order = order[-max(1, batch_tokens // width) :], order[: -max(1, batch_tokens // width)]
            batch = collate([rows[i] for i in take], pad=0)
            logprobs, right, mask = _score(model, torch.from_numpy(batch.token_ids), torch.from_numpy(batch.loss_mask))
            if working:
                hits, guesses = hits + int(right.sum()), guesses + int(mask.sum())
            for row, i in zip(logprobs, take, strict=True):
                totals[working][i] = float(row.sum().exp())
                firsts[working][i] = float(row[_first_sampled(rows[i]) - 1].exp())
    works = sum(firsts[True]) / tasks
    passes = {style: sum(values) / tasks for style, values in totals.items()}
    return Measured(
        env=course.env,
        tasks=tasks,
        pass_rate=passes[True] + passes[False],
        works=works,
        working_right=passes[True] / max(works, 1e-9),
        direct_right=passes[False] / max(1 - works, 1e-9),
        mtp=hits / max(guesses, 1),
    )


def _first_sampled(row: Demonstration) -> int:
    return int(row.loss_mask.argmax())


def _score(model: PolicyModel, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masked logprobs [B, L-1] of ids[:, 1:]; where the MTP head's guess is right [N]; the mask of its targets [B, L-2]."""
    hidden = model(ids)
    logprobs, _ = model.token_logprobs(hidden[:, :-1], ids[:, 1:])
    ahead = mask[:, 2:]
    guess = model.logits(model.mtp_hidden(hidden, ids)[:, :-1][ahead]).argmax(-1)
    return logprobs * mask[:, 1:], guess == ids[:, 2:][ahead], ahead
