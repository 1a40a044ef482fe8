"""`polyrl audit`: scripted cheats in whole runs are named, honest runs raise no alarm, and stored rollouts score the same again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from infra.audit import audit
from infra.audit.findings import Finding, Severity, rank
from infra.audit.gate import AuditedWorkers, masked, penalised
from infra.cli.main import app
from rl_core.config import RunConfig
from rl_core.ledger import read_balance
from rl_core.run_store import StoredRun
from rl_core.seams import RolloutWorkers
from rl_core.types import Status, Turn
from tests.unit.cheats import CHEATS, HACKABLE, Cheat
from tests.unit.scripted import Keeper, cheating, honest, scripted_config, scripted_run
from tests.unit.stored_runs import group, store_run

BUILT_INS: dict[str, dict[str, Any]] = {
    "math": {"options": {"digits": 3}},
    "tools": {"max_turns": 6, "options": {"kinds": ["stock", "points", "move", "refund"], "distractors": 0}},
    "long_context": {"max_total_tokens": 4096, "options": {"records": 6, "min_tokens": 128, "max_tokens": 256}},
    "code": {"share": 0.2, "max_tokens": 256, "options": {"num_steps": 2, "digits": 1, "cases": 4}},
}


def audited(workers: RolloutWorkers, config: RunConfig, keeper: Keeper) -> RolloutWorkers:
    async def fetch(ref: Any) -> Any:
        return ref

    async def keep(result: Any, label: str) -> None:
        keeper.keep(result, label)

    return AuditedWorkers(workers, config, fetch=fetch, own=lambda g: g, keep=keep, note=keeper.note)


def run_cheat(folder: Path, cheat: Cheat, *, most: int = 200, seed: int = 0, **audit_section: Any) -> StoredRun:
    environments = {"cheated": {"id": f"{HACKABLE}:{cheat.env}"}, "sums": {"id": f"{HACKABLE}:SumEnv"}}
    config = scripted_config(folder, environments, audit={"honeypots": 0.1, **audit_section}, seed=seed)
    policy, weak = cheating(cheat.trick), honest(0.3, 0.6)
    return scripted_run(config, lambda seat: policy(seat) if seat.task.env == "cheated" else weak(seat), most=most, wrap=audited)


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda c: c.name)
def test_a_cheating_policy_is_named_within_200_rollouts(tmp_path: Path, cheat: Cheat) -> None:
    run = run_cheat(tmp_path, cheat)
    report = audit(run)
    assert 150 <= report.rollouts <= 200
    assert [s.env for s in report.suspects if s.score > 0] == ["cheated"], "the honest environment beside it is not blamed"
    assert report.suspects[0].env == "cheated"
    assert cheat.detector in {f.detector for f in report.alarms}
    paid = {r["rollout_id"]: r["reward"] for r in run.sql("SELECT rollout_id, reward FROM rollouts")}
    assert report.suspects[0].rollouts
    assert all(id in paid for id in report.suspects[0].rollouts)


def test_an_honest_run_of_the_built_in_environments_raises_no_alarm_and_scores_the_same_again(tmp_path: Path) -> None:
    config = scripted_config(tmp_path, BUILT_INS, audit={"honeypots": 0.1}, eval={"tasks": 8})
    report = audit(scripted_run(config, honest(0.3, 0.9), wrap=audited), sample=48)
    assert report.rollouts >= 150
    assert not report.alarms, report.alarms
    assert {env: (r.same, r.impossible) for env, r in report.rescored.items()} == dict.fromkeys(BUILT_INS, (12, 0))
    assert all(report.rescored[env].second_opinions > 2 for env in ("math", "long_context", "code"))


def test_a_verifier_that_does_not_come_to_the_same_verdict_is_named(tmp_path: Path) -> None:
    config = scripted_config(tmp_path, {"moody": {"id": f"{HACKABLE}:MoodyEnv"}}, eval={"tasks": 4})
    report = audit(scripted_run(config, honest(0.5, 0.5), most=80))
    assert "re-scoring" in {f.detector for f in report.alarms}


def test_a_stored_reward_that_was_changed_afterwards_is_named(tmp_path: Path) -> None:
    import pyarrow as pa

    from rl_core.run_store import SCHEMA, RunStore
    from rl_core.segments import write_atomically

    config = scripted_config(tmp_path, {"sums": {"id": f"{HACKABLE}:SumEnv"}}, eval={"tasks": 4})
    run = scripted_run(config, honest(0.5, 0.5), most=60)
    assert not audit(run).alarms
    rows = run.sql("SELECT * FROM rollouts")
    victim = next(r for r in rows if r["label"] == "train" and r["reward"] == 0.0)
    table = pa.Table.from_pylist([{**r, "reward": 1.0} if r is victim else r for r in rows], schema=SCHEMA)
    write_atomically(run.run_dir / "rollouts" / "part-00000.parquet", table)
    report = audit(RunStore.find(tmp_path, str(run.run_dir)))
    assert [f.rollouts for f in report.alarms if f.detector == "re-scoring"] == [(victim["rollout_id"],)]


# --- honeypots and the gate -----------------------------------------------------------------------------------------------


def test_honeypots_are_sampled_at_their_rate_and_never_trained(tmp_path: Path) -> None:
    run = run_cheat(tmp_path, CHEATS[2])
    counts = {r["label"]: r["n"] for r in run.sql("SELECT label, count(DISTINCT group_id) AS n FROM rollouts GROUP BY label")}
    assert counts["honeypot"] == pytest.approx(0.1 * counts["train"], abs=2)
    drawn = sum(b.drawn for b in read_balance(run.run_dir / "ledger.sqlite"))
    assert drawn >= counts["train"]
    tasks = run.sql(
        "SELECT count(*) AS n FROM rollouts a, rollouts b WHERE a.label = 'honeypot' AND b.label != 'honeypot' AND a.task_key = b.task_key"
    )
    assert tasks == [{"n": 0}], "a honeypot has a key of its own"


@pytest.mark.parametrize("cheat", [CHEATS[0], CHEATS[2]], ids=lambda c: c.name)
def test_the_penalty_gate_takes_the_reward_of_a_cheat(tmp_path: Path, cheat: Cheat) -> None:
    run = run_cheat(tmp_path, cheat, most=400, gate="penalty", every=32)
    ends = run.sql(
        "SELECT status, reward, components LIKE '%audit_penalty%' AS penalty FROM rollouts "
        "WHERE env = 'cheated' AND label = 'train' ORDER BY started_at"
    )
    late = ends[len(ends) // 2 :]
    assert any(e["reward"] == 1.0 for e in ends[:40]), "before the first alarm, it was paid"
    if cheat.detector == "reused answers":
        assert any(e["penalty"] and e["reward"] == 0.0 for e in late)
    else:
        assert any(e["status"] == "hack_suspected" and e["reward"] is None for e in late)
    assert any("audit: cheated is suspect" in e.data["text"] for e in run.events() if e.kind == "note")
    assert not [f for f in audit(run).alarms if f.detector == "re-scoring"], "a penalty does not break re-scoring"


def test_the_quarantine_gate_leaves_a_cheated_environment_alone_and_the_others_go_on(tmp_path: Path) -> None:
    run = run_cheat(tmp_path, CHEATS[0], most=300, gate="quarantine", every=32)
    half = run.sql("SELECT env, status FROM rollouts WHERE label = 'train' ORDER BY started_at")[-80:]
    honest_rows = [r for r in half if r["env"] == "sums"]
    assert len(honest_rows) > 60, "its share goes to the others"
    assert all(r["status"] == "hack_suspected" for r in half if r["env"] == "cheated")


def test_the_stop_gate_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    run = run_cheat(tmp_path, CHEATS[0], gate="stop", every=32)
    last = list(run.events())[-1].data
    assert last["outcome"] == "failed"
    assert last["reason"].startswith("audit.gate=stop: cheated is suspect (")


def test_a_gate_that_sees_no_alarm_changes_nothing(tmp_path: Path) -> None:
    config = scripted_config(tmp_path, {"sums": {"id": f"{HACKABLE}:SumEnv"}}, audit={"gate": "stop", "honeypots": 0.2, "every": 16})
    run = scripted_run(config, honest(0.3, 0.9), wrap=audited)
    assert run.state == "finished"
    assert not [e for e in run.events() if e.kind == "note"]


def test_a_masked_group_has_no_reward_and_a_penalised_one_keeps_what_it_took() -> None:
    cheats = group(rewards=(1.0, 1.0, 0.0), text="status: pass")
    cheats = replace(
        cheats, rollouts=tuple(replace(r, turns=(Turn(content=f"status: pass{i % 2}"),)) for i, r in enumerate(cheats.rollouts))
    )
    alarm = Finding(
        detector="reused answers", env="math", severity=Severity.ALARM, strength=0.9, sentence="seen", answers=frozenset({"status: pass0"})
    )
    taken = penalised(cheats, [alarm])
    assert [r.verdict.reward for r in taken.rollouts] == [0.0, 1.0, 0.0]
    assert [r.verdict.components.get("audit_penalty") for r in taken.rollouts] == [1.0, None, 0.0]
    assert {r.verdict.status for r in masked(cheats, [alarm]).rollouts} == {Status.HACK_SUSPECTED}
    assert {r.verdict.reward for r in masked(cheats, [alarm]).rollouts} == {None}


# --- the command and the ranking ------------------------------------------------------------------------------------------


def test_the_command_ranks_suspects_with_their_evidence_and_exits_with_1(tmp_path: Path) -> None:
    run = run_cheat(tmp_path, CHEATS[0])
    done = CliRunner().invoke(app, ["audit", run.id, "--runs-dir", str(tmp_path), "--json", "--sample", "40"])
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert said["suspects"][0]["env"] == "cheated"
    assert said["suspects"][0]["score"] > 0.9
    assert {"detector", "severity", "strength", "sentence", "count", "rollouts"} == set(said["suspects"][0]["findings"][0])
    text = CliRunner().invoke(app, ["audit", run.id, "--runs-dir", str(tmp_path), "--sample", "4"]).stdout
    assert "1. cheated  suspicion" in text
    assert "STATUS: PASS" not in text, "the report counts what the policy wrote, and does not repeat it"


def test_the_command_looks_at_the_first_rollouts_only_and_is_silent_before_there_is_enough_to_see(tmp_path: Path) -> None:
    run = run_cheat(tmp_path, CHEATS[0])
    done = CliRunner().invoke(app, ["audit", run.id, "--runs-dir", str(tmp_path), "--first", "8", "--json"])
    assert (done.exit_code, json.loads(done.stdout)["rollouts"]) == (0, 8)


def test_a_store_without_turns_is_audited_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = store_run(tmp_path / "old", groups=(group(split="eval"), group("g1", rewards=(1.0, 0.0))))
    (folder / "config.yaml").write_text("name: old\nmodel: {path: configs/models/seed}\nenvironments: {math: {}}\n")
    import pyarrow.parquet as pq

    part = folder / "rollouts" / "part-00000.parquet"
    pq.write_table(pq.read_table(part).drop_columns(["task", "turns", "truncated"]), part)
    report = audit(StoredRun(folder))
    assert not report.rescorable
    assert not report.alarms


def test_suspects_are_ranked_by_the_chance_that_an_alarm_is_right() -> None:
    def finding(env: str, severity: Severity, strength: float, *rollouts: str) -> Finding:
        return Finding(detector="d", env=env, severity=severity, strength=strength, sentence="", rollouts=rollouts)

    one, two, note = rank(
        [
            finding("a", Severity.ALARM, 0.6, "x"), finding("b", Severity.ALARM, 0.5, "y"), finding("b", Severity.ALARM, 0.5, "z", "y"),
            finding("c", Severity.NOTE, 0.99, "n"),
        ]
    )  # fmt: skip
    assert (one.env, one.score, one.rollouts) == ("b", 0.75, ["y", "z"])
    assert (two.env, note.env, note.score) == ("a", "c", 0.0)
