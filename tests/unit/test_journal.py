"""Groups come back from the journal number for number, up to where a crash cut it off."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rl_core import journal as module
from rl_core.journal import GroupJournal, segments
from rl_core.seams import GroupResult
from rl_core.types import Completion, Group, Message, Rollout, Status, Task, ToolCall, Turn, Verdict, VersionSpan


def completion(rng: np.random.Generator, prompt: int, tokens: int) -> Completion:
    return Completion(
        prompt_ids=rng.integers(0, 999, prompt).astype(np.int32),
        token_ids=rng.integers(0, 999, tokens).astype(np.int32),
        logprobs=rng.normal(size=tokens).astype(np.float32),
        spans=(VersionSpan(start=0, stop=1, version=3), VersionSpan(start=1, stop=tokens, version=4)),
        finish_reason="stop",
        engine_steps=2,
        drafted=4,
        accepted=1,
    )


def spoken_turn(number: int) -> Turn:
    call = ToolCall(name="find", arguments={"name": "Ann\ud800", "deep": [{"n": number}]})
    return Turn(content="2\n", thought="1+1", tool_calls=(call,) * number, malformed="" if number else "cut off")


def make_group(name: str, seed: int = 0) -> Group:
    rng = np.random.default_rng(seed)
    task = Task(
        env="math", key="k" + name, split="train", seed=seed, public={"q": "1+1", "n": [1, 2]}, private={"a": "2"}, difficulty="add"
    )
    done = Verdict(status=Status.OK, reward=0.25, components={"correct": 0.1 + 0.2}, evidence={"e": "<b>ü\ud7ff</b>"}, latency_s=0.1)
    lost = Verdict(status=Status.INFRA_ERROR, reward=None)
    spoken = (Message(role="user", content="1+1"), Message(role="assistant", content="2\n"))

    def rollout(index: int, verdict: Verdict, turns: int) -> Rollout:
        said = tuple(completion(rng, 5 + t, 3 + t) for t in range(turns))
        return Rollout(
            id=f"{name}-{index}", env="math", task_key=task.key, completions=said, messages=spoken, verdict=verdict, worker="w0",
            turns=tuple(spoken_turn(t) for t in range(turns)), truncated=turns == 1, started_at=1.7e9 + 0.1, seconds=0.3,
        )  # fmt: skip

    return Group(id=name, task=task, rollouts=(rollout(0, done, 2), rollout(1, lost, 0), rollout(2, done, 1)))


def same(a: Group, b: Group) -> bool:
    def plain(group: Group) -> Group:
        return replace(group, rollouts=tuple(replace(r, completions=()) for r in group.rollouts))

    mine, theirs = ([c for r in g.rollouts for c in r.completions] for g in (a, b))
    arrays = all(
        np.array_equal(getattr(x, n), getattr(y, n)) and getattr(x, n).dtype == getattr(y, n).dtype
        for x, y in zip(mine, theirs, strict=True)
        for n in ("prompt_ids", "token_ids", "logprobs")
    )
    rest = all((x.spans, x.finish_reason, x.drafted) == (y.spans, y.finish_reason, y.drafted) for x, y in zip(mine, theirs, strict=True))
    return plain(a) == plain(b) and arrays and rest


def test_a_group_comes_back_number_for_number_in_another_process(tmp_path: Path) -> None:
    journal = GroupJournal(tmp_path)
    groups = {name: make_group(name, seed) for seed, name in enumerate("abc")}
    for group in groups.values():
        journal.append(group)
    found = GroupJournal(tmp_path).read(["a", "c", "never"])  # the first one was not closed: a killed process closes nothing
    assert sorted(found) == ["a", "c"]
    assert all(same(found[name], groups[name]) for name in found)
    assert GroupResult.of(found["a"], 0.0) == GroupResult.of(groups["a"], 0.0)


@pytest.mark.parametrize("cut", [1, 100, 400])
def test_a_torn_end_loses_the_torn_group_alone(tmp_path: Path, cut: int) -> None:
    journal = GroupJournal(tmp_path)
    journal.append(make_group("a"))
    (path,) = segments(tmp_path)
    whole = path.stat().st_size
    journal.append(make_group("b", 1))
    with path.open("r+b") as file:
        file.truncate(max(path.stat().st_size - cut, whole))
    again = GroupJournal(tmp_path)
    assert sorted(again.read(["a", "b"])) == ["a"]
    again.append(make_group("b", 1))
    assert same(again.read(["b"])["b"], make_group("b", 1))


def test_what_was_appended_last_counts(tmp_path: Path) -> None:
    journal = GroupJournal(tmp_path)
    journal.append(make_group("a", 1))
    journal.append(make_group("a", 2))
    assert same(journal.read(["a"])["a"], make_group("a", 2))


def test_pruning_frees_segments_that_nobody_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1)
    journal = GroupJournal(tmp_path)
    for name in "abc":
        journal.append(make_group(name))
    assert len(segments(tmp_path)) == 3
    journal.prune(["b"])
    assert len(segments(tmp_path)) == 1
    journal.append(make_group("d"))
    assert sorted(journal.read("abcd")) == ["b", "d"]
    assert sorted(GroupJournal(tmp_path).read("abcd")) == ["b", "d"]


@pytest.mark.parametrize("cut", [0.05, 0.3, 0.6, 0.95])
def test_zeros_in_place_of_the_last_group_end_the_segment_there(tmp_path: Path, cut: float) -> None:
    """What a power cut may leave where a group was written and not flushed: the right length, and no content."""
    journal = GroupJournal(tmp_path)
    journal.append(make_group("a"))
    (path,) = segments(tmp_path)
    whole = path.stat().st_size
    journal.append(make_group("b", seed=1))
    end = path.stat().st_size
    os.truncate(path, whole + int(cut * (end - whole)))
    os.truncate(path, end)
    assert set(GroupJournal(tmp_path).read(["a", "b"])) == {"a"}


def test_a_group_with_one_changed_byte_is_not_read(tmp_path: Path) -> None:
    journal = GroupJournal(tmp_path)
    journal.append(make_group("a"))
    (path,) = segments(tmp_path)
    content = path.read_bytes()
    readable = []
    for at in range(len(content) - 400, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        readable += [g for g in GroupJournal(tmp_path).read(["a"]).values() if not same(g, make_group("a"))]
    assert readable == []
