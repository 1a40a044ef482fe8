"""Runs a scenario on real gloo ranks, each a process of its own, and builds groups for it. Used by test_learner."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl_core.types import Completion, Group, Message, Rollout, Status, Task, Verdict, VersionSpan

ROOT = Path(__file__).parents[2]


def run_ranks(num_ranks: int, folder: Path, plan: Sequence[tuple[str, str, dict[str, Any]]]) -> dict[str, list[Any]]:
    """Run each (name, scenario, settings) of `plan` one after the other on the same ranks; name -> what each rank returned (JSON).

    A scenario is `learner_scenarios.<scenario>(rank, folder, **settings)`. One set of processes for many scenarios, since importing
    torch, Transformers and DeepSpeed is most of the time.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    on_gpus = torch.cuda.device_count() >= num_ranks  # NCCL wants one for each rank; fewer, and all go to the CPU
    outs = [folder / f"out-{num_ranks}-{rank}.json" for rank in range(num_ranks)]
    program = [sys.executable, "-m", "tests.integration.learner_scenarios"]
    processes = [
        subprocess.Popen(
            [*program, str(rank), str(num_ranks), str(port), str(folder), json.dumps(plan), str(out)],
            cwd=ROOT,
            env=environment | {"CUDA_VISIBLE_DEVICES": str(rank) if on_gpus else ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=280)
            assert process.returncode == 0, f"a rank failed:\n{output[-6000:]}"
    finally:
        for process in processes:
            process.kill()
    answers = [json.loads(out.read_text()) for out in outs]
    return {name: [answer[name] for answer in answers] for name, _, _ in plan}


def completion(prompt: Sequence[int], sampled: Sequence[int], logprobs: Sequence[float] | None = None, version: int = 0) -> Completion:
    return Completion(
        prompt_ids=np.array(prompt, np.int32),
        token_ids=np.array(sampled, np.int32),
        logprobs=np.array(logprobs if logprobs is not None else [-1.0] * len(sampled), np.float32),
        spans=(VersionSpan(start=0, stop=len(sampled), version=version),) if len(sampled) else (),
        finish_reason="stop",
    )


def rollout(*completions: Completion, reward: float | None, env: str = "math", status: Status = Status.OK, key: str = "r") -> Rollout:
    return Rollout(
        id=key,
        env=env,
        task_key="k",
        completions=completions,
        messages=(Message(role="user", content=""),),
        verdict=Verdict(status=status, reward=reward),
    )


def group(*rollouts: Rollout) -> Group:
    env = rollouts[0].env
    return Group(id="g", task=Task(env=env, key="k", split="train", seed=0, public={}), rollouts=rollouts)


def random_groups(
    count: int,
    *,
    vocab: int,
    seed: int,
    logprob: Callable[[np.random.Generator], float] | None = None,
    version: int = 0,
    long_prompt: int = 0,
) -> list[Group]:
    """Groups of two environments, some with two turns, with ragged lengths and random rewards.

    With `long_prompt` one more group, whose rollouts all answer the same prompt of so many tokens.
    """
    rng = np.random.default_rng(seed)
    draw = logprob or (lambda rng: float(-np.log(vocab) + rng.normal(0, 0.3)))

    def turn(prompt: list[int]) -> Completion:
        n = int(rng.integers(3, 12))
        return completion(prompt, rng.integers(0, vocab, n).tolist(), [draw(rng) for _ in range(n)], version)

    groups = []
    for index in range(count):
        env, rollouts = ("math", "tools")[index % 2], []
        for member in range(4):
            first = turn(rng.integers(0, vocab, int(rng.integers(2, 20))).tolist())
            turns = [first]
            if env == "tools":
                heard = rng.integers(0, vocab, 3).tolist()
                turns.append(turn([*first.prompt_ids.tolist(), *first.token_ids.tolist(), *heard]))
            rollouts.append(rollout(*turns, reward=float(member % 2 == 0) + float(rng.random() < 0.3), env=env, key=f"{index}-{member}"))
        groups.append(group(*rollouts))
    if long_prompt:
        prompt = rng.integers(0, vocab, long_prompt).tolist()
        groups.append(group(*(rollout(turn(prompt), reward=float(m % 3 == 0), key=f"long-{m}") for m in range(5))))
    return groups
