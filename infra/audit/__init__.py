"""`polyrl audit`: was the reward of a stored run earned?

StoredRun --> rows --+--> detectors ----------------------+--> findings --> suspects, ranked
                     +--> a sample, re-scored (replayed) --+
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from infra.audit.detectors import Evidence, detect
from infra.audit.findings import Finding, Report, Rescored, Severity, Suspect, rank
from infra.audit.rescore import Outcome, Replay, Rescorer, choose
from infra.audit.rows import HELD_OUT, Row, read_rows
from rl_core.config_files import load_config
from rl_core.run_store import StoredRun

DISAGREEMENT_SHARE = 0.1
"""Share of paid rollouts of the sample that the second opinion calls wrong from which on it is an alarm."""

LENGTH_TASKS = 24


def audit(run: StoredRun, *, sample: int = 200, first: int = 0) -> Report:
    """Audit a stored run. `sample` rollouts are re-scored, spread over its environments; `first` looks only at so many rollouts."""
    config = load_config(run.run_dir / "config.yaml")
    rows = read_rows(run, first=first)
    envs = [name for name in config.environments if any(r.env == name for r in rows)]
    rescorer = Rescorer(config)
    findings: list[Finding] = []
    rescored: dict[str, Rescored] = {}
    for env in envs:
        mine = [r for r in rows if r.env == env]
        findings += detect(evidence(rescorer, env, mine))
        chosen = choose(mine, max(1, sample // len(envs)) if sample else 0, random.Random(f"audit {run.id} {env}"))
        replays = [rescorer.replay(row) for row in chosen]
        rescored[env] = count(replays)
        findings += judge_replays(env, replays)
    return Report(
        run=run.id,
        rollouts=sum(r.label not in HELD_OUT for r in rows),
        held_out=sum(r.label in HELD_OUT for r in rows),
        rescorable=not rows or any(r.task is not None for r in rows),
        rescored=rescored,
        suspects=rank(findings),
    )


def evidence(rescorer: Rescorer, env: str, rows: Sequence[Row]) -> Evidence:
    """What the detectors get to see of one environment."""
    with_task = [r for r in rows if r.task is not None and r.label == "train"][:LENGTH_TASKS]
    return Evidence(
        env=env,
        rows=rows,
        runs_programs=rescorer.env_class(env).needs_sandbox,
        honest_length=rescorer.honest_length(env, with_task),
    )


def count(replays: Sequence[Replay]) -> Rescored:
    outcomes = [r.outcome for r in replays]
    opinions = [r.second_opinion for r in replays if r.second_opinion is not None]
    return Rescored(
        tried=len(replays), same=outcomes.count(Outcome.SAME), different=outcomes.count(Outcome.DIFFERENT),
        timing=outcomes.count(Outcome.TIMING), impossible=outcomes.count(Outcome.IMPOSSIBLE),
        second_opinions=len(opinions), disagreements=opinions.count(False),
    )  # fmt: skip


def judge_replays(env: str, replays: Sequence[Replay]) -> Iterator[Finding]:
    """Verifier disagreement, with itself and with the second opinion."""
    different = [r for r in replays if r.outcome is Outcome.DIFFERENT]
    if different:
        sentence = (
            f"{len(different)} of {len(replays)} rollouts do not re-score to their stored verdict; the first: {different[0].difference}"
        )
        yield _finding("re-scoring", env, Severity.ALARM, 0.5 + len(different) / len(replays) / 2, sentence, different)
    failed = [r for r in replays if r.outcome is Outcome.IMPOSSIBLE]
    if failed:
        sentence = f"{len(failed)} of {len(replays)} rollouts could not be re-scored; the first: {failed[0].difference}"
        yield _finding("re-scoring", env, Severity.NOTE, len(failed) / len(replays), sentence, failed)
    asked = [r for r in replays if r.second_opinion is not None]
    wrong = [r for r in asked if r.second_opinion is False]
    if wrong:
        share = len(wrong) / len(asked)
        severity = Severity.ALARM if share >= DISAGREEMENT_SHARE and len(wrong) > 1 else Severity.NOTE
        sentence = f"a second, differently built verifier calls {len(wrong)} of {len(asked)} paid rollouts wrong"
        yield _finding("second opinion", env, severity, 0.5 + share / 2, sentence, wrong)


def _finding(detector: str, env: str, severity: Severity, strength: float, sentence: str, replays: Sequence[Replay]) -> Finding:
    return Finding(
        detector=detector, env=env, severity=severity, strength=min(strength, 0.999), sentence=sentence,
        rollouts=tuple(r.row.rollout_id for r in replays), answers=frozenset(r.row.said for r in replays if severity is Severity.ALARM),
    )  # fmt: skip


__all__ = ["Evidence", "Finding", "Report", "Severity", "Suspect", "audit", "detect"]
