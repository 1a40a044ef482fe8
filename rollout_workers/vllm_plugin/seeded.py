"""Requests with a seed of their own, on CPU.

Defect upstream (vLLM 0.32, CPU): when a prompt is prefilled in parts, the token sampled after each part is thrown away and the
request's generator is to be set back by a CUDA offset, which a CPU generator does not have. The error ends the engine.
Here such a generator keeps its place instead: what a seed gives then depends on how many parts its prompt was prefilled in.
"""

from __future__ import annotations

from typing import Any

import torch


class CpuGenerator(torch.Generator):
    """A generator that takes a rewind for done."""

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        pass


def install() -> None:
    """Give every request that brings a generator one of ours, with the same seed."""
    from vllm.v1.worker.gpu_input_batch import InputBatch

    if hasattr(InputBatch, "polyrl_seeded"):
        return
    stock = InputBatch.add_request

    def add_request(self: Any, request: Any) -> Any:
        if request.generator is not None and not isinstance(request.generator, CpuGenerator):
            seed = request.generator.initial_seed()
            request.generator = CpuGenerator()
            request.generator.manual_seed(seed)
        return stock(self, request)

    InputBatch.add_request = add_request
    InputBatch.polyrl_seeded = True
