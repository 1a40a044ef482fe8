"""What the processes that compute are started with."""

from __future__ import annotations

import pytest

from rl_core.process_env import with_huge_pages


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=2:glibc.malloc.check=3", "glibc.malloc.hugetlb=2:glibc.malloc.check=3"),
    ],
    ids=["nothing", "something of the user's", "another kind of huge pages"],
)
def test_what_malloc_was_told_already_stays(monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", before)
    assert with_huge_pages() == after
    monkeypatch.setenv("GLIBC_TUNABLES", after)
    assert with_huge_pages() == after
