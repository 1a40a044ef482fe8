"""Keeps 300 MB of each episode."""

from base import Parity

from environments.base import Observation, Turn, Verdict

KEPT: list[bytes] = []


class Env(Parity):
    id = "leaks"

    def act(self, turn: Turn) -> Observation | Verdict:
        KEPT.append(b"x" * (300 << 20))
        return super().act(turn)
