"""A step of a finished run, done again: the weights before it, the batch that made it, the same numbers (invariant 7).

    newest checkpoint before the step --> [the steps in between, again] --> the step, under the run's rules or under others
                                              ^ batches kept in the journal ^

Recorded figures come from the run's events. On the machine that recorded them, with one CPU thread, they are equal to the
bit; elsewhere sums are added up in another order, and agree to `TOLERANCE`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from learner import checkpoint
from learner.make import make_learner
from rl_core.config import RunConfig
from rl_core.journal import read_groups
from rl_core.ledger import read_batch
from rl_core.types import Group

FIGURES = (
    "loss", "policy_loss", "grad_norm", "mtp_grad_norm", "mtp_loss", "trained_tokens", "masked_share", "clip_share", "ess", "entropy",
    "ratio_mean", "mismatch_kl", "reference_kl", "stale_rollouts", "truncated_rollouts",
)  # fmt: skip
"""Last parts of the names of metrics that a step determines."""

TOLERANCE = 1e-4
"""Relative; float32 sums in another order. A masked token more or less is far outside it."""
FLOOR = 1e-6
"""Absolute: the policy loss is near zero by construction."""


class CannotReplay(ValueError):
    """The run did not keep what this needs. The message is a sentence for its user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the weights before a step come from."""

    version: int
    folder: Path | None  # None is the checkpoint that the run started from

    def batches(self, run_dir: Path, step: int) -> dict[int, list[Group]]:
        """What trained after it, up to and with `step`, by version. Raises CannotReplay for what is missing."""
        found = {}
        for version in range(self.version + 1, step + 1):
            names = read_batch(run_dir / "ledger.sqlite", version)
            groups = read_groups(run_dir / "journal", names)
            if not names:
                raise CannotReplay(f"no batch made version {version}: the run did not come so far, or went back to a checkpoint there")
            if missing := len(names) - len(groups):
                raise CannotReplay(
                    f"{missing} of the {len(names)} groups of step {version} are no longer in the journal; run with "
                    f"learner.keep_batches=all, or with the number of steps to keep"
                    + ("" if version == step else f" (the newest checkpoint before step {step} is of version {self.version})")
                )
            found[version] = list(groups.values())
        return found


def source_of(run_dir: Path, step: int) -> Source:
    """The newest checkpoint from before `step`."""
    if step < 1:
        raise CannotReplay(f"step {step}, wanted 1 or more: step 1 makes version 1")
    versions = {v: folder for v, folder in _checkpoints(run_dir / "checkpoints") if v < step}
    return Source(version=max(versions), folder=versions[max(versions)]) if versions else Source(version=0, folder=None)


def _checkpoints(root: Path) -> Iterator[tuple[int, Path]]:
    for folder in root.glob("step-*"):
        if (folder / checkpoint.STATE).is_file():
            yield int(json.loads((folder / checkpoint.STATE).read_text())["version"]), folder


def weights_before(config: RunConfig, source: Source, batches: Mapping[int, list[Group]], out: Path) -> Path:
    """The checkpoint folder with the weights from which the last of `batches` was trained; made in `out` if steps lie in between.

    Those need the optimizer's state, and a checkpoint of several ranks has it in pieces that one alone cannot read. Call
    `optimizer.connect` first, with one rank.
    """
    if config.learner.lora.rank:
        raise CannotReplay("a checkpoint's weights have the adapters of learner.lora merged into them, and a step needs them apart")
    *between, step = sorted(batches)
    if not between:
        return Path(config.model.path) if source.folder is None else source.folder / "model"
    if config.learner.num_ranks > 1 and source.folder is not None:
        raise CannotReplay(
            f"step {step} is {len(between)} steps after the checkpoint of version {source.version}, whose optimizer state belongs to "
            f"{config.learner.num_ranks} ranks; replay step {source.version + 1}, or run with learner.checkpoint_every=1"
        )
    learner = make_learner(config)
    if source.folder is not None:
        learner.load(source.folder)
    for version in between:
        learner.accumulate(batches[version])
        learner.apply(again=True)
    learner.save_model(out)
    return out


def replay(config: RunConfig, weights: Path, step: int, batch: Sequence[Group]) -> dict[str, float]:
    """Metrics of `step`, from the weights before it and its batch, under the rules of `config`."""
    learner = make_learner(config, weights=weights, version=step - 1)
    learner.accumulate(batch)
    return dict(learner.apply(again=True).metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One metric of a step: what the run recorded, what came out now, and what would have under other rules."""

    name: str
    recorded: float | None
    recomputed: float | None
    changed: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether now is then. A figure that only one of them has does not agree."""
        if self.recorded is None or self.recomputed is None:
            return self.recorded is self.recomputed
        return abs(self.recomputed - self.recorded) <= TOLERANCE * abs(self.recorded) + FLOOR


def compare(recorded: Mapping[str, float], recomputed: Mapping[str, float], changed: Mapping[str, float] | None = None) -> list[Figure]:
    """The figures that a step determines, those of the learner first."""
    columns = (recorded, recomputed, changed or {})
    names = {name for column in columns for name in column if name.startswith(("learner/", "env/")) and name.rpartition("/")[2] in FIGURES}
    return [
        Figure(name=name, recorded=recorded.get(name), recomputed=recomputed.get(name), changed=(changed or {}).get(name))
        for name in sorted(names, key=lambda n: (not n.startswith("learner/"), n.rpartition("/")[0], FIGURES.index(n.rpartition("/")[2])))
    ]
