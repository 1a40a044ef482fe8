"""Asynchronous against synchronous, for settings whose latencies were published, beside the speed-ups that were published with them.

What was published fixes the learner's time per step, in both modes, and the time of generation in the synchronous one; the engines'
speed is fitted to the latter. What was not published is how long the responses were: so each setting is simulated with a mean of
a quarter of the limit and three spreads. The asynchronous run is then a prediction, with nothing left to fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from infra.simulation.planner import EnvPlan, Forecast, Plan, forecast
from rl_core.config import LoopConfig

SPREADS = (0.4, 0.8, 1.2)
"""Standard deviation of the logarithm of a response's length; with 0.8, the longest of a thousand is about ten times the median."""

SCALE = 16
"""One simulated engine and one simulated group stand for so many."""

STEPS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One row of verl's table: Qwen2.5-Math-7B, DAPO, 512 prompts of 16 responses of at most 28k tokens, H20 GPUs."""

    gpus: int  # synchronous: all do both; asynchronous: half generate, half train
    step_s: float  # synchronous, of which
    generation_s: float
    training_s: float  # old log-probs and update; the rest of the step is taken to be the transfer of weights
    asynchronous_training_s: float
    asynchronous_step_s: float

    @property
    def speed_up(self) -> float:
        return self.step_s / self.asynchronous_step_s


SOURCE = "https://github.com/volcengine/verl/blob/main/docs/advance/fully_async.md (table of the 7B model)"

VERL = tuple(
    Published(gpus=gpus, step_s=step, generation_s=gen, training_s=training, asynchronous_training_s=update, asynchronous_step_s=other)
    for gpus, step, gen, training, update, other in (
        (32, 790.10, 357.41, 107.71 + 313.81, 269.80, 294.77),
        (64, 365.28, 150.72, 70.26 + 133.41, 156.98, 189.26),
        (128, 356.30, 177.85, 53.92 + 113.81, 113.16, 150.63),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One published setting, simulated with one spread."""

    published: Published
    spread: float
    synchronous: Forecast
    asynchronous: dict[int, Forecast]  # by max_staleness

    def speed_up(self, max_staleness: int) -> float:
        return self.synchronous.step_s / self.asynchronous[max_staleness].step_s


def compare(published: Published, spread: float, staleness: tuple[int, ...] = (1, 2, 4)) -> Comparison:
    """Fit the engines to the synchronous run, then predict the asynchronous one."""
    env = EnvPlan(group_size=16, mean_tokens=7_000, spread=spread, max_tokens=28_000, signal=1.0)
    rest = published.step_s - published.generation_s - published.training_s
    together = Plan(
        loop=LoopConfig(steps=STEPS, groups_per_step=512 // SCALE, max_staleness=0, window=4), environments={"math": env},
        workers=published.gpus // SCALE, max_sequences=256, base_s=0.01, per_sequence_s=0.01 / 64,
        learner_step_s=published.training_s, publish_s=rest,
    )  # fmt: skip
    trial = forecast(together).step_s - published.training_s - rest
    factor = published.generation_s / trial  # generation is linear in the engines' speed
    together = replace(together, base_s=together.base_s * factor, per_sequence_s=together.per_sequence_s * factor)
    apart = replace(together, workers=together.workers // 2, learner_step_s=published.asynchronous_training_s)
    return Comparison(
        published=published,
        spread=spread,
        synchronous=forecast(together),
        asynchronous={s: forecast(replace(apart, loop=replace(apart.loop, max_staleness=s))) for s in staleness},
    )


def table() -> Iterator[str]:
    """A Markdown table, row by row."""
    yield "| GPUs | spread | sync step | max_staleness | step | mean staleness | engines idle | learner idle | speed-up | published |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for published in VERL:
        for spread in SPREADS:
            comparison = compare(published, spread)
            for staleness, f in comparison.asynchronous.items():
                yield (
                    f"| {published.gpus} | {spread} | {comparison.synchronous.step_s:.0f} s | {staleness} | {f.step_s:.0f} s "
                    f"| {f.staleness_mean:.2f} | {f.engine_idle:.0%} | {f.learner_idle:.0%} | {comparison.speed_up(staleness):.2f} "
                    f"| {published.speed_up:.2f} |"
                )
    yield ""
    yield f"Published: {SOURCE}"
