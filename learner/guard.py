"""Which steps are not taken: their loss or gradient is not finite, or the gradient is far above what it was lately.

    norm > factor * median(last HISTORY norms)          judged for the policy and for the MTP head, each by its own history

A GRPO loss is zero on average whatever happens, so a spike is looked for in the gradient: it shows there, and it is what would harm.
Norms clip a spike's length, not its direction: one batch of garbage still turns AdamW's moments. In the main job the
largest norm is 2.8 times the median before it; a factor of 10 leaves healthy runs alone.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median

HISTORY = 32
"""Steps that the median is over: long enough to be steady, short enough to follow a run whose gradients grow slowly."""

ENOUGH = 8
"""Steps below which there is nothing to compare with. The first ones warm up, and are often large."""


class Guard:
    """Judges steps before they are taken; remembers the norms of those that were."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._taken: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY))

    def judge(self, loss: float, norms: Mapping[str, float], *, spikes: bool = True) -> str:
        """Why the step must not be taken, or "" if it may. `spikes=False` asks for finite numbers alone."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        for name, norm in norms.items():
            if not math.isfinite(norm):
                return f"the gradient of the {name} is {norm}"
            taken = self._taken[name]
            if spikes and self._factor and len(taken) >= ENOUGH and norm > self._factor * median(taken):
                times = norm / median(taken)
                return f"the gradient of the {name} is {norm:.3g}, {times:.0f} times the median of the last {len(taken)} steps"
        return ""

    def taken(self, norms: Mapping[str, float]) -> None:
        """The step was taken."""
        for name, norm in norms.items():
            self._taken[name].append(norm)

    def state(self) -> dict[str, list[float]]:
        """For the checkpoint: a resumed run judges as the old one would have."""
        return {name: list(norms) for name, norms in self._taken.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        self._taken.clear()
        for name, norms in state.items():
            self._taken[name].extend(norms)
