"""NeMo-Gym resource servers over HTTP: the server keeps the task's tools and its verifier, the policy is ours.

    environments:
      office: {id: nemo_gym, max_turns: 8, options: {url: "http://127.0.0.1:8001", rows: data/train.jsonl}}

    POST /seed_session  the row                              -> a cookie, which is the session
    POST /NAME          a tool call's arguments              -> what the tool says, in JSON
    POST /verify        the row and a Responses API object   -> reward, components, whether the sample counts

Rows are NeMo-Gym's own JSONL: `responses_create_params` (input messages, tools) beside whatever the verifier wants. A tool is called
by its name in the row's list, never by a path that the policy wrote, and only with arguments that its schema allows: others get an
answer that says so and do not reach the server, whose verifiers may trip over them. What the server fails at is our failure: a verifier
that answers with an error or masks the sample gives a verifier_error, a server that cannot be reached an infra_error.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import requests

from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict
from environments.bridges import verifier_failed
from environments.knobs import OptionError, check_range, read_knobs
from rl_core.types import ToolCall

KNOBS: dict[str, Any] = {"url": "", "rows": "", "timeout_s": 30.0, "low": 0.0, "high": 1.0}
"""url: of the resource server. rows: its JSONL file. timeout_s: of one request. low, high: the range of its rewards, mapped to 0 and 1."""

OWN_ROUTES = frozenset({"verify", "seed_session", "close_session", "aggregate_metrics", "reverify_mode", "mcp", "health"})
MAX_CALLS = 16  # of one turn
MAX_RESULT = 20_000  # characters of what a tool says
MAX_REPLY = 4 << 20  # bytes of one answer of the server


class NemoGymEnv(TextEnv):
    """Tasks of a NeMo-Gym resource server: its tools, its verifier, over HTTP."""

    id: ClassVar[str] = "nemo_gym"
    version: ClassVar[str] = "1"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.knobs = checked_knobs(options)
        self._http: requests.Session | None = None
        self._output: list[dict[str, Any]] = []
        self._tools: dict[str, dict[str, Any]] = {}

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        knobs = checked_knobs(options)
        row = rng.choice(read_rows(knobs["rows"]))
        asked = row["responses_create_params"]
        return TaskDraft(
            public={"messages": to_messages(asked["input"]), "tools": list(asked.get("tools") or [])},
            private={"row": row},
            difficulty=str(row.get("difficulty", "")),
        )

    def begin(self, task: Task) -> Observation:
        self.close()
        self._http = requests.Session()
        self._http.trust_env = False  # no proxy stands between us and a server that the config names
        self._output = []
        self._tools = {tool["name"]: tool for tool in task.public["tools"]}
        for name in self._tools:
            if name in OWN_ROUTES or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
                raise ValueError(f"a row declares the tool {name!r}, which is a route of the server's own or no name")
        self._post("seed_session", task.private["row"]).raise_for_status()
        tools = tuple(
            {"name": t["name"], "description": t.get("description") or "", "parameters": t.get("parameters") or {}}
            for t in self._tools.values()
        )
        messages = tuple(Message(role=m["role"], content=m["content"]) for m in task.public["messages"])
        return Observation(messages=messages, tools=tools)

    def act(self, turn: Turn) -> Observation | Verdict:
        if turn.malformed:
            return Verdict(status=Status.INVALID_OUTPUT, reward=0.0, evidence={"reason": turn.malformed})
        if turn.content or not turn.tool_calls:
            self._output.append(said(turn.content, len(self._output)))
        if not turn.tool_calls:
            return self._verify()
        if len(turn.tool_calls) > MAX_CALLS:
            return Verdict(status=Status.INVALID_OUTPUT, reward=0.0, evidence={"reason": f"more than {MAX_CALLS} tool calls in one turn"})
        return Observation(messages=tuple(Message(role="tool", content=self._call(call)) for call in turn.tool_calls))

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def _call(self, call: ToolCall) -> str:
        """One tool call, recorded as the verifier will read it; what breaks its declaration is answered here."""
        tool = self._tools.get(call.name)
        if tool is None:
            return f"error: there is no tool {call.name[:80]!r}; there are {', '.join(self._tools) or 'none'}"
        arguments = dict(call.arguments)
        try:
            jsonschema.validate(arguments, tool.get("parameters") or {})
        except jsonschema.ValidationError as error:
            return f"error: the arguments of {call.name} are wrong: {error.message[:200]}"
        reply = self._post(call.name, arguments)
        result = reply.text[:MAX_RESULT] if reply.ok else f"error {reply.status_code}: {reply.text[:500]}"
        number = len(self._output)
        self._output += [
            {
                "type": "function_call", "id": f"fc_{number}", "call_id": f"call_{number}", "name": call.name,
                "arguments": json.dumps(arguments), "status": "completed",
            },
            {"type": "function_call_output", "call_id": f"call_{number}", "output": result},
        ]  # fmt: skip
        return result

    def _verify(self) -> Verdict:
        assert self.task is not None
        row = self.task.private["row"]
        response = {
            "id": "resp_0", "created_at": int(time.time()), "model": "policy", "object": "response", "output": self._output,
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": list(self.task.public["tools"]),
        }  # fmt: skip
        reply = self._post("verify", row | {"response": response})
        if not reply.ok:
            return verifier_failed(f"the server's verifier answered {reply.status_code}: {reply.text}")
        found = reply.json()
        if found.get("mask_sample"):
            return verifier_failed(f"the server masks this sample: {found.get('failure_kind')}, {found.get('failure_reason')}")
        raw = float(found["reward"])
        if not math.isfinite(raw):
            return verifier_failed(f"the server's verifier answered with the reward {raw}")
        reward = min(1.0, max(0.0, (raw - self.knobs["low"]) / (self.knobs["high"] - self.knobs["low"])))
        return Verdict(
            status=Status.OK, reward=reward, components={"reward": raw} | components(found), evidence={"server": self.knobs["url"]}
        )

    def _post(self, route: str, body: Any) -> requests.Response:
        assert self._http is not None
        url = f"{self.knobs['url'].rstrip('/')}/{route}"
        reply = self._http.post(url, json=body, timeout=self.knobs["timeout_s"], allow_redirects=False, stream=True)
        content = b"".join(reply.iter_content(65536)) if int(reply.headers.get("content-length", 0)) <= MAX_REPLY else b""
        reply._content = content[:MAX_REPLY]
        return reply


def components(found: Mapping[str, Any]) -> dict[str, float]:
    """Named scores of a verify response: its `reward_components`, and numbers and truths beside the reward."""
    named = dict(found.get("reward_components") or {})
    beside = {k: v for k, v in found.items() if k != "reward" and isinstance(v, bool | float) and not k.startswith("mask_")}
    return {str(k): float(v) for k, v in {**beside, **named}.items()}


def said(text: str, number: int) -> dict[str, Any]:
    """The policy's words as an output item of the Responses API."""
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "id": f"msg_{number}", "role": "assistant", "status": "completed", "content": content}


def to_messages(asked: str | list[dict[str, Any]]) -> list[dict[str, str]]:
    """Responses API input as role and text."""
    if isinstance(asked, str):
        return [{"role": "user", "content": asked}]
    found = []
    for item in asked:
        content = item.get("content", "")
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        found.append({"role": {"developer": "system"}.get(item["role"], item["role"]), "content": text})
    return found


def checked_knobs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that `options` set. Raises OptionError."""
    knobs = read_knobs(NemoGymEnv.id, KNOBS, options)
    if not re.match(r"https?://", knobs["url"]):
        raise OptionError(
            f"environment 'nemo_gym': option url is {knobs['url']!r}, wanted the resource server's address, such as http://127.0.0.1:8001"
        )
    check_range(NemoGymEnv.id, "timeout_s", knobs["timeout_s"], 0.1, 3600)
    if not knobs["low"] < knobs["high"]:
        raise OptionError(f"environment 'nemo_gym': low={knobs['low']} and high={knobs['high']}, wanted low < high")
    read_rows(knobs["rows"])
    return knobs


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file. Raises OptionError that names the file and line."""
    file = Path(path)
    if not path or not file.is_file():
        raise OptionError(f"environment 'nemo_gym': option rows is {path!r}, wanted a JSONL file such as a server's data/example.jsonl")
    return _rows(path, file.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _rows(path: str, changed: int) -> list[dict[str, Any]]:
    del changed
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            row["responses_create_params"]["input"]
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(f"environment 'nemo_gym': {path}, line {number} is no row ({type(error).__name__}: {error})") from error
        rows.append(row)
    if not rows:
        raise OptionError(f"environment 'nemo_gym': {path} is empty")
    return rows
