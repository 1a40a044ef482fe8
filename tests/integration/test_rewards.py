"""Reward models and judges in actors of a real Ray: scored, killed, started anew; and in a real pool when POLYRL_LONG_TESTS is set."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from infra.ray_cluster import start_local
from learner.reward_model import train_reward_model
from reward_models.classifier import Classifier
from reward_models.learned import VERIFIED, Answer, Failure
from rl_core.config import RunConfig
from rl_core.config_files import parse_config
from rl_core.types import EpisodeSpec, Group, SamplingParams, Status
from rollout_workers.pool import Pool
from rollout_workers.rewards import RewardActors, recipe
from tests.unit.preferences import preferences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEED_MODEL = Path(__file__).parents[2] / "configs" / "models" / "seed"
ROLLOUT = {"max_num_seqs": 8, "max_model_len": 2048, "max_batched_tokens": 2048, "kv_cache_gib": 0.25, "speculative_tokens": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("rm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_reward_model(preferences(64, seed=1), out, tokenizer=SEED_MODEL, epochs=1)
    start_local(num_cpus=8, object_store_memory=100 << 20)
    yield out
    ray.shutdown()
    torch.set_num_threads(threads)


def config(model: Path, **rewards: object) -> RunConfig:
    env = {"max_total_tokens": 300, "rewards": {"manners": {"kind": "classifier", "model": str(model), "timeout_s": 30}, **rewards}}
    return parse_config({"model": {"path": str(SEED_MODEL)}, "environments": {"math": env}, "rollout": ROLLOUT})


def test_a_reward_model_scores_in_its_own_actor_and_comes_back_when_it_was_killed(model: Path) -> None:
    answers = [Answer(question="Where is the tea?", text=text) for text in ("please the lamp 3", "go away the lamp 3")]

    async def main() -> None:
        cfg = config(model)
        actors = await RewardActors.start(cfg)
        try:
            (part,) = recipe(cfg.environments["math"], actors, len).parts
            assert part.component.version == Classifier.load(model).version
            assert await part.component.score(answers) == pytest.approx(Classifier.load(model).score(answers), abs=1e-5)
            (actor, _) = actors.classifiers[str(model)]
            ray.kill(actor, no_restart=False)
            seen = []
            for _ in range(60):
                seen = list(await part.component.score(answers))
                if not isinstance(seen[0], Failure):
                    break
                await asyncio.sleep(0.5)
            assert seen == pytest.approx(Classifier.load(model).score(answers), abs=1e-5)
        finally:
            actors.close()

    asyncio.run(main())


@pytest.mark.skipif(not os.environ.get("POLYRL_LONG_TESTS"), reason="starts two engines; set POLYRL_LONG_TESTS=1 to run it")
def test_a_pool_rewards_its_groups_with_a_classifier_and_a_judge_on_an_engine_of_ours(model: Path) -> None:
    from itertools import islice

    from environments.registry import resolve

    async def main() -> Group:
        # The seed model cannot judge. So its part is a metric: it costs nobody anything, and shows that it was asked.
        cfg = config(model, judge={"kind": "judge", "model": str(SEED_MODEL), "role": "metric", "retries": 0})
        pool = await Pool.start(cfg)
        try:
            task = next(islice(resolve("math").tasks("train", 0, {}), 1))
            spec = EpisodeSpec(group_size=4, sampling=SamplingParams(max_tokens=64), max_turns=1, max_total_tokens=300, timeout_s=120.0)
            result = await pool.run_group("g0", task, spec)
            group: Group = await result.ref
            return group
        finally:
            await pool.aclose()

    group = asyncio.run(main())
    for rollout in group.rollouts:
        verdict = rollout.verdict
        assert verdict.status.trains
        assert f"manners={Classifier.load(model).version}" in verdict.verifier_version
        assert "judge=judge/1:seed/" in verdict.verifier_version
        if verdict.status is Status.OK:
            assert verdict.reward == pytest.approx(verdict.components[VERIFIED] + verdict.components["manners"])
            assert "judge" not in verdict.components, "a judge that fails its calibration gives no score"
