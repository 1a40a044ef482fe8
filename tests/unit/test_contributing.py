"""The environment that CONTRIBUTING.md shows is complete and passes the conformance kit."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest

from environments.check import check_environment

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_the_environment_in_the_guide_passes_the_conformance_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "guide_envs.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(GUIDE.parent)]))  # the kit checks a second process, too
    results = check_environment(importlib.import_module("guide_envs").ReverseEnv, {})
    assert [str(result) for result in results if not result.ok] == []
