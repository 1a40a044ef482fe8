"""Small stored runs for the tests of the run store, the report and the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rl_core.events import Event
from rl_core.run_store import RunStore
from rl_core.types import Completion, Group, Message, Rollout, Status, Task, Verdict, VersionSpan


def completion(length: int = 3, *, prompt: int = 5, versions: tuple[int, ...] = (0,), drafted: int = 0, accepted: int = 0) -> Completion:
    """`length` sampled tokens, divided among `versions`."""
    cuts = np.linspace(0, length, len(versions) + 1).astype(int).tolist()
    spans = tuple(VersionSpan(start=a, stop=b, version=v) for a, b, v in zip(cuts[:-1], cuts[1:], versions, strict=True))
    return Completion(
        prompt_ids=np.arange(prompt, dtype=np.int32),
        token_ids=np.arange(length, dtype=np.int32),
        logprobs=np.full(length, -0.5, np.float32),
        spans=spans,
        finish_reason="stop",
        engine_steps=length,
        drafted=drafted,
        accepted=accepted,
    )


def group(
    id: str = "g0", env: str = "math", rewards: tuple[float | None, ...] = (1.0, 0.0), *, text: str = "7", split: str = "train"
) -> Group:
    """One rollout per reward; None is a failure of ours."""
    task = Task(env=env, key=f"key-{id}", split=split, seed=1, public={"q": "3+4"}, private={"gold": "7"}, difficulty="easy")
    rollouts = []
    for i, reward in enumerate(rewards):
        status = Status.INFRA_ERROR if reward is None else Status.OK
        verdict = Verdict(status=status, reward=reward, components={"correct": reward or 0.0}, evidence={"answer": text})
        messages = (Message(role="user", content="3+4"), Message(role="assistant", content=text))
        rollouts.append(
            Rollout(
                id=f"{id}-{i}", env=env, task_key=task.key, completions=(completion(versions=(2, 3), drafted=4, accepted=3),),
                messages=messages, verdict=verdict, worker="w0", started_at=1.0, seconds=0.5,
            )
        )  # fmt: skip
    return Group(id=id, task=task, rollouts=tuple(rollouts))


def score(passed: float, n: int = 128) -> dict[str, object]:
    """One environment's part of an eval event."""
    return {
        "pass_rate": passed,
        "mean_reward": passed,
        "n": n,
        "ci95": [round(max(0.0, passed - 0.08), 2), round(min(1.0, passed + 0.08), 2)],
    }


def events(*, steps: int = 4, finished: bool = True) -> list[Event]:
    """A run over math and code, in which math rises and code does not."""
    rows = [
        Event(
            kind="run_started",
            data={
                "run": "demo",
                "steps": steps,
                "environments": {"math": 3.0, "code": 1.0},
                "max_staleness": 1,
                "speculative_tokens": 2,
                "objective": "ppo clip; masked importance",
            },
        ),
        Event(kind="phase", data={"name": "training", "detail": f"{steps} steps"}),
        Event(kind="eval", data={"version": 0, "label": "before", "environments": {"math": score(0.3), "code": score(0.2)}}),
    ]
    for step in range(1, steps + 1):
        metrics = {
            "env/math/reward": 0.3 + 0.1 * step, "env/math/groups_trained": 3.0 * step, "env/math/share": 0.75,
            "env/math/staleness_mean": 0.5, "env/math/staleness_max": 1.0, "env/math/mtp_acceptance": 0.6,
            "env/math/tokens_per_engine_step": 1.9, "env/math/masked_share": 0.01 * step, "env/math/ess": 0.9, "env/math/entropy": 0.5,
            "learner/staleness_max": 1.0, "learner/tokens_per_s": 9000.0,
            "sync/logprob_error_mean": 2e-6 * step, "sync/logprob_error_max": 3e-5, "sync/pause_ms": 40.0 + step,
            "progress/elapsed_s": 5.0 * step, "progress/eta_s": 5.0 * (steps - step), "rollout/tokens_per_s": 4000.0,
        }  # fmt: skip
        if step != 2:  # no group of code came back in this step
            metrics["env/code/reward"] = 0.2
        rows.append(Event(kind="step", data={"version": step, "metrics": metrics}))
    if finished:
        rows.append(Event(kind="eval", data={"version": steps, "label": "after", "environments": {"math": score(0.8), "code": score(0.2)}}))
        rows.append(Event(kind="run_finished", data={"outcome": "finished", "reason": "", "seconds": 61.0}))
    return rows


def store_run(folder: Path, *, finished: bool = True, groups: tuple[Group, ...] = ()) -> Path:
    """A run folder as a run leaves it."""
    store = RunStore(folder)
    (folder / "config.yaml").write_text("name: demo\n")
    for event in events(finished=finished):
        store.emit(event)
    store.add_groups(groups or (group(split="eval"),), "before")
    store.close()
    return folder
