"""Environments from elsewhere: from a file, a folder, a package of its own, and the package that `polyrl envs new` makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from environments.check import check_environment
from environments.plugin_files import absolute, target_of
from environments.registry import BrokenEnvironment, load, resolve
from infra.errors import UsageError
from infra.preflight import PreflightError, preflight
from infra.scaffold import scaffold
from rl_core.config_files import parse_config

ROOT = Path(__file__).parents[2]
ENV = """
from environments.base import Message, Observation, Status, TaskDraft, TextEnv, Verdict
{imports}

class {name}Env(TextEnv):
    '''Says {word}.'''
    id = "{name}"

    @classmethod
    def make_task(cls, rng, options):
        return TaskDraft(public={{"word": WORD, "n": rng.randrange(10**6)}})

    def begin(self, task):
        return Observation(messages=(Message(role="user", content=task.public["word"]),))

    def act(self, turn):
        return Verdict(status=Status.OK, reward=1.0)
"""


def says(target: str) -> str:
    """What the environment behind `target` asks."""
    env_class = resolve(target)
    task = next(env_class.tasks("train", 0))
    return str(env_class().reset(options={"task": task})[1]["observation"].messages[0].content)


def test_a_file_is_an_environment_and_may_import_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, word in (("one", "sun"), ("two", "sea")):  # two files of the same name do not get into each other's way
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "env.py").write_text(ENV.format(name="A", word=word, imports=f"WORD = {word!r}"))
    (tmp_path / "one" / "words_of_b.py").write_text("WORD = 'moon'\n")
    (tmp_path / "one" / "b.py").write_text(ENV.format(name="B", word="moon", imports="from words_of_b import WORD"))
    assert [says(f"{tmp_path}/{folder}/env.py:AEnv") for folder in ("one", "two")] == ["sun", "sea"]
    assert says(f"{tmp_path}/one/b.py:BEnv") == "moon"
    monkeypatch.chdir(tmp_path)
    assert says("one/env.py:AEnv") == "sun"
    assert absolute("one/env.py:AEnv") == f"{tmp_path}/one/env.py:AEnv"
    assert [absolute(id) for id in ("math", "module:Env")] == ["math", "module:Env"]


def test_a_folder_is_searched_for_the_class_without_running_what_else_lies_there(tmp_path: Path) -> None:
    (tmp_path / "aaa_script.py").write_text("raise SystemExit('a script ran')\n")
    (tmp_path / "broken.py").write_text("this is no Python\n")
    package = tmp_path / "inner"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "words.py").write_text("WORD = 'star'\n")
    (package / "env.py").write_text(ENV.format(name="C", word="star", imports="from .words import WORD\nfrom inner import words"))
    assert says(f"{tmp_path}:CEnv") == "star"
    assert resolve(f"{package}:CEnv") is resolve(f"{tmp_path}:CEnv") is resolve(target_of(resolve(f"{tmp_path}:CEnv")))


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("{0}/no.py:Env", "no file or folder"),
        ("{0}:NoSuchEnv", "defines a class 'NoSuchEnv'"),
        ("{0}/raises.py:Env", "ZeroDivisionError: division by zero"),
        ("{0}/exits.py:Env", "SystemExit"),
        ("{0}/other.py:Env", "has no 'Env'"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, target: str, complaint: str) -> None:
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "other.py").write_text("class Other: pass\n")
    for _ in range(2):  # a failed import leaves nothing behind that would look like a success the second time
        load.cache_clear()
        with pytest.raises(BrokenEnvironment, match=complaint):
            resolve(target.format(tmp_path))


def test_a_run_of_a_plugin_that_cannot_be_imported_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("import a_library_that_is_not_there\n")

    def config_of(name: str) -> dict[str, Any]:
        environments = {"math": {}, "mine": {"id": f"{tmp_path}/raises.py:{name}"}}
        return {"model": {"path": str(ROOT / "configs/models/seed")}, "environments": environments}

    config = parse_config(config_of("Env"))
    with pytest.raises(BrokenEnvironment, match="a_library_that_is_not_there"):
        preflight(config)
    source = ENV.format(name="A", word="sun", imports="WORD = 'sun'").replace("return TaskDraft", "{}['row 17']; return TaskDraft")
    (tmp_path / "raises.py").write_text(source)
    load.cache_clear()
    with pytest.raises(PreflightError, match="mine: its first task cannot be drawn; AEnv raised KeyError: 'row 17'"):
        preflight(parse_config(config_of("AEnv")))


def test_the_scaffold_passes_its_own_check_from_its_folder(tmp_path: Path) -> None:
    folder = scaffold("word_sums", tmp_path)
    results = check_environment(resolve(f"{folder}:WordSumsEnv"), {"digits": 4}, num_tasks=4)
    assert not [str(result) for result in results if not result.ok]
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        next(resolve(f"{folder}:WordSumsEnv").tasks("train", 0, {"digit": 3}))


def test_the_scaffold_is_a_plugin_once_it_is_installed(tmp_path: Path) -> None:
    """Installed for real, found by its entry point, checked and shown by the commands, by nothing of ours but the command line."""
    folder, site = scaffold("word_sums", tmp_path), tmp_path / "site"
    environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}

    def run(*command: object) -> str:
        done = subprocess.run([sys.executable, *map(str, command)], env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run(*pip, "--target", site, folder)
    main = ["-c", "from infra.cli import main; main()"]
    listed = {row["id"]: row for row in json.loads(run(*main, "envs", "list", "--json"))}
    assert listed["word_sums"]["source"] == "polyrl-word-sums"
    assert listed["word_sums"]["summary"] == "One sum, one answer; reward 1 for exactly the right number."
    config = tmp_path / "polyrl-word-sums" / "run.yaml"
    assert "word_sums" in run(*main, "config", "check", config, f"model.path={ROOT}/configs/models/seed")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", folder / "tests")


@pytest.mark.parametrize(
    ("name", "complaint"), [("math", "exists already"), ("Word", "small letters"), ("class", "small letters"), ("", "small letters")]
)
def test_a_scaffold_of_a_wrong_name_is_refused(tmp_path: Path, name: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        scaffold(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_scaffold_overwrites_nothing(tmp_path: Path) -> None:
    scaffold("word_sums", tmp_path)
    with pytest.raises(UsageError, match="there already"):
        scaffold("word_sums", tmp_path)
