"""The seal on published weights."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

from rl_core.seal import BadSeal, check, metadata, seal

TENSORS = {"a": np.arange(7, dtype=np.float32), "b.c": np.ones((2, 3), np.float16), "empty": np.empty((0, 4), np.float32)}


def blob(**more: str) -> NDArray[np.uint8]:
    return np.frombuffer(save(TENSORS, metadata=more or None), np.uint8)


def test_a_sealed_file_holds_the_same_tensors_and_a_checksum_of_each() -> None:
    sealed = seal(blob(kept="yes"), 3)
    for name, tensor in load(sealed.tobytes()).items():
        assert np.array_equal(tensor, TENSORS[name])
    assert check(sealed, 3).keys() == TENSORS.keys()


def test_sealing_a_file_and_saving_with_the_seal_agree() -> None:
    bytes_of = {name: np.frombuffer(tensor.tobytes(), np.uint8) for name, tensor in TENSORS.items()}
    assert check(np.frombuffer(save(TENSORS, metadata=metadata(bytes_of, 3)), np.uint8), 3) == check(seal(blob(), 3), 3)


@pytest.mark.parametrize("at", [-1, -13, -40])
def test_a_flipped_bit_is_found_and_the_tensor_named(at: int) -> None:
    broken = seal(blob(), 3).copy()
    broken[at] ^= 1
    with pytest.raises(BadSeal, match=r"tensor (a|b\.c) arrived with checksum \w+, its publisher had \w+"):
        check(broken, 3)


def test_elements_that_changed_places_are_found() -> None:
    broken = seal(blob(), 3).copy()
    values = load(broken.tobytes())
    start = broken.tobytes().index(values["a"].tobytes())
    broken[start : start + 28] = np.frombuffer(values["a"][::-1].tobytes(), np.uint8)
    with pytest.raises(BadSeal, match="tensor a arrived"):
        check(broken, 3)


def test_bytes_without_a_seal_are_refused() -> None:
    with pytest.raises(BadSeal, match="carry no checksums"):
        check(blob(), 3)


def test_a_seal_that_names_other_tensors_is_refused() -> None:
    with pytest.raises(BadSeal, match=r"do not name the same tensors: b\.c"):
        check(np.frombuffer(save(TENSORS, metadata=metadata({"a": np.empty(0, np.uint8), "empty": np.empty(0, np.uint8)}, 3)), np.uint8), 3)


def test_whole_and_true_bytes_of_another_version_are_refused() -> None:
    with pytest.raises(BadSeal, match="sealed as version 3"):
        check(seal(blob(), 3), 4)
