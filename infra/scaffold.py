"""`polyrl envs new NAME`: a package of one environment that passes the conformance kit and trains, to be rewritten by its author.

polyrl-NAME/  pyproject.toml (the entry point)   polyrl_NAME/__init__.py   polyrl_NAME/env.py
              tests/test_env.py (the kit)        run.yaml                  README.md
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from environments.registry import targets
from infra.errors import UsageError

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$dist"
version = "0.1.0"
description = "The environment $id for polyrl"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["polyrl"]

# This is all that makes it a plugin: after `pip install -e .` the id stands in `polyrl envs list`.
[project.entry-points."polyrl.environments"]
$id = "$package.env:$cls"

[tool.setuptools]
packages = ["$package"]
"""

ENV = '''\
"""$id: replace the sums by what you want a model to learn."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict
from environments.knobs import check_range, read_knobs

KNOBS: dict[str, Any] = {"digits": 3}
"""What a config may set under `options`, with defaults; a typo there is an error with a suggestion."""


class $cls(TextEnv):
    """One sum, one answer; reward 1 for exactly the right number."""

    id: ClassVar[str] = "$id"
    version: ClassVar[str] = "1"  # raise it when the same answer may score differently

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        """Everything random comes from `rng`; only `private` may hold the answer. Both parts hold JSON values."""
        knobs = read_knobs(cls.id, KNOBS, options)
        check_range(cls.id, "digits", knobs["digits"], 2, 12)
        a, b = (rng.randrange(10 ** (knobs["digits"] - 1), 10 ** knobs["digits"]) for _ in range(2))
        return TaskDraft(public={"question": f"{a}+{b}"}, private={"answer": str(a + b)}, difficulty=f"{knobs['digits']} digits")

    def begin(self, task: Task) -> Observation:
        """The first messages. Forget everything of an earlier episode here."""
        return Observation(messages=(Message(role="user", content=task.public["question"]),))

    def act(self, turn: Turn) -> Observation | Verdict:
        """Answer the policy's turn: an Observation goes on (`max_turns` in the config), a Verdict ends the episode.

        `turn.content` is hostile text: compare it, never run it, and read no answer from `turn.thought`.
        """
        assert self.task is not None
        if turn.malformed or turn.tool_calls:
            return Verdict(status=Status.INVALID_OUTPUT, reward=0.0, evidence={"reason": turn.malformed or "there are no tools here"})
        right = turn.content.strip() == self.task.private["answer"]
        return Verdict(status=Status.OK, reward=float(right), components={"correct": float(right)})

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        """What a perfect policy says now: the kit and `polyrl envs show` play it."""
        assert self.task is not None
        return Turn(content=self.task.private["answer"])
'''

TEST = '''\
"""The conformance kit: what must hold before a policy is trained on this environment."""

from environments.check import check_environment
from $package.env import $cls


def test_it_conforms():
    failed = [str(result) for result in check_environment($cls, {"digits": 3}) if not result.ok]
    assert not failed, "\\n".join(failed)
'''

RUN = """\
# polyrl run run.yaml            (from the polyrl checkout, or with model.path=... of your own)
name: $id
environments:
  $id: {max_tokens: 64, max_total_tokens: 128, group_size: 8, options: {digits: 3}}
loop: {steps: 10, groups_per_step: 8}
rollout: {max_num_seqs: 32, max_model_len: 256}
eval: {tasks: 32}
"""

README = """\
# $dist

The environment `$id` for polyrl. Ten minutes:

1. `pip install -e .` in the environment that polyrl is installed in; `polyrl envs list` shows `$id`.
2. `polyrl envs show $id` shows tasks as the policy reads them, and the oracle solving them.
3. Write your task into `$package/env.py`. Four methods are all of it:

   | method | what |
   |---|---|
   | `make_task(rng, options)` | draw one task; answers go into `private`, which no prompt shows |
   | `begin(task)` | the first messages, and the tools if there are any |
   | `act(turn)` | more messages, or the verdict: a status, a reward from 0 to 1, named components |
   | `oracle(observation, rng)` | what a perfect policy says; for checks and demonstrations |

4. `polyrl envs check $id` (or `pytest`) tries what reinforcement learning finds first: the empty answer, an echo of the prompt, constants,
   a megabyte, broken markup, answers inside the thought. It also looks for draws that differ between processes, tasks that sit in both
   splits, and episodes that leak into each other.
5. `polyrl run run.yaml` trains on it. Beside others: add `$id: {share: 0.5}` under `environments:` of any config.

Without `pip`: the id in a config may be a path, `id: path/to/$dist:$cls`, or a module on PYTHONPATH, `id: $package.env:$cls`.

Rules: say `invalid_output` with reward 0 for what the policy did wrong; raise for what went wrong on your side (the episode is then left
out of training and counts as no zero). Never decide a status from text that the policy wrote.
"""

FILES = {
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    "run.yaml": RUN,
    "$package/__init__.py": "",
    "$package/env.py": ENV,
    "tests/test_env.py": TEST,
}


def scaffold(name: str, parent: Path) -> Path:
    """Write the package of environment `name` into a new folder below `parent`. Raises UsageError."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name) or keyword.iskeyword(name):
        raise UsageError(f"environment name {name!r}: wanted small letters, digits and _, for example word_sums")
    if name in (known := targets()):
        raise UsageError(f"environment {name!r} exists already ({known[name][1]}); choose another name")
    words = {
        "id": name,
        "package": f"polyrl_{name}",
        "dist": f"polyrl-{name.replace('_', '-')}",
        "cls": "".join(part.capitalize() for part in name.split("_")) + "Env",
    }
    folder = parent / words["dist"]
    if folder.exists():
        raise UsageError(f"{str(folder)!r} is there already; choose another name, or another folder with --into")
    for path, text in FILES.items():
        file = folder / Template(path).substitute(words)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(words), encoding="utf-8")
    return folder
