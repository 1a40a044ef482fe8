"""Find a value in thousands of tokens: look-up, overwritten value, two-hop join, and the key that is not there.

    The man saw the boat.
    oak=4821                        a record
    elm->oak                        an alias: elm has oak's value
    oak now=1930                    a later line replaces an earlier one
    ... many more lines ...
    elm?                     ->     <think>elm->oak
                                    oak now=1930</think>1930

All kinds ask in the same words, so the policy must find out what holds for its key. The question stands at the end. Values
are drawn per task and cannot be guessed. No space stands before a key, so that a byte-level BPE always gives it the same ids.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict, as_honeypot, unguessable
from environments.knobs import check_choices, check_range, read_knobs, shows_working
from reward_models.math_answer import extract

KINDS = ("needle", "overwritten", "join", "absent")
KNOBS: dict[str, Any] = {
    "min_tokens": 1024,
    "max_tokens": 4096,
    "tokenizer": "",
    "kinds": list(KINDS),
    "absent_share": 0.1,
    "records": 24,
    "hops": 2,
    "updates": 1,
    "key_words": 1,
    "questions": 1,
    "system": "",
}
"""min_tokens, max_tokens: of the prompt's text. tokenizer: folder with the policy's tokenizer.json; "" estimates three characters a token.
absent_share: of questions whose answer is `none`. records: keys that distract, at most. hops: of a join. updates: of an overwritten value.
key_words: words per key. questions: asked at once and answered in order, separated by spaces. system: a system message."""

NONE = "none"
VALUE_DIGITS = 4
CHARS_PER_TOKEN = 3.0
TOKENS_PER_RECORD = 20
"""At most one distracting record per so many tokens: the rest is filler."""

SHORT_WORDS = (
    "ant axe arm ash bay bed bib bow bug cob cub den dip due ear eel egg elm fan fig fox fur gas gem gum ham hip hog hut ice ink ivy "
    "jam jet jig jug keg kid lab leg lid log lug mat mew mix mop mud nap net nib nod nut oak oil owl pad pea pie pod pug rag rib rod "
    "rug sap sky sob sun tar tea tie top tub urn van vet vow wax web wig yak yew zip zoo"
)
WORDS = tuple(SHORT_WORDS.split())
"""No two begin with the same two letters, so that a look-up is settled by the first token or two."""
BEINGS = ("man", "girl", "king", "bird", "horse", "child", "train", "boat")
DEEDS = ("saw", "left", "found", "passed", "liked", "missed")
FILLER = tuple(f"The {who} {deed} the {whom}." for who in BEINGS for deed in DEEDS for whom in BEINGS if who != whom)

MANY_LINES, SAMPLED = 200, 32
_PIECE = re.compile(r" ?[A-Za-z]+|[0-9]|[^A-Za-z0-9\s]+|\s")

Entry = tuple[str, list[str], list[str], str]
"""(key to ask for, its lines in the order in which they must stand, the lines that decide, the answer)"""


class LongContextEnv(TextEnv):
    """One question about a long document; reward 1 for exactly the right value."""

    id: ClassVar[str] = "long_context"
    version: ClassVar[str] = "1"
    components: ClassVar[tuple[str, ...]] = ("correct", "fraction", "format")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.knobs = checked_knobs(options)

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        knobs = checked_knobs(options)
        low, high = knobs["min_tokens"], knobs["max_tokens"]
        tokens = low + int((high - low) * rng.random() ** 3)  # cubed: half of the prompts use the first eighth of the range
        keys = draw_keys(rng, knobs["key_words"])
        kinds = [draw_kind(rng, knobs) for _ in range(knobs["questions"])]
        asked = [draw_entry(rng, kind, keys, knobs) for kind in kinds]
        present = [kind for kind in knobs["kinds"] if kind != "absent"] or ["needle"]
        distractors = max(0, min(knobs["records"], tokens // TOKENS_PER_RECORD) - len(asked))
        others = [draw_entry(rng, rng.choice(present), keys, knobs) for _ in range(distractors)]
        groups = [entry[1] for entry in asked + others if entry[1]]
        return TaskDraft(
            public={"tokens": tokens, "groups": groups, "question": " ".join(entry[0] + "?" for entry in asked)},
            private={"answers": [entry[3] for entry in asked], "quotes": [line for entry in asked for line in entry[2]]},
            difficulty=kinds[0] if len(set(kinds)) == 1 else "mixed",
        )

    def begin(self, task: Task) -> Observation:
        text = write_document(task, token_counter(self.knobs["tokenizer"]))
        system = (Message(role="system", content=self.knobs["system"]),) if self.knobs["system"] else ()
        return Observation(messages=(*system, Message(role="user", content=text)))

    def act(self, turn: Turn) -> Verdict:
        assert self.task is not None
        wanted: list[str] = list(self.task.private["answers"])
        if turn.malformed or turn.tool_calls:
            return self._verdict([], wanted, turn.malformed or "a tool call where there are no tools")
        given = (extract(turn.content) or "").removesuffix(".").lower().split()
        return self._verdict(given, wanted, "")

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        assert self.task is not None
        private = self.task.private
        thought = "\n".join(private["quotes"]) if shows_working(self.knobs, rng) else ""
        return Turn(thought=thought, content=" ".join(private["answers"]))

    def second_opinion(self, turns: Sequence[Turn]) -> bool:
        """Every wanted value stands in the answer, as a word of its own and in order, and no other number does."""
        assert self.task is not None
        wanted = [str(a) for a in self.task.private["answers"]]
        return bool(turns) and re.findall(rf"[0-9]+|\b{NONE}\b", turns[-1].content[-10_000:].lower()) == wanted

    @classmethod
    def honeypot(cls, task: Task, rng: random.Random) -> Task:
        return as_honeypot(task, {**task.private, "answers": [str(unguessable(rng)) for _ in task.private["answers"]]})

    def other_questions(self) -> list[tuple[str, Turn]]:
        """What else could be asked about the document, each with the oracle's turn, working shown: only for demonstrations.

        A long document costs the same to read for one question as for all of them.
        """
        assert self.task is not None
        asked = set(self.task.public["question"].split())
        found = []
        for group in self.task.public["groups"]:
            aliases = [line for line in group if "->" in line]
            quotes = [*aliases, group[-1]]
            question = re.split(r"->|=| now=", quotes[0])[0] + "?"
            if question not in asked:
                found.append((question, Turn(thought="\n".join(quotes), content=group[-1].rpartition("=")[2])))
        return found

    def _verdict(self, given: list[str], wanted: list[str], malformed: str) -> Verdict:
        formed = len(given) == len(wanted) and all(word == NONE or (word.isascii() and word.isdigit()) for word in given)
        right = [g == w for g, w in zip(given, wanted, strict=False)] if formed else []
        correct = bool(right) and all(right)
        evidence = {"answer": " ".join(given)[:80], "wanted": " ".join(wanted)} | ({"reason": malformed} if malformed else {})
        return Verdict(
            status=Status.OK if formed else Status.INVALID_OUTPUT,
            reward=float(correct),
            components={"correct": float(correct), "fraction": sum(right) / len(wanted), "format": float(formed)},
            evidence=evidence,
            verifier_version=f"{self.id}/{self.version}",
        )


def checked_knobs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that `options` set, in range. Raises ValueError."""
    knobs = read_knobs(LongContextEnv.id, KNOBS, options)
    check_choices(LongContextEnv.id, "kinds", knobs["kinds"], KINDS)
    for name, low, high in (("min_tokens", 32, 10**6), ("max_tokens", knobs["min_tokens"], 10**6), ("absent_share", 0, 1)):
        check_range(LongContextEnv.id, name, knobs[name], low, high)
    for name, low, high in (("records", 0, 2000), ("hops", 2, 8), ("updates", 1, 8), ("key_words", 1, 4), ("questions", 1, 8)):
        check_range(LongContextEnv.id, name, knobs[name], low, high)
    keys = (knobs["records"] + knobs["questions"]) * (knobs["hops"] if "join" in knobs["kinds"] else 1)
    if keys > (len(WORDS) if knobs["key_words"] == 1 else len(WORDS) ** knobs["key_words"] // 2):
        raise ValueError(
            f"environment 'long_context': records={knobs['records']} may need {keys} keys, more than key_words={knobs['key_words']} gives; "
            f"raise key_words or lower records"
        )
    return knobs


# --- drawing ------------------------------------------------------------------------------------------------------------


def draw_keys(rng: random.Random, key_words: int) -> Callable[[], str]:
    """A function that gives a fresh key at every call."""
    if key_words == 1:
        return iter(rng.sample(WORDS, len(WORDS))).__next__
    used: set[str] = set()

    def fresh() -> str:
        while (key := "-".join(rng.choice(WORDS) for _ in range(key_words))) in used:
            pass
        used.add(key)
        return key

    return fresh


def draw_kind(rng: random.Random, knobs: Mapping[str, Any]) -> str:
    """What one question is about."""
    present = [kind for kind in knobs["kinds"] if kind != "absent"]
    if not present or ("absent" in knobs["kinds"] and rng.random() < knobs["absent_share"]):
        return "absent"
    return str(rng.choice(present))


def draw_entry(rng: random.Random, kind: str, fresh_key: Callable[[], str], knobs: Mapping[str, Any]) -> Entry:
    """A key with its lines. An absent key has none."""
    key = fresh_key()
    if kind == "absent":
        return key, [], [f"{key}={NONE}"], NONE
    chain = [key] + [fresh_key() for _ in range(knobs["hops"] - 1 if kind == "join" else 0)]
    aliases = [f"{a}->{b}" for a, b in pairwise(chain)]
    count = 1 + (rng.randint(1, knobs["updates"]) if kind == "overwritten" else 0)
    values = [str(rng.randrange(10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS)) for _ in range(count)]
    settings = [f"{chain[-1]}{' now' if i else ''}={value}" for i, value in enumerate(values)]
    return key, aliases + settings, [*aliases, settings[-1]], values[-1]


# --- writing ------------------------------------------------------------------------------------------------------------


def write_document(task: Task, count: Callable[[str], int]) -> str:
    """Records strewn over filler lines up to the task's number of tokens, and the question at the end.

    A record's settings keep their order; its aliases may stand anywhere.
    """
    rng = random.Random(task.seed)
    groups: list[list[str]] = task.public["groups"]
    used = count(task.public["question"] + "\n") + count_lines([line for group in groups for line in group], count)
    fillers: list[str] = []
    while used < task.public["tokens"]:
        fillers.append(rng.choice(FILLER))
        used += count(fillers[-1] + "\n")
    if fillers and used > task.public["tokens"]:
        fillers.pop()
    placed: list[tuple[float, str]] = []
    for group in groups:
        aliases = [line for line in group if "->" in line]
        settings = [line for line in group if "->" not in line]
        placed += [(rng.random(), line) for line in aliases]
        placed += zip(sorted(rng.random() for _ in settings), settings, strict=True)
    placed += [(rng.random(), line) for line in fillers]
    return "\n".join([line for _, line in sorted(placed)] + [task.public["question"]])


def count_lines(lines: Sequence[str], count: Callable[[str], int]) -> int:
    """Tokens of `lines` and their line breaks.

    Thousands of records are all different, and a tokenizer takes 15 us for each. But where it cuts words, digits and signs apart before
    anything else, as byte-level BPE does, the tokens of a line are those of its pieces, and these repeat. Whether it does is
    seen on every SAMPLED-th line, which is counted whole as well.
    """
    if len(lines) >= MANY_LINES and all(count(line + "\n") == count_pieces(line, count) for line in lines[::SAMPLED]):
        return sum(count_pieces(line, count) for line in lines)
    return sum(count(line + "\n") for line in lines)


def count_pieces(line: str, count: Callable[[str], int]) -> int:
    return sum(map(count, _PIECE.findall(line + "\n")))


@lru_cache(maxsize=8)
def token_counter(folder: str) -> Callable[[str], int]:
    """Tokens of a text by the tokenizer in `folder`, or estimated. Raises ValueError if the folder has none."""
    if not folder:
        return lambda text: max(1, round(len(text) / CHARS_PER_TOKEN))
    file = Path(folder, "tokenizer.json")
    if not file.is_file():
        raise ValueError(f"environment 'long_context': option tokenizer is {folder!r}, which holds no tokenizer.json")
    from tokenizers import Tokenizer  # not at the top: only this option needs it

    tokenizer = Tokenizer.from_file(str(file))

    @lru_cache(maxsize=65_536)
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count
