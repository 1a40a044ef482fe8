"""Learners that are killed while they save, one after the other in one run folder. Used by test_checkpoint_kill.

    born          a learner that goes on from the newest checkpoint
    life          ... and took a step
    saved         ... and saved; somewhere there, or later, it is killed
    undisturbed   the same steps without a checkpoint: what weights, optimizer and loss must be at every version

What they saw is a JSON line each. Every life is a fork of this process, which imports everything once and computes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learner import checkpoint
from learner.learner import Learner
from learner.model import PolicyModel
from learner.optimizer import solo
from rl_core.config import ImportanceConfig, LearnerConfig
from tests.integration.learner_ranks import random_groups
from tests.integration.tiny_hybrid import make_tiny_hybrid

VOCAB = 32
LAST = (1, 4, 0, 2, 3, 5)
"""Operations from the end of a save at which to die first: there names change."""
SAVES = 3
"""After which a life ends by itself, if nobody has killed it."""
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree", "shutil.copyfile"}


class Lives:
    """What happens in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.log = folder, folder / "checkpoints", folder / "seen.jsonl"

    def make(self) -> Learner:
        config = LearnerConfig(warmup_steps=1, learning_rate=1e-2, importance=ImportanceConfig(low=0.0, high=1e9))
        learner = Learner(
            PolicyModel.from_pretrained(self.folder / "model"), config, temperatures={"math": 1.0, "tools": 1.0}, max_staleness=0
        )
        if (newest := checkpoint.latest(self.root)) is not None:
            learner.load(newest)
        return learner

    def step(self, learner: Learner) -> float:
        """The step that this version always takes; its loss."""
        learner.accumulate(random_groups(2, vocab=VOCAB, seed=learner.version, version=learner.version))
        return learner.apply().metrics["learner/loss"]

    def see(self, who: str, learner: Learner, **more: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps({"who": who, "version": learner.version, "digest": digest(learner), **more}) + "\n")

    def life(self, deadly: Callable[[], object]) -> None:
        """`deadly` is called before the first save."""
        learner = self.make()
        self.see("born", learner)
        for save in range(SAVES):
            self.see("life", learner, loss=self.step(learner))
            if not save:
                deadly()
            learner.save(self.root)
            self.see("saved", learner)

    def survivor(self) -> None:
        """One life that nobody ends; then all its steps and those of its forebears again, without a checkpoint."""
        learner = self.make()
        self.see("born", learner)
        self.see("life", learner, loss=self.step(learner))
        steps, self.root = learner.version, self.folder / "no-checkpoints"
        learner = self.make()
        self.see("undisturbed", learner)
        for _ in range(steps):
            self.see("undisturbed", learner, loss=self.step(learner))


def digest(learner: Learner) -> str:
    """Of every bit of weights and optimizer state."""
    found = hashlib.sha256()
    state = [t for values in learner.optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    for tensor in [*learner.model.state_dict().values(), *state]:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def at_event(number: int) -> Callable[[], object]:
    """Dies at the file operation of this number, counted from the beginning of a save."""
    left = number

    def on(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in FILE_EVENTS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(on)


def count_events(lives: Lives) -> tuple[int, float]:
    """File operations and seconds of one save, to a folder of its own."""
    seen = 0

    def on(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        seen += event in FILE_EVENTS

    learner = lives.make()
    sys.addaudithook(on)
    began = time.monotonic()
    learner.save(lives.folder / "counted")
    return seen, time.monotonic() - began


def run_in_fork(work: Callable[[], object]) -> int:
    """Its process id. A process of one rank, in which gloo and DeepSpeed start afresh."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        with solo():
            work()
        status = 0
    finally:
        os._exit(status)  # nothing of the parent's is cleaned up here


def wait_for(pid: int) -> int:
    """Its wait status; 0 is a good end."""
    return os.waitpid(pid, 0)[1]


def main(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """What became of the processes: those killed, and killed amid a save that had not come to its end."""
    torch.set_num_threads(1)
    rng, lives, measured = random.Random(seed), Lives(folder), folder / "measured.json"
    make_tiny_hybrid(folder / "model", vocab_size=VOCAB)
    assert wait_for(run_in_fork(lambda: measured.write_text(json.dumps(count_events(lives))))) == 0
    num_events, seconds = json.loads(measured.read_text())
    killed = amid = 0
    for death in range(kills):
        if death % 2:
            status = kill_from_outside(lives, rng.uniform(0, seconds))
        else:
            operation = num_events - LAST[death // 2] if death // 2 < len(LAST) else rng.randint(1, num_events)
            status = wait_for(run_in_fork(lambda operation=operation: lives.life(at_event(operation))))  # type: ignore[misc]
        assert os.WIFSIGNALED(status) or status == 0, f"a life ended with status {status}"
        killed += os.WIFSIGNALED(status)
        amid += any(lives.root.glob(".*.partial"))
    assert wait_for(run_in_fork(lives.survivor)) == 0
    return {"killed": killed, "amid": amid}


def kill_from_outside(lives: Lives, after_s: float) -> int:
    """Kill a life so long after its first save began; its wait status."""
    told, tell = os.pipe()
    pid = run_in_fork(lambda: lives.life(lambda: os.write(tell, b".")))
    os.close(tell)
    began = os.read(told, 1)  # empty if it ended before
    os.close(told)
    if began:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
    return wait_for(pid)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
