"""The MTP head's first projection in the precision that the engine runs in.

Defect upstream (vLLM 0.32): `eh_proj` is made in `config.dtype`, the precision of the checkpoint's file, and all else in that of the
engine. Where the two differ (float32 weights, served in bfloat16), the CPU's kernel takes bfloat16 numbers for float32 ones and reads
beyond them: the head's output is garbage or NaN, changes from call to call, and no draft is accepted. No error, no wrong sample, no gain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def in_engines_dtype(init: Callable[..., None]) -> Callable[..., None]:
    """`NemotronHMultiTokenPredictor.__init__` that finds the engine's precision in its config."""

    def made(self: Any, *, vllm_config: Any, **rest: Any) -> None:
        draft = vllm_config.speculative_config.draft_model_config
        draft.hf_config.get_text_config().dtype = draft.dtype
        init(self, vllm_config=vllm_config, **rest)

    return made


def install() -> None:
    from vllm.model_executor.models.nemotron_h_mtp import NemotronHMultiTokenPredictor

    if NemotronHMultiTokenPredictor.__init__.__name__ != "made":
        NemotronHMultiTokenPredictor.__init__ = in_engines_dtype(NemotronHMultiTokenPredictor.__init__)
