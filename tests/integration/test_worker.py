"""The pool on real Ray, a real engine and the shipped seed model: groups, publication, and a worker that is killed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import ray

from environments.registry import resolve
from infra.evaluating import Plan, Row, scores, settings
from infra.ray_cluster import start_local
from learner.model import PolicyModel
from rl_core.chat import ChatML
from rl_core.config import RunConfig
from rl_core.config_files import parse_config
from rl_core.drafts import CUT_OFF, Draft, read_drafts
from rl_core.seal import seal
from rl_core.seams import GroupResult
from rl_core.thinking import MAX_CLOSED
from rl_core.types import EpisodeSpec, Group, Receipt, Rollout, SamplingParams, Status, Task, Turn
from rollout_workers import hosts as hosts_module
from rollout_workers.hosts import Hosts, HostSet, start_hosts
from rollout_workers.pool import Pool, PoolError
from tests.integration.hanging_env import HangingEnv
from tests.integration.leaking_env import LeakingEnv
from tests.integration.ties import logprob_errors, worst

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

T = TypeVar("T")
SEED_MODEL = Path(__file__).parents[2] / "configs" / "models" / "seed"
GROUP_SIZE = 4


class Running:
    """A pool, and a way to await it from a test."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.pool: Pool = self.run(Pool.start(config, run_dir=run_dir))

    def run(self, work: Awaitable[T], seconds: float = 600.0) -> T:
        async def awaited() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(seconds)

    def spec(self, env: str, **sampling: Any) -> EpisodeSpec:
        e = self.config.environments[env]
        params = SamplingParams(**({"max_tokens": e.max_tokens} | sampling))
        return EpisodeSpec(
            group_size=GROUP_SIZE, sampling=params, max_turns=e.max_turns, max_total_tokens=e.max_total_tokens, timeout_s=e.timeout_s
        )

    def groups(self, env: str, count: int, name: str, **sampling: Any) -> list[GroupResult]:
        async def together() -> list[GroupResult]:
            spec = self.spec(env, **sampling)
            return await asyncio.gather(*(self.pool.run_group(f"{name}-{i}", t, spec) for i, t in enumerate(tasks(env, count))))

        return self.run(together())


def tasks(env: str, count: int) -> list[Task]:
    return list(islice(resolve(env).tasks("train", 0, {}), count))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if not (SEED_MODEL / "config.json").is_file():
        pytest.skip("no seed checkpoint in configs/models/seed; make one with `polyrl model seed`")
    rollout = {"max_num_seqs": 16, "max_model_len": 768, "max_batched_tokens": 1024, "kv_cache_gib": 0.25, "speculative_tokens": 2}
    environments = {"math": {"max_total_tokens": 300}, "tools": {"max_turns": 5, "max_total_tokens": 768}}
    config = parse_config({"model": {"path": str(SEED_MODEL)}, "environments": environments, "rollout": rollout})
    start_local(num_cpus=8, object_store_memory=200 << 20)
    made = Running(config, tmp_path_factory.mktemp("run"))
    yield made
    made.run(made.pool.aclose())
    ray.shutdown()


@pytest.mark.parametrize("env", ["math", "tools"])
def test_a_group_is_scored_and_its_summary_tells_the_truth(running: Running, env: str) -> None:
    for result in running.groups(env, 3, f"scored-{env}"):
        group: Group = ray.get(result.ref)
        assert (group.id, group.task.env, result.env, len(group.rollouts)) == (result.group_id, env, env, GROUP_SIZE)
        assert set(result.statuses) <= {Status.OK.value, Status.INVALID_OUTPUT.value}
        assert result.rewards == tuple(r.verdict.reward for r in group.trainable)
        assert result.has_signal == (len(set(result.rewards)) > 1)
        assert result.sampled_tokens == sum(len(c.token_ids) for r in group.rollouts for c in r.completions) > 0
        assert (result.min_version, result.max_version) == (0, 0)
        assert 0 <= result.accepted <= result.drafted
        assert result.drafted > 0


def test_a_worker_reaches_a_host_on_its_machine_directly(running: Running) -> None:
    """Not through Ray, which takes several times as long, and would serve just as well otherwise."""
    running.groups("math", 1, "direct")
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@polyrl-host-" in line]
    assert len(sockets) > len(set(sockets)), "one listens, and each connection to it has its name as well"
    assert "not reached directly" not in (running.run_dir / "logs" / "w0.log").read_text()


def test_every_turns_prompt_extends_the_ids_before_it(running: Running) -> None:
    turns = 0
    for result in running.groups("tools", 12, "extends"):
        for rollout in ray.get(result.ref).rollouts:
            for before, after in zip(rollout.completions, rollout.completions[1:], strict=False):
                known = [*before.prompt_ids, *before.token_ids]
                assert after.prompt_ids[: len(known)].tolist() == known
                turns += 1
    assert turns > 0, "no episode had a second turn: nothing was tested"


def test_rollouts_of_a_group_have_dice_of_their_own_and_fixed_dice_repeat(running: Running) -> None:
    def sampled(name: str) -> list[list[int]]:
        (result,) = running.groups("math", 1, name, seed=5)
        return [r.completions[0].token_ids.tolist() for r in ray.get(result.ref).rollouts]

    first = sampled("dice-1")
    assert len({tuple(ids) for ids in first}) > 1
    assert sampled("dice-2") == first


def test_thoughts_are_closed_at_their_budget_and_the_answer_still_comes(running: Running) -> None:
    """The seed model works additions out within <think>: of three tokens it gets no further than the first digits."""

    async def capped(budget: int) -> list[GroupResult]:
        spec = replace(running.spec("math", temperature=0.5), thinking_budget=budget)
        work = (running.pool.run_group(f"capped-{budget}-{i}", task, spec) for i, task in enumerate(tasks("math", 4)))
        return await asyncio.gather(*work)

    chat = ChatML(SEED_MODEL)
    assert chat.think_ids is not None
    for budget in (0, 3):
        results = running.run(capped(budget))
        for result in results:
            group = ray.get(result.ref).rollouts
            assert result.thinking_tokens == sum(r.thinking_tokens for r in group) <= budget * GROUP_SIZE
            assert result.thoughts_closed == sum(r.thoughts_closed for r in group)
        rollouts = [r for result in results for r in ray.get(result.ref).rollouts]
        assert sum(r.thoughts_closed for r in rollouts) > 0, "no answer of four groups began with a thought"
        assert all("unclosed" not in r.turns[0].malformed for r in rollouts if 0 < r.thoughts_closed < MAX_CLOSED)
        assert all(c.token_ids[place] == chat.think_ids[1] for r in rollouts for c in r.completions for place in c.forced)


def test_an_evaluation_at_two_budgets_asks_the_same_and_tells_what_was_thought(running: Running) -> None:
    config = replace(running.config, environments={"math": running.config.environments["math"]})
    plan, told = Plan(budgets=[0, None], tasks=6, samples=2), list[tuple[int | None, int, int]]()

    async def measured() -> list[Row]:
        note = lambda *progress: told.append(progress)  # noqa: E731
        return [row for at in settings(config, plan) for row in await scores(config, plan, running.pool, at, note)]

    without, free = running.run(measured())
    assert (without.env, without.budget, free.budget) == ("math", 0, None)
    assert without.result.n == free.result.n == 12
    assert without.result.thinking_tokens == 0 < free.result.thinking_tokens
    assert free.result.thoughts_closed == 0
    assert without.result.by_difficulty.keys() == free.result.by_difficulty.keys()
    assert told == [(budget, done, 6) for budget in (0, None) for done in range(1, 7)]


def test_an_episode_of_a_broken_environment_is_masked_and_not_a_zero(running: Running) -> None:
    (task,) = tasks("math", 1)
    broken = Task(env="math", key="broken", split="train", seed=task.seed, public={}, private={})
    result = running.run(running.pool.run_group("broken", broken, running.spec("math")))
    assert set(result.statuses) == {Status.ENV_ERROR.value}
    assert (result.num_trainable, result.rewards, result.has_signal) == (0, (), False)
    assert all(r.id.endswith("r1") for r in ray.get(result.ref).rollouts), "each is tried twice"


def test_a_gold_that_nobody_can_read_ends_as_a_verifier_error_without_a_token(running: Running) -> None:
    """Through the host's actor, whose symbolic tier starts a process of its own."""
    (task,) = tasks("math", 1)
    unreadable = replace(task, private={"answer": "\\frac{1}{"})
    result = running.run(running.pool.run_group("unreadable", unreadable, running.spec("math")))
    assert set(result.statuses) == {Status.VERIFIER_ERROR.value}
    assert (result.rewards, result.sampled_tokens) == ((), 0)


def test_a_host_whose_interpreter_hangs_is_killed_and_serves_again(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing inside can help: the environment holds the interpreter's lock."""
    monkeypatch.setattr(hosts_module, "LOOK_S", 1.0)
    monkeypatch.setattr(hosts_module, "ANSWER_S", 2.0)
    flag = tmp_path / "flag"
    task = next(HangingEnv.tasks("train", 0, {}))

    async def main() -> tuple[Any, Any, int]:
        started = start_hosts(running.config)
        hosts, (handle, *_) = Hosts(started, owner="w9.0"), started.shared

        async def episode() -> Any:
            session = hosts.session("tests.integration.hanging_env:HangingEnv", {"flag": str(flag)}, task)
            await session.reset()
            return (await session.step(Turn(content=""))).verdict

        try:
            await handle.ping.remote()
            flag.touch()
            hung = await episode()
            return hung, await episode(), hosts.killed
        finally:
            ray.kill(handle)

    hung, after, killed = running.run(main(), 60.0)
    assert hung.status is Status.INFRA_ERROR
    assert (after.reward, killed) == (1.0, 1)


def test_a_host_that_leaks_is_replaced_between_episodes_and_no_episode_is_lost(running: Running) -> None:
    task = next(LeakingEnv.tasks("train", 0, {}))

    async def main() -> list[tuple[str, Any]]:
        (host,) = start_hosts(replace(running.config, rollout=replace(running.config.rollout, env_host_memory_gib=0.3))).shared
        hosts = Hosts(HostSet(shared=(host,)), owner="w9.1")

        async def episode() -> tuple[str, Any]:
            session = hosts.session("tests.integration.leaking_env:LeakingEnv", {}, task)
            process = (await session.reset()).messages[0].content
            await asyncio.sleep(1.0)  # the host sees what it takes, and that an episode is open
            verdict = (await session.step(Turn(content=""))).verdict
            await session.close()
            return process, verdict

        try:
            return [await episode() for _ in range(4)]
        finally:
            ray.kill(host)

    episodes = running.run(main(), 120.0)
    assert all(verdict.reward == 1.0 for _, verdict in episodes)
    assert len({process for process, _ in episodes}) >= 2


def test_published_weights_are_proved_and_stamped_on_the_tokens_after(running: Running) -> None:
    blob = seal(np.fromfile(SEED_MODEL / "model.safetensors", np.uint8), 7)
    broken = blob.copy()
    broken[-1] ^= 1
    with pytest.raises(PoolError, match=r"^worker w0 does not hold version 7: tensor \S+ arrived with checksum"):
        running.run(running.pool.load_weights(7, ray.put(broken)))
    (receipt,) = running.run(running.pool.load_weights(7, ray.put(blob)))
    assert receipt.checksums
    assert (receipt.worker, receipt.version, receipt.num_bytes) == ("w0", 7, blob.nbytes)
    assert {s.version for c in receipt.probe for s in c.spans} == {7}
    assert [(r.min_version, r.max_version) for r in running.groups("math", 2, "stamped")] == [(7, 7)] * 2


def test_a_killed_workers_rollouts_go_on_and_it_is_back_after_a_verified_update(running: Running) -> None:
    """SIGKILL amid work: finished rollouts stay, begun ones go on from their tokens, and the next version reaches the new worker."""
    weights = np.fromfile(SEED_MODEL / "model.safetensors", np.uint8)
    running.run(running.pool.load_weights(8, ray.put(seal(weights, 8))))
    (kept,) = running.groups("math", 1, "kept")
    engines = engine_processes()
    names = [f"killed-{i}" for i in range(24)]  # seconds of work: drafts are written twice a second, and the kill must find some

    chat = ChatML(SEED_MODEL)

    def goes_on(draft: Draft) -> bool:
        """Amid a turn, or after one that called a tool: tokens must follow. After another turn only the verdict may."""
        last = draft.completions[-1]
        calls = not (turn := chat.parse(last.token_ids)).malformed and bool(turn.tool_calls)
        return draft.end is None and (last.finish_reason == CUT_OFF or (calls and len(draft.completions) <= 3))

    def begun() -> int:
        drafts = read_drafts(running.run_dir / "drafts", names)
        return sum(goes_on(d) for mine in drafts.values() for d in mine.values())

    async def kill_amid_work() -> tuple[list[GroupResult], Sequence[Receipt]]:
        spec = running.spec("tools")
        work = [asyncio.create_task(running.pool.run_group(n, t, spec)) for n, t in zip(names, tasks("tools", len(names)), strict=True)]
        while begun() < 4:
            await asyncio.sleep(0.02)
            assert not all(w.done() for w in work)
        (worker,) = (p for p in psutil.Process().children(recursive=True) if "RolloutWorker" in " ".join(p.cmdline()))
        worker.kill()
        receipts = await running.pool.load_weights(9, ray.put(seal(weights, 9)))
        return await asyncio.gather(*work), receipts

    results, (receipt,) = running.run(kill_amid_work())
    assert sorted(r.group_id for r in results) == sorted(names)
    assert (receipt.version, {s.version for c in receipt.probe for s in c.spans}) == (9, {9})
    assert running.pool._places["w0"].restarts == 1
    again = [r for r in results if r.attempts == 2]
    assert sum(r.continued for r in again) >= 4
    assert all(r.history.startswith("worker w0 died: ") for r in again)
    assert {(r.min_version, r.max_version) for r in again} <= {(8, 9), (8, 8), (9, 9)}, "it must not serve its first weights"
    rollouts = [r for result in again for r in ray.get(result.ref).rollouts]
    both = [r for r in rollouts if {s.version for c in r.completions for s in c.spans} == {8, 9}]
    assert both, "a rollout that went on has tokens of the engine that died and of the one that followed"
    assert worst_logprob_error(both) < 1e-3
    assert isinstance(ray.get(kept.ref), Group), "a finished group must not go with the worker that made it"
    psutil.wait_procs(engines, timeout=20)
    assert not [p for p in engines if p.is_running()], "the killed worker left its engine behind"


def worst_logprob_error(rollouts: Sequence[Rollout]) -> float:
    """Largest distance of a stored logprob from plain torch's, in nats."""
    model = PolicyModel.from_pretrained(SEED_MODEL)
    return worst(logprob_errors(model, c) for r in rollouts for c in r.completions)


def test_closing_the_pool_leaves_no_engine(running: Running) -> None:
    """Last: it ends the module's pool."""
    engines = engine_processes()
    assert engines
    running.run(running.pool.aclose())
    psutil.wait_procs(engines, timeout=20)
    assert not [p for p in engines if p.is_running()]


def engine_processes() -> list[psutil.Process]:
    """The engine processes below this test's own Ray."""
    return [p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
