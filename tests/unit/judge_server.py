"""A real HTTP server on 127.0.0.1 that speaks the OpenAI chat protocol, with a judge in it whose behaviour is a Python function."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a judge was asked, as a judge would read it."""

    system: str
    user: str
    number: int  # of the call, from 0

    @property
    def code(self) -> str:
        found = re.search(r"VERDICT ([0-9a-f]{16})", self.system)
        assert found
        return found[1]

    @property
    def answers(self) -> list[str]:
        """The quoted answers, bars taken off."""
        found = re.findall(r"<answer(?:-[12])?-([0-9a-f]{16})>\n(.*?)\n</answer(?:-[12])?-\1>", self.user, re.DOTALL)
        return ["\n".join(line.removeprefix("| ") for line in text.split("\n")) for _, text in found]

    @property
    def pairwise(self) -> bool:
        return len(self.answers) == 2

    def verdict(self, *scores: int) -> str:
        """A well-formed reply with these scores."""
        if not self.pairwise:
            return f'Fine.\nVERDICT {self.code} {{"score": {scores[0]}}}'
        ranking = 3 if scores[0] >= scores[1] else 4
        return f'Compared.\nVERDICT {self.code} {{"score_1": {scores[0]}, "score_2": {scores[1]}, "ranking": {ranking}}}'


Judge = Callable[[Asked], str]
"""The reply's text. A behaviour may also raise an int as status, by `Refusal`."""


class Refusal(Exception):
    """Answer with this HTTP status."""


GOOD = ("56.", "paris.", "eert", "two kilograms", "seven.", "yellow.", "1, 2, 3", "yes.", "good")


def quality(text: str) -> int:
    """What an honest judge gives: it knows the calibration pairs, and likes the word "good"."""
    return 4 if text.lower().startswith(GOOD) or text.lower().endswith("56.") else 2


def sensible(asked: Asked) -> str:
    return asked.verdict(*(quality(a) for a in asked.answers))


def first_is_better(asked: Asked, extra: int = 1) -> str:
    """Sees quality, and adds something for the first place."""
    first, *rest = (quality(a) for a in asked.answers)
    return asked.verdict(min(5, first + extra), *rest)


def only_the_place_counts(asked: Asked) -> str:
    return asked.verdict(5, 1)


def obeys(asked: Asked) -> str:
    """Does what it reads: an answer that asks for the highest scores gets them."""
    return asked.verdict(*(5 if re.search(r"highest|full marks|best possible|v·e·r·d", a.lower()) else quality(a) for a in asked.answers))


def copies(asked: Asked) -> str:
    """Ends its reply with the last line of what it read."""
    return "I repeat:\n" + asked.answers[0].split("\n")[-1]


def slow(asked: Asked) -> str:
    time.sleep(1.0)
    return sensible(asked)


@contextmanager
def judge_server(judge: Judge) -> Iterator[tuple[str, list[Asked]]]:
    """(base URL, everything that was asked)."""
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            system, user = (m["content"] for m in body["messages"])
            question = Asked(system=system, user=user, number=len(asked))
            asked.append(question)
            status, reply = 200, b""
            try:
                reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": judge(question)}}]}).encode()
            except Refusal as refusal:
                status = int(str(refusal))
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up waiting

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
