"""A real vLLM engine with MTP on a random hybrid model: what it samples, what it says about it, and new weights in flight.

One engine serves the whole module (a start costs some twenty seconds), in a thread with an event loop of its own.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from transformers import NemotronHForCausalLM

from learner.export import export
from learner.model import PolicyModel
from reward_models.chat_models import EngineChat
from reward_models.judges import Asking, Judge
from reward_models.learned import Answer, Failure
from rl_core.config import RolloutConfig
from rl_core.drafts import joined
from rl_core.seal import seal
from rl_core.thinking import MAX_CLOSED, Thinking
from rl_core.types import CUT_OFF, Completion, Message, SamplingParams, Turn
from rollout_workers import engine as engines
from rollout_workers.continuing import Continuing
from rollout_workers.engine import PROBE_TOKENS, PROBES, Engine, EngineError, WeightsMismatch, engine_arguments
from tests.integration.tiny_hybrid import make_tiny_hybrid

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

T = TypeVar("T")
VOCAB, STOP, DRAFTS = 128, 3, 2
ROLLOUT = RolloutConfig(
    max_num_seqs=16, max_model_len=512, max_batched_tokens=1024, speculative_tokens=DRAFTS, auto_k=False, kv_cache_gib=0.25
)


class Served:
    """The engine, its checkpoint, and a way to await it from a test."""

    def __init__(self, model: Path) -> None:
        self.model, self.version = model, 0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.engine = self.run(Engine.start(name="w0", model_path=str(model), dtype="float32", rollout=ROLLOUT, stop_ids=[STOP]))

    def run(self, work: Awaitable[T], seconds: float = 300.0) -> T:
        async def awaited() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(seconds)

    def sample(self, prompts: Sequence[Sequence[int]], name: str, **params: Any) -> list[Completion]:
        async def together() -> list[Completion]:
            asked = SamplingParams(**({"max_tokens": 100} | params))
            return await asyncio.gather(*(self.engine.sample(p, asked, request_id=f"{name}-{i}") for i, p in enumerate(prompts)))

        return self.run(together())

    def load(self, blob: NDArray[np.uint8]) -> Any:
        self.version += 1
        return self.run(self.engine.load_weights(self.version, seal(blob, self.version)))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # Matrices three times their usual size: distributions are far from uniform, so that a wrong one shows.
    folder = tmp_path_factory.mktemp("tiny")
    PolicyModel.from_pretrained(make_tiny_hybrid(folder / "original", vocab_size=VOCAB, scale=3.0)).save_pretrained(folder / "checkpoint")
    export(folder / "checkpoint", folder / "export")
    with pytest.MonkeyPatch.context() as patch:
        extension = {"worker_extension_cls": "tests.integration.corruption.Corrupting"}
        patch.setattr(engines, "engine_arguments", lambda *given: engine_arguments(*given) | extension)
        made = Served(folder / "export")
    yield made
    made.run(made.engine.aclose())
    made.loop.call_soon_threadsafe(made.loop.stop)


async def until_sampled(served: Served, names: Sequence[str]) -> None:
    """Until one of the requests has a token."""
    while not any(len(part.token_ids) for part in served.engine.under_way(dict.fromkeys(names, 0)).values()):
        await asyncio.sleep(0.002)


def prompts(count: int, *, seed: int = 0, low: int = 2, high: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCAB, rng.integers(low, high)).tolist() for _ in range(count)]


def distribution(model: NemotronHForCausalLM, c: Completion, temperature: float) -> NDArray[np.float64]:
    """[T, V] logprobs at each sampled token, by a plain forward pass of Transformers."""
    ids = torch.from_numpy(np.concatenate([c.prompt_ids, c.token_ids])).long()[None]
    with torch.no_grad():
        logits = model(ids).logits[0, len(c.prompt_ids) - 1 : -1].double() / temperature
    return torch.log_softmax(logits, -1).numpy()


def of_sampled(logprobs: NDArray[np.float64], c: Completion) -> NDArray[np.float64]:
    return logprobs[np.arange(len(c.token_ids)), c.token_ids]


def checkpoint(served: Served, change: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, w: w) -> NDArray[np.uint8]:
    """The checkpoint's bytes with changed tensors."""
    weights = {name: change(name, w).contiguous() for name, w in load_file(served.model / "model.safetensors").items()}
    return np.frombuffer(save(weights), np.uint8)


def reference(served: Served, blob: NDArray[np.uint8] | None = None, folder: Path | None = None) -> NemotronHForCausalLM:
    path = served.model
    if blob is not None:
        assert folder is not None
        (folder / "config.json").write_bytes((served.model / "config.json").read_bytes())
        (folder / "model.safetensors").write_bytes(blob.tobytes())
        path = folder
    return NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_an_exported_checkpoint_is_served_with_its_mtp_head(served: Served) -> None:
    original = NemotronHForCausalLM.from_pretrained(served.model.parent / "original", dtype=torch.float32).eval()
    done = served.sample(prompts(4, seed=11), "exported")
    assert sum(c.drafted for c in done) > 0
    for c in done:
        assert np.abs(of_sampled(distribution(original, c, 1.0), c) - c.logprobs).max() < 1e-3


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
        differences.append(np.abs(of_sampled(truth, c) - c.logprobs))
    assert np.concatenate(differences).mean() < 1e-4
    assert np.concatenate(differences).max() < 1e-2


def nucleus(logprobs: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Renormalised over the smallest set of tokens that holds `top_p`."""
    order = np.argsort(-logprobs, axis=1)
    p = np.exp(np.take_along_axis(logprobs, order, 1))
    kept = np.where(np.cumsum(p, 1) - p < top_p, p, 0.0)
    out = np.full_like(logprobs, -np.inf)
    with np.errstate(divide="ignore"):
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
        surplus += float((of_sampled(truth, c) - mean).sum())
        variance += float(((p * truth**2).sum(1) - mean**2).sum())
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
        assert np.all(truth.max(1) - of_sampled(truth, c) < 1e-3)


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
        assert np.abs(of_sampled(distribution(model, c, 1.0), c) - c.logprobs).max() < 1e-3


def test_a_prompt_without_room_to_answer_is_refused_in_a_sentence(served: Served) -> None:
    with pytest.raises(ValueError, match=r"512 tokens leaves no room to answer: rollout.max_model_len is 512"):
        served.sample([[5] * 512], "long")


def test_reloading_unchanged_weights_keeps_greedy_output_and_the_probe_is_all_new(served: Served) -> None:
    """Upstream once changed greedy output of this very architecture (vllm#48284).

    One prompt at a time: which prompts share a batch depends on when they arrive, and the last bits depend on the batch.
    """

    def one_by_one(name: str) -> list[Completion]:
        return [served.sample([p], f"{name}-{i}", temperature=0.0, max_tokens=60)[0] for i, p in enumerate(prompts(4, seed=7))]

    before = one_by_one("before")
    receipt = served.load(checkpoint(served))
    after = one_by_one("after")
    assert [c.token_ids.tolist() for c in before] == [c.token_ids.tolist() for c in after]
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old.logprobs, new.logprobs)
    assert (receipt.worker, receipt.version, len(receipt.probe)) == ("w0", served.version, PROBES)
    assert receipt.pause_s > 0
    for c in receipt.probe:
        assert len(c.token_ids) == PROBE_TOKENS
        assert c.drafted > 0, "the probe must be sampled with speculation on"
        assert {s.version for s in c.spans} == {served.version}


HARMS = {
    # what is done to the engine: what the sentence must name
    "parameter": "policy model.norm_f.weight holds",
    "decay rate": "policy model.layers.0.mixer.A holds",
    "conv view": "policy model.layers.2.mixer.conv_weights holds",
    "packed": "policy model.layers.0.mixer.in_proj.cpu_linear is not the one",
    "constant": "policy model.layers.3.mixer.attn._k_scale holds",
    "stale draft": "draft model.layers.0",
    "loader": "policy model.layers.3.mixer.qkv_proj.weight holds",
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_tensor_that_is_not_what_was_published_stops_the_update_by_name(served: Served, harm: str) -> None:
    """Found while it is staged ("loader"), the engine goes on with what it has; found when it is live, it samples no token more."""
    generator, name = torch.Generator().manual_seed(5), f"harmed-{harm}"
    blob, old = checkpoint(served, lambda _, w: w * (1 + 0.01 * torch.rand(w.shape, generator=generator))), served.version
    sentence = f"^worker w0 does not hold version {old + 1}: {HARMS[harm]}"

    async def load_amid_sampling() -> asyncio.Task[Completion]:
        work = asyncio.create_task(served.engine.sample([5, 6], SamplingParams(max_tokens=400), request_id=name))
        while not served.engine.under_way({name: 0}):
            await asyncio.sleep(0.002)
        with pytest.raises(WeightsMismatch, match=sentence):
            await served.engine.load_weights(old + 1, seal(blob, old + 1))
        await asyncio.wait([work])
        return work

    served.engine._stop_ids = []
    served.run(served.engine._llm.collective_rpc("corrupt", args=(harm,)))
    try:
        work = served.run(load_amid_sampling())
        if harm == "loader":
            assert [(s.version, s.stop) for s in work.result().spans] == [(old, 400)]
        else:
            for unserved in (work.result, lambda: served.sample([[5, 6]], "refused")):
                with pytest.raises(WeightsMismatch, match=sentence):
                    unserved()
    finally:
        served.engine._stop_ids = [STOP]
        served.run(served.engine._llm.collective_rpc("corrupt", args=("",)))
    receipt = served.load(checkpoint(served))
    (names,) = served.run(served.engine._llm.collective_rpc("tensor_names"))
    missing = set(names) - receipt.checksums.keys()
    assert not missing
    assert {s.version for c in served.sample([[5, 6]], "mended") for s in c.spans} == {served.version}


def test_bytes_that_changed_on_the_way_stop_the_update_by_name(served: Served) -> None:
    version = served.version + 1
    blob = seal(checkpoint(served), version)
    blob[-1] ^= 1
    with pytest.raises(WeightsMismatch, match=rf"worker w0 does not hold version {version}: tensor [\w.]+ arrived with checksum"):
        served.run(served.engine.load_weights(version, blob))
    with pytest.raises(WeightsMismatch, match="carry no checksums"):
        served.run(served.engine.load_weights(version, checkpoint(served)))
    with pytest.raises(WeightsMismatch, match=f"are sealed as version {version - 1}"):
        served.run(served.engine.load_weights(version, seal(checkpoint(served), version - 1)))
    assert {s.version for c in served.sample([[5, 6]], "unchanged") for s in c.spans} == {version - 1}


def test_only_the_thread_that_samples_multiplies(served: Served) -> None:
    """vLLM's CPU kernels share their scratch memory: what a second thread multiplies meanwhile spoils samples, without an error."""
    served.run(served.engine._llm.collective_rpc("kernel_threads"))
    served.load(checkpoint(served))
    assert served.run(served.engine._llm.collective_rpc("kernel_threads")) == [["MainThread"]]


def test_an_update_leaves_no_second_set_of_weights_behind(served: Served) -> None:
    """Without the collector of circles, which may come minutes later."""

    def tensors(collect: bool = False) -> int:
        return served.run(served.engine._llm.collective_rpc("tensors", args=(collect,)))[0]

    tensors()
    try:
        served.load(checkpoint(served))
        until = time.monotonic() + 60
        before = tensors()
        for _ in range(3):
            served.load(checkpoint(served))
        while (left := tensors() - before) > 20 and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        tensors(collect=True)
    assert left <= 20, "a set of weights of this model is some hundred tensors"


def test_sequences_in_flight_are_restarted_from_their_prompt_where_so_configured(served: Served) -> None:
    blob, old = checkpoint(served), served.version
    served.version += 1

    async def load_amid_sampling() -> list[Completion]:
        names = [f"again-{i}" for i in range(len(asked))]
        params = SamplingParams(max_tokens=400)
        work = [asyncio.create_task(served.engine.sample(p, params, request_id=n)) for n, p in zip(names, asked, strict=True)]
        await until_sampled(served, names)
        await served.engine.load_weights(old + 1, seal(blob, old + 1))
        return await asyncio.gather(*work)

    asked = prompts(12, seed=8, high=30)
    served.engine._stop_ids, served.engine._rollout = [], replace(ROLLOUT, in_flight="restart")
    try:
        done = served.run(load_amid_sampling())
    finally:
        served.engine._stop_ids, served.engine._rollout = [STOP], ROLLOUT
    assert {s.version for c in done for s in c.spans} == {old + 1}
    assert [c.prompt_ids.tolist() for c in done] == asked
    assert all(len(c.token_ids) == 400 for c in done)
    assert all(c.state_age_max == 0 for c in done)


def test_new_weights_arrive_in_flight_whole_and_the_sequences_go_on(served: Served, tmp_path: Path) -> None:
    """Every tensor is changed, one by one (a layerwise reload once lost `mixer.D`: prime-rl#2714)."""
    generator = torch.Generator().manual_seed(3)

    def shake(_: str, w: torch.Tensor) -> torch.Tensor:
        return w * (1 + 0.2 * torch.rand(w.shape, generator=generator))

    old, blob = served.version, checkpoint(served, shake)

    async def load_amid_sampling() -> tuple[list[Completion], Any]:
        params = SamplingParams(max_tokens=400)
        asked = prompts(12, seed=8, high=30)
        served.engine._stop_ids = []  # so that they run long enough
        running = [asyncio.create_task(served.engine.sample(p, params, request_id=f"flight-{i}")) for i, p in enumerate(asked)]
        await until_sampled(served, [f"flight-{i}" for i in range(len(asked))])
        receipt = await served.engine.load_weights(old + 1, seal(blob, old + 1))
        return await asyncio.gather(*running), receipt

    try:
        done, receipt = served.run(load_amid_sampling())
    finally:
        served.engine._stop_ids = [STOP]
    served.version = old + 1
    straddling = [c for c in done if len(c.spans) == 2]
    assert straddling, "every sequence ended before the update: nothing was tested"
    before, after = reference(served), reference(served, blob, tmp_path)
    for c in straddling:
        assert [s.version for s in c.spans] == [old, old + 1]
        assert c.spans[0].start == 0
        assert c.spans[0].stop == c.spans[1].start
        assert c.spans[1].stop == len(c.token_ids) == 400
        assert c.state_age_max == 1, "state of the old weights is behind the tokens of the new ones"
        assert c.state_age_sum == c.spans[1].stop - c.spans[1].start
        first = slice(0, c.spans[0].stop)
        assert np.abs(of_sampled(distribution(before, c, 1.0), c) - c.logprobs)[first].max() < 1e-3
    for c in receipt.probe:
        assert np.abs(of_sampled(distribution(after, c, 1.0), c) - c.logprobs).max() < 1e-3
        assert np.abs(of_sampled(distribution(before, c, 1.0), c) - c.logprobs).mean() > 0.01, "the change is too small to be seen"
    served.load(checkpoint(served))


def test_what_is_shown_of_sequences_under_way_is_how_they_end(served: Served) -> None:
    """Looked at while they are sampled, and while an update comes in between: ids, logprobs and versions, piece by piece."""
    names, blob = [f"way-{i}" for i in range(8)], checkpoint(served)
    seen = dict.fromkeys(names, 0)
    shown: dict[str, list[Completion]] = {name: [] for name in names}
    served.version += 1

    async def watched() -> list[Completion]:
        asked = SamplingParams(max_tokens=200)
        work = [asyncio.create_task(served.engine.sample(p, asked, request_id=n)) for n, p in zip(names, prompts(8, seed=9), strict=True)]
        update = asyncio.create_task(served.engine.load_weights(served.version, seal(blob, served.version)))
        while not all(w.done() for w in work):
            await asyncio.sleep(0.002)
            for name, part in served.engine.under_way(seen).items():
                seen[name] += len(part.token_ids)
                shown[name] += [part] if len(part.token_ids) else []
        await update
        return await asyncio.gather(*work)

    done = served.run(watched())
    assert served.engine.under_way(dict.fromkeys(names, 0)) == {}
    assert max(map(len, shown.values())) > 3, "no sequence was looked at several times"
    for end, parts in zip(done, shown.values(), strict=True):
        if parts:
            whole = reduce(joined, parts)
            count = len(whole.token_ids)
            assert whole.finish_reason == CUT_OFF
            assert whole.prompt_ids.tolist() == end.prompt_ids.tolist()
            assert whole.token_ids.tolist() == end.token_ids[:count].tolist()
            assert whole.logprobs.tolist() == end.logprobs[:count].tolist()
            assert whole.versions.tolist() == end.versions[:count].tolist()


BUDGET = Thinking(budget=20, open_id=10, close_id=11, inside=True)
"""As if each prompt ended with an open thought; a random model would seldom open one."""


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
        assert np.abs(of_sampled(distribution(model, c, 1.0), c) - c.logprobs)[c.sampled].max() < 1e-3


def test_a_closed_thought_keeps_its_versions_across_an_update_in_flight(served: Served) -> None:
    """Loaded as soon as the first turn has gone on behind its closed thought."""
    old = served.version

    async def load_amid_thoughts() -> list[Completion]:
        params, asked = SamplingParams(max_tokens=400, thinking=BUDGET), prompts(12, seed=22, high=30)
        served.engine._stop_ids = []  # so that they run long enough
        samplers = [Continuing(served.engine, None, "across", i) for i in range(12)]
        work = [
            asyncio.create_task(s.sample(p, params, request_id=f"across-{i}")) for i, (s, p) in enumerate(zip(samplers, asked, strict=True))
        ]
        while not any("." in s.request_id.removeprefix("across-") for s in samplers):
            await asyncio.sleep(0.002)
        await served.engine.load_weights(old + 1, seal(checkpoint(served), old + 1))
        return await asyncio.gather(*work)

    try:
        done = served.run(load_amid_thoughts())
    finally:
        served.engine._stop_ids = [STOP]
    served.version = old + 1
    model = reference(served)
    straddling = [c for c in done if len(c.spans) == 2]
    assert any(c.forced and c.forced[0] < c.spans[0].stop for c in straddling), "no thought was closed before the update"
    for c in straddling:
        assert [s.version for s in c.spans] == [old, old + 1]
        assert c.spans[0].stop == c.spans[1].start
        assert np.abs(of_sampled(distribution(model, c, 1.0), c) - c.logprobs)[c.sampled].max() < 1e-3, "the weights were the same"


def test_new_draft_weights_arrive_too(served: Served) -> None:
    """With its output silenced the draft cannot guess; with its own weights back it guesses as before."""

    def silent(name: str, w: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(w) if name == "mtp.layers.1.final_layernorm.weight" else w

    asked = prompts(12, seed=9)

    def share(name: str) -> float:
        done = served.sample(asked, name, temperature=0.0)
        return sum(c.accepted for c in done) / sum(c.drafted for c in done)

    usual = share("usual")
    served.load(checkpoint(served, silent))
    silenced = share("silenced")
    served.load(checkpoint(served))
    assert share("again") == usual
    assert silenced != usual


def test_the_proof_of_an_update_waits_behind_no_sequence(served: Served) -> None:
    """The engine is full and more wait inside it. All are long: the probes must be through before any of them ends."""
    ended: list[float] = []

    async def load_amid_a_queue() -> float:
        async def long(number: int) -> Completion:
            done = await served.engine.sample([5, 6], SamplingParams(max_tokens=400), request_id=f"queued-{number}")
            ended.append(asyncio.get_running_loop().time())
            return done

        served.engine._stop_ids = []
        running = [asyncio.create_task(long(i)) for i in range(2 * ROLLOUT.max_num_seqs)]
        await until_sampled(served, [f"queued-{i}" for i in range(ROLLOUT.max_num_seqs)])
        inside = len(served.engine._llm.output_processor.request_states)
        assert ROLLOUT.max_num_seqs < inside < 2 * ROLLOUT.max_num_seqs, "some wait in the engine, and some before it"
        await served.engine.load_weights(served.version + 1, seal(checkpoint(served), served.version + 1))
        proved = asyncio.get_running_loop().time()
        await asyncio.gather(*running)
        return proved

    try:
        proved = served.run(load_amid_a_queue())
    finally:
        served.engine._stop_ids = [STOP]
    served.version += 1
    assert len(ended) == 2 * ROLLOUT.max_num_seqs
    assert proved < min(ended)


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


def test_an_engine_without_room_for_a_second_set_of_weights_loads_in_place(served: Served, tmp_path: Path) -> None:
    """As on CUDA: seal and probe are what is checked, and a broken seal leaves it standing still. Nobody uses this engine any more: vLLM
    marks loaders in passing, so that an engine loads in place always or never."""
    generator = torch.Generator().manual_seed(6)
    blob = checkpoint(served, lambda _, w: w * (1 + 0.1 * torch.rand(w.shape, generator=generator)))
    served.engine._stages = False
    served.run(served.engine._llm.collective_rpc("load_in_place"))
    receipt, after = served.load(blob), reference(served, blob, tmp_path)
    assert not receipt.checksums
    for c in receipt.probe:
        assert np.abs(of_sampled(distribution(after, c, 1.0), c) - c.logprobs).max() < 1e-3
    version = served.version + 1
    with pytest.raises(WeightsMismatch, match=f"are sealed as version {version - 1}"):
        served.run(served.engine.load_weights(version, seal(blob, version - 1)))
    with pytest.raises(WeightsMismatch, match=f"are sealed as version {version - 1}"):
        served.sample([[5, 6]], "in-place")


def test_shutdown_leaves_no_process(served: Served) -> None:
    """Last: it ends the module's engine."""
    processes = list(served.engine._processes)
    assert processes
    served.run(served.engine.aclose())
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
