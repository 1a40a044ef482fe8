"""A task source that raises or ends costs its environment groups, and the run nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest

from environments.host import EnvHost, EnvironmentBug
from environments.registry import resolve
from environments.sources import guarded
from rl_core.types import Task


def math(position: int) -> Iterator[Task]:
    return resolve("math").tasks("train", 0, start=position)


def raises_at(bad: int) -> Iterator[Task]:
    def source(position: int) -> Iterator[Task]:
        for at in range(position, 10**9):
            if at == bad:
                raise ZeroDivisionError(f"no task {at}")
            yield next(math(at))

    return guarded(source, "mine", "train")


def test_a_source_that_works_is_left_as_it_is() -> None:
    assert list(islice(guarded(math, "math", "train", 3), 5)) == list(islice(math(3), 5))


def test_a_task_that_cannot_be_drawn_keeps_its_place_and_the_others_theirs() -> None:
    drawn, whole = list(islice(raises_at(2), 5)), list(islice(math(0), 5))
    assert [task.key for task in drawn] == [*[t.key for t in whole[:2]], "undrawn-train-2", *[t.key for t in whole[3:]]]
    with pytest.raises(EnvironmentBug, match="drawing train task 2: ZeroDivisionError: no task 2"):
        EnvHost().open("s", "math", {}, drawn[2])


def test_a_source_that_ends_goes_on_as_placeholders() -> None:
    def short(position: int) -> Iterator[Task]:
        return islice(math(position), max(0, 2 - position))

    tasks = list(islice(guarded(short, "mine", "eval"), 4))
    assert [task.key for task in tasks[2:]] == ["undrawn-eval-2", "undrawn-eval-3"]
    assert "its task source ended" in tasks[2].private["undrawn"]
