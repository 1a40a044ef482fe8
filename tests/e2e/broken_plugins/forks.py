"""Starts processes without end, each of which stays."""

import os
import time

from base import Parity

from environments.base import Turn, Verdict


class Env(Parity):
    id = "forks"

    def act(self, turn: Turn) -> Verdict:
        while True:
            if os.fork() == 0:
                time.sleep(600)
                os._exit(0)
