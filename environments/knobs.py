"""Reading an environment's difficulty knobs: the `options` of its config section, checked against its defaults."""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from typing import Any

SHARED = {"oracle_working": 0.5, "sandbox": "auto", "tokenizer": "", "examples": 0}
"""Options that every environment accepts: how often its oracle shows its working, where untrusted programs run, the folder of the
policy's tokenizer.json, in whose tokens a prompt's length may be asked for, and how many worked examples stand before the task."""


class OptionError(ValueError):
    """An environment's options cannot be used. The message is a sentence for the config's author."""


def read_knobs(env_id: str, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` overridden by `options`. Raises OptionError for a knob that does not exist or has another type than its default."""
    knobs = dict(SHARED) | dict(defaults)
    for name, value in options.items():
        if name not in knobs:
            near = difflib.get_close_matches(name, knobs, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(knobs))}"
            raise OptionError(f"environment {env_id!r} has no option {name!r}; {hint}")
        wanted = type(knobs[name])
        if wanted is list and isinstance(value, Sequence) and not isinstance(value, str):
            value = list(value)
        elif wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif type(value) is not wanted:
            raise OptionError(f"environment {env_id!r}: option {name} is {value!r}, wanted a {wanted.__name__} such as {knobs[name]!r}")
        knobs[name] = value
    return knobs


def check_range(env_id: str, name: str, value: float, low: float, high: float) -> None:
    """Raise OptionError unless low <= value <= high."""
    if not low <= value <= high:
        raise OptionError(f"environment {env_id!r}: option {name} is {value}, wanted {low} to {high}")


def check_choices(env_id: str, name: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    """Raise OptionError unless `chosen` is a non-empty part of `known`."""
    if not chosen:
        raise OptionError(f"environment {env_id!r}: option {name} is empty, wanted some of {', '.join(known)}")
    for item in chosen:
        if item not in known:
            raise OptionError(f"environment {env_id!r}: option {name} has {item!r}, wanted some of {', '.join(known)}")


def shows_working(options: Mapping[str, Any], rng: random.Random) -> bool:
    """Whether an oracle writes out its steps this time: with probability `oracle_working`."""
    return rng.random() < float(options.get("oracle_working", SHARED["oracle_working"]))
