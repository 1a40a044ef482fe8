"""The learner as the loop sees it: Ray actors, payloads by reference, resume from a run folder, no process left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import safetensors.torch

from infra.ray_cluster import start_local
from learner.actor import LearnerGroup
from rl_core.config import EnvironmentConfig, ImportanceConfig, LearnerConfig, ModelConfig, RunConfig
from tests.integration.learner_ranks import random_groups
from tests.integration.tiny_hybrid import make_tiny_hybrid

VOCAB = 32


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    start_local(num_cpus=4, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = make_tiny_hybrid(tmp_path_factory.mktemp("seed") / "model", vocab_size=VOCAB)
    return RunConfig(
        model=ModelConfig(path=str(folder)),
        environments={"math": EnvironmentConfig(), "tools": EnvironmentConfig(temperature=0.7)},
        learner=LearnerConfig(num_ranks=2, importance=ImportanceConfig(low=0.0, high=1e9)),
    )


async def alive(learner: LearnerGroup) -> list[int]:
    pids = await asyncio.gather(*[rank.pid.remote() for rank in learner._ranks])
    return [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.mark.slow
async def test_two_ranks_step_publish_save_resume_and_leave_no_process(config: RunConfig, tmp_path: Path) -> None:
    learner = await LearnerGroup.start(config, tmp_path)
    pids = await alive(learner)
    assert len(pids) == 2
    version, before = await learner.snapshot()
    assert version == 0

    groups = random_groups(4, vocab=VOCAB, seed=0)
    metrics = await learner.accumulate([ray.put(group) for group in groups])
    assert metrics["learner/trained_tokens"] == sum(r.num_sampled for g in groups for r in g.rollouts)
    probe = [c for r in groups[0].rollouts for c in r.completions]
    assert (await learner.agreement(probe)).num_tokens == sum(len(c.token_ids) for c in probe)
    stats, after = await learner.apply()
    assert (stats.version, learner.version) == (1, 1)
    assert stats.metrics["learner/tokens_per_s"] > 0

    old, new = [safetensors.torch.load((await blob).tobytes()) for blob in (before, after)]
    assert set(old) == set(new)
    assert {"lm_head.weight", "mtp.layers.0.eh_proj.weight", "backbone.layers.1.mixer.experts.0.up_proj.weight"} <= set(new)
    changed = {name for name in new if not old[name].equal(new[name])}
    assert "lm_head.weight" in changed
    assert "mtp.layers.0.eh_proj.weight" in changed
    assert not any(name.endswith("mixer.gate.weight") for name in changed), "routers are frozen"

    folder = Path(await learner.save())
    assert folder == tmp_path / "checkpoints" / "step-000001"
    with pytest.raises(Exception, match="too old to train: sampled by version -1"):
        await learner.accumulate([ray.put(g) for g in random_groups(1, vocab=VOCAB, seed=0, version=-1)])
    await learner.aclose()
    _, left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert not left

    again = await LearnerGroup.start(config, tmp_path)
    try:
        version, weights = await again.snapshot()
        assert version == 1
        resumed = safetensors.torch.load((await weights).tobytes())
        assert all(resumed[name].equal(tensor) for name, tensor in new.items())
        await again.adopt(5)  # as after a rollback: the same weights under a later version, saved at once
        version, weights = await again.snapshot()
        assert (version, again.version) == (5, 5)
        assert all(tensor.equal(new[name]) for name, tensor in safetensors.torch.load((await weights).tobytes()).items())
        assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000005"
    finally:
        await again.aclose()
