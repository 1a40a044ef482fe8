"""The process in which reasoning-gym's scorers run: killed when late, limited in memory, and unable to start what a policy wrote.

    stdin   {"family", "arguments", "entry", "answer"}        one JSON object a line
    stdout  {"score": 1.0} | {"refused": "exec"} | {"error": "ValueError: ..."}

Some scorers evaluate the answer (nine of them in 0.1.25: by `eval`, or by sympy's `parse_expr`, which evaluates too). Python announces
every execution of code through an audit event before the code runs. While a scorer looks at an answer, the hook below turns the
execution of any code into an error, and the use of files, processes and sockets likewise. An answer is so compared, and never started.
What must be evaluated to be scored (`EVALUATED`) gets there only if it is made of the characters and names that its grammar lists, with
which nothing but arithmetic can be said.

Run as `python -I reasoning_gym_scorer.py SYS_PATH_AS_JSON`: no import of ours, so that what a worker holds is small.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from typing import Any

ARITHMETIC = r"[0-9+\-*/() ]*"
NAMES = frozenset({"sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "pi"})
POLYNOMIAL = r"[0-9A-Za-z+\-*/()., ]*"
EVALUATED = {
    "countdown": ARITHMETIC,
    "puzzle24": ARITHMETIC,
    "simple_integration": POLYNOMIAL,
    "intermediate_integration": POLYNOMIAL,
    "polynomial_multiplication": POLYNOMIAL,
}
"""Families whose scorer must evaluate the answer, and what an answer may be made of."""
MAX_EVALUATED = 400  # characters
POWER = r"\*\*\s*(?:\d{1,2}|\(\s*-?\s*\d{1,2}\s*\))(?!\s*\*\*|[\d.])"
"""The exponents that may stand there: numbers of at most two digits, not towers of them."""
MEMORY_BYTES = 3 << 30
FILE_BYTES = 0

FORBIDDEN = (
    "exec",
    "import",
    "open",
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "shutil.",
    "sys.settrace",
    "sys.setprofile",
    "pty.",
    "code.__new__",
)
"""Audit events that no scorer needs while it looks at an answer."""


class Refused(BaseException):
    """No `except Exception` of a scorer may swallow this."""


class Guard:
    """The audit hook: armed around one call of a scorer."""

    def __init__(self) -> None:
        self.armed, self.may_evaluate, self.seen = False, False, ""
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or not event.startswith(FORBIDDEN):
            return
        if event in ("exec", "code.__new__", "import") and self.may_evaluate:
            return
        self.seen = event
        raise Refused(event)


def fits(family: str, answer: str) -> bool:
    """Whether an answer to an evaluated family says arithmetic and nothing else."""
    if len(answer) > MAX_EVALUATED or not re.fullmatch(EVALUATED[family], answer):
        return False
    if any(len(name) > 1 and name not in NAMES for name in re.findall(r"[A-Za-z]+", answer)):
        return False
    if re.search(r"\d[A-Za-z]|[A-Za-z]\d|\.[A-Za-z]|[A-Za-z]\.", answer):  # 1e999, 0x1, attributes
        return False
    return len(re.findall(POWER, answer)) == answer.count("**")


def answer_to(request: dict[str, Any], guard: Guard, datasets: dict[str, Any]) -> dict[str, Any]:
    """Score one answer. The gold answer goes first, unguarded: it loads what the scorer loads."""
    import reasoning_gym

    family, answer, entry = request["family"], request["answer"], request["entry"]
    key = json.dumps([family, request["arguments"]], sort_keys=True)
    if key not in datasets:
        datasets[key] = reasoning_gym.create_dataset(family, seed=0, size=1, **request["arguments"])
    dataset = datasets[key]
    gold = dataset.score_answer(entry["answer"], entry) if isinstance(entry["answer"], str) else None
    if family in EVALUATED and not fits(family, answer):
        return {"score": 0.0, "refused": "characters or names that this family's answers have no use for"}
    guard.armed, guard.may_evaluate, guard.seen = True, family in EVALUATED, ""
    try:
        score = float(dataset.score_answer(answer, entry))
    except Refused:
        return {"score": 0.0, "refused": guard.seen}
    except Exception as error:  # noqa: BLE001 -- many scorers raise on what is no answer; the gold answer passed a moment ago
        if gold is None:
            return {"error": f"{type(error).__name__}: {error}"[:300]}
        return {"score": 0.0, "refused": f"the scorer raised {type(error).__name__}"}
    finally:
        guard.armed = False
    return {"score": score, "refused": guard.seen}


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a scorer prints is no result
    guard, datasets = Guard(), {}  # type: ignore[var-annotated]
    for line in sys.stdin:
        try:
            result = answer_to(json.loads(line), guard, datasets)
        except Exception as error:  # noqa: BLE001 -- data for the parent: our failure, not the policy's
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
        results.write(json.dumps(result) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
