"""Hostile programs against the task "write f(x), x times 2": 25 classes, each program below a line that names class, name and end.

    ### 12 printed verdict                    earns 0 with status ok
    ### 6 spin -> late                        earns 0 with status timeout_model
    ### 2 memory in one process -> oom        earns 0, and the kernel says why (only where groups of processes are bounded)
    ### 9 internet stream (probe)             f(x) returns what it got hold of: it must come to its end, and return []
    ### 3 endless output (stdin)              a program that reads the input and prints

NAME_ITSELF gives the process the name MARK, so that the host can look for survivors; CANARY_FOLDER is a folder of the host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.integration.attacks import forging, reaching, resources

MARK = "polyrl-attack"  # at most 15 characters: a process name
NAME_ITSELF = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{MARK}', 0, 0, 0)"
CANARY_FOLDER = "/tmp/polyrl-canary"  # does not exist, in no sandbox and not on the host

CLASSES = {
    1: "fork and thread bombs", 2: "memory bombs", 3: "output floods and control characters", 4: "hostile use of stdin",
    5: "files, descriptors, inodes", 6: "time", 7: "processes that outlive their case", 8: "reading the host and others",
    9: "network", 10: "links and devices as output", 11: "the runner and its result line", 12: "faked verdicts", 13: "patched libraries",
    14: "objects that pass for values", 15: "known answers", 16: "state between cases", 17: "clocks and limits",
    18: "asking the grader", 19: "bombs for the host's parsers", 20: "compiler bombs", 21: "source text tricks", 22: "the kernel's surface",
    23: "faked failures of ours", 24: "flooding", 25: "looking for the reference",
}  # fmt: skip

_HEAD = re.compile(r"(\d+) (.+?)(?: \((probe|stdin)\))?(?: -> (late|oom|flood))?$")
_WORDS = {
    "NAME_ITSELF": NAME_ITSELF, "PARENTHESES": "(" * 5000 + ")" * 5000, "MINUSES": "-" * 100_000 + "1", "CANARY_FOLDER": CANARY_FOLDER,
    "LAMBDAS": "lambda: " * 3000 + "1", "BRACKETS": "[" * 190 + "]" * 190,
    "FORMFEED": "\f",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Attack:
    number: int  # of its class
    name: str
    program: str
    kind: str = "forge"
    """"forge": wants to be paid as f. "stdin": the same for a program. "probe": reports what it reached."""
    end: str = "ok"
    """"ok", "late" (its own time-out), "oom" (memory of all its processes), "flood" (more output than allowed)."""

    @property
    def id(self) -> str:
        return f"{self.number:02} {self.name}"


def read(text: str) -> list[Attack]:
    """The attacks of "### ..." sections."""
    found = []
    for section in text.split("### ")[1:]:
        head, _, program = section.partition("\n")
        match = _HEAD.match(head)
        assert match, head
        for word, meaning in _WORDS.items():
            program = program.replace(word, meaning)
        number, name, kind, end = match.groups()
        found.append(Attack(number=int(number), name=name, program=program, kind=kind or "forge", end=end or "ok"))
    return found


ATTACKS = [
    *read(resources.PROGRAMS),
    *read(forging.PROGRAMS),
    *read(reaching.PROGRAMS),
    *(
        Attack(number=22, name=f"system call {name}", program=reaching.SYSTEM_CALL.format(number=number, arguments=arguments), kind="probe")
        for name, (number, arguments) in reaching.SYSTEM_CALLS.items()
    ),
]
BY_NAME = {a.name: a for a in ATTACKS}
assert len(BY_NAME) == len(ATTACKS)
