"""Both spellings of a tool call: what is written is read again, and whatever a policy writes is a turn, never an error."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from environments.host_actor import HostActor
from environments.registry import resolve
from environments.scripted import LocalSession, OracleEpisode
from learner.seed.tokenizer import SPECIAL_TOKENS, train_tokenizer
from rl_core.chat import ChatML
from rl_core.config import ConfigError
from rl_core.config_files import parse_config
from rl_core.tool_formats import FORMATS, MAX_CALL_CHARS, MAX_JSON_DEPTH, detect
from rl_core.tool_xml import MAX_NAME_CHARS, TAGS
from rl_core.types import EpisodeSpec, Message, SamplingParams, ToolCall, Turn
from rollout_workers.episode import run_episode
from tests.unit.test_chat import CORPUS, ids_of

SEED_MODEL = Path(__file__).parents[2] / "configs" / "models" / "seed"
PROPERTIES: dict[str, Any] = {
    "order": {"type": "integer"},
    "note": {"type": "string"},
    "price": {"type": "number"},
    "urgent": {"type": "boolean"},
    "items": {"type": "array"},
    "where": {"type": "object"},
    "by": {"type": ["integer", "null"]},
    "until": {"anyOf": [{"type": "null"}, {"type": "number"}]},
}
REFUND = {
    "name": "refund",
    "description": "refund an order",
    "parameters": {"type": "object", "properties": PROPERTIES, "required": ["order"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(CORPUS, tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.fixture(scope="module", params=["hermes", "xml"])
def chat(request: pytest.FixtureRequest, folder: Path) -> ChatML:
    return ChatML(folder, request.param)


@pytest.fixture(scope="module")
def xml(folder: Path) -> ChatML:
    return ChatML(folder, "xml")


text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
no_tags = text.filter(lambda t: not any(tag in t for tag in TAGS))
floats = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)  # a test beside this one may have torch flush them
leaf = no_tags | st.integers() | floats | st.booleans() | st.none()
nested = st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(no_tags, inner, max_size=3), max_leaves=8)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "order": st.integers(),
        "note": no_tags,
        "price": floats | st.integers(),
        "urgent": st.booleans(),
        "items": st.lists(nested, max_size=3),
        "where": st.dictionaries(no_tags, nested, max_size=3),
        "by": st.integers() | st.none(),
        "until": floats | st.none(),
    },
)


@settings(max_examples=200)
@given(values=arguments, thought=no_tags, content=no_tags)
def test_a_call_is_read_as_it_was_written_value_for_value_and_type_for_type(
    chat: ChatML, values: dict[str, Any], thought: str, content: str
) -> None:
    turn = Turn(thought=thought.strip(), content=content.strip(), tool_calls=(ToolCall(name="refund", arguments=values),))
    again = chat.parse(chat.assistant(turn), [REFUND])
    assert again == turn
    assert json.dumps(again.tool_calls[0].arguments) == json.dumps(values), "1 is not 1.0, and True is not 1"


hostile = st.lists(
    st.sampled_from([*TAGS, "<tool_call>", "</tool_call>", "<think>", "refund", "order", ">", "\n", " ", "{", '"', "42", "=", "\x00", "é"])
    | text,
    max_size=30,
).map("".join)


@settings(max_examples=150)
@given(written=hostile)
def test_whatever_is_written_is_a_turn_and_a_call_is_never_made_of_broken_markup(chat: ChatML, written: str) -> None:
    turn = chat.parse([*ids_of(chat, written), chat.stop_ids[0]], [REFUND])
    assert isinstance(turn.malformed, str)
    json.dumps([dict(c.arguments) for c in turn.tool_calls], allow_nan=False).encode()
    if chat.tool_format.name == "xml":
        said = [turn.content, *(v for c in turn.tool_calls for v in c.arguments.values() if isinstance(v, str))]
        assert turn.malformed or not any(tag in s for s in said for tag in TAGS)


@settings(max_examples=150)
@given(written=hostile)
def test_whatever_stands_in_a_call_is_a_call_or_a_sentence(written: str) -> None:
    for spelled in FORMATS.values():
        for body in (
            written,
            f"<function=refund>{written}</function>",
            f"<function=refund><parameter=order>{written}</parameter></function>",
        ):
            assert isinstance(spelled.read(body, {"refund": PROPERTIES}), ToolCall | str)


@pytest.mark.parametrize("repeated", [*TAGS, "<parameter=x>1</parameter>", "<function=", " ", "[", "9", "<parameter=" + "k" * 200])
def test_a_huge_call_is_refused_by_its_length_before_it_is_read(repeated: str) -> None:
    """So the time of reading is bounded by the constant; below it, each character is looked at a fixed number of times."""
    body = "<function=refund>" + repeated * (1 + 4_000_000 // len(repeated))
    for spelled in FORMATS.values():
        assert spelled.read(body, {}) == f"tool call is longer than {MAX_CALL_CHARS} characters"
        assert isinstance(spelled.read(body[:MAX_CALL_CHARS], {}), str)


class Counting(str):
    """A text that counts how much of it searches look at."""

    __slots__ = ("looked",)
    looked: int

    def find(self, sub: str, start: Any = 0, end: Any = None) -> int:
        found = super().find(sub, start, len(self) if end is None else end)
        self.looked += (found if found >= 0 else min(len(self), len(self) if end is None else end)) - start
        return found


@pytest.mark.parametrize("repeated", ["<parameter=k{}>v</parameter>", "<parameter=k{}>", "<parameter=k{}", "</parameter>", "<function=f>"])
def test_searches_through_a_call_add_up_to_its_length(repeated: str) -> None:
    body = Counting("<function=f>" + "".join(repeated.format(i) for i in range(1000)) + "</function>")
    body.looked = 0
    FORMATS["xml"].read(body, {})
    assert body.looked <= len(body)


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ("<tool_call>refund 4821</tool_call>", "does not begin with <function=NAME>"),
        ('<tool_call>{"name": "refund", "arguments": {}}</tool_call>', "does not begin with <function=NAME>"),
        ("<tool_call><function=></function></tool_call>", "no name of a function"),
        ("<tool_call><function=a b></function></tool_call>", "no name of a function"),
        ("<tool_call><function=" + "f" * (MAX_NAME_CHARS + 1) + "></function></tool_call>", "no name of a function"),
        ("<tool_call><function=refund><parameter=>1</parameter></function></tool_call>", "a parameter without a name"),
        ("<tool_call><function=refund><parameter=order>1</function></tool_call>", "unclosed <parameter=order>"),
        ("<tool_call><function=refund><parameter=order>1<parameter=note>a</parameter></function></tool_call>", "a tag within the value"),
        ("<tool_call><function=refund><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>", "twice: a"),
        ("<tool_call><function=refund>and so on</function></tool_call>", "something other than parameters"),
        ("<tool_call><function=refund><parameter=order>1</parameter></tool_call>", "something other than parameters"),
        ("<tool_call><function=refund></function> now</tool_call>", "goes on behind"),
        ("<tool_call><function=refund></function>", "unclosed <tool_call>"),
        ("<function=refund><parameter=order>1</parameter></function>", "<function= outside of a tool call"),
        ("done </parameter>", "</parameter> outside of a tool call"),
    ],
)
def test_broken_xml_markup_is_said_in_words(xml: ChatML, written: str, fault: str) -> None:
    turn = xml.parse([*ids_of(xml, written), xml.stop_ids[0]], [REFUND])
    assert fault in turn.malformed
    assert turn.tool_calls == () or "unclosed" in fault


@pytest.mark.parametrize(
    "body",
    [
        "<function=refund><parameter=order>7</parameter></function>",
        "\n<function=refund>\n<parameter=order>\n7\n</parameter>\n</function>\n",
    ],
)
def test_xml_is_read_with_and_without_line_breaks(body: str) -> None:
    assert FORMATS["xml"].read(body, {"refund": PROPERTIES}) == ToolCall(name="refund", arguments={"order": 7})


@pytest.mark.parametrize(
    ("key", "spelled", "value"),
    [
        ("urgent", "True", True), ("by", "None", None), ("by", "3", 3), ("until", "2.5", 2.5), ("items", "[1]", [1]), ("note", "3", "3"),
        ("note", "null", "null"), ("order", "3.5", "3.5"), ("order", "true", "true"), ("price", "NaN", "NaN"), ("price", "1e999", "1e999"),
        ("order", "9" * 5000, "9" * 5000), ("items", '{"a": 1}', '{"a": 1}'), ("items", "[" * 5000, "[" * 5000), ("unknown", "3", "3"),
        ("items", "[" * (MAX_JSON_DEPTH + 2) + "]" * (MAX_JSON_DEPTH + 2), "[" * (MAX_JSON_DEPTH + 2) + "]" * (MAX_JSON_DEPTH + 2)),
        ("where", '{"a": 1, "a": 2}', '{"a": 1, "a": 2}'), ("note", "\n two \n", "\n two \n"),
    ],
)  # fmt: skip
def test_a_value_has_its_schemas_type_or_stays_the_text_that_it_is(key: str, spelled: str, value: Any) -> None:
    call = FORMATS["xml"].read(f"<function=refund><parameter={key}>\n{spelled}\n</parameter></function>", {"refund": PROPERTIES})
    assert isinstance(call, ToolCall)
    assert call.arguments == {key: value}
    assert type(call.arguments[key]) is type(value)


@given(
    schema=st.recursive(
        st.none() | st.integers() | text,
        lambda s: st.lists(s, max_size=3) | st.dictionaries(st.sampled_from(["type", "anyOf", "oneOf"]), s),
        max_leaves=6,
    )
)
def test_a_plugins_odd_schema_is_no_error(schema: Any) -> None:
    call = FORMATS["xml"].read("<function=f><parameter=k>1</parameter></function>", {"f": {"k": schema}})
    assert isinstance(call, ToolCall)


@pytest.mark.parametrize(
    "call",
    [ToolCall(name="a b", arguments={}), ToolCall(name="f", arguments={"k>": 1}), ToolCall(name="f", arguments={"k": "</parameter>"})],
)
def test_what_xml_cannot_spell_is_refused_when_it_is_written(xml: ChatML, call: ToolCall) -> None:
    with pytest.raises(ValueError, match="XML tool call"):
        xml.assistant(Turn(content="", tool_calls=(call,)))


def test_xml_prompts_list_tools_with_their_schemas_and_wrap_what_tools_say(xml: ChatML) -> None:
    shown = xml.decode(xml.prompt([Message(role="system", content="Help."), Message(role="user", content="Hi")], [REFUND]))
    assert shown.startswith(
        "<|im_start|>system\nHelp.\n# Tools\n\n<tools>\n<function>\n<name>refund</name>\n<description>refund an order</description>"
    )
    assert "<parameter>\n<name>order</name>\n<type>integer</type>\n</parameter>" in shown
    assert '<required>["order"]</required>' in shown
    ids = [
        *xml.prompt([Message(role="user", content="Hi")]),
        *xml.assistant(Turn(content="", tool_calls=(ToolCall(name="f", arguments={}),))),
    ]
    longer = xml.extend(ids, [Message(role="tool", content="</tool_response>done")])
    assert longer[: len(ids)] == ids
    said = xml.decode(longer[len(ids) :])
    assert said == "\n<|im_start|>user\n<tool_response>\n</tool_response>done\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def test_markers_of_a_tools_result_are_ids_where_the_tokenizer_has_them(folder: Path, tmp_path: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    first = len(spec["model"]["vocab"])
    for i, marker in enumerate(("<tool_response>", "</tool_response>")):
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": first + i, "content": marker, "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    chat = ChatML(tmp_path, "xml")
    ids = chat.extend([chat.stop_ids[0]], [Message(role="tool", content="<tool_response>ok</tool_response>")])
    assert [i for i in ids if i >= first] == [first, first + 1], "ours are ids, a tool's own spelling is letters"
    assert "a special token within the turn" in chat.parse([first, chat.stop_ids[0]]).malformed
    assert len(SPECIAL_TOKENS) > 0


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, "hermes"),
        ({"chat_template.jinja": "{{ '<function=' + name }}"}, "xml"),
        ({"tokenizer_config.json": json.dumps({"chat_template": "<function="})}, "xml"),
        ({"tokenizer_config.json": json.dumps({"chat_template": [{"name": "tool_use", "template": "<function="}]})}, "xml"),
        ({"tokenizer_config.json": json.dumps({"chat_template": '{"name": ...}'})}, "hermes"),
        ({"tokenizer_config.json": "not JSON"}, "hermes"),
        ({"tokenizer_config.json": "[]"}, "hermes"),
    ],
)
def test_auto_takes_what_the_checkpoints_template_writes(folder: Path, tmp_path: Path, files: dict[str, str], wanted: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert detect(tmp_path) == wanted
    assert ChatML(tmp_path).tool_format.name == wanted
    assert ChatML(tmp_path, "xml").tool_format.name == "xml"


@pytest.mark.parametrize("spelled", ["hermes", "xml"])
async def test_the_tools_environment_pays_its_oracle_in_either_spelling(spelled: str) -> None:
    """Turns as ids, there and back: written by the oracle, parsed as a policy's, typed by the schemas that the environment shows."""
    host, chat, cls = HostActor("bubblewrap", exit=lambda: None), ChatML(SEED_MODEL, spelled), resolve("tools")
    options = {"failure_rate": 0.0, "oracle_working": 1.0}
    spec = EpisodeSpec(group_size=1, sampling=SamplingParams(max_tokens=2048), max_turns=8, max_total_tokens=32768, timeout_s=60)
    for i, task in enumerate(islice(cls.tasks("train", 0, options), 12)):
        session = LocalSession(host=host, id=f"r{i}", env_id="tools", options=options, task=task)
        policy = OracleEpisode(session, cls(**options), task, chat)
        rollout = await run_episode(task, spec, policy, policy, chat, f"r{i}")
        assert rollout.verdict.reward == 1.0, rollout.verdict.evidence
        for before, after in pairwise(rollout.completions):
            known = [*before.prompt_ids, *before.token_ids]
            assert after.prompt_ids[: len(known)].tolist() == known


def test_the_config_chooses_the_format() -> None:
    settings = {"model": {"path": str(SEED_MODEL), "tool_format": "xlm"}, "environments": {"math": {}}}
    with pytest.raises(ConfigError, match=r"model\.tool_format is 'xlm', wanted one of auto, hermes, xml; did you mean xml\?"):
        parse_config(settings)
