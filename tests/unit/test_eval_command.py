"""polyrl eval: what is asked for, what is refused before anything starts, and what its tables, files and figures say."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import infra.evaluating as evaluating
from infra.cli.evals import at_budget, configured, parse_budgets
from infra.errors import UsageError
from infra.eval_report import draw, tables, to_csv
from infra.evaluating import Plan, Row, settings
from infra.launch import task_source
from rl_core.config import RunConfig
from rl_core.evaluation import normal, score
from rl_core.run_store import create_run_dir
from tests.unit.fakes import group_result
from tests.unit.test_cli import Call, polyrl  # noqa: F401

ROOT = Path(__file__).parents[2]
SEED_MODEL, QUICKSTART = ROOT / "configs" / "models" / "seed", ROOT / "configs" / "quickstart.yaml"
SMALL = [str(QUICKSTART), "environments.math.options.digits=2"]


@pytest.fixture
def evaluate(polyrl: Call) -> Call:  # noqa: F811
    return partial(polyrl, "eval")


def rows(masked: bool = False) -> list[Row]:
    """Two environments at three budgets; one of them gains from thinking."""
    found = []
    for budget, right in ((0, 1), (64, 3), (None, 4)):
        groups = []
        for i in range(4):
            passed, tokens = (right, 400) if i < 2 else (1, 4000)
            thinking = {"thinking_tokens": 4 * (budget or 100), "thoughts_closed": 0 if budget is None else 4}
            rewards = (1.0,) * passed + (0.0,) * (4 - passed)
            groups.append(group_result(task_key=f"k{i}", rewards=rewards, prompt_tokens=tokens, **thinking))
        result = score(groups, {"k0": "add", "k1": "add", "k2": "mul", "k3": "mul"})
        found += [Row(env="math", budget=budget, result=result)]
        lost = score([replace(g, rewards=(), statuses=("infra_error",) * 4) for g in groups]) if masked else result
        found += [Row(env="code", budget=budget, result=lost)]
    return found


def test_budgets_are_read_in_order_and_nonsense_is_refused() -> None:
    assert parse_budgets("0,64, 256,none") == [0, 64, 256, None]
    assert parse_budgets("") is None
    for text, said in {"0,x": "'x' is no budget", "-1": "'-1' is no budget", "1,1": "names one twice", "0,": "'' is no budget"}.items():
        with pytest.raises(UsageError, match=said):
            parse_budgets(text)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([str(SEED_MODEL)], "is a model; say as well which CONFIG"),
        (["configs/quickstart.yaml"], "wanted a run or a checkpoint folder before it: polyrl eval latest configs/quickstart.yaml"),
        ([str(SEED_MODEL), *SMALL, "--step", "3"], "--step 3 is of a run"),
        ([str(SEED_MODEL), *SMALL, "--env", "maths"], "--env maths: "),
        ([str(SEED_MODEL), *SMALL, str(QUICKSTART)], "got 2 configs"),
        ([str(SEED_MODEL), *SMALL, "loop.stepz=3"], "did you mean loop.steps?"),
        ([str(SEED_MODEL), *SMALL, "--env", "math", "--budgets", "0,many"], "'many' is no budget"),
        (["latest", "--runs-dir", "/nowhere"], "no run in '/nowhere'"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_starts(
    evaluate: Call, monkeypatch: pytest.MonkeyPatch, args: list[str], said: str
) -> None:
    monkeypatch.setattr(evaluating, "run", lambda *_: pytest.fail("it was started"))
    code, out, err = evaluate(*args)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_run_is_evaluated_with_its_own_environments_and_newest_weights(tmp_path: Path) -> None:
    config = configured(str(SEED_MODEL), [*SMALL, f"runs_dir={tmp_path}"], ["math", "tools"], None, tmp_path)
    assert (list(config.environments), config.model.path) == (["math", "tools"], str(SEED_MODEL))
    run_dir = create_run_dir(config)
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        configured("latest", [], [], None, tmp_path)
    for step in (5, 10):
        folder = run_dir / "checkpoints" / f"step-{step:06d}"
        (folder / "model").mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        (folder / "model" / "config.json").write_bytes((SEED_MODEL / "config.json").read_bytes())
    of_run = configured("latest", ["eval.seed=9"], ["math"], None, tmp_path)
    assert of_run.model.path == str(run_dir / "checkpoints" / "step-000010" / "model")
    assert (list(of_run.environments), of_run.eval.seed, of_run.environments["math"].options["digits"]) == (["math"], 9, 2)
    assert configured("latest", [], [], 5, tmp_path).model.path.endswith("step-000005/model")


def test_without_budgets_each_environment_has_its_own_and_with_them_all_have_the_same(tmp_path: Path) -> None:
    config = configured(str(SEED_MODEL), [*SMALL, "environments.math.thinking_budget=7"], ["math", "tools"], None, tmp_path)
    assert settings(config, Plan(budgets=None, tasks=1, samples=1)) == [{"math": 7, "tools": None}]
    assert settings(config, Plan(budgets=[0, None], tasks=1, samples=1)) == [{"math": 0, "tools": 0}, {"math": None, "tools": None}]
    assert {e.thinking_budget for e in at_budget(config, 3).environments.values()} == {3}
    assert config.environments["math"].thinking_budget == 7
    first, again = (next(task_source(config, "math", "eval", config.eval.seed)) for _ in range(2))
    assert first == again
    assert first.split == "eval"


def test_the_command_prints_tables_and_writes_files(evaluate: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[RunConfig, Plan]] = []

    def run(config: RunConfig, plan: Plan, progress: Callable[[int | None, int, int], None]) -> list[Row]:
        asked.append((config, plan))
        progress(None, 0, 0)
        progress(64, 8, 8)
        return rows()

    monkeypatch.setattr(evaluating, "run", run)
    args = [str(SEED_MODEL), *SMALL, "--env", "math", "--tasks", "4", "--samples", "4", "--budgets", "0,64,none"]
    code, out, err = evaluate(*args, "--out", str(tmp_path / "new"))
    assert code == 0
    assert "8/8 groups at a thinking budget of 64" in err
    assert asked[0][1] == Plan(budgets=[0, 64, None], tasks=4, samples=4)
    assert "math           budget" not in out
    assert "math: reward" in out
    assert "math by difficulty" in out
    assert (tmp_path / "new" / "budgets.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "new" / "scores.csv").read_text().splitlines()) == 1 + len(rows())
    code, out, _ = evaluate(*args, "--json")
    report = json.loads(out)
    assert (code, report["seed"], [row["budget"] for row in report["rows"]][::2]) == (0, 1234, [0, 64, None])
    assert json.loads((tmp_path / "new" / "scores.json").read_text())["rows"] == report["rows"]


def test_an_environment_whose_rollouts_were_all_lost_is_a_failure(evaluate: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "run", lambda *_: rows(masked=True))
    code, _, err = evaluate(str(SEED_MODEL), *SMALL, "--env", "math", "--budgets", "0,64,none")
    assert code == 1
    assert "no rollout of code counts" in err


def test_tables_and_csv_say_what_was_measured(tmp_path: Path) -> None:
    lines = tables(rows())
    assert lines[0].split() == ["environment", "budget", "pass@1", "pass@4", "reward", "thinking", "closed", "rollouts", "masked"]
    assert lines[1].split() == ["math", "0", "25.0%", "[5,", "70]", "100.0%", "[51,", "100]", "0.250", "100.0", "1.00", "16", "0"]
    assert [line.split()[1:4] for line in lines if line.startswith("  add")] == [["25%", "/8", "75%"]] * 2
    found = list(csv.DictReader(to_csv(rows()).splitlines()))
    assert [(row["env"], row["budget"], float(row["reward"])) for row in found[::2]] == [
        ("math", "0", 0.25), ("math", "64", 0.5), ("math", "none", 0.625),
    ]  # fmt: skip
    assert float(found[0]["pass@4_low"]) == pytest.approx(0.51, abs=0.01)
    draw(rows(), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    assert normal([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5 - 1.959964 * 1.2909944 / 2, 2.5 + 1.959964 * 1.2909944 / 2))
    assert (normal([0.5]), normal([])) == ((0.5, 0.5), (0.0, 0.0))
