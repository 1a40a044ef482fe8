"""An engine that chooses how many tokens it drafts: whatever it chooses, what it samples and says about it is the policy's.

Which numbers a fresh engine tries depends on how fast its machine is, so the choice goes by turns here: k changes all the time, and every
number has its turn. The model is the shipped one: the head of a random one doubts all its drafts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from vllm.sampling_params import RequestOutputKind

from environments.registry import resolve
from learner.model import PolicyModel
from rl_core.chat import ChatML
from rl_core.config import RolloutConfig
from rl_core.types import Completion, SamplingParams
from rollout_workers import engine as engines
from rollout_workers.engine import Engine
from rollout_workers.vllm_plugin.auto_k import AUTO_VARIABLE
from rollout_workers.vllm_plugin.mtp_draft import LEAST_CHANCE
from tests.integration.ties import logprob_errors, worst

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEED_MODEL = Path(__file__).parents[2] / "configs" / "models" / "seed"
MOST = 4
ROLLOUT = RolloutConfig(max_num_seqs=8, max_model_len=512, max_batched_tokens=1024, speculative_tokens=MOST, auto_k=True, kv_cache_gib=0.25)


class Sampled:
    """What one engine sampled, all in one go: vLLM is up for as long as that takes."""

    def __init__(self) -> None:
        asyncio.run(self._sample())

    async def _sample(self) -> None:
        engine = await Engine.start(name="auto", model_path=str(SEED_MODEL), dtype="float32", rollout=ROLLOUT, stop_ids=[])
        math = resolve("math")()
        tasks, chat = math.tasks("train", 3, {}), ChatML(SEED_MODEL)

        self.held: dict[int | None, Completion] = {}
        """What was sampled, one sequence at a time, while so many drafts were held."""
        self.passes: dict[str, list[int]] = {}
        """Of each of `likeliest`, by name: how many tokens there were after each pass of the policy."""
        generate = engine._llm.generate

        async def watched(prompt: Any, request: Any, name: str) -> AsyncIterator[Any]:
            """Every pass, and not only the last; the process that receives them may see two at once."""
            request.output_kind = RequestOutputKind.CUMULATIVE
            async for output in generate(prompt, request, name):
                self.passes.setdefault(name, []).append(len(output.outputs[0].token_ids))
                yield output

        async def several(name: str, count: int, **params: Any) -> list[Completion]:
            asked = SamplingParams(**({"max_tokens": 320} | params))
            shown = [math.reset(options={"task": next(tasks)})[1]["observation"] for _ in range(count)]
            prompts = [chat.prompt(one.messages, one.tools) for one in shown]
            return await asyncio.gather(*(engine.sample(p, asked, request_id=f"{name}-{i}") for i, p in enumerate(prompts)))

        names = [f"greedy-{count}-{i}" for count in (1, 4) for i in range(count)]
        try:
            self.drawn = [c for count in (1, 4, 24) for c in await several(f"drawn-{count}", count)]
            for k in (0, 3, None):
                await engine.hold_drafts(k)
                self.held[k] = (await several(f"held-{k}", 1, max_tokens=150))[0]
            engine._llm.generate = watched
            self.likeliest = [c for count in (1, 4) for c in await several(f"greedy-{count}", count, temperature=0.0, max_tokens=150)]
            self.ends = [self.passes[name] for name in names]
        finally:
            await engine.aclose()


@pytest.fixture(scope="module")
def sampled() -> Sampled:
    asked = engines.environment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "environment", lambda rollout: asked(rollout) | {AUTO_VARIABLE: "turns"})
        return Sampled()


def test_logprobs_are_the_policys_while_k_changes(sampled: Sampled) -> None:
    model = PolicyModel.from_pretrained(SEED_MODEL)
    assert worst(logprob_errors(model, c) for c in sampled.drawn) < 1e-3


def test_no_drafts_and_the_most_were_tried_and_the_counts_by_position_add_up(sampled: Sampled) -> None:
    everything = [*sampled.drawn, *sampled.likeliest]
    assert max(len(c.positions) for c in everything) == MOST
    undrafted = [c.engine_steps - (c.positions[0][0] if c.positions else 0) for c in everything]
    assert max(undrafted) > 20, "passes of a turn of 0, and those behind which the head doubted its first draft already"
    for c in everything:
        assert (sum(d for d, _ in c.positions), sum(a for _, a in c.positions)) == (c.drafted, c.accepted)
        for (drafted, accepted), (next_drafted, next_accepted) in zip(c.positions, c.positions[1:], strict=False):
            assert drafted >= next_drafted
            assert accepted >= next_accepted


def test_every_pass_is_counted_also_where_accepted_drafts_were_cut_off_at_the_end(sampled: Sampled) -> None:
    for c, lengths in zip(sampled.likeliest, sampled.ends, strict=True):
        assert c.engine_steps >= len(lengths)  # two passes may arrive as one
    cut_off = [c.engine_steps + c.accepted - len(c.token_ids) for c in [*sampled.drawn, *sampled.likeliest]]
    assert 0 <= min(cut_off) <= max(cut_off) <= MOST
    assert max(cut_off) > 0, "no draft stood behind an end: the test could not tell"
    assert sampled.held[0].engine_steps == len(sampled.held[0].token_ids)


def test_a_number_of_drafts_is_held_in_every_step_until_it_is_let_go(sampled: Sampled) -> None:
    assert sampled.held[0].drafted == 0
    three = [drafted for drafted, _ in sampled.held[3].positions]
    assert len(three) == 3
    # Also where the head doubts its drafts; the last steps are bounded by the tokens that are left.
    assert three[0] - three[2] <= 2
    assert three[0] >= sampled.held[3].engine_steps - 1
    assert len(sampled.held[None].positions) == MOST


def first_drafts(model: PolicyModel, c: Completion) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """For every place at which the engine could draft [T - 1]: whether the learner's MTP head is right there, and how sure it is."""
    ids = torch.from_numpy(np.concatenate([c.prompt_ids, c.token_ids])).long()[None]
    with torch.no_grad():
        chances = model.logits(model.mtp_hidden(model(ids), ids))[0, len(c.prompt_ids) - 1 :].softmax(-1)[: len(c.token_ids) - 1]
    chance, draft = chances.max(-1)
    return draft.numpy() == c.token_ids[1:], chance.numpy()


def test_first_drafts_are_those_of_the_learners_head(sampled: Sampled) -> None:
    """At temperature 0 no more first drafts are accepted than the head is right, and of those that it dares no smaller share.

    Which places are drafted from depends on how long the runs before them were, so the share is that of the places where a pass of the
    policy ended and where the head is sure enough. Keys and values of the head's attention that were computed while k was 0, or belong to
    rejected drafts, would show here.
    """
    model, drafted, accepted, sure = PolicyModel.from_pretrained(SEED_MODEL), 0, 0, []
    for c, ends in zip(sampled.likeliest, sampled.ends, strict=True):
        right, chance = first_drafts(model, c)
        counts = c.positions[0] if c.positions else (0, 0)
        assert counts[1] <= right.sum()
        drafted, accepted = drafted + counts[0], accepted + counts[1]
        places = np.array([end - 1 for end in ends if end < len(c.token_ids)], np.int64)
        sure += right[places[chance[places] >= LEAST_CHANCE]].tolist()
    assert drafted >= 30, "too few for the bound, which widens with fewer; how many there are is the engine's choice, by its speed"
    assert abs(accepted / drafted - np.mean(sure)) < 4 * (0.25 / drafted) ** 0.5
