"""A real resource server of NeMo-Gym in a process of its own: sessions, tools and the verifier over HTTP."""

from __future__ import annotations

import http.server
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from environments.bridges.nemo_gym import NemoGymEnv
from environments.check import check_environment, play_oracle
from environments.host import EnvHost
from rl_core.seams import Observation
from rl_core.types import Status, Task, ToolCall, Turn
from tests.integration.nemo_server import NotHere, install, server

pytestmark = [pytest.mark.timeout(400)]

WORDS = (
    "Outperform",
    "Desolate",
    "Revealed",
    "Arid",
    "Wicked",
    "Vacant",
    "Coarse",
    "Sunrise",
    "Covered",
    "Midnight",
    "Grotesque",
    "Remote",
)


class Asking(NemoGymEnv):
    """The bridge, with an oracle for this one server: ask for each synonym's value, then hand in the list."""

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        assert self.task is not None
        row = self.task.private["row"]
        if observation.tools:
            return Turn(content="", tool_calls=tuple(value_of(word) for word in row["expected_synonyms"]))
        values = [json.loads(m.content).get("synonym_value") for m in observation.messages]
        return Turn(content="Done.") if None in values else Turn(content="", tool_calls=(hand_in(values),))


def value_of(word: str) -> ToolCall:
    return ToolCall(name="get_synonym_value", arguments={"synonym": word})


def hand_in(values: list[int]) -> ToolCall:
    return ToolCall(name="extract_synonym_values", arguments={"synonym_values": values})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows like the server's own examples, with words of ours."""
    try:
        own = (install() / "gym/resources_servers/example_multi_step/data/example.jsonl").read_text(encoding="utf-8").splitlines()
    except NotHere as reason:
        pytest.skip(str(reason))
    example, rng = json.loads(own[0]), random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for line in own:
            file.write(line + "\n")
        for number in range(300):
            words = rng.sample(WORDS, 3)
            asked = {
                "input": [{"role": "user", "content": f"{number}: values of {', '.join(words)}?"}],
                "tools": example["responses_create_params"]["tools"],
            }
            values = [sum(map(ord, word)) for word in words]
            file.write(
                json.dumps(
                    example
                    | {"id": number, "responses_create_params": asked, "expected_synonyms": words, "expected_synonym_values": values}
                )
                + "\n"
            )
    return path


@pytest.fixture(scope="module")
def url(rows: Path) -> Iterator[str]:
    with server("example_multi_step", rows.with_name("server.log")) as address:
        yield address


@pytest.fixture
def options(url: str, rows: Path) -> dict[str, Any]:
    return {"url": url, "rows": str(rows)}


def a_task(options: dict[str, Any], seed: int = 0) -> Task:
    return next(NemoGymEnv.tasks("train", seed, options))


def test_the_server_passes_the_kit_with_an_oracle_of_ours(options: dict[str, Any]) -> None:
    results = check_environment(Asking, options, num_tasks=4, second_process=False)
    assert not [str(result) for result in results if not result.ok]


def test_an_episode_of_several_tool_calls_is_scored_by_the_servers_verifier(options: dict[str, Any]) -> None:
    env, task = Asking(**options), a_task(options)
    observation = env.reset(options={"task": task})[1]["observation"]
    assert {tool["name"] for tool in observation.tools} == {"get_synonym_value", "extract_synonym_values"}
    verdict = play_oracle(env, task)
    assert verdict.reward == 1.0
    assert verdict.components["accuracy"] == verdict.components["set_overlap"] == 1.0
    env.reset(options={"task": task})
    values = task.private["row"]["expected_synonym_values"]
    env.step(Turn(content="", tool_calls=(hand_in(values[:1]),)))
    partly = env.step(Turn(content="Done."))[4]["verdict"]
    assert partly.reward == 0.0
    assert partly.components["set_overlap"] == pytest.approx(1 / len(values))
    env.close()


def test_the_policy_reaches_declared_tools_with_fitting_arguments_and_nothing_else(options: dict[str, Any]) -> None:
    env, task = NemoGymEnv(**options), a_task(options)
    env.reset(options={"task": task})
    calls = [
        ToolCall(name="verify", arguments={}),
        ToolCall(name="../verify", arguments={}),
        ToolCall(name="seed_session", arguments={}),
        ToolCall(name="extract_synonym_values", arguments={"values": [1]}),
        value_of("Arid"),
    ]
    answers = [m.content for m in env.step(Turn(content="", tool_calls=tuple(calls)))[4]["observation"].messages]
    assert all("there is no tool" in answer for answer in answers[:3])
    assert "arguments of extract_synonym_values are wrong" in answers[3]
    assert json.loads(answers[4]) == {"synonym_value": sum(map(ord, "Arid"))}
    verdict = env.step(Turn(content="Done."))[4]["verdict"]
    assert (verdict.status, verdict.reward) == (Status.OK, 0.0), "a call with wrong arguments must not make the verifier fail"
    env.close()


def test_a_server_that_is_away_is_an_infrastructure_error_and_its_failures_are_the_verifiers(rows: Path) -> None:
    class Failing(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            masked = json.dumps({"reward": 0.0, "mask_sample": True, "failure_kind": "judge_unavailable"}).encode()
            body = b"{}" if self.path == "/seed_session" else masked
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            return

    failing = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=failing.serve_forever, daemon=True).start()
    options = {"url": f"http://127.0.0.1:{failing.server_port}", "rows": str(rows), "timeout_s": 2.0}
    host, task = EnvHost(), a_task(options)
    for name in ("masked", "away"):
        host.open(name, "nemo_gym", options, task)
    masked = host.step("masked", Turn(content="x")).verdict
    failing.shutdown()
    failing.server_close()
    away = host.step("away", Turn(content="x")).verdict
    assert masked is not None
    assert away is not None
    assert (masked.status, away.status) == (Status.VERIFIER_ERROR, Status.INFRA_ERROR)
    assert "judge_unavailable" in masked.evidence["error"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"url": "localhost"}, "wanted the resource server's address"),
        ({"rows": "no.jsonl"}, "wanted a JSONL file"),
        ({"low": 1.0}, "low < high"),
    ],
)
def test_wrong_options_say_what_is_wrong(rows: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        next(NemoGymEnv.tasks("train", 0, {"url": "http://127.0.0.1:1", "rows": str(rows)} | change))
