"""The thinking budget: no thought is longer, what we wrote is known as ours everywhere, and no death of a worker changes either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.preflight import PreflightError, check_thinking
from rl_core.config import ConfigError
from rl_core.config_files import parse_config
from rl_core.drafts import Draft, DraftFile, read_drafts
from rl_core.journal import GroupJournal, read_groups
from rl_core.metrics import group_figures
from rl_core.run_store import RunStore, StoredRun
from rl_core.seams import GroupResult
from rl_core.thinking import MAX_CLOSED, THOUGHT_FULL, Thinking, thinking_tokens
from rl_core.trajectories import rollout_trajectories
from rl_core.types import CUT_OFF, Completion, Group, Rollout, SamplingParams, Turn, VersionSpan
from rollout_workers.continuing import Continuing, part_params
from rollout_workers.episode import run_episode
from rollout_workers.vllm_plugin.thought_cap import THINKING, thought_is_full
from tests.unit.test_drafts import closed_in_the_end
from tests.unit.test_episode import TASK, Letters, Session, spec

__all__ = ["closed_in_the_end"]
OPEN, CLOSE = Letters.think_ids
SEED_MODEL = Path(__file__).parents[2] / "configs" / "models" / "seed"


class ThinkingLetters(Letters):
    """What stands between < and > is a thought."""

    def parse(self, token_ids: Sequence[int], tools: Sequence[dict[str, Any]] = ()) -> Turn:
        said, inside = "", False
        for i in token_ids:
            inside = i == OPEN or (inside and i != CLOSE)
            said += chr(i) if i > 1 and not inside and i != CLOSE else ""
        return Turn(content=said)


class Dies(Exception):
    """The engine is gone."""


class Thinker:
    """An engine whose policy wants to think thoughts of the given lengths, and then says `answer`.

    What comes next depends on the turn so far alone, as with a model; so a turn is the same however often it was cut off.
    """

    def __init__(self, *thoughts: int, answer: str = "stop", version: int = 3, dies_after: int | None = None) -> None:
        self.thoughts, self.answer, self.version, self.left = thoughts, answer, version, dies_after
        self.asked: list[SamplingParams] = []
        self.requests: list[str] = []
        self.sampler: Continuing | None = None

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str) -> Completion:
        self.asked.append(params)
        self.requests.append(request_id)
        turn = list(prompt_ids)[list(prompt_ids).index(ord("?")) + 1 :]
        said: list[int] = []
        thinking, finish = params.thinking, "length"
        while len(said) < params.max_tokens:
            if self.left == 0:
                self._die(prompt_ids, said)
            self.left = None if self.left is None else self.left - 1
            said.append(self._next([*turn, *said]))
            thinking = thinking.after(said[-1:]) if thinking is not None else None
            if said[-1] == 0:
                finish = "stop"
                break
            if thinking is not None and thinking.full and len(said) < params.max_tokens:
                finish = THOUGHT_FULL
                break
        return self._completion(prompt_ids, said, finish)

    def _next(self, turn: list[int]) -> int:
        opened, ended = turn.count(OPEN), turn.count(CLOSE)
        if opened > ended:
            return ord("x") if len(turn) - 1 - last(turn, OPEN) < self.thoughts[ended] else CLOSE
        if opened < len(self.thoughts):
            return OPEN
        said = len(turn) - 1 - last(turn, CLOSE)
        return ord(self.answer[said]) if said < len(self.answer) else 0

    def _die(self, prompt_ids: Sequence[int], said: list[int]) -> None:
        """After a look at what it has said."""
        assert self.sampler is not None
        self.sampler.snapshot(self._completion(prompt_ids, said, CUT_OFF))
        raise Dies

    def _completion(self, prompt_ids: Sequence[int], said: list[int], finish: str) -> Completion:
        return Completion(
            prompt_ids=np.array(prompt_ids, np.int32), token_ids=np.array(said, np.int32),
            logprobs=np.full(len(said), -self.version, np.float32),
            spans=(VersionSpan(start=0, stop=len(said), version=self.version),), finish_reason=finish,
        )  # fmt: skip


def last(ids: list[int], marker: int) -> int:
    return max((place for place, i in enumerate(ids) if i == marker), default=-1)


async def play(engine: Thinker, budget: int | None, file: DraftFile | None = None, draft: Draft | None = None, **changes: int) -> Rollout:
    sampler = engine.sampler = Continuing(engine, file, "g", 0, draft)
    settings = replace(spec(max_total_tokens=2000, **({"max_tokens": 900} | changes)), thinking_budget=budget)
    try:
        return await run_episode(TASK, settings, sampler, Session(first="?"), ThinkingLetters(), "g-0")
    finally:
        if file is not None:
            file.flush()
            file.flush()


def text(rollout: Rollout) -> str:
    return "".join(chr(i) for i in rollout.completions[0].token_ids if i > 1)


@pytest.mark.parametrize(
    ("budget", "said", "forced"),
    [
        (None, "<xxxxx>stop", ()),
        (6, "<xxxxx>stop", ()),
        (5, "<xxxxx>stop", (6,)),  # it was full: whether the policy was about to close it cannot be known
        (2, "<xx>stop", (3,)),
        (0, "<>stop", (1,)),
    ],
)
async def test_a_thought_is_closed_at_its_budget_and_the_turn_goes_on(budget: int | None, said: str, forced: tuple[int, ...]) -> None:
    rollout = await play(Thinker(5), budget)
    (completion,) = rollout.completions
    assert (text(rollout), completion.forced, completion.finish_reason) == (said, forced, "stop")
    assert rollout.verdict.reward == 1.0
    assert rollout.thinking_tokens == min(5, 5 if budget is None else budget)
    assert (rollout.thoughts_closed, rollout.num_sampled, rollout.num_prompt) == (len(forced), len(said) + 1 - len(forced), 2 + len(forced))


async def test_thoughts_of_one_turn_share_its_budget_and_each_turn_has_its_own() -> None:
    rollout = await play(Thinker(4, 4, 4, answer="stop"), 6)
    assert text(rollout) == "<xxxx><xx><>stop"
    assert rollout.completions[0].forced == (9, 11)
    asked = Thinker(4)
    twice = await run_episode(
        TASK, replace(spec(max_turns=2), thinking_budget=3), Continuing(asked, None, "g", 0), Session(first="?"), Letters(), "g-0"
    )
    assert all(p.thinking is not None and p.thinking.budget == 3 for p in asked.asked)
    assert len(twice.completions) == 2
    first_of_each = [p for name, p in zip(asked.requests, asked.asked, strict=True) if "." not in name]
    assert [p.thinking.used for p in first_of_each if p.thinking is not None] == [0, 0]


async def test_a_policy_that_only_opens_thoughts_is_ended_as_cut_off() -> None:
    engine = Thinker(*[3] * 400)
    rollout = await play(engine, 1)
    assert text(rollout) == "<x>" + "<>" * (MAX_CLOSED - 1) + "<"
    assert (rollout.completions[0].finish_reason, rollout.thoughts_closed) == ("length", MAX_CLOSED)
    assert len(engine.asked) == MAX_CLOSED + 1


async def test_a_forced_marker_counts_for_the_turns_tokens_and_may_be_its_last() -> None:
    engine = Thinker(9)
    rollout = await play(engine, 3, max_tokens=8)
    assert text(rollout) == "<xxx>sto"
    assert [p.max_tokens for p in engine.asked] == [8, 3]
    assert (await play(Thinker(9), 3, max_tokens=5)).completions[0].finish_reason == "length"
    full = (await play(Thinker(9), 3, max_tokens=4)).completions[0]
    assert (full.finish_reason, full.forced) == ("length", ()), "no token is left to close it with"


def test_fixed_dice_are_not_thrown_again_behind_a_closed_thought() -> None:
    params = SamplingParams(max_tokens=10, seed=2**31 - 1)
    assert part_params(params, [], 0).seed == params.seed
    assert len({part_params(params, [1], number).seed for number in range(20)}) == 20
    assert part_params(SamplingParams(max_tokens=10), [1], 3).seed is None


async def test_what_we_wrote_is_context_for_the_loss_and_never_trained() -> None:
    rollout = await play(Thinker(9), 2)
    (trajectory,) = rollout_trajectories(rollout, 1.0)
    prompt = len(rollout.completions[0].prompt_ids)
    said = trajectory.loss_mask[prompt:]
    assert "".join(chr(i) for i in trajectory.token_ids[prompt:]) == "<xx>stop\0"
    assert said.tolist() == [True, True, True, False, True, True, True, True, True]
    assert trajectory.logprobs[prompt:].tolist() == [-3.0 * s for s in said]
    assert trajectory.versions[prompt:].tolist() == [3 if s else -1 for s in said]


thoughts = st.lists(st.integers(0, 40), max_size=3)


@settings(max_examples=60)
@given(wanted=thoughts, budget=st.integers(0, 50), tokens=st.integers(1, 140), deaths=st.lists(st.integers(0, 60), max_size=4))
async def test_a_turn_is_the_same_however_often_its_worker_dies(
    wanted: list[int], budget: int, tokens: int, deaths: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("drafts")
    whole = await play(Thinker(*wanted), budget, max_tokens=tokens)
    assert len(whole.completions[0].token_ids) <= tokens
    draft: Draft | None = None
    for life, after in enumerate(deaths):
        try:
            await play(Thinker(*wanted, version=life, dies_after=after), budget, DraftFile(folder, f"w{life}"), draft, max_tokens=tokens)
        except Dies:
            draft = read_drafts(folder, ["g"]).get("g", {}).get(0)
    done = await play(Thinker(*wanted, version=9), budget, None, draft, max_tokens=tokens)
    one, other = whole.completions[0], done.completions[0]
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert (one.forced, one.finish_reason) == (other.forced, other.finish_reason)
    assert (done.verdict, done.thinking_tokens, done.thoughts_closed) == (whole.verdict, whole.thinking_tokens, whole.thoughts_closed)
    assert thinking_tokens(other.token_ids.tolist(), OPEN, CLOSE) <= budget
    told = other.logprobs[other.sampled]
    assert told.tolist() == [-float(v) for v in other.versions[other.sampled]], "each token has the logprob of the engine that sampled it"


@given(ids=st.lists(st.sampled_from([OPEN, CLOSE, 5, 6])), cut=st.integers(0, 50), budget=st.integers(0, 5))
def test_counting_in_parts_is_counting_at_once(ids: list[int], cut: int, budget: int) -> None:
    start = Thinking(budget=budget, open_id=OPEN, close_id=CLOSE)
    assert start.after(ids[:cut]).after(ids[cut:]) == start.after(ids)


@given(ids=st.lists(st.sampled_from([OPEN, CLOSE, 5]), min_size=1, max_size=40), budget=st.integers(0, 6))
def test_the_scheduler_sees_a_full_thought_at_its_very_token(ids: list[int], budget: int) -> None:
    """Token by token, as it appends them; a request without a cap is left alone."""
    start = Thinking(budget=budget, open_id=OPEN, close_id=CLOSE)
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={THINKING: asdict(start)}), output_token_ids=[])
    plain = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None), output_token_ids=[OPEN, 5, 5])
    for place, token in enumerate(ids, 1):
        request.output_token_ids.append(token)
        assert thought_is_full(request) == start.after(ids[:place]).full
    assert not thought_is_full(plain)


async def test_journal_store_and_metrics_tell_what_was_forced(tmp_path: Path) -> None:
    rollout = await play(Thinker(9), 2)
    group = Group(id="g", task=TASK, rollouts=(rollout,))
    GroupJournal(tmp_path / "journal").append(group)
    (again,) = read_groups(tmp_path / "journal", ["g"])["g"].rollouts
    assert again.completions[0].forced == rollout.completions[0].forced == (3,)
    assert (again.thinking_tokens, again.thoughts_closed) == (2, 1)
    store = RunStore(tmp_path, keep_tokens=True)
    store.add_groups([group], "train")
    store.close()
    (row,) = StoredRun(tmp_path).sql("SELECT num_thinking_tokens, thoughts_closed, num_sampled_tokens, token_ids, forced FROM rollouts")
    assert (row["num_thinking_tokens"], row["thoughts_closed"], row["num_sampled_tokens"]) == (2, 1, 8)
    assert row["token_ids"][0][row["forced"][0][0]] == CLOSE
    figures = group_figures([GroupResult.of(group, 1.0)], 1.0)
    assert (figures["thinking_tokens"], figures["thoughts_closed"]) == (2.0, 1.0)


def test_a_completion_cannot_be_forced_where_it_has_no_token() -> None:
    with pytest.raises(ValueError, match="forced tokens at"):
        Completion(
            prompt_ids=np.zeros(1, np.int32), token_ids=np.zeros(1, np.int32), logprobs=np.zeros(1, np.float32),
            spans=(VersionSpan(start=0, stop=1, version=0),), finish_reason="stop", forced=(1,),
        )  # fmt: skip


def test_a_budget_is_refused_below_zero_and_where_the_tokenizer_has_no_markers(tmp_path: Path) -> None:
    model = {"path": str(SEED_MODEL)}
    with pytest.raises(ConfigError, match=r"environments\.math\.thinking_budget is -1, wanted 0 or more"):
        parse_config({"model": model, "environments": {"math": {"thinking_budget": -1}}})
    config = parse_config({"model": model, "environments": {"math": {"thinking_budget": 0}}})
    check_thinking(config)
    plain = (SEED_MODEL / "tokenizer.json").read_text().replace('"</think>"', '"</thunk>"')
    (tmp_path / "tokenizer.json").write_text(plain)
    config.model.path = str(tmp_path)
    with pytest.raises(PreflightError, match=r"environments\.math\.thinking_budget is 0, but the tokenizer of .* has no tokens <think>"):
        check_thinking(config)
