"""Tool calls as Nemotron-3 and Qwen3-Coder spell them.

    <function=refund>
    <parameter=order>
    4821
    </parameter>
    <parameter=note>
    two lines,
    as they are
    </parameter>
    </function>

Nothing is escaped: a value is what stands between its tags, less one newline at either end (also read without them). So a value's type
is not written down; it comes from the tool's JSON schema. A value that is not of its type stays the text that it is, which the
environment's own check of arguments then refuses: a fault of the policy, told like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl_core.types import ToolCall

FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END = "<function=", "</function>", "<parameter=", "</parameter>"
TAGS = (FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END)
MAX_NAME_CHARS = 256


def write_xml(call: ToolCall) -> str:
    """What stands between <tool_call> and </tool_call>. Raises ValueError for what would be read as something else."""
    lines = ["", f"{FUNCTION}{_name(call.name)}>"]
    for name, value in call.arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if any(tag in text for tag in TAGS):
            raise ValueError(f"argument {name!r} of {call.name!r} holds a tag of the format itself, which XML tool calls cannot spell")
        lines += [f"{PARAMETER}{_name(name)}>", text, PARAMETER_END]
    return "\n".join([*lines, FUNCTION_END, ""])


def _name(name: str) -> str:
    if not _is_name(name):
        raise ValueError(f"{name!r} is no name of a function or parameter in an XML tool call")
    return name


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME_CHARS and name.isprintable() and not set(name) & set("<> ")


def read_xml(text: str, known: Mapping[str, Mapping[str, Any]], parse_json: Callable[[str], Any]) -> ToolCall | str:
    """The call that `text` spells, or what is wrong with it. One pass: each search begins where the last one ended."""
    place = _skip(text, 0)
    if not text.startswith(FUNCTION, place):
        return f"tool call does not begin with {FUNCTION}NAME>"
    name, place = _opening(text, place + len(FUNCTION))
    if not _is_name(name):
        return "tool call has no name of a function"
    types, arguments = known.get(name, {}), dict[str, Any]()
    while text.startswith(PARAMETER, place := _skip(text, place)):
        key, place = _opening(text, place + len(PARAMETER))
        if not _is_name(key):
            return "tool call has a parameter without a name"
        if key in arguments:
            return f"tool call gives a parameter twice: {key[:40]}"
        end = text.find(PARAMETER_END, place)
        if end < 0:
            return f"unclosed {PARAMETER}{key[:40]}>"
        value = text[place:end]
        if any(tag in value for tag in TAGS):
            return f"a tag within the value of parameter {key[:40]}"
        arguments[key] = typed(_stripped(value), types.get(key), parse_json)
        place = end + len(PARAMETER_END)
    if not text.startswith(FUNCTION_END, place):
        return f"tool call has something other than parameters before its {FUNCTION_END}"
    if text[place + len(FUNCTION_END) :].strip():
        return f"tool call goes on behind its {FUNCTION_END}"
    return ToolCall(name=name, arguments=arguments)


def _skip(text: str, place: int) -> int:
    """The first place from `place` on that is no white space."""
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _opening(text: str, place: int) -> tuple[str, int]:
    """The name up to the ">" that ends a tag, and the place behind it; no name where there is none within reach."""
    end = text.find(">", place, place + MAX_NAME_CHARS + 1)
    return (text[place:end], end + 1) if end >= 0 else ("", place)


def _stripped(value: str) -> str:
    return value.removeprefix("\n").removesuffix("\n")


def typed(text: str, schema: Any, parse_json: Callable[[str], Any]) -> Any:
    """The value that `text` spells under a JSON schema; the text itself where it spells none, or where nothing is known."""
    allowed = _allowed(schema)
    for kind in ("null", "boolean", "integer", "number", "array", "object"):
        if kind in allowed and (value := _of_kind(text.strip(), kind, parse_json)) is not _NONE:
            return value
    return text


_NONE = object()


def _allowed(schema: Any) -> set[str]:
    """Types that a schema names: {"type": ["integer", "null"]}, or those of its anyOf / oneOf."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type", ())
    found = {named} if isinstance(named, str) else {n for n in named if isinstance(n, str)} if isinstance(named, Sequence) else set()
    for key in ("anyOf", "oneOf"):
        for part in schema.get(key, ()) if isinstance(schema.get(key), Sequence) else ():
            found |= {part["type"]} if isinstance(part, Mapping) and isinstance(part.get("type"), str) else set()
    return found


def _of_kind(text: str, kind: str, parse_json: Callable[[str], Any]) -> Any:
    """The value, or _NONE. Templates that print Python's words (True, None) are common enough to be read as well."""
    if kind in ("null", "boolean"):
        words: Mapping[str, bool | None] = {"null": None, "none": None} if kind == "null" else {"true": True, "false": False}
        return words.get(text.lower(), _NONE)
    try:
        value = parse_json(text)
    except ValueError:
        return _NONE
    fits = {
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    return value if fits[kind] else _NONE


def stray_xml(content: str) -> str:
    """Markup of a call that stands in no call."""
    found = next((tag for tag in TAGS if tag in content), "")
    return f"{found} outside of a tool call" if found else ""


def xml_listing(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools with their schemas, in the tags that such models know, and how to call one."""
    lines = ["# Tools", "", "<tools>"]
    for tool in tools:
        parameters = tool.get("parameters") or {}
        lines += ["<function>", f"<name>{tool['name']}</name>"]
        lines += [f"<description>{tool['description']}</description>"] if tool.get("description") else []
        lines.append("<parameters>")
        for name, schema in parameters.get("properties", {}).items():
            lines += ["<parameter>", f"<name>{name}</name>"]
            lines += [f"<{key}>{value if isinstance(value, str) else json.dumps(value)}</{key}>" for key, value in schema.items()]
            lines.append("</parameter>")
        if parameters.get("required"):
            lines.append(f"<required>{json.dumps(list(parameters['required']))}</required>")
        lines += ["</parameters>", "</function>"]
    example = ["<tool_call>", f"{FUNCTION}NAME>", f"{PARAMETER}KEY>", "VALUE", PARAMETER_END, FUNCTION_END, "</tool_call>"]
    return "\n".join([*lines, "</tools>", "", "A call of a function is written like this:", "", *example])
