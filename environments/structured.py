"""Write down what was said as JSON that fits a schema: right form and right content, both exactly.

    {id:int, city:str, tags:[str], n_tags:int}       {"id": 4821, "city": "Oslo", "tags": ["red", "old"], "n_tags": 2}
    id=4821; city=Rome; tags=red,old;            ->
    city now=Oslo; n_tags=count of tags

Facts come in any order; a later one replaces an earlier one, some are about things that the schema has no place for, and some fields
must be computed from others. The reward is 1 when the answer is JSON, satisfies the schema, and every field is equal to its value.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from jsonschema import Draft202012Validator

from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict, as_honeypot, unguessable
from environments.knobs import check_choices, check_range, read_knobs, shows_working
from reward_models.code_cases import read_json, same

STYLES = ("brief", "full")
TYPES = ("int", "str", "bool", "enum", "strings", "ints", "object")
KNOBS: dict[str, Any] = {
    "types": ["int", "str", "bool", "strings"], "min_fields": 2, "max_fields": 4, "depth": 1, "items": 3, "changes": 0, "extras": 0,
    "computed": 0, "style": "brief",
}  # fmt: skip
MAX_CHARS = 65_536

_FIELDS = (
    "age area city code color cost day depth door floor grade group height hour item kind label level limit mark month name number owner "
    "page part place plan point price rank rate region room score shape side size stage state step stock street team term topic unit "
    "user value week weight width year zone"
)
FIELDS = tuple(_FIELDS.split())
_WORDS = (
    "amber birch cedar coral crane delta ember fern flint frost gale glade grove hazel heron iris jade lark lilac lotus maple marsh mint "
    "moss north ocean olive onyx opal otter pearl pine plum quail quartz raven reed river robin ruby sage slate south stone swift "
    "thorn tulip velvet willow"
)
WORDS = tuple(_WORDS.split())
COMPUTED: dict[str, tuple[str, Callable[[list[Any]], Any]]] = {
    "count": ("count of", len),
    "sum": ("sum of", sum),
    "max": ("largest of", max),
    "min": ("smallest of", min),
}
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n(.*)\n?```\Z", re.DOTALL)


class StructuredEnv(TextEnv):
    """Turn facts into JSON that satisfies a schema; reward 1 if it is valid and every field is right.

    types                   of fields: int, str, bool, enum, strings, ints, object [int, str, bool, strings]
    min_fields, max_fields  of the record, the fields of inner objects not counted [2, 4]
    depth                   of objects within objects, if types has object [1]
    items                   of a list, at most [3]
    changes                 facts that are replaced later [0]
    extras                  facts that the schema has no place for [0]
    computed                fields that follow from a list of numbers [0]; needs ints
    style                   brief for small models, or full: sentences and the schema itself [brief]
    """

    id: ClassVar[str] = "structured"
    version: ClassVar[str] = "1"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.knobs = checked_knobs(options)

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        knobs = checked_knobs(options)
        schema, gold = draw_record(rng, knobs, knobs["depth"], rng.randint(knobs["min_fields"], knobs["max_fields"]))
        facts = [f"{path}={spell(value)}" for path, value in leaves(gold)]
        rng.shuffle(facts)
        facts = add_extras(rng, add_changes(rng, facts, gold, schema, knobs["changes"]), schema, knobs["extras"])
        facts += add_computed(rng, schema, gold, knobs["computed"])
        public = {"schema": schema, "facts": facts, "style": knobs["style"]}
        return TaskDraft(public=public, private={"gold": gold}, difficulty=f"{sum(1 for _ in leaves(gold))} fields")

    def begin(self, task: Task) -> Observation:
        return Observation(messages=(Message(role="user", content=ask(**task.public)),))

    def act(self, turn: Turn) -> Verdict:
        assert self.task is not None
        gold, schema = self.task.private["gold"], self.task.public["schema"]
        try:
            answer = read_answer(turn)
        except ValueError as error:
            return self._verdict(Status.INVALID_OUTPUT, 0.0, False, 0.0, {"reason": str(error)[:300], "answer": turn.content[:500]})
        invalid = next(Draft202012Validator(schema).iter_errors(answer), None)
        wanted, given = dict(leaves(gold)), dict(leaves(answer)) if isinstance(answer, dict) else {}
        wrong = [path for path in wanted if path not in given or not same(given[path], wanted[path])]
        evidence = {"answer": turn.content[:500], "wrong": ", ".join(wrong)[:300]}
        if invalid is not None:
            evidence["invalid"] = invalid.message[:300]
        right = 1.0 if same(answer, gold) else (len(wanted) - len(wrong)) / (len(wanted) + 1)  # not all, if there is something else beside
        return self._verdict(Status.OK, 1.0, invalid is None, right, evidence)

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        assert self.task is not None
        gold = self.task.private["gold"]
        thought = "; ".join(f"{path}={spell(value)}" for path, value in leaves(gold)) if shows_working(self.knobs, rng) else ""
        return Turn(thought=thought, content=json.dumps(gold))

    @classmethod
    def honeypot(cls, task: Task, rng: random.Random) -> Task:
        """Another number in the first field than the facts say."""
        gold = task.private["gold"]
        return as_honeypot(task, {"gold": {**gold, next(iter(gold)): unguessable(rng)}})

    def _verdict(self, status: Status, parses: float, valid: bool, fields: float, evidence: dict[str, str]) -> Verdict:
        correct = float(valid and fields == 1.0)
        components = {"correct": correct, "parses": parses, "valid": float(valid), "fields": fields}
        return Verdict(
            status=status, reward=correct, components=components, evidence=evidence, verifier_version=f"{self.id}/{self.version}"
        )


def checked_knobs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that `options` set, in range. Raises ValueError."""
    env = StructuredEnv.id
    knobs = read_knobs(env, KNOBS, options)
    check_choices(env, "types", knobs["types"], TYPES)
    check_choices(env, "style", [knobs["style"]], STYLES)
    for name, low, high in (
        ("min_fields", 2, 40), ("max_fields", knobs["min_fields"], 40), ("depth", 1, 6), ("items", 1, 50), ("changes", 0, 20),
        ("extras", 0, 20), ("computed", 0, 4),
    ):  # fmt: skip
        check_range(env, name, knobs[name], low, high)
    if knobs["types"] == ["object"]:
        raise ValueError(f"environment {env!r}: option types has nothing but object, wanted some that hold a value")
    if knobs["computed"] and "ints" not in knobs["types"]:
        raise ValueError(f"environment {env!r}: option computed is {knobs['computed']}, which needs ints among the types")
    return knobs


# --- drawing ------------------------------------------------------------------------------------------------------------


def draw_record(rng: random.Random, knobs: Mapping[str, Any], depth: int, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(schema, an instance). The first field is a number of four digits, which nobody can guess."""
    names = rng.sample(FIELDS, count)
    allowed = [t for t in knobs["types"] if t != "object" or depth > 1]
    types = ["int" if depth == knobs["depth"] else rng.choice(allowed), *(rng.choice(allowed) for _ in names[1:])]
    if knobs["computed"] and depth == knobs["depth"] and "ints" not in types:
        types[-1] = "ints"
    properties: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, kind in zip(names, types, strict=True):
        if kind == "object":
            properties[name], values[name] = draw_record(rng, knobs, depth - 1, rng.randint(1, 3))
        else:
            properties[name], values[name] = draw_value(rng, kind, knobs["items"])
    schema = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    return schema, values


def draw_value(rng: random.Random, kind: str, items: int) -> tuple[dict[str, Any], Any]:
    """(schema, an instance) of one field."""
    if kind == "int":
        return {"type": "integer"}, rng.randint(1000, 9999)
    if kind == "bool":
        return {"type": "boolean"}, rng.random() < 0.5
    if kind == "enum":
        choices = rng.sample(WORDS, 4)
        return {"enum": choices}, rng.choice(choices)
    if kind == "strings":
        return {"type": "array", "items": {"type": "string"}}, rng.sample(WORDS, rng.randint(1, min(items, len(WORDS))))
    if kind == "ints":
        return {"type": "array", "items": {"type": "integer"}}, [rng.randint(10, 99) for _ in range(rng.randint(1, items))]
    return {"type": "string"}, rng.choice(WORDS)


def add_changes(rng: random.Random, facts: list[str], gold: dict[str, Any], schema: dict[str, Any], count: int) -> list[str]:
    """Of some fields, first another value; the true one comes later."""
    paths = [path for path, value in leaves(gold) if "." not in path and not isinstance(value, bool | list)]
    for path in rng.sample(paths, min(count, len(paths))):
        options = [v for v in schema["properties"][path].get("enum", ()) if v != gold[path]]
        old = rng.choice(options) if options else rng.randint(1000, 9999) if isinstance(gold[path], int) else rng.choice(WORDS)
        at = facts.index(f"{path}={spell(gold[path])}")
        facts = [*facts[:at], *facts[at + 1 :], f"{path} now={spell(gold[path])}"]
        facts.insert(rng.randint(0, at), f"{path}={spell(old)}")
    return facts


def add_extras(rng: random.Random, facts: list[str], schema: dict[str, Any], count: int) -> list[str]:
    others = [name for name in FIELDS if name not in schema["properties"]]
    for name in rng.sample(others, min(count, len(others))):
        facts.insert(rng.randint(0, len(facts)), f"{name}={spell(draw_value(rng, rng.choice(('int', 'str')), 1)[1])}")
    return facts


def add_computed(rng: random.Random, schema: dict[str, Any], gold: dict[str, Any], count: int) -> list[str]:
    """More fields of `schema` and `gold`, which follow from a list of numbers; the facts that say how."""
    source = rng.choice([name for name, value in gold.items() if isinstance(value, list) and isinstance(value[0], int)]) if count else ""
    facts = []
    for name in rng.sample(sorted(COMPUTED), count):
        phrase, compute = COMPUTED[name]
        field = f"{name}_{source}"
        schema["properties"][field], gold[field] = {"type": "integer"}, compute(gold[source])
        schema["required"].append(field)
        facts.append(f"{field}={phrase} {source}")
    return facts


# --- wording ------------------------------------------------------------------------------------------------------------


def ask(schema: dict[str, Any], facts: list[str], style: str) -> str:
    """The question as the policy reads it."""
    if style == "brief":
        return f"{signature(schema)}\n{'; '.join(facts)}"
    told = " ".join(sentence(fact) for fact in facts)
    return (
        f"{told}\n\nWrite this down as one JSON object that satisfies the schema below, with nothing before or after it. Where something "
        f"was corrected, the last word counts; leave out what the schema has no field for.\n\n{json.dumps(schema)}"
    )


def sentence(fact: str) -> str:
    path, _, value = fact.partition("=")
    name, now = path.removesuffix(" now"), " now" if path.endswith(" now") else ""
    *owners, leaf = name.split(".")
    return f"The {' '.join([leaf, *(f'of the {owner}' for owner in reversed(owners))])} is{now} {value.replace(',', ', ')}."


def signature(schema: Mapping[str, Any]) -> str:
    """{id:int, tags:[str]}: a schema in a few tokens."""
    if "enum" in schema:
        return "|".join(schema["enum"])
    if schema["type"] == "object":
        return "{" + ", ".join(f"{name}:{signature(inner)}" for name, inner in schema["properties"].items()) + "}"
    if schema["type"] == "array":
        return f"[{signature(schema['items'])}]"
    return {"integer": "int", "string": "str", "boolean": "bool"}[schema["type"]]


def spell(value: Any) -> str:
    """A value within a fact."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- judging ------------------------------------------------------------------------------------------------------------


def leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything that is no object."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_answer(turn: Turn) -> Any:
    """The JSON of an answer, alone or in one fence. Raises ValueError; never slow, whatever was written."""
    if turn.malformed or turn.tool_calls:
        raise ValueError(turn.malformed or "a tool call where there are no tools")
    text = turn.content.strip()
    if len(text) > MAX_CHARS:
        raise ValueError(f"an answer of {len(text)} characters, wanted at most {MAX_CHARS}")
    if fenced := _FENCE.match(text):
        text = fenced[1]
    return read_json(text)
