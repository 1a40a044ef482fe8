"""Write a text of a given form: every rule can be checked, and all of them must hold.

    5 words; first oak; no e; end !      ->     oak sky sun fog rain!

The rules are read off a text that was drawn first, so they can always be met together; that text is the oracle's answer and stays
private. What the text says is free: this environment teaches to follow an instruction to the letter. Answers are words and
punctuation. A digit in them is an error, which the instruction itself always has: repeating it is never an answer.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from environments import files
from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict
from environments.knobs import check_choices, check_range, read_knobs, shows_working

STYLES = ("brief", "full")
MAX_CHARS = 20_000
MARKS = (".", "!", "?")
BULLET = "- "

_WORDS = (
    "air ant arm art bag ball band bank bear bell bird boat bone book box boy bread bus cake car cat city clay coal coat cold corn cow "
    "crow cup day deer desk dog door dust ear egg eye farm field fire fish flag fog food fox frog game gate girl glass goat gold grass "
    "hair hand hat hill home horn horse house ice ink iron jam key king kite lake lamp land leaf lion log map milk mill moon moss "
    "mouse nest night nut oak oil owl page park path pear pen pig pine plum pond queen rain ring river road rock roof room root rope "
    "rose salt sand sea seed sheep ship shoe sky snow soap song star stone storm sun swan tea tent toy tree van vase wall wave well "
    "wind wolf wood wool yard zoo"
)
VOCABULARY = tuple(_WORDS.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One kind of rule. Arguments are JSON values."""

    find: Callable[[random.Random, str], list[Any] | None]
    """Arguments that hold for a text, or None if this rule has nothing to say of it."""
    holds: Callable[..., bool]
    """(text, *arguments)."""
    brief: str  # str.format templates over the arguments
    full: str
    names_a_word: bool = False
    """Whether its arguments cannot be guessed. Each task has such a rule, or one answer would do for many tasks."""


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def lines(text: str) -> list[str]:
    return text.split("\n")


def once(items: Sequence[str]) -> list[str]:
    """Those that occur once, in order."""
    seen = Counter(items)
    return [item for item in items if seen[item] == 1]


def letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalpha())


def _absent_letter(rng: random.Random, text: str) -> list[Any] | None:
    absent = [c for c in "etaoinshrdlucmfw" if c not in text.lower()]
    return [rng.choice(absent)] if absent else None


def _present_letter(rng: random.Random, text: str) -> list[Any] | None:
    letter = rng.choice(sorted(set(letters(text))))
    return [letter, letters(text).count(letter)]


def _pair(rng: random.Random, text: str) -> list[Any] | None:
    found = once(words(text))
    if len(found) < 2:
        return None
    i, j = sorted(rng.sample(range(len(found)), 2))
    return [found[i], found[j]]


def _place(rng: random.Random, text: str) -> list[Any]:
    found = words(text)
    place = rng.randrange(len(found))
    return [place + 1, found[place]]


def _used(rng: random.Random, text: str) -> list[Any]:
    found = words(text)
    word = rng.choice(found)
    return [word, found.count(word)]


def _if(true: bool, *arguments: Any) -> list[Any] | None:
    return list(arguments) if true else None


def _comes_before(text: str, first: str, second: str) -> bool:
    found = words(text)
    return found.count(first) == 1 == found.count(second) and found.index(first) < found.index(second)


RULES: dict[str, Rule] = {
    "words": Rule(
        find=lambda rng, t: [len(words(t))],
        holds=lambda t, n: len(words(t)) == n,
        brief="{0} words", full="It has exactly {0} words.",
    ),
    "first": Rule(
        find=lambda rng, t: [words(t)[0]], holds=lambda t, w: words(t)[:1] == [w],
        brief="first {0}", full='Its first word is "{0}".', names_a_word=True,
    ),
    "last": Rule(
        find=lambda rng, t: [words(t)[-1]], holds=lambda t, w: words(t)[-1:] == [w],
        brief="last {0}", full='Its last word is "{0}".', names_a_word=True,
    ),
    "place": Rule(
        find=_place, holds=lambda t, n, w: words(t)[n - 1 : n] == [w],
        brief="word {0} is {1}", full='Word number {0} is "{1}".', names_a_word=True,
    ),
    "use": Rule(
        find=_used, holds=lambda t, w, n: words(t).count(w) == n,
        brief="{0} x{1}", full='The word "{0}" occurs exactly {1} time(s).', names_a_word=True,
    ),
    "before": Rule(
        find=_pair, holds=_comes_before,
        brief="{0} before {1}", full='"{0}" and "{1}" occur once each, the former before the latter.', names_a_word=True,
    ),
    "initials": Rule(
        find=lambda rng, t: _if(len(words(t)) <= 12, "".join(w[0] for w in words(t)).lower()),
        holds=lambda t, initials: "".join(w[0] for w in words(t)).lower() == initials,
        brief="initials {0}", full='The first letters of its words spell "{0}".', names_a_word=True,
    ),
    "avoid": Rule(
        find=_absent_letter, holds=lambda t, c: c not in t.lower(),
        brief="no {0}", full='The letter "{0}" does not occur.',
    ),
    "count": Rule(
        find=_present_letter, holds=lambda t, c, n: letters(t).count(c) == n,
        brief="{1} {0}", full='The letter "{0}" occurs exactly {1} time(s), whether capital or small.',
    ),
    "lower": Rule(
        find=lambda rng, t: _if(t == t.lower()), holds=lambda t: t == t.lower(),
        brief="lower case", full="It has no capital letter.",
    ),
    "upper": Rule(
        find=lambda rng, t: _if(t == t.upper()), holds=lambda t: t == t.upper(),
        brief="upper case", full="It has no small letter.",
    ),
    "longest": Rule(
        find=lambda rng, t: [max(map(len, words(t)))], holds=lambda t, n: max(map(len, words(t)), default=0) == n,
        brief="longest word {0}", full="Its longest word has exactly {0} letters.",
    ),
    "different": Rule(
        find=lambda rng, t: _if(len({w.lower() for w in words(t)}) == len(words(t))),
        holds=lambda t: len({w.lower() for w in words(t)}) == len(words(t)),
        brief="no word twice", full="No word occurs twice.",
    ),
    "sorted": Rule(
        find=lambda rng, t: _if(words(t.lower()) == sorted(words(t.lower()))),
        holds=lambda t: all(a <= b for a, b in pairwise(words(t.lower()))),
        brief="a to z", full="Its words are in alphabetical order.",
    ),
    "commas": Rule(
        find=lambda rng, t: [t.count(",")], holds=lambda t, n: t.count(",") == n,
        brief="{0} commas", full="It has exactly {0} comma(s).",
    ),
    "end": Rule(
        find=lambda rng, t: _if(t[-1] in MARKS, t[-1]), holds=lambda t, mark: t.endswith(mark),
        brief="end {0}", full='It ends with "{0}".',
    ),
    "lines": Rule(
        find=lambda rng, t: [len(lines(t))], holds=lambda t, n: len(lines(t)) == n,
        brief="{0} lines", full="It has exactly {0} line(s), none of them empty.",
    ),
    "bullets": Rule(
        find=lambda rng, t: _if(all(line.startswith(BULLET) for line in lines(t))),
        holds=lambda t: all(re.match(r"- \S", line) for line in lines(t)),
        brief="bullets", full='Every line begins with "- ".',
    ),
    "per_line": Rule(
        find=lambda rng, t: _if(len({len(words(line)) for line in lines(t)}) == 1, len(words(lines(t)[0]))),
        holds=lambda t, n: all(len(words(line)) == n for line in lines(t)),
        brief="{0} a line", full="Every line has exactly {0} words.",
    ),
}  # fmt: skip

KNOBS: dict[str, Any] = {
    "kinds": list(RULES), "min_rules": 1, "max_rules": 3, "min_words": 3, "max_words": 8, "max_lines": 1, "style": "brief",
    **files.KNOBS,
}  # fmt: skip


class InstructionsEnv(TextEnv):
    """Write a text that meets every rule of a list; reward 1 if all of them hold.

    kinds                 which rules beside the number of words, which every task has [all]
    min_rules, max_rules  beside it [1, 3]; 12 is hard for anybody
    min_words, max_words  of the text [3, 8]
    max_lines             of the text [1]
    style                 brief for small models, or full sentences [brief]
    file, columns         prompts from a file, each with its rules: see environments/files.py
    """

    id: ClassVar[str] = "instructions"
    version: ClassVar[str] = "1"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.knobs = checked_knobs(options)

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        knobs = checked_knobs(options)
        text = draw_text(rng, knobs)
        rules = draw_rules(rng, text, knobs)
        return TaskDraft(public={"rules": rules, "style": knobs["style"]}, hint={"text": text}, difficulty=f"{len(rules)} rules")

    file_columns: ClassVar[Mapping[str, bool]] = {"prompt": True, "rules": True, "difficulty": False}

    @classmethod
    def row_draft(cls, row: Mapping[str, Any]) -> TaskDraft:
        """`rules` is a list such as [["words", 5], ["first", "oak"]], or the text of one; the prompt says them in its own words."""
        rules = files.json_list(row["rules"], "rules")
        for rule in rules:
            check_rule(rule)
        public = {"prompt": str(row["prompt"]), "rules": rules}
        return TaskDraft(public=public, difficulty=str(row.get("difficulty", f"{len(rules)} rules")))

    def begin(self, task: Task) -> Observation:
        return Observation(
            messages=(Message(role="user", content=task.public.get("prompt") or ask(task.public["rules"], task.public["style"])),)
        )

    def act(self, turn: Turn) -> Verdict:
        assert self.task is not None
        text = turn.content.strip()
        if reason := turn.malformed or not_a_text(turn):
            return self._verdict(Status.INVALID_OUTPUT, [False], {"reason": reason})
        rules: list[list[Any]] = self.task.public["rules"]
        met = [bool(RULES[name].holds(text, *arguments)) for name, *arguments in rules]
        broken = [ask([rule], "brief") for rule, ok in zip(rules, met, strict=True) if not ok]
        return self._verdict(Status.OK, met, {"answer": text[:500], "broken": "; ".join(broken)})

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        assert self.task is not None
        if "text" not in self.task.private:
            return super().oracle(observation, rng)  # a row of a file: nobody knows an answer
        text = self.task.private["text"]
        thought = " ".join(f"{i}{w}" for i, w in enumerate(words(text), 1)) if shows_working(self.knobs, rng) else ""
        return Turn(thought=thought, content=text)

    def _verdict(self, status: Status, met: list[bool], evidence: dict[str, str]) -> Verdict:
        correct = float(all(met))
        components = {"correct": correct, "fraction": sum(met) / len(met)}
        return Verdict(
            status=status, reward=correct, components=components, evidence=evidence, verifier_version=f"{self.id}/{self.version}"
        )


def checked_knobs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that `options` set, in range. Raises ValueError."""
    env = InstructionsEnv.id
    knobs = read_knobs(env, KNOBS, options)
    check_choices(env, "kinds", knobs["kinds"], tuple(RULES))
    check_choices(env, "style", [knobs["style"]], STYLES)
    if not any(RULES[kind].names_a_word for kind in knobs["kinds"]):
        known = ", ".join(name for name, rule in RULES.items() if rule.names_a_word)
        raise ValueError(f"environment {env!r}: option kinds needs one of {known}; without it, one answer would do for many tasks")
    for name, low, high in (
        ("min_rules", 1, len(RULES)), ("max_rules", knobs["min_rules"], len(RULES)), ("min_words", 2, 500),
        ("max_words", knobs["min_words"], 500), ("max_lines", 1, min(50, knobs["min_words"])),
    ):  # fmt: skip
        check_range(env, name, knobs[name], low, high)
    return knobs


def check_rule(rule: Any) -> None:
    """Raise ValueError unless it is [name, arguments...] of a rule that there is."""
    name, *arguments = rule if isinstance(rule, list) and rule else [None]
    if name not in RULES:
        raise ValueError(f"rule {rule!r}: wanted a list that begins with one of {', '.join(RULES)}")
    try:
        RULES[name].holds("a b", *arguments)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"rule {rule!r}: {error}; it reads {RULES[name].full!r}") from error


def draw_text(rng: random.Random, knobs: Mapping[str, Any]) -> str:
    """A text with some features that rules can be about."""
    count = rng.randint(knobs["min_words"], knobs["max_words"])
    chosen = rng.choices(VOCABULARY, k=count) if rng.random() < 0.3 or count > len(VOCABULARY) else rng.sample(VOCABULARY, count)
    if rng.random() < 0.2:
        chosen.sort()
    num_lines = rng.randint(1, min(knobs["max_lines"], count))
    if num_lines > 1 and rng.random() < 0.5:  # lines of one length
        chosen = chosen[: max(len(chosen) // num_lines, 1) * num_lines]
    cuts = [round(i * len(chosen) / num_lines) for i in range(num_lines + 1)]
    rows = [" ".join(chosen[a:b]) for a, b in pairwise(cuts)]
    if rng.random() < 0.3:
        rows = [row.replace(" ", ", ", rng.randint(1, 2)) for row in rows]
    if num_lines > 1 and rng.random() < 0.5:
        rows = [BULLET + row for row in rows]
    text = "\n".join(rows) + rng.choice(("", "", *MARKS))
    return text.upper() if rng.random() < 0.2 else text


def draw_rules(rng: random.Random, text: str, knobs: Mapping[str, Any]) -> list[list[Any]]:
    """The number of words, a rule that names a word, and more; all hold for `text`."""
    found = {}
    for name in sorted(set(knobs["kinds"]) - {"words"}):
        arguments = RULES[name].find(rng, text)
        if arguments is not None:
            found[name] = arguments
    naming = [name for name in found if RULES[name].names_a_word]
    chosen = [rng.choice(naming)] if naming else []
    others = [name for name in found if name not in chosen]
    wanted = rng.randint(knobs["min_rules"], knobs["max_rules"])
    chosen += rng.sample(others, min(max(0, wanted - len(chosen)), len(others)))
    rng.shuffle(chosen)
    return [["words", *(RULES["words"].find(rng, text) or ())], *([name, *found[name]] for name in chosen)]


def ask(rules: Sequence[Sequence[Any]], style: str) -> str:
    """The instruction as the policy reads it."""
    if style == "brief":
        return "; ".join(RULES[name].brief.format(*arguments) for name, *arguments in rules)
    listed = "\n".join(f"{i}. {RULES[name].full.format(*arguments)}" for i, (name, *arguments) in enumerate(rules, 1))
    return f"Write a text of words and punctuation, without digits, that meets all of these rules:\n{listed}"


def not_a_text(turn: Turn) -> str:
    """Why an answer is none, or ""."""
    if turn.tool_calls:
        return "a tool call where there are no tools"
    text = turn.content.strip()
    if not text or len(text) > MAX_CHARS:
        return f"an answer of {len(text)} characters, wanted 1 to {MAX_CHARS}"
    if odd := re.search(r"[^A-Za-z \n.,;:!?'\"()-]", text):
        return f"it has {json.dumps(odd[0])}; answers are words and punctuation, without digits"
    if any(not words(line) for line in lines(text)):
        return "a line without a word"
    return ""
