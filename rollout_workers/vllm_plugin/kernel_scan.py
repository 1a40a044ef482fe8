"""An engine may start in a process that has llvmlite loaded, as numba does, which vLLM itself and kernels.py use.

Defect upstream (vLLM 0.32, CPU without Triton): at start `triton_utils.dispatcher` looks through every attribute of every loaded module for
kernels to replace, and takes `vars(value)` for a dict. llvmlite has an object that answers any attribute with a function, `__dict__`
as well: the engine ends with "'_lib_fn_wrapper' object has no attribute 'get'".
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """In that module, `vars` of what is no ordinary object is empty."""
    import vllm.triton_utils.dispatcher as dispatcher

    dispatcher.vars = instance_dict  # type: ignore[attr-defined]


def instance_dict(value: Any) -> dict[str, Any]:
    found = vars(value)
    return found if hasattr(found, "get") and not callable(found) else {}
