"""The token view of a rollout: each id with its text, logprob and policy version, as far as the store kept them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from rl_core.run_store import StoredRun

MAX_TOKENS = 50_000
"""Of one rollout that one answer carries; more would freeze the page."""

_loading = threading.Lock()


class Decoder(Protocol):
    """The part of a tokenizer that the view needs."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...


def token_view(run: StoredRun, row: Mapping[str, Any]) -> dict[str, Any]:
    """{"kept": False, "why": sentence}, or {"kept": True, "completions": [...], ...}.

    A completion is {"prompt", "tokens", "ids", "logprobs", "versions", "forced"}: the last are places in "tokens" of what we wrote.
    """
    if not row.get("token_ids"):
        return {
            "kept": False,
            "why": "The store of this run keeps no tokens of this rollout: their counts, and the text of the conversation.",
        }
    tokenizer = _tokenizer_of(run)
    left, completions = MAX_TOKENS, []
    kept = (row["prompt_ids"], row["token_ids"], row["logprobs"], row["versions"], row["forced"])
    for prompt, ids, logprobs, versions, forced in zip(*kept, strict=True):
        completions.append(
            {
                "prompt": _texts(tokenizer, prompt[-left:] if left else []),
                "tokens": _texts(tokenizer, ids[:left]),
                "ids": ids[:left],
                "logprobs": logprobs[:left],
                "versions": versions[:left],
                "forced": [place for place in forced if place < left],
            }
        )
        left = max(0, left - len(prompt) - len(ids))
    return {
        "kept": True,
        "decoded": tokenizer is not None,
        "cut": left == 0,
        "completions": completions,
        "versions": [row["min_version"], row["max_version"]],
    }


def _texts(tokenizer: Decoder | None, ids: Sequence[int]) -> list[str]:
    return [f"<{i}>" if tokenizer is None else tokenizer.decode([i], skip_special_tokens=False) for i in ids]


def _tokenizer_of(run: StoredRun) -> Decoder | None:
    """The tokenizer that the run's own config names, if it lies on this machine."""
    try:
        path = Path(str(OmegaConf.select(OmegaConf.load(run.run_dir / "config.yaml"), "model.path"))) / "tokenizer.json"
    except (OSError, OmegaConfBaseException, YAMLError):
        return None
    with _loading:
        return _load(path) if path.is_file() else None


@lru_cache(maxsize=4)
def _load(path: Path) -> Decoder:
    from tokenizers import Tokenizer

    tokenizer: Decoder = Tokenizer.from_file(str(path))
    return tokenizer
