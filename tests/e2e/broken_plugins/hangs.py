"""Waits for ever in a step, in C, where no exception reaches it."""

import time

from base import Parity

from environments.base import Turn, Verdict


class Env(Parity):
    id = "hangs"

    def act(self, turn: Turn) -> Verdict:
        time.sleep(3600)
        raise AssertionError("not reached")
