"""Draws one task, so that a run starts, and fails in the run's own process from then on."""

import random
from collections.abc import Mapping
from typing import Any

from base import Parity

from environments.base import TaskDraft

drawn = 0


class Env(Parity):
    id = "cannot_draw"

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        global drawn
        drawn += 1
        if drawn > 1:
            raise KeyError("row 17 has no answer")
        return super().make_task(rng, options)
