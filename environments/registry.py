"""From an environment's id to its class: built-ins, installed plugins, and `module:Class` or `path:Class` without any packaging.

A plugin is a distribution with an entry point in the group `polyrl.environments`:

    [project.entry-points."polyrl.environments"]
    riddles = "my_package.riddles:RiddlesEnv"

Nothing is imported before it is asked for, and a plugin that cannot be imported is an entry with an error, not a crash.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from environments.base import TextEnv
from environments.plugin_files import import_path, is_path

GROUP = "polyrl.environments"
BUILT_INS = {
    "math": "environments.math:MathEnv",
    "long_context": "environments.long_context:LongContextEnv",
    "code": "environments.code:CodeEnv",
    "tools": "environments.tools:ToolsEnv",
    "instructions": "environments.instructions:InstructionsEnv",
    "structured": "environments.structured:StructuredEnv",
    "humaneval": "environments.humaneval:HumanEvalEnv",
}
BRIDGES = {
    "gymnasium": "environments.bridges.gymnasium_in:GymnasiumEnv",
    "reasoning_gym": "environments.bridges.reasoning_gym:ReasoningGymEnv",
    "verifiers": "environments.bridges.verifiers:VerifiersEnv",
    "nemo_gym": "environments.bridges.nemo_gym:NemoGymEnv",
}

log = logging.getLogger(__name__)


class UnknownEnvironment(ValueError):
    """No environment has this id."""


class BrokenEnvironment(ValueError):
    """The id is known, but its class cannot be loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentEntry:
    """One row of `list_environments`."""

    id: str
    target: str  # "module:Class" or "path:Class"
    source: str  # "built-in", "bridge", or the distribution that a plugin came with
    env_class: type[TextEnv] | None
    error: str = ""
    """Why env_class is None, in words."""

    @property
    def summary(self) -> str:
        """First line of the class's docstring; "" if it has none."""
        doc = (self.env_class.__doc__ or "") if self.env_class else ""
        return doc.strip().split("\n")[0]


def resolve(id: str) -> type[TextEnv]:
    """The class behind an id, `module:Class`, `file.py:Class` or `folder:Class`. Raises UnknownEnvironment or BrokenEnvironment."""
    if ":" in id:
        return load(id)
    known = targets()
    if id not in known:
        near = difflib.get_close_matches(id, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}."
        raise UnknownEnvironment(
            f"no environment {id!r}; {hint} A class that is not installed as a plugin is written module:Class or path/file.py:Class"
        )
    return load(known[id][0])


def is_foreign(id: str) -> bool:
    """Whether the code behind this id is not ours: a plugin, a module or file of somebody's, or a bridge into another world's packages.

    Answered from names alone, so that nothing is imported. What is foreign runs in a process of its own.
    """
    target = targets()[id][0] if id in targets() else id
    module = target.rpartition(":")[0]
    return not module.startswith("environments.") or module.startswith("environments.bridges.")


def list_environments() -> list[EnvironmentEntry]:
    """Every registered environment, loaded where that is possible, built-ins first."""
    entries = []
    for id, (target, source) in targets().items():
        try:
            entries.append(EnvironmentEntry(id=id, target=target, source=source, env_class=load(target)))
        except BrokenEnvironment as error:
            entries.append(EnvironmentEntry(id=id, target=target, source=source, env_class=None, error=str(error)))
    return entries


def targets() -> dict[str, tuple[str, str]]:
    """{id: (target, source)}; a built-in's id cannot be taken over by a plugin, and of two plugins the first by name stays."""
    found = {id: (target, "built-in") for id, target in BUILT_INS.items()}
    found |= {id: (target, "bridge") for id, target in BRIDGES.items()}
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        source = point.dist.name if point.dist else "a plugin"
        if point.name not in found:
            found[point.name] = (point.value, source)
        elif found[point.name][0] != point.value:
            log.warning("%s offers environment %r, which %s has already; ignored", source, point.name, found[point.name][1])
    return found


@cache
def load(target: str) -> type[TextEnv]:
    """Import `module:Class` or `path:Class`. Raises BrokenEnvironment with the cause in one line."""
    module_name, _, class_name = (part.strip() for part in target.rpartition(":"))
    try:
        module = import_path(module_name, class_name) if is_path(module_name) else importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        log.debug("importing %s failed", module_name, exc_info=True)
        hint = f"; is its folder on PYTHONPATH? (looked for {error.name!r})" if isinstance(error, ModuleNotFoundError) else ""
        cause = f"importing {module_name!r} raised {type(error).__name__}: {error}"
        raise BrokenEnvironment(f"environment {target!r}: {cause}{hint}") from error
    found = getattr(module, class_name, None)
    if found is None:
        names = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, TextEnv) and v is not TextEnv]
        there = ", ".join(names) or "none"
        raise BrokenEnvironment(f"environment {target!r}: {module_name!r} has no {class_name!r}; environments in it: {there}")
    if not (isinstance(found, type) and issubclass(found, TextEnv)):
        raise BrokenEnvironment(f"environment {target!r}: {class_name!r} is not a subclass of environments.base.TextEnv")
    if not isinstance(getattr(found, "id", None), str) or not found.id:
        raise BrokenEnvironment(f'environment {target!r}: the class has no `id`; give it one, for example id = "riddles"')
    return found
