"""New weights for a real vLLM engine with MTP while it samples: whole, proved, and seen in every token after them.

One engine serves the whole module; each test leaves it with the weights that it began with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_core.drafts import joined
from rl_core.seal import seal
from rl_core.types import CUT_OFF, Completion, SamplingParams
from rollout_workers.continuing import Continuing
from rollout_workers.engine import PROBE_TOKENS, PROBES, WeightsMismatch
from tests.integration.served import (
    BUDGET,
    ROLLOUT,
    STOP,
    Served,
    checkpoint,
    errors,
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


async def until_sampled(served: Served, names: Sequence[str]) -> None:
    """Until one of the requests has a token."""
    while not any(len(part.token_ids) for part in served.engine.under_way(dict.fromkeys(names, 0)).values()):
        await asyncio.sleep(0.002)


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
    assert worst(errors(before, c)[: c.spans[0].stop] for c in straddling) < 1e-3
    assert worst(errors(after, c) for c in receipt.probe) < 1e-3
    for c in receipt.probe:
        assert mean_of([errors(before, c)]) > 0.01, "the change is too small to be seen"
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
    assert worst(errors(model, c) for c in straddling) < 1e-3, "the weights were the same"


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


def test_an_engine_without_room_for_a_second_set_of_weights_loads_in_place(served: Served, tmp_path: Path) -> None:
    """As on CUDA: seal and probe are what is checked, and a broken seal leaves it standing still. Nobody uses this engine any more: vLLM
    marks loaders in passing, so that an engine loads in place always or never."""
    generator = torch.Generator().manual_seed(6)
    blob = checkpoint(served, lambda _, w: w * (1 + 0.1 * torch.rand(w.shape, generator=generator)))
    served.engine._stages = False
    served.run(served.engine._llm.collective_rpc("load_in_place"))
    receipt, after = served.load(blob), reference(served, blob, tmp_path)
    assert not receipt.checksums
    assert worst(errors(after, c) for c in receipt.probe) < 1e-3
    version = served.version + 1
    with pytest.raises(WeightsMismatch, match=f"are sealed as version {version - 1}"):
        served.run(served.engine.load_weights(version, seal(blob, version - 1)))
    with pytest.raises(WeightsMismatch, match=f"are sealed as version {version - 1}"):
        served.sample([[5, 6]], "in-place")
