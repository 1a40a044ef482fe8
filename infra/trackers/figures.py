"""What an event has to say in numbers, under the names of docs/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping

from rl_core.events import Event

HELD_OUT = ("pass_rate", "mean_reward", "masked")


def figures(event: Event) -> tuple[int, dict[str, float]] | None:
    """(policy version, {name: value}) of a step or an evaluation; None for any other event."""
    if event.kind == "step":
        return int(event.data["version"]), dict(event.data["metrics"])
    if event.kind == "eval":
        return int(event.data["version"]), held_out(event.data["environments"])
    return None


def held_out(environments: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of an evaluation: env/<id>/held_out/..."""
    return {
        f"env/{env}/held_out/{name}": float(result[name]) for env, result in environments.items() for name in HELD_OUT if name in result
    }
