"""What the episode path costs: generated tokens/s of episodes over those of the bare engine.

episode_over_raw_single    math: one turn, no tool
episode_over_raw_multi     tools: up to six turns, each of which waits for its environment
episode_over_raw_mixed     the four environments of the quickstart together, in equal parts
episode_over_raw           the smallest of the three medians
tokens_per_s_<what>_<how>  generated tokens/s, `episodes` and `raw`
whole_over_raw_<what>      the same from the first request to the last verdict
waited_<what>_<how>        share of a round for which the engine could run, and something else had its processor (Linux)

A run never drains: there is always a next group. So rates are taken from when a quarter of the tokens has been generated until three
quarters have, while the engine is full; what filling and draining cost an episode, which is waiting for its environment then, is in
`whole_over_raw`.

Episodes run as in a run: `RolloutWorker.run_group`, environments in a host process, chat format, logprobs, policy versions, and drafts
journalled as in a run. Raw is `AsyncLLM.generate` of the same engine, right after them: the same prompts, each with as many tokens as
the episode's turn had, the next turn of an episode asked for as soon as the one before is done. The engine has a process of its
own, as ever; worker and environments share the other core. Without speculation, whose luck with drafts would differ from run to run.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import ray
import uvloop
from omegaconf import OmegaConf

from environments.registry import resolve
from infra.bench import interleaved, ratio
from infra.ray_cluster import start_local
from rl_core.config import RunConfig
from rl_core.config_files import parse_config
from rl_core.types import Completion, EpisodeSpec, Group, SamplingParams, Task
from rollout_workers.hosts import start_hosts
from rollout_workers.worker import EPISODES_PER_SEQUENCE, Job, RolloutWorker

ROOT = Path(__file__).parents[2]
SEED_MODEL = ROOT / "configs" / "models" / "seed"
MIXTURES = {"single": ("math",), "multi": ("tools",), "mixed": ("math", "code", "tools", "long_context")}
GROUPS = {"single": 128, "multi": 48, "mixed": 32}  # per repetition
EDGE = 1 / 4
"""Share of a round's tokens that fills the engine, and that drains it."""
GROUP_SIZE = 8
REPETITIONS = {"single": 80, "multi": 32, "mixed": 32}
"""On a virtual machine with neighbours, adjacent rounds are a tenth apart, be they of five seconds or of forty: many short ones tell
more."""
numbers = itertools.count()


def bench() -> dict[str, list[float]]:
    start_local(num_cpus=8, object_store_memory=1 << 28)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return uvloop.run(measure(Path(folder)))  # Ray's actors, in which workers live, run on uvloop
    finally:
        ray.shutdown()


async def measure(folder: Path) -> dict[str, list[float]]:
    quickstart: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "quickstart.yaml"))
    rollout = {"max_num_seqs": 64, "max_model_len": 4608, "speculative_tokens": 0, "kv_cache_gib": 0.5}
    config = parse_config({"model": {"path": str(SEED_MODEL)}, "environments": quickstart["environments"], "rollout": rollout})
    worker = RolloutWorker(
        "w0", life="bench", model_path=str(SEED_MODEL), dtype="float32", rollout=config.rollout, seed=0, hosts=start_hosts(config),
        run_dir=folder,
    )  # fmt: skip
    await worker.start()
    figures: dict[str, list[float]] = {}
    loop = asyncio.get_running_loop()
    try:
        for mixture, environments in MIXTURES.items():
            count = REPETITIONS[mixture]
            work = Work(worker, config, environments, GROUPS[mixture])
            measures = {
                f"{mixture}_{how}": lambda run=run: asyncio.run_coroutine_threadsafe(run(), loop).result()
                for how, run in (("episodes", work.episodes), ("raw", work.raw))
            }
            rates = await asyncio.to_thread(interleaved, measures, count)
            figures |= {f"tokens_per_s_{name}": values for name, values in rates.items()}
            figures[f"episode_over_raw_{mixture}"] = ratio(rates[f"{mixture}_episodes"], rates[f"{mixture}_raw"])
            print(f"episode_over_raw_{mixture}: {median(figures[f'episode_over_raw_{mixture}']):.3f}", file=sys.stderr, flush=True)
            figures[f"whole_over_raw_{mixture}"] = ratio(work.whole["episodes"][-count:], work.whole["raw"][-count:])
            figures |= {f"waited_{mixture}_{how}": values[-count:] for how, values in work.waited.items()}
    finally:
        await worker.shutdown()
    # Not the worst of each repetition: the smallest of three ratios that are each a few percent off is below 1 for equals, too.
    figures["episode_over_raw"] = [min(median(figures[f"episode_over_raw_{mixture}"]) for mixture in MIXTURES)]
    return figures


class Work:
    """One mixture: a round of episodes, and the same tokens again without them."""

    def __init__(self, worker: RolloutWorker, config: RunConfig, environments: Sequence[str], groups: int) -> None:
        self._worker, self._config, self._groups = worker, config, groups
        self._tasks = [self._source(env) for env in environments]
        self._done: list[Group] = []
        self.whole: dict[str, list[float]] = defaultdict(list)
        """Tokens/s of whole rounds, warm-up included."""
        self.waited: dict[str, list[float]] = defaultdict(list)

    def _source(self, env: str) -> Any:
        return resolve(env).tasks("train", 7, self._options(env))

    def _options(self, env: str) -> dict[str, Any]:
        return {"tokenizer": str(SEED_MODEL), **self._config.environments[env].options}

    async def episodes(self) -> float:
        tasks = list(islice(itertools.chain.from_iterable(zip(*self._tasks, strict=False)), self._groups))
        began, turns, waited = time.perf_counter(), [], waited_s(self._worker)
        sample = self._worker.engine.sample

        async def watched(*args: Any, **kwargs: Any) -> Completion:
            completion = await sample(*args, **kwargs)
            turns.append((time.perf_counter(), len(completion.token_ids)))
            return completion

        self._worker.engine.sample = watched  # type: ignore[method-assign]
        try:
            done = await asyncio.gather(*(self._worker.run_group(self._job(task)) for task in tasks))
        finally:
            self._worker.engine.sample = sample  # type: ignore[method-assign]
        self._done = [group for group, _ in done]
        self.waited["episodes"].append((waited_s(self._worker) - waited) / (time.perf_counter() - began))
        return self._rate("episodes", began, turns)

    def _job(self, task: Task) -> Job:
        e = self._config.environments[task.env]
        spec = EpisodeSpec(
            group_size=GROUP_SIZE, sampling=SamplingParams(max_tokens=e.max_tokens), max_turns=e.max_turns,
            max_total_tokens=e.max_total_tokens, timeout_s=600,
        )  # fmt: skip
        return Job(group_id=f"g{next(numbers)}", task=task, spec=spec, env_id=task.env, options=self._options(task.env))

    async def raw(self) -> float:
        room = asyncio.Semaphore(int(self._config.rollout.max_num_seqs * EPISODES_PER_SEQUENCE))  # as many as episodes, at a time
        llm = self._worker.engine._llm
        began, done, waited = time.perf_counter(), [], waited_s(self._worker)

        async def again(turns: Sequence[Completion]) -> None:
            async with room:
                for turn in turns:
                    tokens = await generate(llm, turn.prompt_ids.tolist(), len(turn.token_ids))
                    done.append((time.perf_counter(), tokens))

        await asyncio.gather(*(again(r.completions) for group in self._done for r in group.rollouts))
        self.waited["raw"].append((waited_s(self._worker) - waited) / (time.perf_counter() - began))
        return self._rate("raw", began, done)

    def _rate(self, how: str, began: float, turns: Sequence[tuple[float, int]]) -> float:
        """Tokens/s in the middle of a round. `turns`: when each ended, and its tokens."""
        total = sum(tokens for _, tokens in turns)
        self.whole[how].append(total / (time.perf_counter() - began))
        done, middle = 0, []
        for ended, tokens in turns:
            done += tokens
            if EDGE * total <= done <= (1 - EDGE) * total:
                middle.append((ended, tokens))
        return sum(tokens for _, tokens in middle[1:]) / (middle[-1][0] - middle[0][0])


def waited_s(worker: RolloutWorker) -> float:
    """Seconds that the engine's main thread has waited for a processor so far; nan where the kernel does not tell."""
    engine = worker.engine._processes[0].pid
    try:
        return int(Path(f"/proc/{engine}/task/{engine}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return float("nan")


async def generate(llm: Any, prompt: list[int], count: int) -> int:
    """As many tokens as the episode's turn had, with what a user of vLLM would ask for: their logprobs, at the end."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    params = vllm.SamplingParams(
        max_tokens=count, temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    tokens = 0
    async for output in llm.generate({"prompt_token_ids": prompt}, params, f"raw-{next(numbers)}"):
        tokens = len(output.outputs[0].token_ids)
    assert tokens == count, f"asked for {count} tokens, got {tokens}"
    return tokens
