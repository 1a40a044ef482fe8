"""Configs in and out: YAML and `key=value` overrides, merged by OmegaConf.

A typo, a wrong type or a value out of range is a `ConfigError` with one sentence that says what to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl_core.config import ConfigError, EnvironmentConfig, RewardConfig, RunConfig
from rl_core.config_checks import validate


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key=value` overrides, check everything. Raises ConfigError."""
    file = Path(path)
    if not file.is_file():
        near = sorted(str(p) for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        raise ConfigError(f"no config file {str(path)!r}" + (f"; there are {', '.join(near)}" if near else f" and no folder {file.parent}"))
    try:
        loaded = OmegaConf.load(file)
    except Exception as error:  # yaml's own errors have many classes
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, wanted a mapping of keys such as `model:` and `environments:`")
    return parse_config(loaded, overrides, source=str(path))


def parse_config(tree: DictConfig | dict[str, Any], overrides: Iterable[str] = (), *, source: str = "config") -> RunConfig:
    """As `load_config`, from a mapping."""
    merged = OmegaConf.merge(OmegaConf.create(tree), _dotlist(overrides))
    plain = OmegaConf.to_container(merged, resolve=False)
    assert isinstance(plain, dict)
    check_keys(plain, RunConfig, "", source)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        reason = " ".join(str(getattr(error, "msg", None) or error).split("\n")[0].split())
        raise ConfigError(f"{source}: {key}: {reason}; see `polyrl config show`") from error
    assert isinstance(config, RunConfig)
    validate(config)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved config, as it is stored in the run folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _dotlist(overrides: Iterable[str]) -> DictConfig:
    items = list(overrides)
    for item in items:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"override {item!r}: wanted key=value, for example loop.steps=20")
    return OmegaConf.from_dotlist(items)


def check_keys(tree: dict[Any, Any], cls: type, prefix: str, source: str) -> None:
    """Raise ConfigError for the first key that the dataclass does not have, with the nearest one that it has."""
    known = {f.name: get_type_hints(cls)[f.name] for f in fields(cls)}
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {prefix}{key}; {hint}")
        if isinstance(value, dict) and is_dataclass(known[key]):
            check_keys(value, known[key], f"{prefix}{key}.", source)  # type: ignore[arg-type]
        elif isinstance(value, dict) and key == "environments":
            for name, child in value.items():
                if not isinstance(child, dict):
                    raise ConfigError(f"{source}: environments.{name} is {child!r}, wanted a mapping such as {{share: 1.0}}")
                check_keys(child, EnvironmentConfig, f"environments.{name}.", source)
        elif isinstance(value, dict) and cls is EnvironmentConfig and key == "rewards":
            for name, child in value.items():
                if not isinstance(child, dict):
                    raise ConfigError(
                        f"{source}: {prefix}rewards.{name} is {child!r}, wanted a mapping such as {{kind: judge, model: ...}}"
                    )
                check_keys(child, RewardConfig, f"{prefix}rewards.{name}.", source)


class Absent(Enum):
    """What a config has under a key that it lacks: an option of an environment that the other one sets."""

    ABSENT = "(absent)"

    def __repr__(self) -> str:
        return self.value


ABSENT = Absent.ABSENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One key that two configs set otherwise; ABSENT where one of them lacks it."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}  {self.old!r} -> {self.new!r}"


def differences(old: RunConfig, new: RunConfig) -> list[Difference]:
    """Every key whose value differs, by name."""
    a, b = flat(asdict(old)), flat(asdict(new))
    found = [Difference(key=key, old=a.get(key, ABSENT), new=b.get(key, ABSENT)) for key in sorted(a.keys() | b.keys())]
    return [d for d in found if d.old != d.new]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loop.steps": 40, ...}: the leaves of a tree; empty parts are left out."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def reference(cls: type = RunConfig, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, type, default) of every key, for the configuration reference."""
    rows: list[tuple[str, str, str]] = []
    hints = get_type_hints(cls)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            rows += reference(hints[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]
        elif f.name == "environments":
            rows += reference(EnvironmentConfig, f"{prefix}environments.<name>.")
        elif f.name == "rewards":
            rows += reference(RewardConfig, f"{prefix}rewards.<name>.")
        else:
            default = f.default if f.default is not NO_DEFAULT else f.default_factory()  # type: ignore[misc, operator]
            rows.append((f"{prefix}{f.name}", getattr(hints[f.name], "__name__", str(hints[f.name])), repr(default)))
    return rows
