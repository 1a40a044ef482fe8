"""A run's weights as a checkpoint folder that Transformers and vLLM load, MTP head included."""

from __future__ import annotations

import shutil
from pathlib import Path

MTP = "mtp."
"""Transformers has no place for these; vLLM and `PolicyModel` read them."""


class BadCheckpoint(ValueError):
    """What was written cannot be loaded."""


def export(model: Path, out: Path) -> dict[str, int]:
    """Copy the checkpoint folder `model` to the new folder `out`, load it there with Transformers; {"parameters", "mtp_parameters"}.

    Raises BadCheckpoint, and leaves nothing, if a weight is missing, of the wrong shape, or unknown.
    """
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, out, dirs_exist_ok=True)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    unknown = {name for name in info["unexpected_keys"] if not name.startswith(MTP)}
    wrong = [f"{kind} {sorted(map(str, names))[:3]}" for kind, names in
             (("missing", info["missing_keys"]), ("mismatched", info["mismatched_keys"]), ("unknown", unknown)) if names]  # fmt: skip
    if wrong:
        shutil.rmtree(out)
        raise BadCheckpoint(f"{model} does not load as a {type(loaded).__name__}: {'; '.join(wrong)}")
    mtp = 0
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            mtp += sum(tensors.get_tensor(name).numel() for name in tensors.keys() if name.startswith(MTP))  # noqa: SIM118
    return {"parameters": sum(p.numel() for p in loaded.parameters()), "mtp_parameters": mtp}
