"""The audit while a run goes: honeypots among its tasks, and a gate that acts on alarms.

    loop --run_group--> AuditedWorkers --run_group--> engines
                           |    \\--now and then--> a honeypot group: stored, looked at, never handed to the loop
                           +--> Gate: the environment's latest rollouts --> alarms --> note, penalty, quarantine or stop

Honeypots are measurements, as held-out tasks are: they have no ticket in the ledger and no way into the replay queue.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from environments.registry import resolve
from infra.audit.detectors import Evidence, detect
from infra.audit.findings import Finding, Severity
from infra.audit.rows import PENALTY, Row
from rl_core.config import RunConfig
from rl_core.loop import RunError
from rl_core.seams import GroupResult, Ref, RolloutWorkers
from rl_core.types import EpisodeSpec, Group, Receipt, Rollout, Status, Task, Verdict

WINDOW = 512
"""Latest rollouts of an environment that the gate looks at. An environment that has become honest leaves its past behind."""


class Gate:
    """Knows which environments are under suspicion now. Thread-safe: to look takes longer than the loop should wait."""

    def __init__(self, config: RunConfig) -> None:
        self._every = config.audit.every
        self._runs_programs = {name: resolve(env.id or name).needs_sandbox for name, env in config.environments.items()}
        self._rows: dict[str, deque[Row]] = {name: deque(maxlen=WINDOW) for name in config.environments}
        self._since_look = dict.fromkeys(config.environments, 0)
        self._lock = threading.Lock()
        self.alarms: dict[str, list[Finding]] = {name: [] for name in config.environments}

    def see(self, group: Group, label: str) -> list[str]:
        """A group finished: what there is to say about it. Looks every `audit.every` rollouts, and at once when a honeypot was paid."""
        env = group.task.env
        rows = [Row.of(group, rollout, label) for rollout in group.rollouts]
        with self._lock:
            self._rows[env].extend(rows)
            self._since_look[env] += len(rows)
            if self._since_look[env] >= self._every or (label == "honeypot" and any(r.paid for r in rows)):
                self._since_look[env] = 0
                return self._look(env)
        return []

    def _look(self, env: str) -> list[str]:
        seen = Evidence(env=env, rows=list(self._rows[env]), runs_programs=self._runs_programs[env])
        alarms = [f for f in detect(seen) if f.severity is Severity.ALARM]
        known = {f.detector for f in self.alarms[env]}
        self.alarms[env] = alarms
        if known and not alarms:
            return [f"audit: {env} raises no alarm any more"]
        return [f"audit: {env} is suspect ({f.detector}): {f.sentence}" for f in alarms if f.detector not in known]


class AuditedWorkers:
    """Implements `rl_core.seams.RolloutWorkers` around another."""

    def __init__(
        self,
        workers: RolloutWorkers,
        config: RunConfig,
        *,
        fetch: Callable[[Ref], Awaitable[Group]],
        own: Callable[[Group], Ref],
        keep: Callable[[GroupResult, str], Awaitable[None]],
        note: Callable[[str], None],
    ) -> None:
        """`fetch` and `own` are the two ways between a group and its reference; `keep` stores a honeypot's group."""
        self._workers, self._config = workers, config
        self._fetch, self._own, self._keep = fetch, own, keep
        self._note = note
        self.gate = Gate(config)
        self._due = dict.fromkeys(config.environments, 0.0)  # honeypot groups that are owed; one count for all would favour some

    async def run_group(self, group_id: str, task: Task, spec: EpisodeSpec) -> GroupResult:
        """As the workers do; a honeypot may run beside it, and a suspect environment's groups come back treated."""
        pot = self._honeypot(task)
        if pot is None:
            result = await self._workers.run_group(group_id, task, spec)
        else:
            result, _ = await asyncio.gather(self._workers.run_group(group_id, task, spec), self._try(f"{group_id}-pot", pot, spec))
        if self._config.audit.gate == "off":
            return result
        group = await self._fetch(result.ref)
        await self._look(group, "train")
        return self._treat(result, group)

    async def load_weights(self, version: int, weights: Ref) -> Sequence[Receipt]:
        return await self._workers.load_weights(version, weights)

    def revived(self) -> Sequence[Receipt]:
        return self._workers.revived()

    def _honeypot(self, task: Task) -> Task | None:
        """The honeypot that is due with this task, in the same words; None if none is due, or its environment has none."""
        self._due[task.env] += self._config.audit.honeypots
        if self._due[task.env] < 1:
            return None
        self._due[task.env] -= 1
        env = self._config.environments[task.env]
        return resolve(env.id or task.env).honeypot(task, random.Random(f"honeypot {task.key}"))

    async def _try(self, group_id: str, pot: Task, spec: EpisodeSpec) -> None:
        result = await self._workers.run_group(group_id, pot, spec)
        await self._keep(result, "honeypot")
        await self._look(await self._fetch(result.ref), "honeypot")

    async def _look(self, group: Group, label: str) -> None:
        for sentence in await asyncio.to_thread(self.gate.see, group, label):
            self._note(sentence)

    def _treat(self, result: GroupResult, group: Group) -> GroupResult:
        """What the loop gets of a group of a suspect environment."""
        alarms = self.gate.alarms[group.task.env]
        action = self._config.audit.gate
        if not alarms or action == "note":
            return result
        if action == "stop":
            raise RunError(f"audit.gate=stop: {group.task.env} is suspect ({alarms[0].detector}): {alarms[0].sentence}; see `polyrl audit`")
        treated = penalised(group, alarms) if action == "penalty" else masked(group, alarms)
        return result if treated is group else result.treated(treated, self._own(treated))


def penalised(group: Group, alarms: Sequence[Finding]) -> Group:
    """Answers that an alarm names earn nothing. Where none of those comes again, cheats cannot be told from work: the group is masked."""
    named = frozenset(answer for f in alarms for answer in f.answers)
    suspect = [Row.of(group, rollout, "train").said in named for rollout in group.rollouts]
    if any(suspect):
        rollouts = tuple(_penalty(r, alarms[0]) if s else r for r, s in zip(group.rollouts, suspect, strict=True))
        return replace(group, rollouts=rollouts)
    return group if any(f.detector == "reused answers" for f in alarms) else masked(group, alarms)


def masked(group: Group, alarms: Sequence[Finding]) -> Group:
    """No rollout trains. Three such groups in a row open the environment's breaker, which leaves it alone and probes it later."""
    verdicts = (
        Verdict(
            status=Status.HACK_SUSPECTED, reward=None, components=r.verdict.components, verifier_version=r.verdict.verifier_version,
            evidence={**r.verdict.evidence, "audit": alarms[0].sentence}, latency_s=r.verdict.latency_s,
        )
        for r in group.rollouts
    )  # fmt: skip
    return replace(group, rollouts=tuple(replace(r, verdict=v) for r, v in zip(group.rollouts, verdicts, strict=True)))


def _penalty(rollout: Rollout, alarm: Finding) -> Rollout:
    verdict = rollout.verdict
    if verdict.reward is None:
        return rollout
    components = {**verdict.components, PENALTY: verdict.reward}
    evidence = {**verdict.evidence, "audit": alarm.sentence}
    return replace(rollout, verdict=replace(verdict, reward=0.0, components=components, evidence=evidence))
