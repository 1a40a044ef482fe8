"""The optimizer engine: DeepSpeed ZeRO over an AdamW that clips policy and MTP head apart.

DeepSpeed clips one norm over all parameters. The two losses here are of different nature (a policy gradient near zero on
average, and a cross-entropy), so a spike of one must not shrink the other's step: DeepSpeed's clip is off, and the optimizer
clips each parameter group by its own norm. ZeRO hands every rank its slice of each group, after averaging over ranks; the
norm is therefore summed over ranks here, and before the step: whether it is taken is decided for all groups at once.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rl_core.config import LearnerConfig

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed

BETAS = (0.9, 0.95)
"""Usual for language models: the second moment forgets in 20 steps, which suits short RL runs."""

ADAM_EPSILON = 1e-8
ONE_SUB_GROUP = 10**15
"""ZeRO 3 cuts parameter groups into pieces of this many elements and steps them one by one; a norm needs the whole group."""


class GroupClippedAdamW(torch.optim.AdamW):
    """AdamW whose parameter groups carry a `name` and a `max_norm`; `norms` holds those before the clip, by name."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        super().__init__(groups, lr=lr, weight_decay=weight_decay, betas=BETAS, eps=ADAM_EPSILON)
        self.norms: dict[str, float] = {}
        self.vetoed = False
        """The next step leaves weights and state as they are. ZeRO goes through its motions and frees the gradients."""
        self.starting = False

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Clip each group by its norm, then step. ZeRO calls this once per group, with the others left out."""
        if self.vetoed:
            return None
        if not self.starting:  # ZeRO 3 calls step() once with zeros, to allocate state
            for group in self.param_groups:
                scale = min(1.0, group["max_norm"] / (self.norms[group["name"]] + 1e-12))
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)
        return super().step(closure)


def measure(engine: Any, optimizer: GroupClippedAdamW) -> dict[str, float]:
    """Norm of each parameter group's accumulated gradient over all ranks, the same on every rank; `optimizer.norms` from here on.

    Reads ZeRO's own partition of the averaged gradients (by group, since a group is one sub-group: see ONE_SUB_GROUP).
    """
    zero = engine.optimizer
    names = [group["name"] for group in optimizer.param_groups]
    optimizer.norms = {name: global_norm(zero.averaged_gradients[i] or [], engine.device) for i, name in enumerate(names)}
    return dict(optimizer.norms)


def global_norm(gradients: list[Tensor], device: torch.device) -> float:
    """Euclidean norm of slices of gradients that lie spread over all ranks."""
    squared = sum((g.float().square().sum(dtype=torch.float64) for g in gradients), torch.zeros((), dtype=torch.float64, device=device))
    if dist.is_initialized():
        dist.all_reduce(squared)
    return math.sqrt(float(squared)) if torch.isfinite(squared) else float(squared)


def parameter_groups(policy: list[nn.Parameter], mtp: list[nn.Parameter], max_norm: float) -> list[dict[str, Any]]:
    """One group each for policy and MTP head, leaving out an empty one."""
    groups = [{"name": "policy", "params": policy, "max_norm": max_norm}, {"name": "MTP head", "params": mtp, "max_norm": max_norm}]
    return [group for group in groups if group["params"]]


def connect(*, rank: int, world_size: int, address: str, port: int, timeout_s: float) -> None:
    """Join the process group of the learner's ranks: NCCL on GPUs, gloo on CPUs."""
    import datetime

    on_gpu = torch.cuda.is_available()
    os.environ.update(
        {"MASTER_ADDR": address, "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    )
    if not on_gpu:
        # An all-reduce for inference that DeepSpeed would compile with g++ for half a minute at the first start; we never call it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False, timeout=datetime.timedelta(seconds=timeout_s)
    )


@contextmanager
def solo() -> Iterator[None]:
    """A process group of one rank in this process, for work outside of a run; one that is there already is used."""
    if dist.is_initialized():
        yield
        return
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    connect(rank=0, world_size=1, address="127.0.0.1", port=port, timeout_s=60)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_engine(
    module: nn.Module, groups: list[dict[str, Any]], config: LearnerConfig, *, dtype: torch.dtype
) -> tuple[Any, GroupClippedAdamW]:
    """(DeepSpeed engine over `module`, the optimizer within it). Every rank calls this with the same weights."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    optimizer = GroupClippedAdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    optimizer.starting = True
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config, dtype), dist_init_required=False)
    optimizer.starting = False
    for state in optimizer.state.values():  # the step with zeros above must not count for Adam's bias correction
        if "step" in state:
            state["step"].zero_()
    return engine, optimizer


def deepspeed_config(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Gradients are averaged over ranks by DeepSpeed; accumulation is driven by hand, since batches vary in microbatches."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": config.zero_stage,
            "sub_group_size": ONE_SUB_GROUP,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": config.zero_stage > 1,
        },
    }
