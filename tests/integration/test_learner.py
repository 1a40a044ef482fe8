"""The learner on real parts: a small random hybrid with an MTP head, DeepSpeed ZeRO, gloo ranks in processes of their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.integration.learner_ranks import run_ranks
from tests.integration.learner_scenarios import VOCAB
from tests.integration.tiny_hybrid import make_tiny_hybrid

RULES = {
    "policy_loss": "gspo",
    "clip_low": 0.1,
    "clip_high": 0.1,
    "proximal": "behaviour",
    "kl_weight": 0.1,
    "train_staleness": 0,
    "mtp_depth": 3,
}
"""Ratios of whole trajectories, a reference policy, and a rollout that is too stale to train."""

LORA: dict[str, Any] = {"rank": 2, "alpha": 3.0, "targets": ["q_proj", "v_proj", "in_proj"]}

ONE_RANK = [
    ("reference", "reference", {}),
    ("whole", "gradients", {"name": "whole"}),
    ("pieces", "gradients", {"name": "pieces", "microbatch_tokens": 48}),
    ("zero2", "gradients", {"name": "zero2", "zero_stage": 2, "microbatch_tokens": 48}),
    ("zero3", "gradients", {"name": "zero3", "zero_stage": 3, "microbatch_tokens": 48}),
    ("checkpointed", "gradients", {"name": "checkpointed", "zero_stage": 3, "checkpoint_layers": True}),
    ("rules", "gradients", {"name": "rules", **RULES}),
    ("masked", "gradients", {"name": "masked", "importance": {"low": 0.999, "high": 1.001}}),
    ("steps", "steps", {"count": 3}),
    ("half", "gradients", {"name": "half", "dtype": "bfloat16"}),
    ("half_zero3", "gradients", {"name": "half_zero3", "dtype": "bfloat16", "zero_stage": 3, "checkpoint_layers": True}),
    ("bfloat16", "steps", {"count": 3, "dtype": "bfloat16", "microbatch_tokens": 64}),
    ("no_mtp", "steps", {"count": 1, "mtp_loss_weight": 0.0}),
    ("resume", "resume", {"name": "resume1"}),
    ("adapters", "adapters", {"lora": LORA}),
    ("resume_adapters", "resume", {"name": "resume-lora", "lora": LORA}),
    ("nothing", "nothing", {}),
    ("replays", "replays", {}),
    ("llama", "llama", {}),
    ("exported", "exported", {}),
    ("refusals", "refusals", {}),
    ("agreement", "agreement", {}),
    ("bad_steps", "bad_steps", {}),
    ("bad_steps_bf16", "bad_steps", {"zero_stage": 2, "dtype": "bfloat16"}),
    ("bandit", "bandit", {"count": 25}),
]

TWO_RANKS = [
    ("zero1", "gradients", {"name": "two1", "microbatch_tokens": 48}),
    ("zero2", "gradients", {"name": "two2", "zero_stage": 2, "microbatch_tokens": 48}),
    ("zero3", "gradients", {"name": "two3", "zero_stage": 3, "microbatch_tokens": 48}),
    ("rules", "gradients", {"name": "rules2", "zero_stage": 3, "microbatch_tokens": 48, **RULES}),
    ("nothing", "nothing", {}),
    ("steps1", "steps", {"count": 3, "microbatch_tokens": 48}),
    ("steps3", "steps", {"count": 3, "zero_stage": 3}),
    ("resume1", "resume", {"name": "resume2-1"}),
    ("resume3", "resume", {"name": "resume2-3", "zero_stage": 3}),
    ("agreement", "agreement", {"zero_stage": 3}),
    ("bad_steps3", "bad_steps", {"zero_stage": 3}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learner")
    make_tiny_hybrid(folder / "model", vocab_size=VOCAB)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, list[Any]]:
    """What one rank did."""
    return run_ranks(1, folder, ONE_RANK)


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """What two ranks did, after the one rank: the machine has few cores."""
    return run_ranks(2, folder, TWO_RANKS)


def gradient_error(folder: Path, name: str, wanted: str) -> float:
    """Largest deviation of any gradient, relative to the largest entry of that parameter's gradient (and a small floor)."""
    got, expected = (safetensors.torch.load_file(folder / f"{n}.safetensors") for n in (name, wanted))
    assert set(got) == set(expected)
    top = max(float(g.abs().max()) for g in expected.values())
    return max(float((got[n] - g).abs().max()) / max(float(g.abs().max()), 1e-4 * top) for n, g in expected.items())


@pytest.mark.parametrize("name", ["whole", "pieces", "zero2", "zero3", "checkpointed"])
def test_gradients_are_those_of_the_formula_for_any_packing_and_zero_stage(folder: Path, one: dict[str, Any], name: str) -> None:
    assert gradient_error(folder, f"{name}-0", "reference") < 1e-3
    assert one[name][0]["learner/loss"] == pytest.approx(one["reference"][0], rel=1e-4)


def test_packing_really_differs_between_these_tests(one: dict[str, Any]) -> None:
    assert one["whole"][0]["learner/microbatches"] < one["pieces"][0]["learner/microbatches"]
    assert one["pieces"][0]["learner/padded_tokens"] >= one["pieces"][0]["learner/real_tokens"]
    assert one["pieces"][0]["learner/shared_tokens"] == 0
    assert one["whole"][0]["learner/shared_tokens"] == 4 * 298


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_give_the_gradients_of_one(folder: Path, one: dict[str, Any], two: dict[str, Any], stage: int) -> None:
    for rank in (0, 1):
        assert gradient_error(folder, f"two{stage}-{rank}", "reference") < 1e-3
    for key, value in one["whole"][0].items():
        if (
            "/" in key
            and "/expert" not in key
            and not key.endswith(("_s", "padded_tokens", "real_tokens", "shared_tokens", "microbatches"))
        ):
            assert two[f"zero{stage}"][0][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
            assert two[f"zero{stage}"][1][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_loads_of_experts_are_over_all_ranks(one: dict[str, Any], two: dict[str, Any]) -> None:
    loads = {key: value for key, value in one["pieces"][0].items() if "/expert" in key}
    assert sorted(loads) == [f"learner/{name}/{layer}" for name in ("expert_load_max", "experts_idle") for layer in (1, 4)]
    assert all(value >= 1.0 for key, value in loads.items() if "load_max" in key)
    for answer in two["zero1"]:
        assert {key: answer[key] for key in loads} == pytest.approx(loads, rel=0.02)  # a token on the edge may take another expert


def test_rules_over_trajectories_and_a_reference_give_the_same_on_two_ranks(folder: Path, one: dict[str, Any], two: dict[str, Any]) -> None:
    alone = one["rules"][0]
    assert gradient_error(folder, "rules2-0", "rules-0") < 1e-3
    assert gradient_error(folder, "rules2-1", "rules-0") < 1e-3
    for key in (
        "learner/loss",
        "learner/clip_share",
        "learner/reference_kl",
        "env/tools/reference_kl",
        "env/math/ess",
        "learner/trained_tokens",
    ):
        assert two["rules"][0][key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key
    assert alone["learner/clip_share"] > 0
    assert alone["learner/reference_kl"] > 0
    assert alone["env/math/stale_rollouts"] == two["rules"][1]["env/math/stale_rollouts"] == 1
    assert alone["learner/trained_tokens"] < one["whole"][0]["learner/trained_tokens"]


@pytest.mark.parametrize("name", ["steps1", "steps3"])
def test_two_ranks_take_the_steps_of_one(one: dict[str, Any], two: dict[str, Any], name: str) -> None:
    for alone, together in zip(one["steps"][0], two[name][0], strict=True):
        assert together["learner/grad_norm"] == pytest.approx(alone["learner/grad_norm"], rel=1e-2)
        assert together["learner/mtp_grad_norm"] == pytest.approx(alone["learner/mtp_grad_norm"], rel=1e-2)
        assert together["learner/entropy"] == pytest.approx(alone["learner/entropy"], rel=1e-2)


def test_tokens_outside_the_importance_bounds_contribute_no_gradient(folder: Path, one: dict[str, Any]) -> None:
    metrics, found = one["masked"][0], safetensors.torch.load_file(folder / "masked-0.safetensors")
    assert metrics["learner/masked_share"] > 0.9
    assert metrics["env/math/masked_share"] > 0.9
    everything = safetensors.torch.load_file(folder / "whole-0.safetensors")
    share = {n: float(g.norm() / everything[n].norm().clamp(min=1e-12)) for n, g in found.items() if not n.startswith("mtp")}
    if metrics["learner/masked_share"] == 1.0:
        assert max(share.values()) == 0.0
    assert torch.tensor(list(share.values())).median() < 0.5


def test_the_policy_gets_no_gradient_from_the_mtp_loss(folder: Path, one: dict[str, Any]) -> None:
    with_mtp, without = one["steps"][0][0], one["no_mtp"][0][0]
    assert with_mtp["learner/grad_norm"] == pytest.approx(without["learner/grad_norm"], rel=1e-6)
    assert with_mtp["learner/mtp_grad_norm"] > 0
    assert "learner/mtp_grad_norm" not in without


def test_bfloat16_trains_close_to_float32(one: dict[str, Any]) -> None:
    for low, full in zip(one["bfloat16"][0], one["steps"][0], strict=True):
        assert low["learner/entropy"] == pytest.approx(full["learner/entropy"], rel=0.1)
        assert math.isfinite(low["learner/grad_norm"])


@pytest.mark.parametrize("name", ["half", "half_zero3"])
def test_gradients_in_bfloat16_point_where_those_of_the_formula_do(folder: Path, one: dict[str, Any], name: str) -> None:
    """Of the whole model, and of policy and MTP head alone. A token at the edge may take another expert."""
    got, expected = (safetensors.torch.load_file(folder / f"{n}.safetensors", device="cpu") for n in (f"{name}-0", "reference"))
    assert set(got) == set(expected)
    for part in ("", "lm.", "mtp."):
        a, b = (torch.cat([g[n].double().flatten() for n in sorted(g) if n.startswith(part)]) for g in (got, expected))
        assert torch.dot(a, b) / (a.norm() * b.norm()) > 0.999
        assert a.norm() == pytest.approx(float(b.norm()), rel=0.02)
    assert one[name][0]["learner/loss"] == pytest.approx(one["reference"][0], rel=2e-2)


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(one: dict[str, Any], two: dict[str, Any]) -> None:
    for answer in (one["resume"][0], one["resume_adapters"][0], two["resume1"][0], two["resume3"][0]):
        assert answer["versions"] == [3, 3]
        assert answer["norms"][0] == answer["norms"][1]
        assert answer["equal"]
        assert answer["folder"] == "step-000002"
        assert {"model", "optimizer", "state.json", "rank-0.pt"} <= set(answer["files"])


def test_lora_trains_its_adapters_alone_and_publishes_the_merged_model(one: dict[str, Any]) -> None:
    answer = one["adapters"][0]
    assert answer["starts_as"]
    assert answer["names"]
    assert answer["same_model"]
    assert answer["trained"] == ["in_proj", "q_proj", "v_proj"]
    assert any(not name.startswith("mtp.") for name in answer["changed"])
    assert all(name.startswith("mtp.") or name.split(".")[-2] in LORA["targets"] for name in answer["changed"])
    assert answer["losses"][0] == pytest.approx(answer["losses"][1], rel=1e-4)
    assert len(answer["errors"]) == 2 * 4
    assert max(answer["errors"]) < 1e-3


def test_a_bad_step_leaves_every_rank_as_it_was_and_says_why(one: dict[str, Any], two: dict[str, Any]) -> None:
    for answer in (one["bad_steps"][0], one["bad_steps_bf16"][0], *two["bad_steps3"]):
        assert answer["said"] == ["the gradient of the policy is nan", "the gradient of the MTP head is nan"] * 2
        assert all("the gradient of the policy is" in s and "times the median of the last 8 steps" in s for s in answer["spikes"])
        assert answer["versions"] == [9, 9]
        assert answer["equal"], "weights and optimizer are those of a learner that never saw the bad steps"


def test_a_batch_of_stale_rollouts_alone_is_a_step_without_a_gradient(one: dict[str, Any], two: dict[str, Any]) -> None:
    for answer in (one["nothing"][0], *two["nothing"]):
        assert answer["metrics"]["learner/trained_tokens"] == answer["metrics"]["learner/loss"] == answer["norm"] == 0.0
        assert answer["metrics"]["env/math/stale_rollouts"] == 4
        assert answer["next"]["learner/trained_tokens"] > 0


def test_a_llama_takes_a_real_step_with_the_gradients_of_its_formula_and_is_written_back(one: dict[str, Any]) -> None:
    answer = one["llama"][0]
    assert answer["names"]
    assert answer["engine_names"]
    assert answer["error"] < 1e-4
    assert answer["loss"][0] == pytest.approx(answer["loss"][1], rel=1e-4, abs=1e-6)
    assert answer["changed"] == 1.0
    assert answer["export"]["mtp_parameters"] == 0


def test_an_exported_checkpoint_is_complete_and_one_that_lacks_a_weight_is_refused(one: dict[str, Any]) -> None:
    answer = one["exported"][0]
    assert answer["same"]
    assert answer["mtp_parameters"] > 10_000
    assert answer["parameters"] > answer["mtp_parameters"]
    assert "missing ['lm_head.weight']" in answer["broken"]


def test_every_stored_step_replays_to_its_loss_masks_and_gradient_norm_to_the_last_bit(one: dict[str, Any]) -> None:
    for figures in one["replays"][0]["same"]:
        assert {"learner/loss", "learner/grad_norm", "learner/mtp_grad_norm", "env/math/masked_share"} <= {name for name, _, _ in figures}
        assert [recomputed for _, _, recomputed in figures] == [recorded for _, recorded, _ in figures]


def test_a_replay_under_another_rule_shows_what_that_rule_would_have_masked(one: dict[str, Any]) -> None:
    figures = {name: (recorded, other) for name, recorded, other in one["replays"][0]["icepop"]}
    assert figures["env/math/masked_share"][0] == 0.0
    assert figures["env/math/masked_share"][1] > 0.0
    assert figures["learner/trained_tokens"][0] == figures["learner/trained_tokens"][1]
    assert figures["learner/entropy"][0] == figures["learner/entropy"][1]
    assert figures["learner/grad_norm"][0] != figures["learner/grad_norm"][1]


def test_a_step_whose_batch_was_pruned_is_refused_with_what_to_set(one: dict[str, Any]) -> None:
    assert "3 of the 3 groups of step 2 are no longer in the journal; run with learner.keep_batches" in one["replays"][0]["pruned"]


def test_tokens_that_are_too_old_or_too_new_are_refused_with_their_numbers(one: dict[str, Any]) -> None:
    said = one["refusals"][0]["said"]
    assert said["old"].startswith("StalenessError")
    assert "'math'" in said["old"]
    assert "version 3" in said["old"]
    assert said["new"].startswith("StalenessError")
    assert "version 6" in said["new"]
    assert "without a single token" in said["empty"]
    assert "twice" in said["twice"]
    assert "between" in said["save"]
    assert one["refusals"][0]["staleness"] == 1.0


def test_agreement_is_exact_for_the_models_own_logprobs_and_leaves_the_step_alone(one: dict[str, Any], two: dict[str, Any]) -> None:
    for answer in (one["agreement"][0], two["agreement"][0], two["agreement"][1]):
        mean, largest, tokens = answer["good"]
        assert mean < 1e-5
        assert largest < 1e-4
        assert tokens == 18
        assert answer["bad"] == pytest.approx(0.5, abs=1e-3)
        assert answer["norms"][0] == pytest.approx(answer["norms"][1], rel=1e-6)


def test_reward_of_a_bandit_rises(one: dict[str, Any]) -> None:
    rewards = one["bandit"][0]["rewards"]
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-3:]) / 3 > 0.7
    assert max(one["bandit"][0]["masked"]) < 0.05
