"""How soon `polyrl audit` names a scripted cheat, and how often it blames honest runs. Whole runs, as in tests/unit/scripted.py.

named_after_CHEAT      rollouts (in steps of 16) after which the audit of the run so far first names the cheated environment
missed_in_200          cheating runs that were not named within 200 rollouts
alarms_in_honest_runs  alarms raised by honest runs of 200 rollouts over the built-in environments, learning from 0.3 to 0.9
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from infra.audit import audit
from rl_core.run_store import StoredRun
from tests.unit.cheats import CHEATS
from tests.unit.scripted import honest, scripted_config, scripted_run
from tests.unit.test_audit import BUILT_INS, audited, run_cheat

SEEDS = range(3)
STEP = 16
MOST = 200


def bench() -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {"missed_in_200": [], "alarms_in_honest_runs": []}
    with tempfile.TemporaryDirectory(prefix="polyrl-audit-") as folder:
        for seed in SEEDS:
            for cheat in CHEATS:
                named = named_after(run_cheat(Path(folder) / f"{seed} {cheat.name}", cheat, most=MOST, seed=seed))
                figures["missed_in_200"].append(float(named is None))
                if named is not None:
                    figures.setdefault(f"named_after_{cheat.name.replace(' ', '_')}", []).append(named)
            config = scripted_config(Path(folder) / f"{seed} honest", BUILT_INS, audit={"honeypots": 0.1}, eval={"tasks": 24}, seed=seed)
            figures["alarms_in_honest_runs"].append(
                float(len(audit(scripted_run(config, honest(0.3, 0.9), wrap=audited), sample=80).alarms))
            )
    return figures


def named_after(run: StoredRun) -> float | None:
    """Rollouts until the cheated environment is the first suspect, with an alarm; None if it never is."""
    for first in range(STEP, MOST + 1, STEP):
        report = audit(run, first=first, sample=60)
        if report.alarms and report.suspects[0].env == "cheated":
            return float(first)
    return None
