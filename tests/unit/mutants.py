"""Deliberate bugs: one line of the true code replaced by a wrong one, for as long as a test lasts.

The changed source is compiled anew, and the code of every function that came out different is put into the function that all
others have imported already. A line that is not in the source any more fails the test: the bug must then be planted elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest


def plant(monkeypatch: pytest.MonkeyPatch, module: ModuleType, right: str, wrong: str) -> None:
    """Replace `right`, which stands in the source of `module` exactly once, by `wrong`."""
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times in {module.__name__}"
    namespace: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(source.replace(right, wrong), str(module.__file__), "exec"), namespace)
    changed = dict(functions(namespace))
    planted = 0
    for name, function in functions(vars(module)):
        code = changed[name].__code__
        if fingerprint(code) != fingerprint(function.__code__):
            monkeypatch.setattr(function, "__code__", code)
            planted += 1
    assert planted, f"{wrong!r} changes no function of {module.__name__}"


def functions(namespace: Any, prefix: str = "") -> Iterator[tuple[str, FunctionType]]:
    """Functions and methods that were defined in `namespace`, with their names."""
    for name, value in list(dict(namespace).items()):
        value = inspect.unwrap(value) if not isinstance(value, (staticmethod, property)) else getattr(value, "fget", None) or value.__func__
        if isinstance(value, FunctionType) and not prefix.startswith("__"):
            yield prefix + name, value
        elif inspect.isclass(value) and not prefix:
            yield from functions(vars(value), f"{value.__module__}.{name}.")


def fingerprint(code: CodeType) -> tuple[Any, ...]:
    """What a function does, without where it stands."""
    inner = tuple(fingerprint(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, inner
