"""The seed policy's parts: tokenizer, demonstrations, batches, measurement, and a training run that is short but whole."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from environments.base import Message, Observation, Status, Task, TaskDraft, TextEnv, Turn, Verdict
from environments.math import MathEnv
from environments.registry import resolve
from learner.model import PolicyModel, seed_config
from learner.seed import train as seed_train
from learner.seed.curriculum import FINAL, OPTIONS, PHASES, Phase, steps_of
from learner.seed.demonstrations import Course, demonstrations, play, texts
from learner.seed.measure import measure
from learner.seed.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, train_tokenizer
from rl_core.chat import ChatML

MATH = Course(env="math", share=1.0, working=0.5)
TOOLS = Course(env="tools", share=1.0, working=0.5, max_turns=6)


class WrongOracle(TextEnv):
    """An environment whose oracle is mistaken."""

    id: ClassVar[str] = "wrong"

    @classmethod
    def make_task(cls, rng: random.Random, options: Mapping[str, Any]) -> TaskDraft:
        return TaskDraft(public={"n": rng.randrange(10**6)})

    def begin(self, task: Task) -> Observation:
        return Observation(messages=(Message(role="user", content=str(task.public["n"])),))

    def act(self, turn: Turn) -> Verdict:
        return Verdict(status=Status.OK, reward=0.0)

    def oracle(self, observation: Observation, rng: random.Random) -> Turn:
        return Turn(content="no idea")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = [t for course in (MATH, TOOLS) for t in texts(course, resolve(course.env), count=100, seed=0)]
    return train_tokenizer(found, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatML:
    return ChatML(folder)


def test_every_digit_is_a_token_of_its_own(chat: ChatML) -> None:
    ids = chat.encode("order 4821, 4821+48=")
    pieces = [chat.decode([i]) for i in ids]
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("4821482148")


def test_the_special_tokens_come_first_and_the_vocabulary_is_within_bounds(chat: ChatML) -> None:
    assert [chat.tokenizer.token_to_id(t) for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert chat.tokenizer.get_vocab_size() <= VOCAB_SIZE


def test_the_chat_template_renders_the_ids_of_the_chat_format(folder: Path, chat: ChatML) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tools = [{"name": "refund", "parameters": {"properties": {"order": {"type": "integer"}, "why": {"type": "x"}}, "required": ["order"]}}]
    talks = (
        [{"role": "user", "content": "1+2"}],
        [{"role": "system", "content": "Add."}, {"role": "user", "content": "10+25"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    )
    for talk, offered in itertools.product(talks, ([], tools)):
        rendered = tokenizer.apply_chat_template(talk, tools=offered or None, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert ids == chat.prompt([Message(**m) for m in talk], offered)
    assert tokenizer.eos_token_id == chat.stop_ids[0]


def test_the_loss_mask_covers_exactly_what_the_oracle_said(chat: ChatML) -> None:
    task = next(MathEnv.tasks("train", 0, {}))
    env = MathEnv(oracle_working=1.0)
    shown = play(env, task, chat, random.Random(0), max_turns=1)
    turn = chat.parse(shown.token_ids[shown.loss_mask].tolist())
    assert shown.working
    assert turn == env.oracle(Observation(messages=()), random.Random(0))
    assert shown.token_ids[~shown.loss_mask].tolist() == chat.prompt([Message(role="user", content=task.public["question"])])


def test_a_demonstration_of_several_turns_masks_what_the_tools_said(chat: ChatML) -> None:
    stream = demonstrations(TOOLS, resolve("tools"), chat, split="train", seed=0, working=1.0)
    for shown in itertools.islice(stream, 20):
        starts = np.flatnonzero(np.diff(shown.loss_mask.astype(int)) == 1)
        assert len(starts) >= 2
        assert "<|im_start|>" not in chat.decode(shown.token_ids[shown.loss_mask])
        assert chat.decode(shown.token_ids[~shown.loss_mask]).count("<|im_start|>assistant\n") == len(starts)


def test_follow_up_questions_are_asked_in_the_same_conversation_and_their_answers_are_learned(chat: ChatML) -> None:
    options = {"min_tokens": 512, "max_tokens": 1024, "records": 8}
    cls = resolve("long_context")
    task = next(iter(cls.tasks("train", 0, options)))

    def shown(follow_ups: int) -> tuple[list[int], int]:
        d = play(cls(**options), task, chat, random.Random(0), max_turns=1, follow_ups=follow_ups)  # type: ignore[abstract]
        return d.token_ids.tolist(), int((np.diff(d.loss_mask.astype(int), prepend=0) == 1).sum())

    alone, answers_alone = shown(0)
    ids, answers = shown(3)
    assert (answers_alone, answers) == (1, 4)
    assert ids[: len(alone)] == alone
    assert chat.decode(ids).count("<|im_start|>user\n") == 4


def test_an_oracle_that_is_wrong_is_not_imitated(chat: ChatML) -> None:
    env = WrongOracle()
    with pytest.raises(ValueError, match=r"earned 0\.0"):
        play(env, next(WrongOracle.tasks("train", 0)), chat, random.Random(0), max_turns=2)


def test_the_share_of_working_demonstrations_is_the_one_asked_for(chat: ChatML) -> None:
    stream = demonstrations(Course(env="math", share=1.0, working=0.25), MathEnv, chat, split="train", seed=3)
    share = np.mean([d.working for d in itertools.islice(stream, 800)])
    assert 0.19 < share < 0.31


def test_steps_keep_the_shares_of_tokens_and_are_the_same_each_time(chat: ChatML) -> None:
    phase = Phase(until=1.0, courses=(Course(env="math", share=3.0, working=0.5), Course(env="tools", share=1.0, working=0.5, max_turns=6)))
    made = list(itertools.islice(steps_of(phase, chat, pad=0, step_tokens=2048, seed=1), 12))
    again = list(itertools.islice(steps_of(phase, chat, pad=0, step_tokens=2048, seed=1), 12))
    assert all(np.array_equal(a.token_ids, b.token_ids) for x, y in zip(made, again, strict=True) for a, b in zip(x, y, strict=True))
    tokens = {"math": 0, "tools": 0}
    for batch in itertools.chain(*made):
        assert (batch.token_ids != 0).mean() > 0.75
        for env, row in zip(batch.envs, batch.token_ids, strict=True):
            tokens[env] += int((row != 0).sum())
    assert 2.7 < tokens["math"] / tokens["tools"] < 3.3
    assert sum(tokens.values()) == pytest.approx(12 * 2048, rel=0.03)


def test_every_phase_teaches_all_four_environments() -> None:
    for phase in PHASES:
        assert {c.env for c in phase.courses} == {"math", "code", "tools", "long_context"}
    assert PHASES[-1].until == 1.0
    assert {c.env for c in FINAL} == {"math", "code", "tools", "long_context"}


def test_the_seed_is_taught_the_tasks_of_the_quickstart() -> None:
    quickstart = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "configs" / "quickstart.yaml"))
    assert isinstance(quickstart, dict)
    assert {name: env["options"] for name, env in quickstart["environments"].items()} == OPTIONS


def test_the_measured_probabilities_are_those_of_the_whole_answers(chat: ChatML) -> None:
    model = PolicyModel.from_config(seed_config(VOCAB_SIZE), 0)
    torch.nn.init.zeros_(model.lm.get_output_embeddings().weight)  # every token equally likely: an answer of n tokens has V ** -n
    result = measure(model, Course(env="math", share=1.0, working=0.5, options={"kinds": ["mul"], "digits": 2}), chat, tasks=16)
    rows = itertools.islice(
        demonstrations(
            Course(env="math", share=1.0, working=0.0, options={"kinds": ["mul"], "digits": 2}), MathEnv, chat, split="eval", seed=99
        ),
        16,
    )
    expected = np.mean([float(VOCAB_SIZE) ** -int(d.loss_mask.sum()) for d in rows])
    assert result.works == pytest.approx(1 / VOCAB_SIZE, rel=1e-3)
    assert result.pass_rate == pytest.approx(expected, rel=1e-3)


def test_the_learning_rate_warms_up_stays_and_ends_at_zero() -> None:
    rates = [seed_train.learning_rate(step, 1000) for step in range(1001)]
    assert rates[0] < rates[50] < rates[200] == 1.0 == rates[699]
    assert rates[850] < rates[750]
    assert rates[1000] == 0


@pytest.mark.slow
def test_a_short_training_run_learns_saves_and_repeats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed_train, "PHASES", (Phase(until=1.0, courses=(MATH,)),))
    monkeypatch.setattr(seed_train, "FINAL", (MATH,))
    monkeypatch.setattr(seed_train, "TOKENIZER_EPISODES", 200)
    monkeypatch.setattr(seed_train, "REPORT_EVERY_S", 0.0)
    lines: list[str] = []
    for name in ("first", "second"):
        seed_train.train_seed(tmp_path / name, seed=5, steps=12, step_tokens=512, measure_every=0, report=lines.append)
    losses = [float(line.split("math ")[1].split()[0]) for line in lines if line.startswith("step")]
    assert losses[11] < losses[0] - 1.0
    assert losses[:12] == losses[12:]
    assert json.loads((tmp_path / "first" / "training.json").read_text())["steps"] == 12
    first, second = (PolicyModel.from_pretrained(tmp_path / name).engine_state() for name in ("first", "second"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert AutoTokenizer.from_pretrained(tmp_path / "first").pad_token == "<|pad|>"
