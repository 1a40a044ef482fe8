"""The circuit breaker: an environment that breaks is left alone for a while, then tried with one group (Nygard, "Release It!").

    closed --[BROKEN_IN_A_ROW broken groups]--> open --[pause]--> probing --[one good group]--> closed
                                                 ^                   |
                                                 +--[broken: twice the pause]

Broken is what says nothing about the policy: hosts, sandboxes, verifiers. The other environments go on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

BROKEN_IN_A_ROW = 3
FIRST_PAUSE_S = 10.0
LONGEST_PAUSE_S = 600.0

HOPELESS_PROBES = 6
"""Failed probes of every environment at once, after about ten minutes, that end the run."""


class AllBroken(RuntimeError):
    """No environment works any more. The message is a sentence for the run's user."""


@dataclass(slots=True)
class Circuit:
    """One environment's state."""

    broken: int = 0  # groups in a row
    failed_probes: int = 0
    open_until: float = 0.0
    """0: closed, groups flow. Else the time at which one may probe."""
    probing: bool = False
    reason: str = ""


class Breaker:
    """Asked before each draw, told after each group."""

    def __init__(self, envs: Iterable[str], *, now: Callable[[], float], note: Callable[[str], None] = lambda text: None) -> None:
        self.circuits = {env: Circuit() for env in envs}
        self._now, self._note = now, note

    async def usable(self) -> set[str]:
        """Environments that may be drawn from; waits while there is none."""
        while not (names := {env for env, circuit in self.circuits.items() if self._may(circuit)}):
            if all(c.failed_probes >= HOPELESS_PROBES for c in self.circuits.values()):
                reasons = "; ".join(f"{env}: {c.reason}" for env, c in self.circuits.items())
                raise AllBroken(f"no environment works any more: {reasons}")
            due = [c.open_until for c in self.circuits.values() if not c.probing]
            await asyncio.sleep(max(0.05, min(due) - self._now()) if due else 1.0)
        return names

    def drawn(self, env: str) -> None:
        """A group of `env` starts."""
        circuit = self.circuits[env]
        circuit.probing = circuit.probing or circuit.open_until > 0

    def finished(self, env: str, broken: str = "") -> None:
        """A group of `env` came back; `broken` says how it broke, "" that it did not."""
        circuit = self.circuits[env]
        if not broken:
            if circuit.open_until:
                self._note(f"{env} works again")
            self.circuits[env] = Circuit()
            return
        circuit.broken += 1
        circuit.reason = broken
        if circuit.probing:
            circuit.failed_probes += 1
        elif circuit.open_until or circuit.broken < BROKEN_IN_A_ROW:
            return  # a straggler of before, or not enough yet
        pause = min(FIRST_PAUSE_S * 2**circuit.failed_probes, LONGEST_PAUSE_S)
        circuit.probing, circuit.open_until = False, self._now() + pause
        self._note(f"{env} is broken, {circuit.broken} groups in a row ({broken}); the next try is in {pause:.0f} s, the others go on")

    def _may(self, circuit: Circuit) -> bool:
        return not circuit.probing and self._now() >= circuit.open_until
