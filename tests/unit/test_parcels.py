"""Tokens leave an engine in parcels: nothing is lost, nothing changes its order, and nothing waits that somebody waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists

from rollout_workers.vllm_plugin.parcels import HOLD_S, Parcels


class Request:
    def __init__(self, kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY) -> None:
        self.sampling_params = SamplingParams(max_tokens=8, output_kind=kind)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def output(name: str, *tokens: int, end: FinishReason | None = None) -> EngineCoreOutput:
    ids = np.array(tokens, np.int32)
    lists = LogprobsLists(ids[:, None], -ids[:, None].astype(np.float32), ids, None) if tokens else None
    return EngineCoreOutput(request_id=name, new_token_ids=list(tokens), new_logprobs=lists, finish_reason=end)


def step(parcels: Parcels, requests: dict[str, Request], *outputs: EngineCoreOutput) -> list[EngineCoreOutput]:
    """What is sent after a step of one client's requests; a request that ends is the scheduler's no longer."""
    for one in outputs:
        if one.finish_reason is not None:
            requests.pop(one.request_id, None)
    sent = parcels.gather({0: EngineCoreOutputs(outputs=list(outputs))}, requests)
    return sent[0].outputs if sent else []


def check(one: EngineCoreOutput, name: str, tokens: Sequence[int]) -> None:
    assert one.request_id == name
    assert one.new_token_ids == list(tokens)
    lists = one.new_logprobs
    assert lists is not None
    assert lists.logprob_token_ids.tolist() == [[t] for t in tokens]
    assert lists.logprobs.tolist() == [[-t] for t in tokens]
    assert lists.sampled_token_ranks.tolist() == list(tokens)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_sequence_that_ends_takes_all_its_tokens_along_and_others_wait(clock: Clock) -> None:
    parcels, requests = Parcels(clock), {"a": Request(), "b": Request()}
    assert step(parcels, requests, output("a", 1), output("b", 11)) == []
    assert step(parcels, requests, output("a", 2, 3), output("b", 12)) == []
    (sent,) = step(parcels, requests, output("a", 4), output("b", 13, end=FinishReason.STOP))
    check(sent, "b", [11, 12, 13])
    assert sent.finish_reason is FinishReason.STOP
    clock.now = HOLD_S
    (sent,) = step(parcels, requests, output("a", 5))
    check(sent, "a", [1, 2, 3, 4, 5])
    assert step(parcels, requests, output("a", 6)) == []


def test_an_end_without_tokens_brings_what_was_held(clock: Clock) -> None:
    parcels, requests = Parcels(clock), {"a": Request()}
    step(parcels, requests, output("a", 1))
    (sent,) = step(parcels, requests, output("a", end=FinishReason.ERROR))
    check(sent, "a", [1])
    assert sent.finish_reason is FinishReason.ERROR


def test_who_reads_every_token_gets_every_token(clock: Clock) -> None:
    parcels, requests = Parcels(clock), {"a": Request(RequestOutputKind.DELTA), "b": Request()}
    (sent,) = step(parcels, requests, output("a", 1), output("b", 2))
    check(sent, "a", [1])


def test_an_output_that_says_more_than_tokens_does_not_wait_and_overtakes_none(clock: Clock) -> None:
    parcels, requests = Parcels(clock), {"a": Request()}
    step(parcels, requests, output("a", 1))
    more = output("a", 2)
    more.routed_experts = np.zeros((1, 1, 1), np.int32)
    (sent,) = step(parcels, requests, more)
    check(sent, "a", [1, 2])
    assert sent.routed_experts is more.routed_experts


def test_what_belongs_to_a_cancelled_request_goes(clock: Clock) -> None:
    parcels, requests = Parcels(clock), {"a": Request(), "b": Request()}
    step(parcels, requests, output("a", 1), output("b", 2))
    del requests["a"]
    clock.now = HOLD_S
    (sent,) = step(parcels, requests, output("b", 3))
    check(sent, "b", [2, 3])
    assert parcels.take(requests) == {}


def test_before_a_new_version_everything_is_taken(clock: Clock) -> None:
    parcels, requests = Parcels(clock), {"a": Request(), "b": Request()}
    step(parcels, requests, output("a", 1), output("b", 2))
    taken = parcels.take(requests)
    check(taken[0][0], "a", [1])
    check(taken[0][1], "b", [2])
    assert parcels.take(requests) == {}


def test_how_a_prompt_was_read_is_said_with_the_first_token(clock: Clock) -> None:
    parcels, requests = Parcels(clock), {"a": Request()}
    first = output("a", 1)
    first.prefill_stats = stats = PrefillStats()
    step(parcels, requests, first)
    (sent,) = step(parcels, requests, output("a", 2, end=FinishReason.LENGTH))
    assert sent.prefill_stats is stats


def test_a_step_with_other_news_is_sent_without_tokens(clock: Clock) -> None:
    parcels = Parcels(clock)
    news = EngineCoreOutputs(outputs=[output("a", 1)], finished_requests={"z"})
    assert parcels.gather({0: news}, {"a": Request()}) == {0: news}
    assert news.outputs == []


@given(st.lists(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 4), st.booleans()), max_size=4), max_size=30), st.data())
def test_every_token_arrives_once_and_in_order(steps: list[list[tuple[str, int, bool]]], data: st.DataObject) -> None:
    clock, number = Clock(), 0
    parcels, requests, life = Parcels(clock), dict[str, Request](), dict.fromkeys("abcd", 0)
    sampled: dict[str, list[int]] = {}
    arrived: dict[str, list[int]] = {}

    def arrive(outputs: Sequence[Any]) -> None:
        for one in outputs:
            arrived.setdefault(one.request_id, []).extend(one.new_token_ids)
            assert one.new_logprobs.sampled_token_ranks.tolist() == one.new_token_ids

    for planned in steps:
        outputs = []
        for name, count, ends in {p[0]: p for p in planned}.values():
            request = f"{name}{life[name]}"
            requests.setdefault(request, Request())
            tokens = range(number, number := number + count)
            sampled.setdefault(request, []).extend(tokens)
            outputs.append(output(request, *tokens, end=FinishReason.STOP if ends else None))
            life[name] += ends
        arrive(step(parcels, requests, *outputs))
        clock.now += data.draw(st.sampled_from([0.01, 0.1, 0.3]))
    arrive([one for outputs in parcels.take(requests).values() for one in outputs])
    assert arrived == sampled
