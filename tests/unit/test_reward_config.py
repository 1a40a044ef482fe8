"""Rewards by config: from YAML to components that score a group, and what a wrong config is told."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reward_models.learned import VERIFIED, reward_group
from rl_core.config import ConfigError, RunConfig
from rl_core.config_files import parse_config, reference
from rl_core.types import Group, Status, Turn
from rollout_workers.rewards import RewardActors, recipe, recipes
from tests.unit.judge_server import Asked, judge_server, sensible
from tests.unit.scripted import SEED_MODEL
from tests.unit.stored_runs import group


def parsed(rewards: dict[str, Any]) -> RunConfig:
    return parse_config({"model": {"path": str(SEED_MODEL)}, "environments": {"math": {"rewards": rewards}, "tools": {}}})


def said(*texts: str) -> Group:
    base = group(rewards=(1.0,) * len(texts))
    return replace(base, rollouts=tuple(replace(r, turns=(Turn(content=t),)) for r, t in zip(base.rollouts, texts, strict=True)))


def test_a_pairwise_judge_behind_an_endpoint_rewards_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge_server(sensible) as (url, asked):
        config = parsed(
            {
                "verified": {"kind": "verified", "role": "gate"},
                "quality": {"kind": "pairwise", "model": "judge", "url": url, "opponents": 2, "criteria": "kind and short"},
                "short": {"kind": "length", "weight": 0.2},
            }
        )
        made = recipes(config.environments, RewardActors(), len)
        assert set(made) == {"math"}
        rewarded = asyncio.run(reward_group(said("good one", "bad", "", "good but longer"), made["math"]))
    verdicts = [r.verdict for r in rewarded.rollouts]
    assert [v.components[VERIFIED] for v in verdicts] == [1.0] * 4
    assert [v.components["quality"] for v in verdicts] == [0.75, 0.25, 0.0, 0.75]
    assert verdicts[2].reward == 0.0, "the empty answer is paid by nobody"
    assert (verdicts[0].reward or 0) > (verdicts[3].reward or 0) > (verdicts[1].reward or 0)
    assert all("kind and short" in q.system for q in asked)
    assert verdicts[0].verifier_version.startswith(" quality=pairwise/1:judge@127.0.0.1/")


def test_a_dead_endpoint_masks_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge_server(lambda asked: "") as (url, _):
        pass  # and the server is gone
    config = parsed({"quality": {"kind": "judge", "model": "judge", "url": url, "retries": 0, "timeout_s": 1.0}})
    rewarded = asyncio.run(reward_group(said("a", "b"), recipe(config.environments["math"], RewardActors(), len)))
    assert {(r.verdict.status, r.verdict.reward) for r in rewarded.rollouts} == {(Status.VERIFIER_ERROR, None)}


def test_calibration_pairs_of_your_own_decide_whom_to_believe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"question": "q", "good": "dull but right", "bad": "good looking and wrong"}) + "\n")

    def taken_in(asked: Asked) -> str:
        return sensible(asked)

    with judge_server(taken_in) as (url, _):
        config = parsed({"quality": {"kind": "judge", "model": "judge", "url": url, "calibration": str(pairs)}})
        rewarded = asyncio.run(reward_group(said("good", "bad"), recipe(config.environments["math"], RewardActors(), len)))
    assert "drift alarm: the judge is right on 0 of its last 1" in rewarded.rollouts[0].verdict.evidence["error"]


@pytest.mark.parametrize(
    ("rewards", "sentence"),
    [
        ({"x": {"kind": "jugde", "model": "m"}}, r"rewards\.x\.kind is 'jugde'.*did you mean judge"),
        ({"x": {"model": "m"}}, r"rewards\.x\.kind is component, which takes no model"),
        ({"x": {"kind": "judge"}}, r"rewards\.x\.model is empty"),
        ({"x": {"kind": "classifier", "model": "nowhere"}}, r"no checkpoint in 'nowhere'"),
        ({"x": {"kind": "judge", "model": "name"}}, r"for an endpoint give its url"),
        ({"x": {"kind": "length", "role": "gate"}}, r"length control is added"),
        ({"x": {"kind": "judge", "modle": "m"}}, r"unknown key .*rewards\.x\.modle; did you mean .*rewards\.x\.model"),
        ({"x": 3}, r"rewards\.x is 3, wanted a mapping"),
        ({"x": {"kind": "judge", "model": "m", "url": "u", "role": "boss"}}, r"role is 'boss'"),
        ({"x": {"kind": "pairwise", "model": "m", "url": "u", "opponents": 0}}, r"opponents is 0"),
    ],
)
def test_a_wrong_config_is_told_what_to_write(rewards: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parsed(rewards)


@pytest.mark.parametrize(
    ("audit", "sentence"),
    [
        ({"honeypots": 2.0}, r"audit\.honeypots is 2"), ({"honeypots": -1}, r"audit\.honeypots is -1"),
        ({"gate": "quarantaine"}, r"did you mean quarantine"), ({"every": 0}, r"audit\.every is 0"),
    ],
)  # fmt: skip
def test_a_wrong_audit_section_is_told_what_to_write(audit: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_config({"model": {"path": str(SEED_MODEL)}, "environments": {"math": {}}, "audit": audit})


def test_the_reference_names_every_key() -> None:
    keys = {key for key, _, _ in reference()}
    assert {"environments.<name>.rewards.<name>.kind", "audit.gate", "audit.honeypots"} <= keys
