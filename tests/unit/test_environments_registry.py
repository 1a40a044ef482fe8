"""Ids resolve to classes; what is unknown or broken says so, and does not break the rest."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from environments import registry
from environments.math import MathEnv
from environments.registry import BrokenEnvironment, UnknownEnvironment, list_environments, resolve

PLUGIN = '''
from environments.base import Message, Observation, Status, TaskDraft, TextEnv, Turn, Verdict

class SayEnv(TextEnv):
    """Say the word."""
    id = "say"

    @classmethod
    def make_task(cls, rng, options):
        return TaskDraft(public={"word": rng.choice(["sun", "sea", "sky"])})

    def begin(self, task):
        return Observation(messages=(Message(role="user", content=task.public["word"]),))

    def act(self, turn):
        return Verdict(status=Status.OK, reward=1.0)

class NoId(SayEnv):
    id = ""

not_a_class = 3
'''


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modules on the path, one broken, and entry points for them as an installed distribution would declare them."""
    (tmp_path / "say_plugin.py").write_text(PLUGIN)
    (tmp_path / "broken_plugin.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "exiting_plugin.py").write_text("import sys; sys.exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    points = EntryPoints(
        EntryPoint(name=name, value=value, group=registry.GROUP)
        for name, value in [
            ("say", "say_plugin:SayEnv"),
            ("broken", "broken_plugin:Env"),
            ("exiting", "exiting_plugin:Env"),
            ("math", "say_plugin:SayEnv"),
        ]
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
    registry.load.cache_clear()


def test_built_ins_resolve_to_their_classes() -> None:
    assert resolve("math") is MathEnv
    assert resolve("environments.math:MathEnv") is MathEnv
    for name in registry.BUILT_INS:
        assert resolve(name).id == name


def test_an_unknown_id_suggests_the_nearest_one() -> None:
    with pytest.raises(UnknownEnvironment, match="did you mean 'math'"):
        resolve("mathh")
    with pytest.raises(UnknownEnvironment, match="known: code, gymnasium, humaneval, instructions, long_context, math, nemo_gym"):
        resolve("zzzzzz")
    assert issubclass(UnknownEnvironment, ValueError)


@pytest.mark.usefixtures("plugins")
def test_a_plugin_is_found_and_a_broken_one_breaks_only_itself() -> None:
    entries = {entry.id: entry for entry in list_environments()}
    assert entries["say"].env_class is resolve("say")
    assert entries["say"].summary == "Say the word."
    assert entries["broken"].env_class is None
    assert "a_package_that_is_not_there" in entries["broken"].error
    assert "SystemExit" in entries["exiting"].error
    assert all(entries[name].env_class is not None for name in registry.BUILT_INS)
    with pytest.raises(BrokenEnvironment, match="a_package_that_is_not_there"):
        resolve("broken")


@pytest.mark.parametrize(
    ("id", "foreign"),
    [
        ("math", False), ("environments.math:MathEnv", False), ("gymnasium", True),
        ("environments.bridges.gymnasium_in:GymnasiumEnv", True),
        ("say", True), ("say_plugin:SayEnv", True), ("environments/math.py:MathEnv", True), ("no_such_id", True),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("plugins")
def test_what_is_not_ours_is_foreign(id: str, foreign: bool) -> None:
    assert registry.is_foreign(id) is foreign


@pytest.mark.usefixtures("plugins")
def test_a_plugin_cannot_take_over_a_built_in() -> None:
    assert resolve("math") is MathEnv


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("no_such_module:Env", "PYTHONPATH"),
        ("say_plugin:Sya", "environments in it: SayEnv, NoId"),
        ("say_plugin:not_a_class", "not a subclass"),
        ("say_plugin:NoId", "no `id`"),
    ],
)
def test_a_wrong_module_class_says_what_is_wrong(target: str, complaint: str) -> None:
    with pytest.raises(BrokenEnvironment, match=complaint):
        resolve(target)
