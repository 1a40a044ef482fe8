"""The commands, called as the console script calls them. What is wrong is one sentence on standard error and exit code 2."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from environments.sandbox import SandboxUnavailable
from infra import bench, preflight
from infra.bench import find_benchmarks
from infra.cli.main import main
from rl_core.events import Event
from rl_core.ledger import Ledger
from rl_core.run_store import RunStore
from rl_core.types import Task
from tests.unit.stored_runs import score, store_run

Call = Callable[..., tuple[int, str, str]]
BENCHMARKS = find_benchmarks()


@pytest.fixture
def polyrl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the command; returns exit code, standard output, standard error."""

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polyrl", *args])
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config that can run, as far as can be known beforehand."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"num_nextn_predict_layers": 1}')
    path = tmp_path / "small.yaml"
    path.write_text(f"model: {{path: {tmp_path}/model}}\nruns_dir: {tmp_path}/runs\nenvironments: {{math: {{options: {{digits: 2}}}}}}\n")
    return path


WRONG = {
    "an unknown key": (["loop.stepz=3"], "unknown key loop.stepz; did you mean loop.steps?"),
    "a wrong type": (["loop.steps=abc"], "loop.steps"),
    "a negative staleness": (["loop.max_staleness=-1"], "loop.max_staleness is -1, wanted 0 or more"),
    "an unknown environment": (["environments.maths.share=1"], "no environment 'maths'; did you mean 'math'?"),
    "an unknown option of an environment": (["environments.math.options.digitz=1"], "did you mean 'digits'?"),
    "LoRA and a trained router": (
        ["learner.lora.rank=4", "learner.train_router=true"],
        "learner.lora trains what learner.lora.targets names",
    ),
    "a missing checkpoint": (["model.path=/nowhere"], "no checkpoint in '/nowhere'"),
    "an override without a value": (["loop.steps"], "wanted key=value"),
    "a folder that cannot be written": (["runs_dir=/proc/runs"], "runs_dir="),
}


@pytest.mark.parametrize("command", ["run", "submit"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_before_anything_starts(polyrl: Call, config: Path, command: str, case: str) -> None:
    overrides, sentence = WRONG[case]
    code, out, err = polyrl(command, str(config), *overrides)
    assert code == 2
    assert sentence in err
    assert err.startswith("polyrl: ")
    assert err.count("\n") == 1
    assert out == ""
    assert not (config.parent / "runs").exists()


def test_a_full_disk_is_refused(polyrl: Call, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MIN_FREE_GIB", 1e9)
    code, _, err = polyrl("run", str(config))
    assert code == 2
    assert "GiB free, wanted at least" in err
    assert "runs_dir=PATH" in err


def test_a_machine_without_a_sandbox_is_told_before_anything_starts(polyrl: Call, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(name: str) -> None:
        raise SandboxUnavailable(f"{name}: nothing isolates")

    monkeypatch.setattr("environments.sandbox.choose_sandbox", unavailable)
    code, _, err = polyrl("run", str(config), "environments.code.share=1", "sandbox=bubblewrap")
    assert code == 2
    assert "environments.code runs programs in a sandbox" in err
    assert "bubblewrap: nothing isolates" in err
    assert not (config.parent / "runs").exists()
    assert polyrl("config", "check", str(config), "sandbox=bubblewrap")[0] == 0


def test_speculation_without_an_mtp_head_is_refused(polyrl: Call, config: Path) -> None:
    (config.parent / "model" / "config.json").write_text("{}")
    code, _, err = polyrl("run", str(config))
    assert code == 2
    assert "set rollout.speculative_tokens=0" in err
    assert polyrl("config", "check", str(config), "rollout.speculative_tokens=0")[0] == 0


def test_a_checkpoint_cut_off_in_the_download_is_refused(polyrl: Call, config: Path) -> None:
    (config.parent / "model" / "config.json").write_text('{"num_next')
    code, _, err = polyrl("run", str(config))
    assert code == 2
    assert "is not valid JSON" in err


def test_a_config_that_can_run_is_said_to_be_fine(polyrl: Call, config: Path) -> None:
    code, out, _ = polyrl("config", "check", str(config), "loop.steps=7")
    assert code == 0
    assert "7 steps of 16 groups over math" in out


def test_the_resolved_config_is_shown_with_its_overrides(polyrl: Call, config: Path) -> None:
    code, out, _ = polyrl("config", "show", str(config), "loop.steps=7")
    assert code == 0
    assert "steps: 7" in out
    assert "max_staleness: 1" in out
    code, out, _ = polyrl("config", "show")
    assert code == 0
    assert "learner.importance.rule" in out


def test_checking_arguments_imports_neither_ray_nor_vllm_nor_torch(config: Path) -> None:
    program = (
        "import sys; from infra.cli.main import main; sys.argv = ['polyrl', 'run', sys.argv[1], 'loop.stepz=1']\n"
        "try: main()\n"
        "except SystemExit as e: print(e.code, sorted({'ray', 'vllm', 'torch', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(config)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"


def test_show_prints_json_with_scores_before_and_after(polyrl: Call, tmp_path: Path) -> None:
    store_run(tmp_path / "one")
    code, out, _ = polyrl("show", "latest", "--json", "--runs-dir", str(tmp_path))
    assert code == 0
    shown = json.loads(out)
    assert shown["state"] == "finished"
    before, after = shown["environments"]["math"]["before"], shown["environments"]["math"]["after"]
    assert (before["pass_rate"], before["n"], before["ci95"]) == (0.3, 128, [0.22, 0.38])
    assert (after["pass_rate"], after["n"], after["ci95"]) == (0.8, 128, [0.72, 0.88])


def test_show_breaks_the_held_out_scores_down(polyrl: Call, tmp_path: Path) -> None:
    run = store_run(tmp_path / "one")
    store = RunStore(run)
    for label, add in (("before", 0.2), ("after", 0.9)):
        buckets = {"add": {"pass_rate": add, "n": 64}, "mul": {"pass_rate": 0.1, "n": 64}}
        math = {
            **score(0.5),
            "pass_at": {"1": 0.5, "2": add},
            "by_difficulty": buckets,
            "by_length": {"<=128": {"pass_rate": 0.5, "n": 128}},
        }
        store.emit(Event(kind="eval", data={"version": 4, "label": label, "environments": {"math": math}}))
    store.close()
    out = polyrl("show", "--runs-dir", str(tmp_path))[1]
    assert "pass@1 50% -> 50%  pass@2 20% -> 90%" in out
    assert "add 20% -> 90% (64)  mul 10% -> 10% (64)" in out
    assert "<=128" not in out  # one bucket says nothing new


def test_a_killed_run_can_be_shown_and_drawn(polyrl: Call, tmp_path: Path) -> None:
    store_run(tmp_path / "one", finished=False)
    code, out, _ = polyrl("show", "--runs-dir", str(tmp_path))
    assert code == 0
    assert "killed" in out
    assert "ppo clip; masked importance" in out
    assert ["math", "2.50%", "-", "0.900", "-", "0.500"] in [line.split() for line in out.splitlines()]
    assert polyrl("curves", "--runs-dir", str(tmp_path))[0] == 0
    assert (tmp_path / "one" / "curves.png").is_file()
    assert "killed" in polyrl("runs", "--runs-dir", str(tmp_path))[1]


def test_a_run_that_is_not_there_is_wrong_usage(polyrl: Call, tmp_path: Path) -> None:
    for command in ("show", "curves", "ledger"):
        code, _, err = polyrl(command, "nope", "--runs-dir", str(tmp_path))
        assert code == 2
        assert "no run in" in err


def test_the_ledger_adds_up_or_the_command_fails(polyrl: Call, tmp_path: Path) -> None:
    run = store_run(tmp_path / "one")
    ledger = Ledger(run / "ledger.sqlite")
    for position, key in enumerate("abc"):
        ledger.draw(Task(env="math", key=key, split="train", seed=0, public={}), position)
    ledger.filter("g000000", "no signal")
    ledger.ready("g000001")
    ledger.train(["g000001"], 1)
    ledger.close()
    code, out, _ = polyrl("ledger", "--json", "--runs-dir", str(tmp_path))
    assert code == 0
    row = json.loads(out)[0]
    assert {k: row[k] for k in ("drawn", "open", "trained", "filtered", "abandoned", "balanced")} == {
        "drawn": 3, "open": 1, "trained": 1, "filtered": 1, "abandoned": 0, "balanced": True,
    }  # fmt: skip
    assert row["reasons"] == {"filtered: no signal": 1}
    assert "no signal" in polyrl("ledger", "--runs-dir", str(tmp_path))[1]


def test_an_episode_is_sampled_with_the_oracle_and_by_hand(polyrl: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = polyrl("envs", "sample", "tools", "--index", "3", "oracle_working=1.0")
    assert code == 0
    assert "[tool] find(name: string)" in out
    assert "[verdict] ok, reward 1.0" in out
    monkeypatch.setattr("sys.stdin", io.StringIO('/find {"name": "Nobody"}\n\n/find {no json}\n\n'))
    code, out, _ = polyrl("envs", "sample", "tools", "--hand", "failure_rate=0.0")
    assert code == 0
    assert "error: no customer Nobody" in out
    assert "[verdict] invalid_output, reward 0.0" in out
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "left before its end" in polyrl("envs", "sample", "math", "--hand")[1]
    assert polyrl("envs", "sample", "math", "--hand", "--model", "x")[0] == 2
    assert polyrl("envs", "sample", "math", "--split", "test")[0] == 2


def test_environments_are_listed_and_shown_with_a_task(polyrl: Call) -> None:
    code, out, _ = polyrl("envs", "list", "--json")
    assert code == 0
    assert {"math", "code", "tools", "long_context"} <= {row["id"] for row in json.loads(out)}
    code, out, _ = polyrl("envs", "show", "math", "digits=2", "--tasks", "1")
    assert code == 0
    assert "[verdict] ok, reward 1.0" in out
    code, _, err = polyrl("envs", "show", "mth")
    assert code == 2
    assert "did you mean 'math'" in err


def test_stopping_nothing_and_asking_a_cluster_that_is_not_there_are_wrong_usage(
    polyrl: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for args in (["stop"], ["stop", "--head"], ["jobs"], ["logs"]):
        code, _, err = polyrl(*args, "--runs-dir", str(tmp_path))
        assert code == 2
        assert err.count("\n") == 1


def test_a_benchmark_reports_median_and_range(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text("def bench():\n    return {'seconds': [3.0, 1.0, 2.0]}\n")
    result = bench.run_benchmark("tiny", tmp_path)
    assert result["bench"] == "tiny"
    assert result["figures"] == {"seconds": {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}}
    assert result["machine"]["cores"] >= 1


def test_every_benchmark_that_is_listed_can_be_run() -> None:
    assert len(BENCHMARKS) > 5
    assert [p.name for p in BENCHMARKS.values() if "\ndef bench(" not in p.read_text(encoding="utf-8")] == []


def test_an_unknown_benchmark_is_wrong_usage(polyrl: Call) -> None:
    code, _, err = polyrl("bench", "nope", "--json")
    assert code == 2
    assert "no benchmark 'nope'" in err


def test_paired_measures_take_turns_and_warm_ups_are_not_kept() -> None:
    calls: list[str] = []

    def measure(name: str) -> Callable[[], float]:
        def call() -> float:
            calls.append(name)
            return float(len(calls))

        return call

    figures = bench.interleaved({"a": measure("a"), "b": measure("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert figures == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert bench.ratio(figures["b"], figures["a"]) == [4 / 3, 6 / 5]
