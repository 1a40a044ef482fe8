"""Weights from the learner into a running engine, through a safetensors file that lives in memory.

    update_weights   starts a thread: check the seal --> load, check and pack a shadow (staging.py, receipts.py); sampling goes on
    report           asks what was packed, a few milliseconds at a time
    finish           the live models take the shadow's values and are verified; sequences stand still only meanwhile

Policy and draft travel together, in one update. An engine of several workers, or on CUDA, has no room for a second set of weights: it
loads in place by vLLM's layerwise reload, between start and finish, and only the seal is checked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rl_core import seal
from rollout_workers.vllm_plugin import auto_k, conv_alias, receipts, staging

ASK_S = 0.004
"""Less than a step of most engines."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """`path` of a safetensors file sealed as `version` that every worker of the engine can open; names as in a Hugging Face checkpoint."""

    path: str = ""
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How an update went."""

    mismatch: str = ""
    """Which tensor is not what it should be, in a sentence."""
    checksums: dict[str, int] = field(default_factory=dict)
    """Contents of all parameters and buffers: they follow from what was published, or never change. Empty if loaded in place."""


class ObjectStoreWeights(WeightTransferEngine[InitInfo, UpdateInfo]):
    """See the top of the file."""

    init_info_cls, update_info_cls = InitInfo, UpdateInfo

    def open(self, models: Mapping[str, nn.Module]) -> None:
        """The models that an update reaches, by role: "policy" and, if there is one, "draft"."""
        self._models = dict(models)
        self._thread = ThreadPoolExecutor(1, "weights")
        self._staging: Future[tuple[staging.Shadow, receipts.Manifest]] | None = None
        self._report: Report | None = None
        self._constants: dict[str, int] = {}
        if self.stages:
            empty = staging.Shadow(models)
            self._constants = receipts.contents(empty.parts)
            empty.free([])

    @property
    def stages(self) -> bool:
        """Whether there is room for a second set of weights beside the first, and one worker to keep it."""
        return self.device.type == "cpu" and self.parallel_config.world_size == 1

    def report(self) -> Report | None:
        """What the last update came to, or will if it is finished; None while it is being staged."""
        if self._report is None and self._staging is not None and self._staging.done():
            error = self._staging.exception()
            if error is None:
                return self._asked(self._staging.result()[1].questions)
            known = isinstance(error, receipts.Mismatch | seal.BadSeal)
            self._report = Report(mismatch=str(error) if known else f"the new weights do not load: {type(error).__name__}: {error}")
        return self._report

    def _asked(self, questions: list[receipts.Question]) -> Report | None:
        """Ask for a few milliseconds, between two steps of the engine; None if there are more."""
        until = time.monotonic() + ASK_S
        try:
            while questions and time.monotonic() < until:
                questions.pop().ask()
        except receipts.Mismatch as error:
            self._report = Report(mismatch=str(error))
            return self._report
        return None if questions else Report()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        if not self.stages:
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The base class synchronises an accelerator afterwards, which a CPU does not have."""
        if self.device.type == "cpu":
            self.receive_weights(self.parse_update_info(update_info))
        else:
            super().update_weights(update_info)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self._report = None
        if self.stages:
            self._staging = self._thread.submit(self._stage, update_info)
            return
        try:
            seal.check(np.memmap(update_info.path, np.uint8, "r"), update_info.version)
        except seal.BadSeal as error:
            self._report = Report(mismatch=str(error))
            return
        self.model.load_weights(tensors_of(update_info.path).items())  # type: ignore[operator]
        self._report = Report()

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        """Nothing to take over if staging failed: `report` says why."""
        if not self.stages:
            finalize_layerwise_reload(self.model, self.model_config)
            conv_alias.refresh(self.model)
            return
        assert self._staging is not None
        staged, self._staging = self._staging, None
        if self._report is not None:
            return
        shadow, manifest = staged.result()
        assert not manifest.questions, "finished before `report` had all answers"
        taken: set[int] = set()
        replaced = [staging.take(part, taken) for part in shadow.parts]
        try:
            receipts.verify(shadow.parts, manifest)
        except receipts.Mismatch as error:
            self._report = Report(mismatch=str(error))
        else:
            self._report = Report(checksums=manifest.contents)
        self._thread.submit(shadow.free, replaced)  # in its time: it takes tens of milliseconds for a large model

    @torch.no_grad()
    def _stage(self, update_info: UpdateInfo) -> tuple[staging.Shadow, receipts.Manifest]:
        """In a thread: the checked shadow, packed and ready to be taken over."""
        checked = seal.check(np.memmap(update_info.path, np.uint8, "r"), update_info.version)
        published = tensors_of(update_info.path)
        shadow = staging.Shadow(self._models)
        values = {checked[name] for name in shadow.load(published) if name}
        for name in published:
            drafts = name.startswith("mtp.") and "draft" not in self._models
            if checked[name] not in values and not drafts:  # a tied tensor may be published twice, and loaded once
                raise receipts.Mismatch(f"published tensor {name} was loaded into no parameter")
        return shadow, receipts.process(shadow.parts, self._constants)

    def shutdown(self) -> None:
        self._thread.shutdown(wait=False)


def tensors_of(path: str) -> dict[str, torch.Tensor]:
    """Of a safetensors file, mapped and not read. A safe_open handle is no dict: it has keys(), but is not iterable."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class WorkerExtension:
    """What `collective_rpc` can ask of a vLLM worker beyond its own methods."""

    weight_transfer_engine: Any
    model_runner: Any

    def weights_open(self) -> bool:
        """Whether updates are staged beside the live weights."""
        draft = self.get_draft_model()  # type: ignore[attr-defined]
        models = {"policy": self.model_runner.get_model()} | ({} if draft is None else {"draft": draft})
        self.weight_transfer_engine.open(models)
        return bool(self.weight_transfer_engine.stages)

    def hold_drafts(self, k: int | None) -> None:
        """Draft so many in every step; None: choose. Scheduler and drafts are in this process, as there is no other."""
        auto_k.held = k

    def weights_report(self) -> Mapping[str, Any] | None:
        """`Report`, as a mapping."""
        report: Report | None = self.weight_transfer_engine.report()
        return None if report is None else asdict(report)
