"""Environments of ours as ordinary Gymnasium ids: built-ins and installed plugins.

    import gymnasium
    import environments.bridges.gymnasium_out        # registers all of them

    env = gymnasium.make("polyrl/math-v0", digits=2)
    observation, info = env.reset(seed=1)             # {"messages": ({"role": "user", "content": "17+25"},), "tools": "[]"}
    observation, reward, terminated, truncated, info = env.step({"content": "42"})

Gymnasium has no entry points of its own: the import registers, or the module's name stands before the id, as in
`gymnasium.make("environments.bridges.gymnasium_out:polyrl/math-v0")`. No environment is imported before one is made.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium

from environments.base import TextEnv
from environments.registry import resolve, targets

NAMESPACE = "polyrl"
VERSION = 0
"""Of this form of interface; what an environment's own `version` says stands in its verdicts."""


def register_all() -> list[str]:
    """Register every environment that is not registered yet; returns all Gymnasium ids."""
    ids = {name: f"{NAMESPACE}/{name}-v{VERSION}" for name in targets() if name.replace("_", "").replace("-", "").isalnum()}
    for name, gymnasium_id in ids.items():
        if gymnasium_id not in gymnasium.registry:
            gymnasium.register(gymnasium_id, entry_point=partial(make, name), order_enforce=False)
    return list(ids.values())


def make(name: str, **options: Any) -> TextEnv:
    """What `gymnasium.make` calls. Raises BrokenEnvironment for a plugin that cannot be imported."""
    options.pop("render_mode", None)
    return resolve(name)(**options)


register_all()
