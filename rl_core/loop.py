"""The asynchronous training loop, whole.

    Mixer --> [free slot?] --> rollout group --> ReplayQueue --> Learner --> publish weights
                   ^                 |  no signal, or broken: filtered                |
                   |                 v                                                |
                   +--------- slots come back: filtered at once, trained ones when ---+
                              every engine has proved that it samples from the new weights

Generation and training overlap; a publication overlaps the next step's gradients. A slot is taken when a group starts and
given back when the weights trained on it are live in every engine. With P groups per step, a window of W and

    B = (max_staleness + 1) * P - (W - 1)  slots,

a group sees at most B - 1 others that were started before it and W - 1 that overtake it trained before its turn, so

    staleness <= (B - 1 + W - 1) // P = max_staleness        (policy versions; tokens sampled later in a group are younger)

max_staleness = 0 leaves P slots: exactly synchronous, on-policy training. P counts fresh groups: with loop.reuse, a batch has others
beside them that trained before and are within the bound still (rl_core/reuse.py).

Proof of arrival. Each engine returns fresh completions sampled entirely under the version it was given. The learner
recomputes their logprobs before the optimizer may replace those weights: no version is left unproved.

Bad steps. A step whose loss or gradient is not finite, or spikes, is not taken: its groups are filtered with the reason, and
others take their place. Several in a row make the newest checkpoint the next version; then, if that does not help, the run stops.
A version made so frees the places of the batch before it like any other, so the bound above holds.

Failure. A rollout that breaks is data: it is tried again, then masked out of its group (rl_core/faults.py). A group without enough
good rollouts is filtered, with a reason; an environment whose groups keep breaking is paused and probed (rl_core/breaker.py). Queue
and learner restart by themselves (rl_core/durable.py), workers in their pool, which takes up their rollouts elsewhere. Anything
else that raises cancels the rest and ends the run with its cause. Every wait has a bound and a sentence. A run that ended early, by
a stop or by a kill, goes on from its ledger and its journal (rl_core/recovery.py): `record.group` has made a group durable before
the ledger calls it ready.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rl_core.bad_steps import BadSteps
from rl_core.breaker import Breaker
from rl_core.config import LoopConfig
from rl_core.faults import broken, unusable
from rl_core.ledger import Ledger, group_id
from rl_core.metrics import StepMetrics
from rl_core.mixer import Mixer
from rl_core.recovery import Unfinished
from rl_core.reuse import Reuse
from rl_core.seams import GroupResult, Learner, Queue, Record, Ref, RolloutWorkers
from rl_core.types import EpisodeSpec, Receipt, Task

T = TypeVar("T")

MAX_LOGPROB_ERROR = 0.02
"""Mean |engine - learner| in nats under the same weights above which the run stops. float32 agrees to 1e-5, bfloat16 to 2e-3;
a wrong recurrent state or a tensor that did not arrive is 0.05 and more."""

MAX_FILTERED_IN_A_ROW = 512
"""Groups filtered one after the other after which the run stops: its tasks are all solved, all impossible, or all broken."""


class RunError(RuntimeError):
    """The run cannot go on. The message is a sentence for its user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The staleness bound, turned into numbers."""

    slots: int
    window: int

    @staticmethod
    def of(cfg: LoopConfig) -> Budget:
        """A window never needs more than max_staleness * P + 1 places: that leaves P slots, one step's worth."""
        window = min(cfg.window, cfg.max_staleness * cfg.fresh_per_step + 1)
        return Budget(slots=(cfg.max_staleness + 1) * cfg.fresh_per_step - (window - 1), window=window)


async def train(
    cfg: LoopConfig,
    *,
    mixer: Mixer,
    specs: dict[str, EpisodeSpec],
    workers: RolloutWorkers,
    queue: Queue,
    learner: Learner,
    ledger: Ledger,
    record: Record,
    weights: Ref,
    version: int,
    stop: asyncio.Event,
    checkpoint_every: int = 0,
    unfinished: Unfinished | None = None,
) -> int:
    """Train from `version` to `cfg.steps`, or until `stop` is set; returns the version that every engine samples from at the end.

    `unfinished` is what an earlier process of this run left to do; `queue` holds it already.
    """
    unfinished = unfinished or Unfinished()
    slots = asyncio.Semaphore(Budget.of(cfg).slots - len(unfinished.queue))
    breaker = Breaker(mixer.streams, now=asyncio.get_running_loop().time, note=record.note)
    arrived = asyncio.Event()
    metrics = StepMetrics(first_version=version, last_version=cfg.steps)
    filtered_in_a_row = itertools.count(1)
    bad_steps = BadSteps(cfg, ledger, record.note)
    reuse = Reuse(cfg, unfinished.reusable)

    async def generate() -> None:
        """Start one group per free slot, for ever."""
        async with asyncio.TaskGroup() as running:
            for ticket, task in unfinished.cut_off.items():
                running.create_task(roll_out(ticket, task))
            while True:
                await slots.acquire()
                task, position = mixer.draw(await breaker.usable(), ledger.pass_over)
                breaker.drawn(task.env)
                ticket = ledger.draw(task, position)
                await queue.start(ticket)
                running.create_task(roll_out(ticket, task))

    async def roll_out(ticket: int, task: Task) -> None:
        """One group, from its task to the queue, or out of the run with a reason."""
        nonlocal filtered_in_a_row
        name = group_id(ticket)
        result = await workers.run_group(name, task, specs[task.env])
        await record.group(result)
        metrics.finished(result)
        if result.history:
            ledger.restart(name, result.history, times=result.attempts - 1)
        ledger.score(name, result.success)
        mixer.scored(task, result)
        breaker.finished(task.env, broken=broken(result))
        if reason := unusable(result):
            ledger.filter(name, reason)
            mixer.filtered(task.env)
            await queue.drop(ticket)
            slots.release()
            if next(filtered_in_a_row) > MAX_FILTERED_IN_A_ROW:
                raise RunError(
                    f"{MAX_FILTERED_IN_A_ROW} groups in a row could not train (last: {task.env!r}, {reason}); see `polyrl ledger latest`"
                )
        else:
            ledger.ready(name)
            filtered_in_a_row = itertools.count(1)
            await queue.put(ticket, result)
        arrived.set()

    async def next_batch() -> list[GroupResult]:
        """Up to P groups within the staleness bound; empty once the run is asked to stop."""
        while not stop.is_set():
            arrived.clear()
            if fresh := await queue.take(cfg.fresh_per_step):
                batch = [*fresh, *reuse.pick(version)]
                check_staleness(batch, version, cfg.max_staleness)
                return batch
            await bounded(arrived.wait(), cfg.stall_s, "no rollout group finished")
        return []

    async def publish(version: int, weights: Ref, trained: Sequence[GroupResult]) -> Sequence[Receipt]:
        """Bring `weights` into every engine without ending its sequences; then groups may start in the places of those trained."""
        receipts = await bounded(workers.load_weights(version, weights), cfg.stall_s, f"version {version} did not reach every engine")
        for _ in trained:
            slots.release()
        return receipts

    async def prove_arrival(receipts: Sequence[Receipt]) -> None:
        """Invariant 3: the engines' logprobs are the learner's, under the weights that both hold now."""
        back = [r for r in workers.revived() if r.version == version]  # under an older one until this version came, it is in `receipts`
        for receipt in (*receipts, *back):
            agreement = await learner.agreement(receipt.probe)
            metrics.proved(receipt, agreement)
            if agreement.mean > MAX_LOGPROB_ERROR or not agreement.mean == agreement.mean:
                raise RunError(
                    f"worker {receipt.worker} does not sample from version {receipt.version}: its logprobs differ from the learner's by "
                    f"{agreement.mean:.3g} nats on average ({agreement.num_tokens} tokens), more than {MAX_LOGPROB_ERROR}"
                )

    async def step_forward(publishing: asyncio.Task[Sequence[Receipt]]) -> asyncio.Task[Sequence[Receipt]] | None:
        """One batch; returns the publication of what it made, or None when the run was asked to stop."""
        nonlocal version
        began = time.monotonic()
        batch = await next_batch()
        if not batch:
            return None
        waited = time.monotonic() - began
        await bounded(learner.accumulate([g.ref for g in batch]), cfg.stall_s, "the learner's gradients took too long")
        await prove_arrival(await publishing)
        stats, weights = await bounded(learner.apply(), cfg.stall_s, "the optimizer step took too long")
        fresh, again = [g for g in batch if not g.uses], [g for g in batch if g.uses]
        if stats.skipped:
            metrics.skipped()
            for group in fresh:
                mixer.filtered(group.env)
            if not bad_steps.bad(fresh, version, stats.skipped):
                for _ in fresh:
                    slots.release()
                return publishing
            stats, weights = await bounded(learner.roll_back(version + 1), cfg.stall_s, "the return to a checkpoint took too long")
        else:
            bad_steps.good()
            ledger.train([g.group_id for g in fresh], stats.version, [g.group_id for g in again])
            reuse.trained(batch)
            for group in batch:
                (mixer.reused if group.uses else mixer.trained)(group.env)
        version = stats.version
        published = loop.create_task(publish(version, weights, fresh))
        await record.step(version, version, metrics.close_step(stats, batch, mixer, waited, time.monotonic() - began))
        if checkpoint_every and version % checkpoint_every == 0 and version < cfg.steps:
            await learner.save()
        return published

    async with asyncio.TaskGroup() as loop:
        publishing: asyncio.Task[Sequence[Receipt]] = loop.create_task(publish(version, weights, []))
        await asyncio.wait({publishing})  # no group starts under weights that are older than the learner's
        generation = loop.create_task(generate())
        while version < cfg.steps:
            published = await step_forward(publishing)
            if published is None:
                break
            publishing = published
        await prove_arrival(await publishing)
        generation.cancel()
    if not stop.is_set():
        ledger.abandon_open("the run ended")
    return version


def check_staleness(batch: Sequence[GroupResult], version: int, max_staleness: int) -> None:
    """Invariant 2, asserted when a batch is sealed. The admission rule above makes this impossible, so it is a bug, not bad luck."""
    for group in batch:
        oldest = version if group.min_version is None else group.min_version
        if version - oldest > max_staleness:
            raise RunError(
                f"group {group.group_id} ({group.env}) was sampled by version {oldest} and would train version {version}: "
                f"staleness bound {max_staleness} is broken"
            )


async def bounded(work: Awaitable[T], seconds: float, sentence: str) -> T:
    """Await `work`, but no longer than `seconds`."""
    try:
        async with asyncio.timeout(seconds):  # and not wait_for, which can lose a cancellation in Python 3.11
            return await work
    except TimeoutError as error:
        raise RunError(f"{sentence} (waited {seconds:.0f} s; loop.stall_s)") from error
