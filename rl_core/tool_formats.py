"""How a tool call is spelled: two formats, each written, listed and read by the same few functions.

    hermes   <tool_call>{"name": "refund", "arguments": {"order": 4821}}</tool_call>
    xml      <tool_call><function=refund><parameter=order>4821</parameter></function></tool_call>        Nemotron-3, Qwen3-Coder

What is between <tool_call> and </tool_call> comes here as text, from a policy that may write anything: it is read in one pass from left
to right, no longer than MAX_CALL_CHARS, and what is wrong with it is a sentence, never an exception.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_core.tool_xml import read_xml, stray_xml, write_xml, xml_listing
from rl_core.types import ToolCall

MAX_CALL_CHARS = 65_536
MAX_JSON_DEPTH = 16

Schemas = Mapping[str, Mapping[str, Any]]
"""{tool: {parameter: its JSON schema}}."""

_TYPES = {"integer": "int", "string": "str", "number": "float", "boolean": "bool", "array": "list", "object": "dict"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One of FORMATS."""

    name: str
    write: Callable[[ToolCall], str]
    """Raises ValueError for a call that the format cannot spell."""
    read: Callable[[str, Schemas], ToolCall | str]
    """The call that a text spells, or what is wrong with it."""
    listing: Callable[[Sequence[Mapping[str, Any]]], str]
    """What the system message says of the tools."""
    stray: Callable[[str], str]
    """What is wrong with an answer in which markup of a call is left over; "" if nothing is."""
    wraps_results: bool
    """Whether what a tool says is shown as <tool_response> in a user message, not in a message of the role tool."""


def schemas(tools: Sequence[Mapping[str, Any]]) -> Schemas:
    """Of tools as environments show them. Odd ones have no parameters."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        parameters = tool.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        found[str(tool.get("name"))] = properties if isinstance(properties, Mapping) else {}
    return found


def detect(checkpoint: str | Path) -> str:
    """The format that a checkpoint's own chat template writes; hermes where it has none, or one without tools."""
    return "xml" if "<function=" in chat_template(Path(checkpoint)) else "hermes"


def chat_template(folder: Path) -> str:
    """All that the checkpoint says of its template, as text. Never rendered."""
    if not folder.is_dir():
        return ""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in (folder / "chat_template.jinja",) if path.is_file()]
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template", "")
        texts.append(found if isinstance(found, str) else json.dumps(found))
    except (OSError, ValueError, AttributeError):  # a checkpoint without one has none there
        pass
    return "\n".join(texts)


# --- Hermes -------------------------------------------------------------------------------------------------------------


def hermes_listing(tools: Sequence[Mapping[str, Any]]) -> str:
    """One signature line each."""
    return "\n".join(["Tools:", *(signature(tool) for tool in tools)])


def signature(tool: Mapping[str, Any]) -> str:
    """{"name": "refund", "parameters": {...}} -> "refund(order:int, note:str?)"; a "?" marks what may be left out."""
    parameters = tool.get("parameters", {})
    required = parameters.get("required", ())
    arguments = ", ".join(
        f"{name}:{_TYPES.get(schema.get('type', ''), 'any')}{'' if name in required else '?'}"
        for name, schema in parameters.get("properties", {}).items()
    )
    return f"{tool['name']}({arguments})"


def write_call(call: ToolCall) -> str:
    """{"name": "refund", "arguments": {"order": 4821}}"""
    return json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)


def read_hermes(text: str, _: Schemas) -> ToolCall | str:
    """A JSON object says of each value what type it is: no schema is needed."""
    if len(text) > MAX_CALL_CHARS:
        return f"tool call is longer than {MAX_CALL_CHARS} characters"
    try:
        value = strict_json(text)
    except ValueError:
        return "tool call is not JSON"
    if not isinstance(value, dict) or set(value) != {"name", "arguments"}:
        return 'tool call is not an object of "name" and "arguments"'
    if not isinstance(value["name"], str) or not isinstance(value["arguments"], dict):
        return "tool call needs a string for its name and an object for its arguments"
    if not within_depth(value, MAX_JSON_DEPTH):
        return f"tool call is nested deeper than {MAX_JSON_DEPTH}"
    return ToolCall(name=value["name"], arguments=value["arguments"])


def strict_json(text: str) -> Any:
    """JSON without duplicate keys, NaN, numbers out of range or text that cannot be encoded. Raises ValueError for all else."""
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
        text.encode("utf-8")
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # escapes can spell lone surrogates, which no later consumer could encode
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def within_depth(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    children = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(within_depth(child, depth - 1) for child in children)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value


# --- XML ----------------------------------------------------------------------------------------------------------------


def read_xml_call(text: str, known: Schemas) -> ToolCall | str:
    if len(text) > MAX_CALL_CHARS:
        return f"tool call is longer than {MAX_CALL_CHARS} characters"
    return read_xml(text, known, parse_json)


def parse_json(text: str) -> Any:
    """As Hermes reads it, and no deeper."""
    value = strict_json(text)
    if not within_depth(value, MAX_JSON_DEPTH):
        raise ValueError("nested too deep")
    return value


FORMATS = {
    "hermes": ToolFormat(
        name="hermes", write=write_call, read=read_hermes, listing=hermes_listing, stray=lambda _: "", wraps_results=False
    ),
    "xml": ToolFormat(name="xml", write=write_xml, read=read_xml_call, listing=xml_listing, stray=stray_xml, wraps_results=True),
}
