"""What the documentation says of the program: every command in it runs, every key and figure that it names exists, and vice versa.

A command is a line of a code block (indented, or fenced as sh or console) that starts with one of PROGRAMS, or a piece of inline code that
does. What follows a `#` or three spaces is prose. Commands of `polyrl` are parsed with the program's own parser, and their
overrides are held against the config; those of code blocks are then run in a folder with a small stored run, but for the few
in ELSEWHERE, which start a whole run or take minutes: a named test calls them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from infra.cli.main import main
from infra.docs import OUTSIDE, commands, config_tables, filled, lines_of, sections
from rl_core.config import RunConfig
from rl_core.config_files import load_config, reference
from rl_core.ledger import Ledger
from rl_core.types import Task
from tests.unit.stored_runs import store_run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = (
    "polyrl",
    "make",
    "ray",
    "pip",
    "duckdb",
    "git",
    "python",
    ".venv/bin/python",
    "kubectl",
    "docker",
    "wandb",
    "mlflow",
    "tensorboard",
)

ELSEWHERE = {
    "run": ("tests/e2e/test_broken_plugins.py", '"run"'),
    "submit": ("tests/e2e/test_main_job.py", '"submit"'),
    "resume": ("tests/integration/test_resubmission.py", '"resume"'),
    "jobs": ("tests/integration/test_resubmission.py", '"jobs"'),
    "logs": ("tests/integration/test_resubmission.py", '"logs"'),
    "stop": ("tests/integration/test_resubmission.py", '"stop"'),
    "eval": ("tests/unit/test_eval_command.py", '"eval"'),
    "dashboard": ("tests/unit/test_dashboard.py", '"dashboard"'),
    "audit": ("tests/unit/test_audit.py", '"audit"'),
    "replay": ("tests/integration/learner_scenarios.py", "replay.replay("),
    "export": ("tests/integration/learner_scenarios.py", "export("),
    "chaos": ("tests/unit/test_chaos.py", "Chaos("),
    "bench": ("tests/unit/test_cli.py", '"bench"'),
    "simulate": ("tests/unit/test_simulation.py", "run_one("),
    "envs sample": ("tests/unit/test_cli.py", '"sample"'),
    "model seed": ("tests/unit/test_seed.py", "seed_train"),
    "model import": ("tests/unit/test_cli_models.py", '"import"'),
    "reward train": ("tests/unit/test_reward_model.py", '"train"'),
    "verify humaneval": ("tests/integration/test_split_grading.py", "attempt_all("),
}
"""Command -> the test that calls it, or the code under it, and the words there that do; where it costs too much to run for each mention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command as the documentation has it."""

    page: str
    text: str
    block: bool  # stands in a code block, as something to type

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def written(page: Path) -> Iterator[Command]:
    """The commands of a page."""
    name, fence, prose = page.relative_to(ROOT).as_posix(), None, []
    for line in page.read_text(encoding="utf-8").splitlines():
        if mark := re.match(r"\s*```(\w*)", line):
            fence = mark[1] if fence is None else None
        elif fence in ("sh", "console") or (fence is None and line.startswith("    ")):
            if text := command_of(line):
                yield Command(page=name, text=text, block=True)
        elif fence is None:
            prose.append(line)
    for code in re.findall(r"`([^`]+)`", "\n".join(prose)):
        if " " in code and (text := command_of(" ".join(code.split()))):
            yield Command(page=name, text=text, block=False)


def command_of(line: str) -> str:
    """The command that a line holds, without prose behind it; "" if it holds none."""
    text = re.split(r"\s+#\s|\s{3,}", line.strip().removeprefix("$ "))[0].strip()
    return text if text.split(" ")[0] in PROGRAMS and "..." not in text else ""


COMMANDS = sorted({c for page in PAGES for c in written(page)}, key=lambda c: (c.page, c.text))


def of(program: str) -> list[Command]:
    return [c for c in COMMANDS if c.words[0] == program]


def split(words: list[str]) -> tuple[str, list[str]]:
    """(command, arguments): ("envs list", [])."""
    known = commands()
    for length in (2, 1):
        if (name := " ".join(words[1 : 1 + length])) in known:
            return name, words[1 + length :]
    raise AssertionError(f"no command polyrl {' '.join(words[1:])}")


def arguments(words: list[str]) -> list[str]:
    """Usage such as `[--sample N]` becomes arguments that can be parsed."""
    stand_ins = {"N": "1", "COMMAND": "--help", "FOLDER": "folder", "FILE": "file", "ID": "latest"}
    bare = [word.strip("[]") for word in words]
    return [stand_ins.get(word, word) for word in bare if word]


@cache
def key_pattern() -> re.Pattern[str]:
    """Every key; names of environments and what is below `options` are free."""
    below = {True: r"(\..+)?", False: ""}
    keys = [re.escape(key).replace(re.escape("<name>"), "[^.]+") + below["dict" in kind] for key, kind, _ in reference(RunConfig)]
    return re.compile("|".join(keys))


def known_key(key: str) -> bool:
    """Whether the config has this key."""
    return key_pattern().fullmatch(key) is not None


def test_the_documentation_is_read() -> None:
    assert len(of("polyrl")) > 40
    assert {"README.md", "docs/tutorials/first-run.md", "docs/protocol.md"} <= {c.page for c in COMMANDS}
    assert command_of("    polyrl simulate --runs 10000            whole runs with faults") == "polyrl simulate --runs 10000"
    assert command_of("    polyrl show latest --json   # for programs") == "polyrl show latest --json"
    assert command_of("    policy --> learner") == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of the documentation find around them: a stored run, the configs, an environment of one's own."""
    root = tmp_path_factory.mktemp("docs")
    run = store_run(root / "runs" / "20260101-000000-demo")
    (run / "config.yaml").write_text((ROOT / "configs/quickstart.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    ledger = Ledger(run / "ledger.sqlite")
    ledger.draw(Task(env="math", key="k", split="train", seed=1, public={}, private={}), 0)
    ledger.abandon_open("the run ended")
    ledger.close()
    (root / "configs").symlink_to(ROOT / "configs")
    guide = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (root / "my_envs.py").write_text(guide[0], encoding="utf-8")
    (root / "pairs.jsonl").write_text('{"question": "q", "chosen": "a", "rejected": "b"}\n', encoding="utf-8")
    return root


@pytest.mark.parametrize("command", of("polyrl"), ids=lambda c: f"{c.page}: {c.text}")
def test_every_command_exists_with_its_options_and_keys(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in arguments(command.words) if word != "--help"]
    if len(words) == 1:
        return
    if len(words) == 2 and words[1] not in commands():
        assert any(name.startswith(f"{words[1]} ") for name in commands()), f"no command {command.text}"
        return
    name, rest = split(words)
    if not rest and not command.block:
        return  # a mention
    monkeypatch.chdir(folder)
    context = commands()[name].make_context(name, list(rest))
    for override in context.params.get("overrides") or []:
        key = override.split("=")[0]
        assert "=" in override, f"{override!r} is neither an option nor key=value"
        assert known_key(key), f"the config has no key {key}"
    for word in rest:
        if word.startswith("configs/"):
            assert (ROOT / word).exists(), f"there is no {word}"


def call(folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of `polyrl`, called within `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", words)
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


RUN_HERE = list(
    dict.fromkeys(
        c.text for c in of("polyrl") if c.block and "[" not in c.text and split(arguments(c.words))[0] not in ELSEWHERE
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def own_package(folder: Path) -> Path:
    """What `polyrl envs new word_sums` makes, which other commands of the tutorial use."""
    with pytest.MonkeyPatch.context() as patch:
        shutil.rmtree(folder / "polyrl-word-sums", ignore_errors=True)
        assert call(folder, ["polyrl", "envs", "new", "word_sums"], patch) == 0
    return folder / "polyrl-word-sums"


@pytest.mark.parametrize("text", RUN_HERE)
def test_every_cheap_command_runs(
    text: str, folder: Path, own_package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [{"RUN": "latest", "folder": "."}.get(word, word) for word in shlex.split(text)]
    if words[1:3] == ["envs", "new"]:
        shutil.rmtree(own_package)
    if words[1] == "envs" and "word_sums" in words and words[2] != "new":  # once installed, it goes by its name
        words[words.index("word_sums")] = f"{own_package}/polyrl_word_sums/env.py:WordSumsEnv"
    code = call(folder, words, monkeypatch)
    said = capsys.readouterr()
    assert code == 0, f"{text}: exit code {code}\n{said.out[-500:]}{said.err[-500:]}"
    assert said.out.strip()
    if "--json" in words:
        json.loads(said.out)


def test_what_is_run_elsewhere_exists_and_is_called_there() -> None:
    """The table neither outlives a command nor names a test that says nothing of it."""
    for name, (test, words) in ELSEWHERE.items():
        assert name in commands(), f"ELSEWHERE names {name!r}, which is no command"
        assert words in (ROOT / test).read_text(encoding="utf-8"), f"{test} has no {words!r}: what tests polyrl {name} now?"


@pytest.mark.parametrize("command", of("ray"), ids=lambda c: f"{c.page}: {c.text}")
def test_every_command_of_ray_exists_with_its_options(command: Command) -> None:
    from ray.scripts.scripts import cli

    words, found = command.words[1:], cli
    while words and (inner := getattr(found, "commands", None)):
        assert words[0] in inner, f"no command {command.text}"
        found, words = inner[words[0]], words[1:]
    if words or command.block:
        found.make_context(command.text, list(words))
    if "--" in words:  # what the job is to run
        ours = words[words.index("--") + 1 :]
        name, rest = split(ours)
        commands()[name].make_context(name, rest)


@pytest.mark.parametrize("command", [*of("wandb"), *of("mlflow"), *of("tensorboard")], ids=lambda c: f"{c.page}: {c.text}")
def test_every_command_of_a_tracker_is_one_that_its_package_installs(command: Command) -> None:
    pytest.importorskip(command.words[0])
    assert (Path(sys.executable).parent / command.words[0]).is_file()


@pytest.mark.parametrize("command", of("make"), ids=lambda c: f"{c.page}: {c.text}")
def test_every_make_target_exists(command: Command) -> None:
    words = [word for word in command.words[1:] if not word.startswith("PYTHON=")]
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if command.words[1:]:
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert command.words[1] in targets


@pytest.mark.parametrize("command", [*of(".venv/bin/python"), *of("python")], ids=lambda c: f"{c.page}: {c.text}")
def test_every_test_or_module_named_exists(command: Command) -> None:
    for word in command.words[1:]:
        if "/" in word or word.endswith(".py"):
            assert (ROOT / word).exists(), f"there is no {word}"


@pytest.mark.parametrize("command", of("pip"), ids=lambda c: f"{c.page}: {c.text}")
def test_what_is_to_be_installed_is_one_of_our_extras_or_a_folder_made_before(command: Command) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    known = {re.split(r"[=<>\[]", requirement)[0] for extra in extras.values() for requirement in extra}
    for word in command.words[2:]:
        name = re.split(r"[=<>\[]", word)[0]
        extra = re.fullmatch(r"polyrl\[([a-z-]+)\]", word)
        assert word in ("-e", "--no-deps", "polyrl-word-sums") or name in known or (extra and extra[1] in extras), word


@pytest.mark.parametrize("command", of("duckdb"), ids=lambda c: f"{c.page}: {c.text}")
def test_every_query_runs(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb

    monkeypatch.chdir(folder)
    sql = command.words[command.words.index("-c") + 1].replace("<id>", "*")
    assert duckdb.sql(sql).fetchall()


def test_the_config_reference_has_every_key_and_only_those() -> None:
    keys = {row[0] for row in reference(RunConfig)}
    assert {section.prefix + row[0] for section in sections() for row in section.rows} == keys
    table = config_tables()
    assert all(f"| `{key.rpartition('.')[2]}` |" in table for key in keys)


def test_every_key_of_the_config_has_a_meaning() -> None:
    silent = [section.prefix + key for section in sections() for key, _, _, meaning in section.rows if not meaning]
    assert not silent, f"no docstring: {', '.join(silent)}"


NO_KEYS = ("learner.apply", "environments.check.check_environment")
"""Code that is written as a key would be."""

NOT_OURS = ("docs/about/performance-summary.md",)
"""Files of other projects that a page gives as its source."""

SECTIONS = {key.split(".")[0] for key, _, _ in reference(RunConfig) if "." in key}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {code.split("=")[0].rstrip(".") for code in re.findall(r"`([a-z_]+\.[a-z0-9_<>.]+)(?:=[^`]*)?`", text)}
    prefixes = {s.prefix.rstrip(".") for s in sections()}
    prefixes |= {prefix.removesuffix(".<name>") for prefix in prefixes}
    keys = [k for k in named if k.split(".")[0] in SECTIONS and not k.endswith((".py", ".md", ".yaml", ".parquet"))]
    wrong = [k for k in keys if not known_key(k) and k not in prefixes and k not in NO_KEYS]
    assert not wrong, f"no such key: {', '.join(wrong)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    top = {p.name for p in ROOT.iterdir() if p.is_dir()}
    named = set(re.findall(r"`([\w./-]+\.(?:py|md|yaml|json|txt|sh))`", page.read_text(encoding="utf-8")))
    wrong = [n for n in named if n.split("/")[0] in top and "/" in n and n not in NOT_OURS and not (ROOT / n).exists()]
    assert not wrong, f"no such file: {', '.join(wrong)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_yaml_of_a_page_is_yaml_with_keys_that_exist(page: Path) -> None:
    from omegaconf import OmegaConf

    from rl_core.config_files import check_keys

    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        tree = OmegaConf.to_container(OmegaConf.create(block))
        assert isinstance(tree, dict)
        if set(tree) <= {row[0].split(".")[0] for row in reference(RunConfig)}:
            check_keys(tree, RunConfig, "", page.name)


def test_the_page_on_the_loop_shows_all_of_it() -> None:
    """Every line of the file, but for its imports, is on the page, or in a function that is."""
    page = (ROOT / "docs/loop.md").read_text(encoding="utf-8")
    source = (ROOT / "rl_core/loop.py").read_text(encoding="utf-8").splitlines()
    shown: set[int] = set()
    for name in re.findall(r"<!-- code rl_core/loop.py ?(\S*) -->", page):
        first, last = lines_of(ROOT / "rl_core/loop.py", name)
        shown |= set(range(first, last + 1))
    first_code = next(i for i, line in enumerate(source, 1) if line.startswith("T = "))
    hidden = [line for i, line in enumerate(source, 1) if i > first_code and i not in shown and line.strip() and not line.startswith('"""')]
    hidden = [line for line in hidden if not re.match(r"[^ ].*\"\"\"$", line)]
    assert not hidden, hidden
    quoted = re.findall(r"`([a-z_]+(?:\.[a-z_]+)*(?:\(\))?)`", page)
    assert len(quoted) > 8
    assert not [q for q in quoted if q.removesuffix("()") not in "\n".join(source)]


def test_a_page_that_names_code_which_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"has no 'train\.nothing'"):
        filled("<!-- code rl_core/loop.py train.nothing -->")
    with pytest.raises(ValueError, match="has no table"):
        filled("<!-- table README.md | nothing | -->")
    block = filled("<!-- code rl_core/loop.py train.generate -->")
    assert block.splitlines()[1] == "async def generate() -> None:"


def test_a_page_that_would_load_something_from_elsewhere_is_an_error() -> None:
    assert OUTSIDE.search('<script src="https://cdn.example/x.js">')
    assert OUTSIDE.search('<link rel="stylesheet" href="//fonts.example/a.css">')
    assert not OUTSIDE.search(
        '<a href="https://example.org">there</a><link rel="stylesheet" href="assets/a.css"><script src="assets/b.js">'
    )


def test_the_configs_that_ship_are_right() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        imported = path.name.startswith("smollm2")  # its model is made by a command that needs a network
        load_config(path, ["model.path=configs/models/seed"] if imported else [])
    assert os.access(ROOT / ".ci/run", os.X_OK)
