"""What a worker does around its episodes: an environment's cap takes no room of the others, and a full disk ends no work."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rl_core.config import RolloutConfig
from rl_core.drafts import DraftFile
from rl_core.types import Rollout, Status, Task, Verdict
from rollout_workers import worker as module
from rollout_workers.worker import Job, RolloutWorker
from tests.unit.fakes import SPEC

SEED_MODEL = Path(__file__).parents[2] / "configs" / "models" / "seed"


async def test_a_capped_environment_waits_outside_the_room_that_all_share(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RolloutConfig(max_num_seqs=8)
    worker = RolloutWorker(
        "w0", life="w0.0", model_path=str(SEED_MODEL), dtype="float32", rollout=config, seed=0, hosts={}, run_dir=None
    )  # fmt: skip
    inside = {"slow": 0, "fast": 0}
    peak, release = dict(inside), asyncio.Event()

    async def episode(job: Job, index: int, rollout_id: str, begun: Any, draft: Any = None) -> Rollout:
        env = job.task.env
        inside[env] += 1
        peak[env] = max(peak[env], inside[env])
        await (release.wait() if env == "slow" else asyncio.sleep(0))
        inside[env] -= 1
        verdict = Verdict(status=Status.OK, reward=1.0)
        return Rollout(id=rollout_id, env=env, task_key="k", completions=(), messages=(), verdict=verdict)

    monkeypatch.setattr(worker, "_episode", episode)

    def group(env: str, concurrency: int) -> Any:
        task = Task(env=env, key="k", split="train", seed=0, public={})
        spec = replace(SPEC, group_size=32, concurrency=concurrency)
        return asyncio.create_task(worker.run_group(Job(group_id=env, task=task, spec=spec, env_id=env, options={})))

    slow = group("slow", 3)
    await asyncio.sleep(0.01)
    await asyncio.wait_for(group("fast", 0), 10)  # finishes while the other one holds its three places
    assert (inside["slow"], peak["slow"]) == (3, 3)
    release.set()
    _, result = await slow
    assert (result.num_trainable, peak["slow"]) == (32, 3)
    assert 3 < peak["fast"] <= 12 - 3


async def test_a_full_disk_ends_the_drafts_and_not_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(DraftFile):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "SNAPSHOT_S", 0.0)
    worker = RolloutWorker(
        "w0", life="w0.0", model_path=str(SEED_MODEL), dtype="float32", rollout=RolloutConfig(), seed=0, hosts={}, run_dir=None
    )  # fmt: skip
    worker._engine = SimpleNamespace(under_way=lambda since: {})
    await asyncio.wait_for(worker._write_snapshots(file := Full(tmp_path, "w0")), 10)
    file.close()
    assert "rollouts that are interrupted start again: [Errno 28] No space left" in caplog.text
