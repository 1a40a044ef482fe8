"""Harm to a real engine's weights, between its taking new ones and its looking at what it holds."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from vllm import _custom_ops as ops

from rollout_workers.vllm_plugin import receipts, staging
from rollout_workers.vllm_plugin.staging import Part
from rollout_workers.vllm_plugin.weights import ObjectStoreWeights, WorkerExtension

TAKE, PROCESS = staging.take, receipts.process


class Corrupting(WorkerExtension):
    """Named as the worker extension of an engine in place of its base class."""

    undo: ClassVar[list[Callable[[], object]]] = []
    """What no update mends."""
    threads: ClassVar[set[str]] = set()

    def tensor_names(self) -> list[str]:
        """Of all parameters and buffers, tied ones too: what a receipt must cover. A module that two models share is the first one's."""
        models, seen = {"policy": self.model_runner.get_model(), "draft": self.get_draft_model()}, set()  # type: ignore[attr-defined]
        return [
            ".".join(filter(None, (f"{role} {path}".strip(), name)))
            for role, model in models.items()
            for path, module in model.named_modules(memo=seen)
            for each in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            for name, _ in each
        ]

    def kernel_threads(self) -> list[str]:
        """Names of the threads that have called the CPU's matrix product since this was asked first."""
        if not self.threads:
            plain = ops.onednn_mm
            ops.onednn_mm = lambda *given: (self.threads.add(threading.current_thread().name), plain(*given))[1]
        return sorted(self.threads)

    def tensors(self, collect: bool) -> int:
        """How many there are. Unless `collect`, none goes from now on that something refers to, if only in a circle."""
        (gc.enable if collect else gc.disable)()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    def load_in_place(self) -> None:
        """From now on, as where there is no room for a second set of weights."""
        ObjectStoreWeights.stages = False  # type: ignore[assignment, misc, method-assign]

    def corrupt(self, harm: str) -> None:
        """The next updates suffer `harm`, until there is another; "" is none."""
        for mend in self.undo:
            mend()
        self.undo.clear()

        def take(part: Part, taken: set[int]) -> list[Any]:
            packed = part.live.__dict__.get("cpu_linear")
            if harm == "stale draft" and part.name.startswith("draft "):
                return []
            if harm == "constant" and part.name == "policy model.layers.3.mixer.attn":
                self.undo.append(partial(part.live._k_scale.fill_, 1.0))  # type: ignore[operator, union-attr]
                part.live._k_scale.fill_(0.5)  # type: ignore[operator, union-attr]
            before = TAKE(part, taken)
            if harm == "parameter" and part.name == "policy model.norm_f":
                part.live.weight.view(-1)[7] += 1e-6  # type: ignore[operator, union-attr]
            if harm == "decay rate" and part.name == "policy model.layers.0.mixer":
                part.live.A[0] *= 1.001  # type: ignore[operator, index]
            if harm == "conv view" and part.name == "policy model.layers.2.mixer":
                view = part.live._buffers["conv_weights"]
                part.live._buffers["conv_weights"] = view * 1.001  # type: ignore[operator]
                self.undo.append(partial(part.live._buffers.update, conv_weights=view))
            if harm == "packed" and part.name == "policy model.layers.0.mixer.in_proj":
                part.live.__dict__["cpu_linear"] = packed
            return before

        def process(parts: list[Part], constants: dict[str, int]) -> receipts.Manifest:
            for part in parts:
                if harm == "loader" and part.name == "policy model.layers.3.mixer.qkv_proj":
                    part.shadow.weight[3, 5] = 0.0  # type: ignore[operator, index]
            return PROCESS(parts, constants)

        staging.take, receipts.process = take, process
