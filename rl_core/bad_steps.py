"""Steps that were not taken, and what follows from several in a row.

    bad step --> its groups are filtered, others take their place --[bad_steps in a row]--> the newest checkpoint is the next version
                                                                                              --[max_rollbacks of these]--> the run stops

What is bad is the learner's judgement (`StepStats.skipped`). A skipped step makes no version: weights, optimizer and the engines stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rl_core.config import LoopConfig
from rl_core.ledger import Ledger
from rl_core.seams import GroupResult


class TooManyBadSteps(RuntimeError):
    """Going back did not help. The message is a sentence for the run's user."""


class BadSteps:
    """Counts them. Told of each step; rollbacks are counted in the ledger, over all lives of the run."""

    def __init__(self, cfg: LoopConfig, ledger: Ledger, note: Callable[[str], None]) -> None:
        self._cfg, self._ledger, self._note = cfg, ledger, note
        self._in_a_row = 0

    def good(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def bad(self, fresh: Sequence[GroupResult], version: int, reason: str) -> bool:
        """The step after `version`, over the groups `fresh`, was skipped. Returns whether to go back to a checkpoint now."""
        self._ledger.skip([group.group_id for group in fresh], f"bad step: {reason.split(' is ')[0]}")
        self._note(f"the step after version {version} is skipped: {reason}")
        self._in_a_row += 1
        if self._in_a_row < self._cfg.bad_steps:
            return False
        sentence = f"{self._in_a_row} steps in a row were bad (the last: {reason})"
        if len(self._ledger.rollbacks) >= self._cfg.max_rollbacks:
            raise TooManyBadSteps(
                f"{sentence}, after {self._cfg.max_rollbacks} returns to a checkpoint; "
                f"lower learner.learning_rate, or look for what is wrong with the rewards"
            )
        self._note(f"{sentence}: weights and optimizer of the newest checkpoint become version {version + 1}")
        self._ledger.roll_back(version + 1, reason)
        self._in_a_row = 0
        return True
