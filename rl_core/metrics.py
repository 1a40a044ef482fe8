"""What one step reports: the figures of the groups that finished since the last step, of the batch, and of the publication."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from rl_core.mixer import Mixer
from rl_core.seams import GroupResult
from rl_core.types import Agreement, Receipt, StepStats, add_positions


class StepMetrics:
    """Collects between two steps; `close_step` returns the figures and starts anew."""

    def __init__(self, *, first_version: int, last_version: int) -> None:
        self._first, self._last = first_version, last_version
        self._started = self._step_began = time.monotonic()
        self._finished: dict[str, list[GroupResult]] = defaultdict(list)
        self._receipts: list[tuple[Receipt, Agreement]] = []
        self._skipped = 0

    def finished(self, result: GroupResult) -> None:
        """A group came back, whatever becomes of it."""
        self._finished[result.env].append(result)

    def skipped(self) -> None:
        """A step was bad, and not taken."""
        self._skipped += 1

    def proved(self, receipt: Receipt, agreement: Agreement) -> None:
        """An engine proved that it has the weights."""
        self._receipts.append((receipt, agreement))

    def close_step(self, stats: StepStats, batch: Sequence[GroupResult], mixer: Mixer, waited_s: float, step_s: float) -> dict[str, float]:
        """All figures of the step that made `stats.version`."""
        now = time.monotonic()
        seconds = max(now - self._step_began, 1e-9)
        figures = dict(stats.metrics)
        for env, groups in self._finished.items():
            figures |= {f"env/{env}/{name}": value for name, value in group_figures(groups, seconds).items()}
        for env, stream in mixer.streams.items():
            figures[f"env/{env}/groups_trained"] = stream.trained
            figures[f"env/{env}/groups_filtered"] = stream.filtered
            figures[f"env/{env}/share"] = mixer.trained_share(env)
            if stream.curriculum is not None:
                figures |= {f"env/{env}/{name}": value for name, value in stream.curriculum.figures().items()}
        if self._receipts:
            figures["sync/pause_ms"] = 1e3 * max(r.pause_s for r, _ in self._receipts)
            figures["sync/stage_ms"] = 1e3 * max(r.stage_s for r, _ in self._receipts)
            figures["sync/tensors_checked"] = float(min(len(r.checksums) for r, _ in self._receipts))
            figures["sync/bytes"] = float(max(r.num_bytes for r, _ in self._receipts))
            figures["sync/logprob_error_mean"] = max(a.mean for _, a in self._receipts)
            figures["sync/logprob_error_max"] = max(a.max for _, a in self._receipts)
            figures["sync/logprob_tokens"] = float(sum(a.num_tokens for _, a in self._receipts))
        done, elapsed = stats.version - self._first, now - self._started
        figures |= {
            "step/seconds": step_s,
            "step/waited_s": waited_s,  # the learner had nothing to train on
            "progress/step": float(stats.version),
            "progress/steps": float(self._last),
            "progress/elapsed_s": elapsed,
            "progress/eta_s": elapsed / max(done, 1) * (self._last - stats.version),
            "learner/skipped_steps": float(self._skipped),
            "queue/in_flight": float(sum(s.running for s in mixer.streams.values())),
            "rollout/tokens_per_s": sum(g.sampled_tokens for groups in self._finished.values() for g in groups) / seconds,
        }
        self._finished.clear()
        self._receipts.clear()
        self._skipped = 0
        self._step_began = now
        return figures


def group_figures(groups: Sequence[GroupResult], seconds: float) -> dict[str, float]:
    """Figures of one environment's groups that finished within `seconds`."""
    rewards = [r for g in groups for r in g.rewards]
    sampled = sum(g.sampled_tokens for g in groups)
    drafted, steps = sum(g.drafted for g in groups), sum(g.engine_steps for g in groups)
    rollouts = sum(len(g.statuses) for g in groups)
    figures = {
        "groups_finished": float(len(groups)),
        "tokens_per_s": sampled / seconds,
        "sampled_tokens_per_rollout": sampled / max(rollouts, 1),
        "prompt_tokens_per_rollout": sum(g.prompt_tokens for g in groups) / max(rollouts, 1),
        "thinking_tokens": sum(g.thinking_tokens for g in groups) / max(rollouts, 1),
        "thoughts_closed": sum(g.thoughts_closed for g in groups) / max(rollouts, 1),
        "group_seconds": sum(g.seconds for g in groups) / len(groups),
        "signal_share": sum(g.has_signal for g in groups) / len(groups),
        "masked_rollouts": float(rollouts - len(rewards)),
        "continued_rollouts": float(sum(g.continued for g in groups)),
    }
    if sampled:
        figures["state_age_mean"] = sum(g.state_age_sum for g in groups) / sampled
        figures["state_age_max"] = float(max(g.state_age_max for g in groups))
    if rewards:
        figures["reward"] = sum(rewards) / len(rewards)
        figures["pass_rate"] = sum(r >= 1.0 for r in rewards) / len(rewards)
    for name in {name for g in groups for name in g.components}:
        values = [g.components[name] for g in groups if name in g.components]
        figures[f"component/{name}"] = sum(values) / len(values)
    if drafted:
        figures["mtp_acceptance"] = sum(g.accepted for g in groups) / drafted
        figures["mtp_drafts_per_step"] = drafted / steps
        for position, (proposed, accepted) in enumerate(add_positions([g.positions for g in groups]), 1):
            if proposed:
                figures[f"mtp_acceptance/{position}"] = accepted / proposed
    if steps:
        figures["tokens_per_engine_step"] = sampled / steps
    return figures
