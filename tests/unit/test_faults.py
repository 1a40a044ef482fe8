"""Whose fault, and how often it is tried again."""

from __future__ import annotations

from dataclasses import replace

from rl_core.faults import FAULTS, FIRST_PAUSE_S, Fault, Retries, broken, unusable
from rl_core.seams import first_evidence
from rl_core.types import Status, Verdict
from tests.unit.fakes import group_result


def test_every_bad_end_is_somebodys_fault_and_only_the_policys_trains() -> None:
    assert set(FAULTS) == set(Status) - {Status.OK}
    assert all(FAULTS[s] is Fault.POLICY for s in Status if s.trains and s is not Status.OK)


def test_infrastructure_is_tried_again_with_growing_pauses_and_the_policy_never() -> None:
    retries = Retries(8)
    assert [retries.pause(0, Status.INFRA_ERROR) for _ in range(4)] == [FIRST_PAUSE_S, 3 * FIRST_PAUSE_S, 9 * FIRST_PAUSE_S, None]
    assert [retries.pause(1, Status.ENV_ERROR) for _ in range(2)] == [0.0, None]
    assert [retries.pause(1, Status.VERIFIER_ERROR) for _ in range(2)] == [0.0, None]
    assert [retries.pause(2, s) for s in (Status.OK, Status.INVALID_OUTPUT, Status.TIMEOUT_MODEL, Status.HACK_SUSPECTED)] == [None] * 4


def test_a_group_has_one_budget() -> None:
    retries = Retries(4)
    assert sum(retries.pause(i, Status.INFRA_ERROR) is not None for i in range(4) for _ in range(3)) == 4


def test_a_group_without_a_baseline_is_broken_and_names_the_statuses() -> None:
    result = group_result(num_trainable=1, rewards=(1.0,), statuses=("ok", "infra_error", "env_error", "infra_error"), has_signal=False)
    assert broken(result) == unusable(result) == "only 1 good rollouts (env_error, infra_error)"
    told = replace(result, failure="ValueError: no gold")
    assert broken(told) == "only 1 good rollouts (env_error, infra_error: ValueError: no gold)"
    assert broken(group_result()) == unusable(group_result()) == ""
    assert unusable(group_result(has_signal=False, rewards=(1.0, 1.0))) == "no signal: all rewards are equal (solved)"


def test_a_groups_result_tells_the_cause_of_its_first_failure_and_of_a_long_one_both_ends() -> None:
    def verdict(text: str) -> Verdict:
        return Verdict(status=Status.ENV_ERROR, reward=None, evidence={"note": " ", "error": text})

    assert first_evidence(verdict("ValueError:\n  no gold")) == "ValueError: no gold"
    long = first_evidence(verdict(f"environment {'x' * 400} libfoo.so.3 is not there"))
    assert long.startswith("environment xx")
    assert long.endswith("libfoo.so.3 is not there")
    assert len(long) < 210
    assert first_evidence(Verdict(status=Status.INFRA_ERROR, reward=None)) == ""
