"""A model that answers a prompt: behind an OpenAI-compatible endpoint, or in an engine of ours.

await HttpChat(url="http://127.0.0.1:8000/v1", model="judge").complete(messages)   ->   the reply's text
await EngineChat(engine, chat_format("path/of/checkpoint")).complete(messages)     ->   the same
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from reward_models.code_cases import read_json
from rl_core.seams import ChatFormat, Sampler
from rl_core.types import Message, SamplingParams

MAX_REPLY_BYTES = 400_000


class ChatFailed(RuntimeError):
    """No reply: the endpoint is away, slow, refuses, or does not speak the protocol."""


class ChatModel(Protocol):
    """Answers a conversation with a text."""

    @property
    def name(self) -> str: ...

    async def complete(self, messages: Sequence[Message], *, max_tokens: int, temperature: float) -> str:
        """Raises ChatFailed, and nothing else for what happens on the other side."""
        ...


@dataclass(slots=True, kw_only=True)
class HttpChat:
    """An OpenAI-compatible endpoint. One connection pool for the event loop that uses it first."""

    url: str  # base URL, for example http://127.0.0.1:8000/v1
    model: str
    timeout_s: float = 60.0
    api_key_env: str = ""  # name of the environment variable that holds the key; "" for none
    _client: httpx.AsyncClient | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        return f"{self.model}@{httpx.URL(self.url).host}"

    async def complete(self, messages: Sequence[Message], *, max_tokens: int, temperature: float) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        try:
            async with asyncio.timeout(self.timeout_s):
                return _reply_text(await self._post(body))
        except TimeoutError:
            raise ChatFailed(f"{self.name} did not answer within {self.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise ChatFailed(f"{self.name}: {type(error).__name__}: {error}") from None
        except ValueError as error:
            raise ChatFailed(f"{self.name} does not speak the protocol: {error}") from None

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _post(self, body: dict[str, Any]) -> bytes:
        if self._client is None:
            key = os.environ.get(self.api_key_env, "") if self.api_key_env else ""
            self._client = httpx.AsyncClient(timeout=self.timeout_s, headers={"Authorization": f"Bearer {key}"} if key else {})
        async with self._client.stream("POST", f"{self.url.rstrip('/')}/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ChatFailed(f"{self.name} answers with status {response.status_code}")
            received = bytearray()
            async for chunk in response.aiter_bytes():
                received += chunk
                if len(received) > MAX_REPLY_BYTES:
                    raise ChatFailed(f"{self.name} sends more than {MAX_REPLY_BYTES} bytes")
            return bytes(received)


class EngineChat:
    """An engine of ours, through the same seam as an episode."""

    def __init__(self, sampler: Sampler, chat: ChatFormat, *, name: str) -> None:
        self.name = name
        self._sampler, self._chat = sampler, chat
        self._numbers = itertools.count()

    async def complete(self, messages: Sequence[Message], *, max_tokens: int, temperature: float) -> str:
        ids = self._chat.prompt(messages)
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
        try:
            completion = await self._sampler.sample(ids, params, request_id=f"judge-{self.name}-{next(self._numbers)}")
        except ValueError as error:  # a prompt that leaves no room to answer
            raise ChatFailed(f"{self.name}: {error}") from None
        return self._chat.parse(completion.token_ids.tolist()).content


def _reply_text(body: bytes) -> str:
    """choices[0].message.content. Raises ValueError for anything else."""
    value = read_json(body)
    try:
        text = value["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("no choices[0].message.content in the answer") from None
    if not isinstance(text, str):
        raise ValueError(f"the content is a {type(text).__name__}, wanted a text")
    return text
