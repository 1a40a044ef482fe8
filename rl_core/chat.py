"""ChatML: messages to token ids, and sampled ids back to a turn, never tokenizing the same text twice.

    <|im_start|>system\\nYou run a shop.\\nTools:\\nfind(name:str)\\nrefund(order:int)<|im_end|>\\n
    <|im_start|>user\\nRefund Ann's order.<|im_end|>\\n
    <|im_start|>assistant\\n<think>find Ann</think><tool_call>{"name": "find", "arguments": {"name": "Ann"}}</tool_call><|im_end|>\\n
    <|im_start|>tool\\norder 4821<|im_end|>\\n
    <|im_start|>assistant\\n...

Other checkpoints spell tool calls in XML, list their tools so, and show results as <tool_response> (rl_core/tool_formats.py).

The frame is made of ids; what stands inside it is encoded with every special token disabled. So nothing that a task, a
tool or the policy writes can open a turn, close one, or pass for a marker, however it is spelled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rl_core.tool_formats import FORMATS, Schemas, ToolFormat, detect, hermes_listing, schemas
from rl_core.types import Message, ToolCall, Turn

START, END = "<|im_start|>", "<|im_end|>"
THINK, THINK_END, CALL, CALL_END = "<think>", "</think>", "<tool_call>", "</tool_call>"
MARKERS = (THINK, THINK_END, CALL, CALL_END)
RESPONSE, RESPONSE_END = "<tool_response>", "</tool_response>"

LONG_TEXT, LONG_TEXTS, SHORT_TEXTS = 2000, 64, 1024
"""Ids are kept of so many texts, long ones and others: what an environment says first, it says to a whole group."""


class ChatML:
    """Implements `rl_core.seams.ChatFormat` for any tokenizer.json that has the two ChatML tokens.

    The thinking and tool-call markers are single ids where the tokenizer has them. Where it has not (SmolLM2, say), they are
    ordinary text, written by `assistant` and found by `parse` in the decoded text.
    """

    def __init__(self, tokenizer_path: str | Path, tool_format: str = "auto") -> None:
        """`tokenizer_path` is a checkpoint folder or the tokenizer.json itself. Raises ValueError if it is no ChatML tokenizer.

        `tool_format`: hermes, xml, or auto, which takes what the folder's own chat template writes (rl_core/tool_formats.py).
        """
        path = Path(tokenizer_path)
        self.tool_format = FORMATS[detect(path) if tool_format == "auto" else tool_format]
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no tokenizer at {str(path)!r}; give the folder of a Hugging Face checkpoint that holds a tokenizer.json")
        spec = json.loads(path.read_text(encoding="utf-8"))
        for token in spec.get("added_tokens", []):
            token["special"] = True  # only special tokens can be disabled in text, and some tokenizers declare <think> an ordinary one
        self.tokenizer = Tokenizer.from_str(json.dumps(spec))
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._start, self._end = (self._required(token, path) for token in (START, END))
        self._marker_ids = {m: i for m in MARKERS if (i := self.tokenizer.token_to_id(m)) is not None}
        self._markers = {i: m for m, i in self._marker_ids.items()}
        self._reserved = frozenset(self.tokenizer.get_added_tokens_decoder()) - self._markers.keys()
        missing = [re.escape(m) for m in MARKERS if m not in self._marker_ids]
        self._written_markers = re.compile(f"({'|'.join(missing)})") if missing else None
        self._long, self._short = lru_cache(LONG_TEXTS)(self._encode), lru_cache(SHORT_TEXTS)(self._encode)
        self._newline = self.encode("\n")
        self._header = [self._start, *self.encode("assistant\n")]
        self.stop_ids: tuple[int, ...] = (self._end,)
        both = THINK in self._marker_ids and THINK_END in self._marker_ids
        self.think_ids = (self._marker_ids[THINK], self._marker_ids[THINK_END]) if both else None

    def _required(self, token: str, path: Path) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"{path} has no token {token!r}, so it is no ChatML tokenizer; use a checkpoint whose chat format is ChatML")
        return int(found)

    # --- messages to ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Plain text to ids; the spelling of a special token gives the ids of its letters."""
        return list((self._long if len(text) >= LONG_TEXT else self._short)(text))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(_encodable(text), add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text for people, special tokens spelled out."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The ids before the policy's first turn. Tools are listed at the end of the system message."""
        ids: list[int] = []
        for message in with_tools(messages, tools, self.tool_format.listing):
            ids += self._message(message)
        return ids + self._header

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """`ids`, which end with a turn of the policy, then what the environment said, up to the policy's next turn.

        The ids that are already there stay as they are. A turn that a token budget cut off is closed first.
        """
        extended = [int(i) for i in ids]
        if not extended or extended[-1] != self._end:
            extended.append(self._end)
        extended += self._newline
        for message in messages:
            extended += self._message(message)
        return extended + self._header

    def assistant(self, turn: Turn) -> list[int]:
        """A demonstrated turn as the policy should sample it, <|im_end|> included."""
        said = [("", THINK), (turn.thought, THINK_END)] if turn.thought else []  # each a text, and the marker behind it
        text = turn.content
        for call in turn.tool_calls:
            said += [(text, CALL), (self.tool_format.write(call), CALL_END)]
            text = ""
        ids: list[int] = []
        plain = ""
        for before, marker in said:
            plain += before
            if marker in self._marker_ids:
                ids += [*self.encode(plain), self._marker_ids[marker]]
                plain = ""
            else:
                plain += marker
        return [*ids, *self.encode(plain + text), self._end]

    def _message(self, message: Message) -> list[int]:
        if message.role == "tool" and self.tool_format.wraps_results:
            said = [*self._frame(RESPONSE), *self.encode(f"\n{message.content}\n"), *self._frame(RESPONSE_END)]
            return [self._start, *self.encode("user\n"), *said, self._end, *self._newline]
        return [self._start, *self.encode(f"{message.role}\n{message.content}"), self._end, *self._newline]

    def _frame(self, marker: str) -> list[int]:
        """A marker of ours: its one id, or its letters where the tokenizer has none."""
        found = self.tokenizer.token_to_id(marker)
        return self.encode(marker) if found is None else [int(found)]

    # --- ids to a turn --------------------------------------------------------------------------------------------------

    def parse(self, token_ids: Sequence[int], tools: Sequence[dict[str, Any]] = ()) -> Turn:
        """Read a sampled turn. Never raises: whatever is odd about the markup is said in `malformed`.

        `tools` are those that the environment showed: XML calls take the types of their arguments from them.
        """
        ids = [int(i) for i in token_ids]
        faults: list[str] = []
        if ids and ids[-1] == self._end:
            ids.pop()
        else:
            faults.append("cut off before the end of the turn")
        if any(i in self._reserved for i in ids):
            faults.append("a special token within the turn")
            ids = [i for i in ids if i not in self._reserved]
        return _read_turn(self._pieces(ids), faults, self.tool_format, schemas(tools))

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        """Markers and the texts around them, alternating: text, marker, text, ..., text."""
        pieces: list[str] = []
        run: list[int] = []
        for i in ids:
            if i in self._markers:
                pieces += [*self._split(run), self._markers[i]]
                run = []
            else:
                run.append(i)
        return pieces + self._split(run)

    def _split(self, run: list[int]) -> list[str]:
        text = self.decode(run) if run else ""
        return self._written_markers.split(text) if self._written_markers else [text]


@lru_cache(maxsize=8)
def chat_format(tokenizer_path: str, tool_format: str = "auto") -> ChatML:
    """The chat format of a checkpoint folder, read once per process."""
    return ChatML(tokenizer_path, tool_format)


def with_tools(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], listing: Callable[[Sequence[dict[str, Any]]], str] = hermes_listing
) -> list[Message]:
    """`messages`, the tools listed at the end of the system message (which is added if there is none)."""
    if not tools:
        return list(messages)
    if messages and messages[0].role == "system":
        return [Message(role="system", content=f"{messages[0].content}\n{listing(tools)}"), *messages[1:]]
    return [Message(role="system", content=listing(tools)), *messages]


# --- reading what the policy wrote --------------------------------------------------------------------------------------


def _read_turn(pieces: Sequence[str], faults: list[str], tool_format: ToolFormat, known: Schemas) -> Turn:
    """`pieces` alternate: text, marker, text, ..., text."""
    thought, content = "", pieces[0]
    calls: list[ToolCall] = []
    inside = ""  # the marker that is open
    for marker, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if not inside and marker == THINK:
            if thought or calls or content.strip():
                faults.append("<think> after the turn began")
            inside, thought = THINK, thought + text
        elif not inside and marker == CALL:
            inside = CALL
            call = tool_format.read(text, known)
            if isinstance(call, ToolCall):
                calls.append(call)
            else:
                faults.append(call)
        elif (inside, marker) in ((THINK, THINK_END), (CALL, CALL_END)):
            inside = ""
            content += text
        else:
            faults.append(f"{marker} inside {inside}" if inside else f"{marker} without its opening")
    if inside:
        faults.append(f"unclosed {inside}")
    if stray := tool_format.stray(content):
        faults.append(stray)
    return Turn(thought=thought.strip(), content=content.strip(), tool_calls=tuple(calls), malformed="; ".join(dict.fromkeys(faults)))


def _encodable(text: str) -> str:
    """Lone surrogates, which no tokenizer takes, become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
