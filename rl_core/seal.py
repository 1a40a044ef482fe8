"""The seal on published weights: their version and a checksum of every tensor, by who publishes, in the file's own header.

learner --> safetensors bytes {tensors, metadata: {version, {tensor: xxh3 of its bytes}}} --> engine: the same, or the run stops
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

VERSION, CHECKSUMS = "version", "checksums"
"""Keys of the safetensors metadata: a number, and a JSON object."""


class BadSeal(ValueError):
    """Published weights are not what their publisher sealed. The message is a sentence that names the tensor."""


def checksum(data: Any) -> str:
    """Of the bytes of an array; position counts. About 10 GB/s."""
    return xxhash.xxh3_64_hexdigest(data)


def metadata(tensors: Mapping[str, NDArray[np.uint8]], version: int) -> dict[str, str]:
    """The seal over the tensors' bytes, as metadata for `safetensors.save`."""
    return {VERSION: str(version), CHECKSUMS: json.dumps({name: checksum(data) for name, data in tensors.items()})}


def seal(blob: NDArray[np.uint8], version: int) -> NDArray[np.uint8]:
    """A safetensors file's bytes with a seal in its header: for a checkpoint that no learner published."""
    header, start = _header(blob)
    tensors = _tensors(blob, header, start)
    meta = header.get("__metadata__", {}) | metadata(tensors, version)
    text = json.dumps(header | {"__metadata__": meta}).encode()
    text += b" " * (-len(text) % 8)
    return np.concatenate([np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8), blob[start:]])


def check(blob: NDArray[np.uint8], version: int) -> dict[str, str]:
    """{tensor: checksum} of sealed bytes. Raises BadSeal if they are another version's, or one tensor is not as its publisher had it."""
    header, start = _header(blob)
    meta = header.get("__metadata__", {})
    if meta.keys().isdisjoint((VERSION, CHECKSUMS)):
        raise BadSeal("published weights carry no checksums; publish what rl_core.seal.seal() returns")
    if meta[VERSION] != str(version):
        raise BadSeal(f"published weights are sealed as version {meta[VERSION]}")
    sealed: dict[str, str] = json.loads(meta[CHECKSUMS])
    found = {name: checksum(data) for name, data in _tensors(blob, header, start).items()}
    if unknown := sealed.keys() ^ found.keys():
        raise BadSeal(f"published weights and their seal do not name the same tensors: {sorted(unknown)[0]}")
    for name, value in sealed.items():
        if found[name] != value:
            raise BadSeal(f"tensor {name} arrived with checksum {found[name]}, its publisher had {value}")
    return found


def _header(blob: NDArray[np.uint8]) -> tuple[dict[str, Any], int]:
    """(header, where the tensors' bytes begin)."""
    length = int.from_bytes(blob[:8].tobytes(), "little")
    return json.loads(blob[8 : 8 + length].tobytes()), 8 + length


def _tensors(blob: NDArray[np.uint8], header: Mapping[str, Any], start: int) -> dict[str, NDArray[np.uint8]]:
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: blob[start + a : start + b] for name, (a, b) in spans.items()}
