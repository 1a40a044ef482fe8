"""docs/hazards.md names tests that exist, and leaves out no patch of vLLM and no hazard that upstream has a number for."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hazards.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| hazard")]
NAMED = re.findall(r"`(tests/\S+?\.py)::(\w+)`", PAGE)
NOT_DEFECTS = {
    "__init__", "auto_k", "kernels", "lone_rank", "mtp_draft", "parcels", "passes", "places", "prefix_cache", "raw_weights", "receipts",
    "rejection", "staging", "thought_cap", "weights",
}  # fmt: skip
"""Parts of the plugin that mend nothing of upstream's: they add something, or do the same in less time (docs/speculation.md)."""
PATCHES = sorted({p.stem for p in (ROOT / "rollout_workers" / "vllm_plugin").glob("*.py")} - NOT_DEFECTS)


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_a_named_test_exists(path: str, name: str) -> None:
    assert name.startswith("test_")
    assert name in functions_of(ROOT / path)


def test_every_row_names_what_protects_us_and_a_test() -> None:
    assert len(ROWS) > 25
    for row in ROWS:
        hazard, protection, tests = row.strip("| ").split(" | ")
        assert hazard
        assert protection
        assert "::test_" in tests


@pytest.mark.parametrize("patch", PATCHES)
def test_each_patch_of_vllm_has_a_row_and_a_test_of_the_stock_code(patch: str) -> None:
    assert any(f"vllm_plugin/{patch}.py" in row for row in ROWS)
    assert f'stock("{patch}",' in (ROOT / "tests" / "integration" / "test_vllm_defects.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("hazard", ["vllm#48284", "prime-rl#2714", "vllm#38711", "NeMo-RL#4018"])
def test_upstreams_known_hazards_are_listed_by_name(hazard: str) -> None:
    assert any(hazard in row for row in ROWS)
