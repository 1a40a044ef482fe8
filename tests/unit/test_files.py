"""Tasks from files: the formats, what the policy sees, the split, the stream, and what is said about a file that is no good."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from environments.base import TextEnv
from environments.check import play, play_oracle
from environments.code import CodeEnv
from environments.host import EnvHost, TaskUnusable
from environments.instructions import InstructionsEnv
from environments.math import MathEnv
from rl_core.types import Turn

SUMS = [{"question": f"What is {a} plus {b}?", "answer": str(a + b), "difficulty": "sum"} for a in range(20) for b in range(8)]


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(list(rows)).to_parquet(str(path))
    return str(path)


def saved(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(list(rows))}).save_to_disk(str(path))
    return str(path)


def hub_folder(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    (path / "data").mkdir(parents=True)
    for part in range(2):
        parquet(path / "data" / f"train-0000{part}-of-00002.parquet", rows[part::2])
    return str(path)


@pytest.mark.parametrize(("write", "name"), [(jsonl, "a.jsonl"), (parquet, "a.parquet"), (saved, "folder"), (hub_folder, "hub")])
def test_every_format_gives_the_same_tasks_and_the_right_answer_is_paid(tmp_path: Path, write: Any, name: str) -> None:
    options = {"file": write(tmp_path / name, SUMS)}
    found = {t.public["question"]: t for split in ("train", "eval") for t in islice(MathEnv.tasks(split, 0, options), 160)}
    assert set(found) == {row["question"] for row in SUMS}
    env = MathEnv(**options)
    for task in islice(found.values(), 5):
        assert play_oracle(env, task).reward == 1.0
        assert play(env, task, lambda _: Turn(content="1000")).reward == 0.0
        assert task.difficulty == "sum"


def test_an_epoch_has_every_row_once_in_an_order_of_its_own_and_resumes(tmp_path: Path) -> None:
    options = {"file": jsonl(tmp_path / "a.jsonl", SUMS)}
    count = len({t.key for t in islice(MathEnv.tasks("train", 0, options), 400)})
    stream = [t.key for t in islice(MathEnv.tasks("train", 0, options), 2 * count)]
    first, second = stream[:count], stream[count:]
    assert len(set(first)) == count
    assert set(first) == set(second)
    assert first != second
    assert [t.key for t in islice(MathEnv.tasks("train", 0, options, start=count - 3), 6)] == stream[count - 3 : count + 3]
    assert [t.key for t in islice(MathEnv.tasks("train", 1, options), count)] != first


def test_the_split_is_by_what_the_policy_sees(tmp_path: Path) -> None:
    twice = [*SUMS, *({**row, "answer": "0", "difficulty": "other"} for row in SUMS)]  # the same questions, other gold
    options = {"file": jsonl(tmp_path / "a.jsonl", twice)}
    train, held_out = ({t.public["question"] for t in islice(MathEnv.tasks(s, 0, options), 400)} for s in ("train", "eval"))
    assert train
    assert held_out
    assert not train & held_out


def test_columns_go_by_any_name_and_gold_stays_private(tmp_path: Path) -> None:
    rows = [{"problem": r["question"], "final": r["answer"] + " SECRET", "notes": "SECRET"} for r in SUMS]
    options = {"file": jsonl(tmp_path / "a.jsonl", rows), "columns": {"question": "problem", "answer": "final"}}
    task = next(MathEnv.tasks("train", 0, options))
    assert "SECRET" in task.private["answer"]
    assert "SECRET" not in str(MathEnv(**options).begin(task)) + str(task.public)


def test_a_gold_answer_that_cannot_be_read_is_the_tasks_fault_and_costs_nobody_a_reward(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": "\\frac{1}{"} for n in range(100)]
    options = {"file": jsonl(tmp_path / "a.jsonl", rows)}
    with pytest.raises(TaskUnusable):
        EnvHost().open("s", "math", options, next(MathEnv.tasks("train", 0, options)))


@pytest.mark.parametrize(
    ("env", "rows", "options", "complaint"),
    [
        (MathEnv, [], {}, "holds no rows"),
        (
            MathEnv,
            [{"q": "1+1", "answer": "2"}],
            {},
            "there is no column 'question', only q, answer; say which is which with options.columns",
        ),
        (MathEnv, SUMS, {"columns": {"question": "problem"}}, "there is no column 'problem'"),
        (MathEnv, SUMS, {"columns": {"gold": "answer"}}, "names gold; this environment reads question, answer, shape"),
        (MathEnv, [{"question": "1+1", "answer": ""}], {}, "row 0: column 'answer' is empty"),
        (MathEnv, SUMS[:2], {}, "2 rows leave none for eval"),
        (CodeEnv, [{"prompt": "p", "inputs": [1, 2], "expected": [1]}], {}, "2 inputs and 1 expected"),
        (CodeEnv, [{"prompt": "p", "inputs": "no list", "expected": [1]}], {}, "row 0"),
        (InstructionsEnv, [{"prompt": "p", "rules": '[["wordz", 3]]'}], {}, "wanted a list that begins with one of words"),
        (InstructionsEnv, [{"prompt": "p", "rules": '[["words"]]'}], {}, "It has exactly"),
    ],
)
def test_a_file_that_is_no_good_is_one_sentence(
    tmp_path: Path, env: type[TextEnv], rows: Sequence[dict[str, Any]], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        next(env.tasks("train", 0, {"file": jsonl(tmp_path / "a.jsonl", rows), **options}))


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        next(MathEnv.tasks("train", 0, {"file": str(tmp_path / "none.jsonl")}))
    (tmp_path / "a.jsonl").write_text("this is not JSON\n")
    with pytest.raises(ValueError, match="cannot be read"):
        next(MathEnv.tasks("train", 0, {"file": str(tmp_path / "a.jsonl")}))
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"ends with '\.csv', wanted"):
        next(MathEnv.tasks("train", 0, {"file": str(tmp_path / "a.csv")}))


def test_programs_and_rules_from_files_are_judged_by_what_the_rows_say(tmp_path: Path) -> None:
    programs = [
        {
            "prompt": f"Write f(x) that adds {n}.", "inputs": json.dumps([1, 2, "no"]), "expected": json.dumps([1 + n, 2 + n, None]),
            "solution": f"def f(x):\n    return x + {n} if isinstance(x, int) else None",
        }
        for n in range(100)
    ]  # fmt: skip
    code = {"file": jsonl(tmp_path / "code.jsonl", programs)}
    env, task = CodeEnv(**code), next(CodeEnv.tasks("train", 0, code))
    assert play_oracle(env, task).reward == 1.0
    assert play(env, task, lambda _: Turn(content="def f(x): return x")).reward == 0.0
    forms = [{"prompt": f"Name {n} trees in small letters.", "rules": json.dumps([["words", n], ["lower"]])} for n in range(2, 102)]
    texts = {"file": jsonl(tmp_path / "forms.jsonl", forms)}
    form_env, form = InstructionsEnv(**texts), next(InstructionsEnv.tasks("train", 0, texts))
    count = form.public["rules"][0][1]
    assert play(form_env, form, lambda _: Turn(content="oak " * count)).reward == 1.0
    assert play(form_env, form, lambda _: Turn(content="Oak " * count)).reward == 0.0
    with pytest.raises(NotImplementedError):
        form_env.oracle(form_env.begin(form), random.Random(0))
