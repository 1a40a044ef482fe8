"""What a real vLLM engine with MTP on a random hybrid model samples, and what it says about it.

One engine serves the whole module.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from transformers import NemotronHForCausalLM

from reward_models.chat_models import EngineChat
from reward_models.judges import Asking, Judge
from reward_models.learned import Answer, Failure
from rl_core.thinking import MAX_CLOSED
from rl_core.types import Completion, Message, SamplingParams, Turn
from rollout_workers.continuing import Continuing
from rollout_workers.engine import EngineError, engine_arguments
from rollout_workers.vllm_plugin.parcels import HOLD_S
from tests.integration.served import (
    BUDGET,
    DRAFTS,
    ROLLOUT,
    STOP,
    VOCAB,
    Served,
    distribution,
    errors,
    of_sampled,
    prompts,
    reference,
    serving,
)
from tests.integration.ties import mean_of, worst

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("tiny")) as made:
        yield made


def test_an_exported_checkpoint_is_served_with_its_mtp_head(served: Served) -> None:
    original = NemotronHForCausalLM.from_pretrained(served.model.parent / "original", dtype=torch.float32).eval()
    done = served.sample(prompts(4, seed=11), "exported")
    assert sum(c.drafted for c in done) > 0
    assert worst(errors(original, c) for c in done) < 1e-3


def test_tokens_leave_the_engine_a_few_times_a_second(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    processor, arrived = served.engine._llm.output_processor, list[int]()
    stock = processor.process_outputs

    def counting(outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        arrived.append(sum(len(one.new_token_ids) for one in outputs))
        return stock(outputs, *args, **kwargs)

    monkeypatch.setattr(processor, "process_outputs", counting)
    began = time.monotonic()
    done = served.sample(prompts(4, seed=3), "parcels", max_tokens=200)
    seconds = time.monotonic() - began
    assert sum(arrived) == sum(len(c.token_ids) for c in done)
    assert sum(tokens > 0 for tokens in arrived) <= seconds / HOLD_S + 1 + len(done), "one more for each sequence that ended"


def test_an_engine_of_one_process_listens_to_one_group(served: Served) -> None:
    names = [Path(f"/proc/{served.engine._processes[0].pid}/task/{t.id}/comm") for t in served.engine._processes[0].threads()]
    assert [path.read_text().strip() for path in names].count("gloo_tcp_loop") == 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8)])
def test_logprobs_under_speculation_are_those_of_a_plain_forward_pass(served: Served, temperature: float, top_p: float) -> None:
    done = served.sample(prompts(12), f"t{temperature}p{top_p}", temperature=temperature, top_p=top_p)
    assert sum(c.accepted for c in done) > 0, "no draft was accepted: nothing about speculation was tested"
    assert any(c.accepted < c.drafted for c in done), "no draft was rejected: no roll-back was tested"
    model = reference(served)
    differences = []
    for c in done:
        truth = distribution(model, c, temperature)
        if top_p < 1.0:
            truth = nucleus(truth, top_p)
        differences.append(of_sampled(truth, c) - c.logprobs)
    assert mean_of(differences) < 1e-4
    assert worst(differences) < 1e-2


def nucleus(logprobs: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Renormalised over the smallest set of tokens that holds `top_p`."""
    order = np.argsort(-logprobs, axis=1)
    p = np.exp(np.take_along_axis(logprobs, order, 1))
    kept = np.where(np.cumsum(p, 1) - p < top_p, p, 0.0)
    out = np.full_like(logprobs, -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.put_along_axis(out, order, np.log(kept / kept.sum(1, keepdims=True)), 1)
    return out


def test_tokens_under_speculation_are_drawn_from_the_policys_distribution(served: Served) -> None:
    """With p the policy's distribution at each place, log p(token) minus its expectation adds up to noise of a known size.

    A wrong temperature leaves every reported logprob right and fails this by tens of standard deviations.
    """
    model, temperature = reference(served), 0.8
    surplus, variance = 0.0, 0.0
    for c in served.sample(prompts(64, seed=5), "drawn", temperature=temperature):
        truth = distribution(model, c, temperature)
        p = np.exp(truth)
        mean = (p * truth).sum(1)
        surplus += float(np.nansum(of_sampled(truth, c) - mean))
        variance += float(np.nansum((p * truth**2).sum(1) - mean**2))
    assert variance > 100, "the distributions are nearly uniform: the test could not fail"
    assert abs(surplus) < 5 * variance**0.5


def test_steps_drafts_and_acceptances_add_up_to_the_tokens(served: Served) -> None:
    for c in served.sample(prompts(12, seed=1), "sums"):
        assert c.drafted <= DRAFTS * c.engine_steps
        assert 0 <= c.accepted <= c.drafted
        behind_the_end = DRAFTS  # accepted drafts behind the stop token, or beyond max_tokens, are cut off
        assert c.engine_steps + c.accepted - behind_the_end <= len(c.token_ids) <= c.engine_steps + c.accepted


def test_a_completion_ends_with_the_stop_token_or_at_its_length(served: Served) -> None:
    done = served.sample(prompts(32, seed=2), "ends", max_tokens=60)
    assert {c.finish_reason for c in done} == {"stop", "length"}
    for c in done:
        if c.finish_reason == "stop":
            assert c.token_ids[-1] == STOP
            assert STOP not in c.token_ids[:-1]
        else:
            assert len(c.token_ids) == 60
            assert STOP not in c.token_ids


def test_greedy_tokens_are_the_policys_most_likely_ones(served: Served) -> None:
    model = reference(served)
    for c in served.sample(prompts(6, seed=3), "greedy", temperature=0.0, max_tokens=40):
        truth = distribution(model, c, 1.0)
        assert worst([truth.max(1) - of_sampled(truth, c)]) < 1e-3


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(served: Served) -> None:
    prompt = prompts(1, seed=4)
    first = served.sample(prompt, "s1", seed=11)[0]
    again = served.sample(prompt, "s2", seed=11)[0]
    other = served.sample(prompt, "s3", seed=12)[0]
    assert first.token_ids.tolist() == again.token_ids.tolist()
    assert first.token_ids.tolist() != other.token_ids.tolist()


def test_a_seed_gives_the_same_tokens_whoever_runs_beside_it(served: Served) -> None:
    """Its first token has no drafts: alone it is drawn by vLLM's plain sampler, beside others by ours."""
    (prompt,), others = prompts(1, seed=4), prompts(8, seed=13)
    seeded = SamplingParams(max_tokens=40, seed=11)

    async def beside() -> Completion:
        work = [
            asyncio.create_task(served.engine.sample(p, SamplingParams(max_tokens=400), request_id=f"beside-{i}"))
            for i, p in enumerate(others)
        ]
        await served.engine.sample(others[0], SamplingParams(max_tokens=8), request_id="begun")  # by then all draft
        done = await served.engine.sample(prompt, seeded, request_id="seeded")
        assert any(not w.done() for w in work), "they ended before"
        for w in work:
            w.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        return done

    alone = served.run(served.engine.sample(prompt, seeded, request_id="alone"))
    assert served.run(beside()).token_ids.tolist() == alone.token_ids.tolist()


def test_logprobs_stay_true_up_to_the_longest_sequence(served: Served) -> None:
    """Upstream once gave wrong ones near the length limit with MTP (vllm#38711)."""
    limit = ROLLOUT.max_model_len
    done = [c for c in served.sample(prompts(16, seed=6, low=limit - 45, high=limit - 5), "limit") if c.finish_reason == "length"]
    assert done
    model = reference(served)
    for c in done:
        assert len(c.prompt_ids) + len(c.token_ids) == limit
    assert worst(errors(model, c) for c in done) < 1e-3


def test_a_prompt_without_room_to_answer_is_refused_in_a_sentence(served: Served) -> None:
    with pytest.raises(ValueError, match=r"512 tokens leaves no room to answer: rollout.max_model_len is 512"):
        served.sample([[5] * 512], "long")


def think(served: Served, asked: Sequence[Sequence[int]], name: str, max_tokens: int) -> list[Completion]:
    """Turns with a thinking budget, sampled as a rollout worker does."""

    async def together() -> list[Completion]:
        params = SamplingParams(max_tokens=max_tokens, thinking=BUDGET)
        samplers = [Continuing(served.engine, None, name, i) for i in range(len(asked))]
        return await asyncio.gather(
            *(s.sample(p, params, request_id=f"{name}-{i}") for i, (s, p) in enumerate(zip(samplers, asked, strict=True)))
        )

    return served.run(together())


def test_a_thought_ends_at_its_budget_under_speculation_and_every_logprob_stays_true(served: Served) -> None:
    model, asked = reference(served), prompts(16, seed=21)
    done = think(served, asked, "thinks", 80)
    assert sum(c.accepted for c in done) > 0
    assert sum(bool(c.forced) and len(c.token_ids) > 30 for c in done) > 4, "hardly a turn went on behind a closed thought"
    for c, prompt in zip(done, asked, strict=True):
        thinking = BUDGET
        for place, token in enumerate(c.token_ids.tolist()):
            assert (place in c.forced) == thinking.full, "closed where it is full, and nowhere else"
            assert not thinking.full or token == BUDGET.close_id
            thinking = thinking.after([token])
        assert c.prompt_ids.tolist() == prompt
        assert len(c.token_ids) == 80 or c.token_ids[-1] == STOP or len(c.forced) == MAX_CLOSED
    assert worst(errors(model, c) for c in done) < 1e-3


def test_cancelling_a_sample_frees_its_place(served: Served) -> None:
    async def cancel_all() -> list[Completion]:
        params = SamplingParams(max_tokens=400)
        hogs = [asyncio.create_task(served.engine.sample([5, 6], params, request_id=f"hog-{i}")) for i in range(3 * ROLLOUT.max_num_seqs)]
        await asyncio.sleep(0.3)
        for hog in hogs:
            hog.cancel()
        await asyncio.gather(*hogs, return_exceptions=True)
        assert not served.engine._llm.output_processor.request_states, "cancelled requests are still there"
        short = SamplingParams(max_tokens=5)
        work = [served.engine.sample([7, 8], short, request_id=f"free-{i}") for i in range(ROLLOUT.max_num_seqs)]
        return await asyncio.gather(*work)

    assert len(served.run(cancel_all())) == ROLLOUT.max_num_seqs


def test_a_long_sequence_does_not_hold_up_those_that_come_after_it(served: Served) -> None:
    ended: list[str] = []

    async def one(name: str, tokens: int) -> None:
        await served.engine.sample([5, 6], SamplingParams(max_tokens=tokens), request_id=name)
        ended.append(name)

    async def together() -> None:
        served.engine._stop_ids = []
        tail = asyncio.create_task(one("tail", 480))
        for wave in range(3):
            await asyncio.gather(*(one(f"wave-{wave}-{i}", 5) for i in range(ROLLOUT.max_num_seqs - 1)))
        await tail

    try:
        served.run(together())
    finally:
        served.engine._stop_ids = [STOP]
    assert ended.index("tail") == len(ended) - 1


def test_a_checkpoint_without_mtp_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineError, match=r"has no MTP layer to draft with.*rollout.speculative_tokens=0"):
        engine_arguments(str(tmp_path), "float32", ROLLOUT, 0)


class OwnIds:
    """A chat format over the tiny model's ids, whose text is their numbers."""

    stop_ids = (STOP,)
    think_ids = None

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        return [4 + ord(c) % (VOCAB - 4) for m in messages for c in m.content][-200:]

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        raise NotImplementedError("a judge says one thing")

    def parse(self, token_ids: Sequence[int], tools: Sequence[dict[str, Any]] = ()) -> Turn:
        return Turn(content=" ".join(map(str, token_ids)))


def test_an_engine_can_judge_and_one_that_writes_no_verdict_scores_nobody(served: Served) -> None:
    judge = Judge(asking=Asking(chat=EngineChat(served.engine, OwnIds(), name="tiny"), retries=0, max_tokens=16))
    assert served.run(judge.asking.chat.complete([Message(role="user", content="hello")], max_tokens=8, temperature=0.0))
    (score,) = served.run(judge.score([Answer(question="q", text="a")]))
    assert isinstance(score, Failure)
    assert judge.asking.asked == judge.asking.failed > 0


def test_shutdown_leaves_no_process(served: Served) -> None:
    """Last: it ends the module's engine."""
    processes = list(served.engine._processes)
    assert processes
    served.run(served.engine.aclose())
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
