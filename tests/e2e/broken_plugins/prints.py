"""Prints a gigabyte in its first episode, and a megabyte in each one after."""

import sys

from base import Parity

from environments.base import Observation, Turn, Verdict

LINE = "all work and no play makes a dull log\n" * 27_600  # a megabyte
megabytes = 1024


class Env(Parity):
    id = "prints"

    def act(self, turn: Turn) -> Observation | Verdict:
        global megabytes
        count, megabytes = megabytes, 1
        for _ in range(count):
            sys.stdout.write(LINE)
        return super().act(turn)
