"""What can be known to be wrong before anything starts: each is one sentence, and the command ends with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from infra.errors import UsageError
from infra.trackers.background import check_trackers
from rl_core.chat import chat_format
from rl_core.config import RunConfig
from rl_core.rewards import DERIVED, unknown_component

MIN_FREE_GIB = 1.0
"""A quickstart run writes some 50 MB, and Ray spills to the same disk; below this, runs die half-way in unclear ways."""


class PreflightError(UsageError):
    """The machine or the checkpoint does not allow this run. The message says what to do."""


def preflight(config: RunConfig, *, runs_here: bool = True) -> None:
    """Raise for the first thing that would stop this run later. Takes a second or two; neither Ray nor vLLM is imported.

    `runs_here`: on this machine, and not on a cluster elsewhere, whose sandboxes cannot be seen from here.
    """
    for name in config.environments:
        check_environment(config, name)
    check_trackers(config)
    check_speculation(config)
    check_thinking(config)
    check_disk(Path(config.runs_dir))
    if runs_here:
        for name in config.environments:
            check_sandbox(config, name)


def check_environment(config: RunConfig, name: str) -> None:
    """It must exist, and draw a task with these options."""
    from environments.registry import resolve  # here and below, since Gymnasium takes a tenth of a second of every command
    from environments.sandbox import SandboxUnavailable

    env = config.environments[name]
    env_class = resolve(env.id or name)
    named = [key for key, reward in env.rewards.items() if reward.kind == "component"]
    check_components(name, named, env_class.components)
    levels = {f"curriculum.levels[{i}]": level for i, level in enumerate(env.curriculum.levels)}
    for where, level in {"options": {}, **levels}.items():
        try:
            options = {"tokenizer": config.model.path, "sandbox": config.sandbox, **env.options, **level}
            next(env_class.tasks("train", config.seed, options))
            if options.get("file") or options.get("examples"):  # the first task says nothing about the other options
                env_class(**options).close()
        except SandboxUnavailable:
            return  # a task whose reference is run: check_sandbox says what is missing, where the run is on this machine
        except ValueError as error:
            raise PreflightError(f"environments.{name}.{where}: {error}") from error
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise PreflightError(f"environments.{name}: its first task cannot be drawn; {env_class.__name__} raised {said}") from error


def check_components(name: str, named: Collection[str], components: Sequence[str]) -> None:
    """Every component of the verdict that the reward is made of must be one that the environment says it has."""
    known = (*components, *DERIVED)
    for component in named if components else ():
        if component not in known:
            raise PreflightError(unknown_component(name, component, known))


def check_sandbox(config: RunConfig, name: str) -> None:
    """An environment that runs the policy's programs needs something that isolates them."""
    from environments.registry import resolve
    from environments.sandbox import SandboxUnavailable, choose_sandbox
    from environments.sandbox.choose import close_sandboxes

    env = config.environments[name]
    if not resolve(env.id or name).needs_sandbox:
        return
    wanted = str(env.options.get("sandbox", config.sandbox))
    try:
        choose_sandbox(wanted)
    except SandboxUnavailable as error:
        raise PreflightError(f"environments.{name} runs programs in a sandbox, and sandbox={wanted} cannot: {error}") from error
    finally:
        close_sandboxes()


def check_disk(folder: Path) -> None:
    """There must be room for the run, and the folder must be ours to write."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PreflightError(f"runs_dir: cannot write to {str(existing)!r}; give another folder with runs_dir=PATH")
    free = shutil.disk_usage(existing).free / 2**30
    if free < MIN_FREE_GIB:
        raise PreflightError(
            f"runs_dir: the disk of {str(existing)!r} has {free:.2f} GiB free, wanted at least {MIN_FREE_GIB:.0f}; "
            f"free some space, or give a folder on another disk with runs_dir=PATH"
        )


def check_thinking(config: RunConfig) -> None:
    """A thought can only be closed at its budget where the markers are tokens."""
    capped = {name: env.thinking_budget for name, env in config.environments.items() if env.thinking_budget is not None}
    try:
        markers = chat_format(config.model.path).think_ids if capped else None
    except ValueError as error:
        raise PreflightError(f"model.path: {error}") from error
    if capped and markers is None:
        name, budget = next(iter(capped.items()))
        raise PreflightError(
            f"environments.{name}.thinking_budget is {budget}, but the tokenizer of {config.model.path!r} has no tokens <think> and "
            f"</think>; set it to null"
        )


def check_speculation(config: RunConfig) -> None:
    """Speculative decoding needs a checkpoint with an MTP head."""
    path = Path(config.model.path, "config.json")
    try:
        architecture = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PreflightError(f"model.path: {str(path)!r} is not valid JSON ({error}); is the download complete?") from error
    layers = int(architecture.get("num_nextn_predict_layers") or 0)
    if config.rollout.speculative_tokens and not layers:
        raise PreflightError(
            f"rollout.speculative_tokens is {config.rollout.speculative_tokens}, but {config.model.path!r} has no MTP head "
            f"(num_nextn_predict_layers in its config.json); set rollout.speculative_tokens=0"
        )
