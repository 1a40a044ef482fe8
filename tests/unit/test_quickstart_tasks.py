"""The quickstart's tasks and prompts are the ones that the seed policy was trained on, to the letter."""

from __future__ import annotations

import hashlib
import json
from itertools import islice

import pytest

from environments.registry import resolve
from learner.seed.curriculum import OPTIONS

TAUGHT = {"math": "43b9d2811f47507f", "code": "29c7c1a9a5efb932", "tools": "f50c18ae0a74d141", "long_context": "eb32a07c959b50c5"}
"""Digests when the seed was trained. A change here makes a new environment, for which the seed must be trained again."""


@pytest.mark.parametrize("name", sorted(TAUGHT))
def test_the_tasks_are_those_that_the_seed_was_taught(name: str) -> None:
    digest, env = hashlib.sha256(), resolve(name)(**OPTIONS[name])
    for split in ("train", "eval"):
        for task in islice(resolve(name).tasks(split, 11, OPTIONS[name]), 50):
            shown = env.reset(options={"task": task})[1]["observation"]
            digest.update(json.dumps([task.key, task.seed, [[m.role, m.content] for m in shown.messages]]).encode())
    assert digest.hexdigest()[:16] == TAUGHT[name]
