"""What the commands print for programs, and what they offer to a shell."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import environments.humaneval_cases
import environments.humaneval_fakes
import infra.evaluating
from infra.cli import clusters, evals, replays
from infra.cli.common import print_json
from infra.docs import commands
from rl_core.ledger import Ledger
from rl_core.types import Status, Task, Verdict
from tests.unit.stored_runs import store_run
from tests.unit.test_cli import Call, polyrl  # noqa: F401

ROOT = Path(__file__).parents[2]
RUN = "20260101-000000-demo"


ACTIONS = {
    "run", "submit", "resume", "stop", "chaos",  # a run, and where it is afterwards: `show` has its data
    "logs", "dashboard", "envs sample",  # a stream, a server, a conversation
    "envs new", "export", "model seed", "model import", "reward train",  # a folder
}  # fmt: skip
"""Commands that do something, and print only how it goes. Any other one prints data."""

DATA: dict[str, tuple[list[str], set[int]]] = {
    "simulate": (["--runs", "1"], {0}),
    "jobs": ([], {0}),
    "runs": ([], {0}),
    "show": (["latest"], {0}),
    "curves": (["latest"], {0}),
    "ledger": (["latest"], {0}),
    "sql": (["latest", "select * from rollouts"], {0}),
    "rollouts": (["latest"], {0}),
    "eval": (["latest", "--env", "math"], {0}),
    "replay": (["latest", "--step", "1"], {0}),
    "audit": (["latest", "--sample", "1"], {0, 1}),
    "bench": ([], {0}),
    "doctor": ([], {0, 1}),
    "envs list": ([], {0}),
    "envs show": (["math", "--tasks", "1"], {0}),
    "envs check": (["math"], {0}),
    "config show": (["configs/quickstart.yaml"], {0}),
    "config check": (["configs/quickstart.yaml", "sandbox=bubblewrap", "environments={math: {}}"], {0}),
    "config diff": (["configs/quickstart.yaml", "latest"], {0}),
    "verify humaneval": (["--fakes", "1"], {0}),
}
"""Command -> arguments for the folder below, and its exit codes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """configs/, runs/ with one run of the quickstart's config, and a checkpoint."""
    root = tmp_path_factory.mktemp("data")
    run = store_run(root / "runs" / RUN)
    (root / "configs").symlink_to(ROOT / "configs")
    (run / "config.yaml").write_text((ROOT / "configs/quickstart.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (root / "checkpoint").mkdir()
    (root / "checkpoint" / "model").symlink_to(ROOT / "configs/models/seed")
    ledger = Ledger(run / "ledger.sqlite")
    ledger.draw(Task(env="math", key="k", split="train", seed=1, public={}, private={}), 0)
    ledger.close()
    return root


@pytest.fixture
def within(folder: Path, polyrl: Call, monkeypatch: pytest.MonkeyPatch) -> Call:  # noqa: F811
    """The command, called within the folder."""
    monkeypatch.chdir(folder)
    return polyrl


@pytest.fixture
def elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs a cluster, engines, weights or a sandbox answers at once; other tests call the real thing."""
    job = SimpleNamespace(submission_id="polyrl-1", status=SimpleNamespace(value="RUNNING"), metadata={}, start_time=1, entrypoint="x")
    monkeypatch.setattr(clusters, "_client", lambda address, runs_dir: SimpleNamespace(list_jobs=lambda: [job]))
    monkeypatch.setattr(evals, "checkpoint_of", lambda run, step: folder / "checkpoint")
    monkeypatch.setattr(evals, "preflight", lambda config: None)
    monkeypatch.setattr(infra.evaluating, "run", lambda config, plan, progress: progress(None, 0, 0) or [])
    figure = SimpleNamespace(name="learner/loss", recorded=0.5, recomputed=0.5, changed=None, agrees=True)
    monkeypatch.setattr(replays, "compute", lambda *args: [figure])

    def attempts(wanted: Iterable[tuple[str, str]], sandbox: str, threads: int) -> Iterable[Any]:
        for problem, program in wanted:
            verdict = Verdict(status=Status.OK, reward=float(program == "reference"))
            yield SimpleNamespace(problem=problem, program=program, verdict=verdict)

    monkeypatch.setattr(environments.humaneval_cases, "problems", lambda: {"HumanEval/0": None})
    monkeypatch.setattr(environments.humaneval_cases, "data_version", lambda: "1")
    monkeypatch.setattr(environments.humaneval_fakes, "attempt_all", attempts)


def test_every_command_either_does_something_or_prints_data_with_json() -> None:
    having = {name for name, command in commands().items() if any("--json" in parameter.opts for parameter in command.params)}
    assert having == set(DATA)
    assert set(commands()) - having == ACTIONS


@pytest.mark.parametrize("name", DATA)
def test_its_output_is_json_and_nothing_else(name: str, within: Call, elsewhere: None) -> None:
    arguments, codes = DATA[name]
    code, out, err = within(*name.split(), *arguments, "--json")
    assert code in codes, out + err
    assert isinstance(json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")), dict | list)


def test_numbers_that_json_lacks_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x"), "d": "\ud800"})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": "x", "d": "\ud800"}


# Configs, compared.


def test_two_configs_that_say_the_same_do_not_differ(within: Call, folder: Path, tmp_path: Path) -> None:
    assert within("config", "diff", "configs/quickstart.yaml", RUN)[:2] == (0, "no difference\n")
    assert within("config", "diff", f"runs/{RUN}", "latest", "--json")[:2] == (0, "[]\n")
    spelled_out = tmp_path / "full.yaml"
    spelled_out.write_text(within("config", "show", "configs/quickstart.yaml")[1], encoding="utf-8")
    assert within("config", "diff", str(spelled_out), "configs/quickstart.yaml")[0] == 0, "defaults are no difference"


def test_each_key_that_differs_is_named_with_both_values(within: Call, tmp_path: Path) -> None:
    changed = tmp_path / "changed.yaml"
    overrides = ("loop.steps=7", "name=other", "environments.math.options.new=1")
    changed.write_text(within("config", "show", "configs/quickstart.yaml", *overrides)[1], encoding="utf-8")
    code, out, _ = within("config", "diff", "configs/quickstart.yaml", str(changed))
    steps = json.loads(within("config", "show", "configs/quickstart.yaml", "--json")[1])["loop"]["steps"]
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    wanted = [["environments.math.options.new", "(absent) -> 1"], ["loop.steps", f"{steps} -> 7"], ["name", "'quickstart' -> 'other'"]]
    assert (code, lines) == (1, wanted)
    code, out, _ = within("config", "diff", "configs/quickstart.yaml", str(changed), "--json")
    assert (code, json.loads(out)[:2]) == (1, [{"key": "environments.math.options.new", "b": 1}, {"key": "loop.steps", "a": steps, "b": 7}])


@pytest.mark.parametrize("name", ["nothing", "configs/none.yaml", "configs"])
def test_what_is_neither_file_nor_run_cannot_be_compared(within: Call, name: str) -> None:
    code, out, err = within("config", "diff", name, "latest")
    assert (code, out) == (2, "")
    assert name in err


# Shells.


def offered(within: Call, monkeypatch: pytest.MonkeyPatch, typed: str) -> list[str]:
    """What bash is told after `typed`; the last word is the one being typed."""
    monkeypatch.setenv("_POLYRL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    return within()[1].split()


COMPLETIONS = {
    "polyrl sho": ["show"],
    "polyrl config d": ["diff"],
    "polyrl show ": ["latest", RUN],
    "polyrl show 2026": [RUN],
    "polyrl rollouts latest --runs-dir elsewhere 2026": [],
    "polyrl run configs/q": ["configs/quickstart.yaml"],
    "polyrl config diff configs/quickstart.yaml l": ["latest"],
    "polyrl simulate --from 2": [RUN],
    "polyrl envs check tool": ["tools"],
    "polyrl bench sto": ["store"],
    "polyrl show --js": ["--json"],
}


@pytest.mark.parametrize("typed", COMPLETIONS)
def test_a_shell_is_offered_what_fits(within: Call, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    assert offered(within, monkeypatch, typed) == COMPLETIONS[typed]


def test_config_files_are_offered_before_anything_is_typed(within: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    found = offered(within, monkeypatch, "polyrl run ")
    assert {"configs/quickstart.yaml", "configs/models/"} <= set(found)
    assert all((ROOT / name).exists() for name in found)


def test_the_script_for_a_shell_is_printed(within: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, err = within("--show-completion", "bash")
    assert code == 0, err
    assert "_POLYRL_COMPLETE=complete_bash" in out
