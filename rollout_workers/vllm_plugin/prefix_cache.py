"""Forgetting all cached prompts, also those of sequences that are under way.

An engine whose model is attention alone keeps keys and values of prompts, so that the rollouts of a group compute theirs once. After a
weight update they are those of the old policy. vLLM's `reset_prefix_cache` refuses while any block is in use, and an in-flight update
lets sequences keep theirs. What must end is only that others find them: here the index is emptied, and no block is touched.

What a sequence under way adds to the index later cannot be found either: its prompt was sent with the old version as its salt
(`Engine._generate`), and a later request has another.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Let every reset succeed."""
    from vllm.v1.core.block_pool import BlockPool

    if hasattr(BlockPool, "polyrl_forgets"):
        return
    stock = BlockPool.reset_prefix_cache

    def reset_prefix_cache(self: Any) -> bool:
        count = self.num_gpu_blocks
        self.get_num_free_blocks = lambda: count - 1  # the null block is never free; this is all that stock asks for
        try:
            return bool(stock(self))
        finally:
            del self.get_num_free_blocks

    BlockPool.reset_prefix_cache = reset_prefix_cache
    BlockPool.polyrl_forgets = True
