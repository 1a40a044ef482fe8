"""JSON that every reader takes: Python writes NaN and infinity, which JSON does not have."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(content: Any, **layout: Any) -> str:
    """ASCII alone, since a policy writes lone surrogates, which UTF-8 cannot hold; null for what JSON has no number for."""
    try:
        return json.dumps(content, allow_nan=False, **layout)
    except (ValueError, TypeError):
        return json.dumps(plain(content), allow_nan=False, **layout)


def plain(value: Any) -> Any:
    """As JSON can hold it; what it has no type for becomes text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


__all__ = ["dumps", "plain"]
