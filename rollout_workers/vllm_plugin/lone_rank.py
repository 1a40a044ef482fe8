"""An engine of one process talks to nobody, so it opens one process group, and not one for each way in which it could be parallel.

Upstream (vLLM 0.32, PyTorch 2.13) makes a dozen gloo groups of one rank and more. Each has a thread that wakes over and over to see
whether somebody has called, which interrupts an engine whose steps take a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def the_world_as_every_group() -> Iterator[None]:
    """Within, new groups of the only rank that there is are the world itself, and ending one of them ends nothing."""
    if not dist.is_initialized() or dist.get_world_size() > 1 or dist.get_backend() != "gloo":
        yield
        return
    world, made, ended = dist.group.WORLD, dist.new_group, dist.destroy_process_group

    def destroy(group: Any = None) -> None:
        if group is not world:
            ended(group)

    dist.new_group, dist.destroy_process_group = (lambda *_, **__: world), destroy
    try:
        yield
    finally:
        dist.new_group, dist.destroy_process_group = made, ended


def install() -> None:
    """Around the making and the ending of vLLM's groups. In force once, however often it is installed."""
    from vllm.distributed.parallel_state import GroupCoordinator

    if hasattr(GroupCoordinator, "polyrl_lone_rank"):
        return

    def within(stock: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            with the_world_as_every_group():
                stock(*args, **kwargs)

        return call

    GroupCoordinator.__init__ = within(GroupCoordinator.__init__)
    GroupCoordinator.destroy = within(GroupCoordinator.destroy)
    GroupCoordinator.polyrl_lone_rank = True
