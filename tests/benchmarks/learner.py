"""The learner's step against a plain PyTorch loop on the Transformers model: the same weights, batch and loss, in turns, on one thread.

speedup_128|1k|8k|32k                 trained tokens/s, learner over plain loop, with rows of up to so many tokens
speedup_apart_1k                      the same of rows that all have prompts of their own: nothing is shared
tokens_per_s_learner|plain_LENGTH     of them: tokens of all prompts and answers per second of gradients, clip and AdamW
gradient_error_LENGTH                 largest difference between a gradient of the two, over the largest entry of that parameter's
peak_gib_32k, plain_peak_gib_8k       most memory that a process ever held which took one such step and nothing else
peak_gib_32k_checkpointed             with learner.checkpoint_layers
plain_needs_gib_32k                   the plain loop's at 32k, in proportion

A batch is groups as GRPO samples them, `GROUP_SIZE` answers to each prompt. An answer is at most half of a row, and at most 256 tokens.
Speed is without the MTP head, which Transformers does not have; the learner's peak is with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from infra.bench import interleaved, ratio
from learner.learner import Learner
from learner.model import PolicyModel
from learner.optimizer import solo
from rl_core.config import ImportanceConfig, LearnerConfig
from rl_core.process_env import cpu_environment
from rl_core.trajectories import trajectories
from rl_core.types import Completion, Group, Rollout, Status, Task, Trajectory, Verdict, VersionSpan
from tests.benchmarks._plain_loop import PlainLoop

ROOT = Path(__file__).parents[2]
SEED_MODEL = ROOT / "configs" / "models" / "seed"
LENGTHS = {"128": 128, "1k": 1024, "8k": 8192, "32k": 32768}
GROUP_SIZE = {"128": 8, "1k": 8, "8k": 4, "32k": 2}
REPETITIONS = {"128": 3, "1k": 3, "8k": 1, "32k": 1}
LONGEST_ANSWER = 256
BATCH_TOKENS = 16384
"""At least; never less than one group."""
PLAIN_MICROBATCH = 2048
"""Padded tokens, what the plain loop is fastest with on a CPU: its arrays per state and head then fit the cache."""
SETTINGS = LearnerConfig(importance=ImportanceConfig(rule="none"), microbatch_tokens=34_000)
"""Room for a 32k prompt with its answers. Nothing is masked, since nobody sampled these tokens."""
ENV = "bench"


def bench() -> dict[str, list[float]]:
    _, peak_32k = _measure("peak", "learner", "32k")
    start, plain_8k = _measure("peak", "plain", "8k")
    needs = start + (plain_8k - start) * LENGTHS["32k"] / LENGTHS["8k"]
    _, light = _measure("peak", "checkpointed", "32k")
    figures = {"peak_gib_32k": [peak_32k], "plain_peak_gib_8k": [plain_8k], "plain_needs_gib_32k": [needs]}
    figures["peak_gib_32k_checkpointed"] = [light]
    for name in LENGTHS:
        figures |= _measure("speed", name, "together")
    return figures | _measure("speed", "1k", "apart")


def _measure(*what: str) -> Any:
    """In a process of its own, set up as a learner's."""
    command = [sys.executable, "-m", "tests.benchmarks.learner", *what]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | cpu_environment(1), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak(who: str, name: str) -> tuple[float, float]:
    """GiB that this process held at most before and after its only step."""
    batch = groups(name)
    if who != "plain":
        learner = make_learner(replace(SETTINGS, checkpoint_layers=who == "checkpointed"))
        before = most_gib()
        take(learner, batch)
    else:
        plain = PlainLoop(SEED_MODEL, SETTINGS, max_tokens=PLAIN_MICROBATCH)
        before = most_gib()
        take(plain, rows_of(batch))
    return before, most_gib()


def take(who: Learner | PlainLoop, batch: Any) -> None:
    """One optimizer step."""
    who.accumulate(batch)
    who.apply()


def most_gib() -> float:
    """Not by getrusage, whose maximum includes the process that this one was forked from."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def speed(name: str, prompts: str) -> dict[str, list[float]]:
    """Figures of one length; `prompts`: together, or apart. The plain loop's only step of 32k takes minutes."""
    config = replace(SETTINGS, learning_rate=1e-6, mtp_loss_weight=0.0, spike_factor=0.0)
    learner = make_learner(config)
    batch = groups(name, apart=prompts == "apart")
    rows = rows_of(batch)
    tokens = sum(len(row) for row in rows)
    figures: dict[str, list[float]] = {}
    plain = PlainLoop(SEED_MODEL, config, max_tokens=PLAIN_MICROBATCH)
    steps: dict[str, Callable[[], None]] = {"learner": lambda: take(learner, batch), "plain": lambda: take(plain, rows)}

    def tokens_per_s(step: Callable[[], None]) -> float:
        began = time.perf_counter()
        step()
        return tokens / (time.perf_counter() - began)

    label = f"apart_{name}" if prompts == "apart" else name
    if REPETITIONS[name] > 2:
        figures[f"gradient_error_{label}"] = [gradient_error(learner, batch, plain, rows)]
    measures = {one: lambda step=step: tokens_per_s(step) for one, step in steps.items()}
    measured = interleaved(measures, REPETITIONS[name], warmups=int(REPETITIONS[name] > 1))  # type: ignore[arg-type]
    figures |= {f"tokens_per_s_{one}_{label}": values for one, values in measured.items()}
    figures[f"speedup_{label}"] = ratio(measured["learner"], measured["plain"])
    return figures


def gradient_error(learner: Learner, batch: Sequence[Group], plain: PlainLoop, rows: Sequence[Trajectory]) -> float:
    """Largest difference of any gradient, over the largest entry of that parameter's. Both take the step then."""
    learner.accumulate(batch)
    plain.accumulate(rows)
    ours = {name.removeprefix("lm."): safe_get_full_grad(p) for name, p in learner.model.named_parameters() if p.requires_grad}
    theirs = {name: p.grad for name, p in plain.model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    error = max(float((ours[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-12)) for name, grad in theirs.items())
    learner.apply()
    plain.apply()
    return error


def make_learner(config: LearnerConfig) -> Learner:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    return Learner(PolicyModel.from_pretrained(SEED_MODEL), config, temperatures={ENV: 1.0}, max_staleness=10**6)


def groups(name: str, *, apart: bool = False) -> list[Group]:
    """About BATCH_TOKENS tokens of rows that are as long as `name` says, or less by half an answer. `apart`: a prompt for each answer."""
    length, size = LENGTHS[name], GROUP_SIZE[name]
    return [group(length, size, seed, apart=apart) for seed in range(max(1, BATCH_TOKENS // (length * size)))]


def group(length: int, size: int, seed: int, *, apart: bool) -> Group:
    """Random tokens, rewards 0, 1, 0, 1, ... The first answer is the longest."""
    rng = np.random.default_rng(seed)
    longest = min(length // 2, LONGEST_ANSWER)
    prompt, rollouts = rng.integers(5, 700, length - longest), []
    for member in range(size):
        if apart:
            prompt = rng.integers(5, 700, length - longest)
        answer = rng.integers(5, 700, longest if member == 0 else rng.integers(longest // 2, longest))
        completion = Completion(
            prompt_ids=prompt.astype(np.int32),
            token_ids=answer.astype(np.int32),
            logprobs=np.full(len(answer), -1.0, np.float32),
            spans=(VersionSpan(start=0, stop=len(answer), version=0),),
            finish_reason="stop",
        )
        verdict = Verdict(status=Status.OK, reward=float(member % 2))
        rollouts.append(Rollout(id=str(member), env=ENV, task_key="k", completions=(completion,), messages=(), verdict=verdict))
    return Group(id=str(seed), task=Task(env=ENV, key="k", split="train", seed=seed, public={}), rollouts=tuple(rollouts))


def rows_of(groups: Sequence[Group]) -> list[Trajectory]:
    return [row for group in groups for row in trajectories(group, LearnerConfig().advantage)]


if __name__ == "__main__":
    with solo():
        what, *arguments = sys.argv[1:]
        answer = peak(*arguments) if what == "peak" else speed(*arguments)
    print(json.dumps(answer))
