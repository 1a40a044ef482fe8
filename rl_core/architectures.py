"""What a checkpoint's config.json says of how its layers look along the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FULL_ATTENTION = ("llama", "olmo2", "qwen2", "qwen3", "smollm3")
"""Model types of which all that passes between tokens is attention to everything before, with positions that can be given. Each is tested
(tests/unit/test_shared_prefix.py); any other model trains and samples all the same, only without sharing prompts."""


def has_full_attention_only(config: Mapping[str, Any]) -> bool:
    """Whether a token's state depends on the tokens before it through attention to all of them alone: no recurrent state, no window.

    Then a prompt can go through the learner once for a group, and its keys and values can serve the group's other rollouts in an engine.
    """
    windowed = bool(config.get("sliding_window")) and config.get("use_sliding_window", True)
    layers = set(config.get("layer_types") or ())
    return config.get("model_type") in FULL_ATTENTION and not windowed and layers <= {"full_attention"}
