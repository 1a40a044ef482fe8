"""The layers of the architecture, held by the import statements themselves.

infra -> rollout_workers, learner -> environments, reward_models -> rl_core        never sideways, never up
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAY_IMPORT = {
    "rl_core": {"rl_core"},
    "reward_models": {"reward_models", "rl_core"},
    "environments": {"environments", "reward_models", "rl_core"},
    "rollout_workers": {"rollout_workers", "environments", "reward_models", "rl_core"},
    "learner": {"learner", "environments", "reward_models", "rl_core"},
    "infra": {"infra", "rollout_workers", "learner", "environments", "reward_models", "rl_core"},
}
"""What each package may import of ours. An environment may use the verifiers of `reward_models`, never the other way round."""

HEAVY = {
    "ray": ("infra/*", "learner/actor.py", "rollout_workers/pool.py", "rollout_workers/hosts.py", "rollout_workers/rewards.py"),
    "vllm": ("rollout_workers/engine.py", "rollout_workers/vllm_plugin/*"),
    "deepspeed": ("learner/*",),
    "docker": ("environments/sandbox/docker.py", "infra/*"),
    # The classifier imports them when it loads a checkpoint, in the reward model's own actor; the package itself stays light.
    "torch": ("infra/*", "learner/*", "rollout_workers/*", "reward_models/classifier.py"),
    "transformers": ("infra/*", "learner/*", "rollout_workers/*", "reward_models/classifier.py"),
}
"""The only files that may import a heavy library, at the top of the file or within a function."""

IMPORTERS = ("importlib.import_module", "import_module", "__import__")

LIGHT = ("rl_core", "environments", "reward_models")
"""Packages that import on a laptop without any heavy library, whatever the machine has installed."""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: str, file: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in `source`, wherever it stands; "from . import x" counts as its package."""
    package = file.removesuffix(".py").replace("/", ".").split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*parents, *([node.module] if node.module else [])])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def faults(source: str, file: str) -> list[str]:
    """Every import of `file` (relative to the root, with slashes) that breaks a rule, in words."""
    found = []
    package = file.split("/")[0]
    for line, module in imported(source, file):
        top = module.split(".")[0]
        if top in MAY_IMPORT and top not in MAY_IMPORT[package]:
            found.append(f"{file}:{line} imports {module}; {package} may import only {', '.join(sorted(MAY_IMPORT[package]))}")
        if top in HEAVY and not any(fnmatch(file, pattern) for pattern in HEAVY[top]):
            found.append(f"{file}:{line} imports {module}; {top} is imported only in {', '.join(HEAVY[top])}")
    return found


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_no_file_imports_sideways_or_up_or_a_heavy_library_outside_its_places(package: str) -> None:
    assert sources(package), f"no Python files in {package}"
    found = [fault for path in sources(package) for fault in faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())]
    assert not found, "\n".join(found)


def test_every_top_level_package_has_a_rule() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("rl_core/loop.py", "import environments.base"),
        ("rl_core/loop.py", "def f():\n    from ray import get"),
        ("learner/actor.py", "from rollout_workers.pool import Pool"),
        ("learner/seed/train.py", "import infra"),
        ("environments/math.py", "import learner.losses as x"),
        ("environments/math.py", "if True:\n    import importlib\n    importlib.import_module('torch')"),
        ("environments/sandbox/base.py", "import docker.errors"),
        ("environments/tools/env.py", "from ...learner import x"),
        ("reward_models/math_answer.py", "from environments.base import TextEnv"),
        ("learner/model.py", "import vllm"),
        ("rollout_workers/episode.py", "import ray"),
    ],
)
def test_a_forbidden_import_is_seen(file: str, source: str) -> None:
    assert len(faults(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("infra/launch.py", "import ray\nfrom learner.actor import LearnerGroup\nfrom rollout_workers.pool import Pool"),
        ("environments/math.py", "from reward_models import math_answer\nfrom rl_core.types import Turn"),
        ("environments/tools/env.py", "from . import world\nfrom ..base import TextEnv\nimport rayleigh"),
        ("environments/sandbox/docker.py", "import docker"),
    ],
)
def test_an_allowed_import_is_left_alone(file: str, source: str) -> None:
    assert not faults(source, file)


def test_the_light_packages_import_no_heavy_library_even_indirectly() -> None:
    modules = [
        path.relative_to(ROOT).as_posix().removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for package in LIGHT
        for path in sources(package)
        if path.relative_to(ROOT).as_posix() not in ("environments/sandbox/docker.py", "environments/sandbox/runner.py")
    ]
    program = "import importlib, sys\n"
    program += "".join(f"importlib.import_module({module!r})\n" for module in modules)
    program += f"print([m for m in {sorted(HEAVY)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"importing rl_core, environments and reward_models loads {done.stdout.strip()}"
