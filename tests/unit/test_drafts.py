"""What is left of a rollout when its worker dies: token for token, under the versions that sampled each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rl_core import drafts as module
from rl_core.drafts import Draft, DraftFile, joined, prune, read_drafts
from rl_core.trajectories import rollout_trajectories
from rl_core.types import CUT_OFF, Completion, Message, Rollout, Status, Task, Verdict, VersionSpan


@pytest.fixture(autouse=True)
def closed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Killed processes close nothing, so the tests do not either; this does, after them."""
    files: list[DraftFile] = []
    original = DraftFile.__init__

    def kept(self: DraftFile, folder: Path, worker: str) -> None:
        files.append(self)
        original(self, folder, worker)

    monkeypatch.setattr(DraftFile, "__init__", kept)
    yield
    for file in files:
        file.close()


TASK = Task(env="math", key="k", split="train", seed=0, public={})


def completion(prompt: list[int], tokens: int, *versions: int, finish: str = "stop") -> Completion:
    """`tokens` sampled tokens, cut into as many spans as there are versions."""
    edges = np.linspace(0, tokens, len(versions) + 1).astype(int).tolist()
    spans = [VersionSpan(start=a, stop=b, version=v) for a, b, v in zip(edges, edges[1:], versions, strict=False)]
    ids = np.arange(100, 100 + tokens, dtype=np.int32)
    logprobs = -np.linspace(0.1, 1, tokens).astype(np.float32)
    return Completion(
        prompt_ids=np.array(prompt, np.int32),
        token_ids=ids,
        logprobs=logprobs,
        spans=tuple(spans),
        finish_reason=finish,
        engine_steps=tokens,
    )


def part(whole: Completion, start: int, stop: int) -> Completion:
    """What an engine shows of a sequence under way."""
    spans = [VersionSpan(start=max(s.start, start) - start, stop=min(s.stop, stop) - start, version=s.version) for s in whole.spans]
    return replace(
        whole, token_ids=whole.token_ids[start:stop], logprobs=whole.logprobs[start:stop],
        spans=tuple(s for s in spans if s.stop > s.start), finish_reason=CUT_OFF, engine_steps=stop - start,
    )  # fmt: skip


def two_turns() -> tuple[Completion, Completion]:
    first = completion([1, 2, 3], 6, 4)
    known = [*first.prompt_ids.tolist(), *first.token_ids.tolist()]
    return first, completion([*known, 7, 8], 10, 4, 5)


def same(a: Completion, b: Completion) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("prompt_ids", "token_ids", "logprobs"))
    return arrays and (a.spans, a.finish_reason, a.engine_steps) == (b.spans, b.finish_reason, b.engine_steps)


def written(file: DraftFile) -> None:
    """As after a second: a flush, which comes upon the groups, and another, which writes them."""
    file.flush()
    file.flush()


def only(folder: Path, group: str = "g", index: int = 0) -> Draft:
    return read_drafts(folder, [group])[group][index]


def test_turns_and_the_tokens_of_one_under_way_come_back_number_for_number(tmp_path: Path) -> None:
    first, second = two_turns()
    file = DraftFile(tmp_path, "w0")
    file.add("g", 0, 0, first)
    written(file)
    file.add("g", 0, 1, part(second, 0, 4), known=9)
    written(file)
    file.add("g", 0, 1, part(second, 4, 7), known=9, start=4)  # not closed: a killed process closes nothing
    written(file)
    draft = only(tmp_path)
    assert same(draft.completions[0], first)
    assert same(draft.completions[1], part(second, 0, 7))
    assert (draft.min_version, draft.end) == (4, None)
    file.add("g", 0, 1, second, known=9)
    written(file)
    assert same(only(tmp_path).completions[1], second)


def test_a_finished_rollout_comes_back_whole_with_its_verdict(tmp_path: Path) -> None:
    turns = two_turns()
    verdict = Verdict(status=Status.OK, reward=0.5, evidence={"answer": "<b>\ud7ff</b>"})
    said = (Message(role="user", content="?"), Message(role="assistant", content="!"))
    rollout = Rollout(id="g-0", env="math", task_key="k", completions=turns, messages=said, verdict=verdict, worker="w0", seconds=1.0)
    file = DraftFile(tmp_path, "w0")
    file.add("g", 0, 0, turns[0])
    written(file)
    file.add("g", 0, 1, turns[1], known=9)
    written(file)
    file.end("g", 0, rollout)
    written(file)
    again = only(tmp_path).rollout(TASK)
    assert again is not None
    assert replace(again, completions=()) == replace(rollout, completions=())
    assert all(same(a, b) for a, b in zip(again.completions, turns, strict=True))
    assert only(tmp_path).rollout(replace(TASK, key="another")) is None


def test_one_record_holds_all_that_happened_since_the_last(tmp_path: Path) -> None:
    first, second = two_turns()
    done = Rollout(id="g-0", env="math", task_key="k", completions=(first,), messages=(), verdict=Verdict(status=Status.OK, reward=1.0))
    file = DraftFile(tmp_path, "w0")
    file.add("g", 0, 0, first)
    file.add("h", 3, 0, first)
    file.end("g", 0, done)
    file.add("h", 3, 1, second, known=9)
    file.add("g", 1, 0, completion([1, 2, 3], 3, 6))
    assert read_drafts(tmp_path, ["g", "h"]) == {}, "nothing is written before the flush"
    file.flush()
    assert read_drafts(tmp_path, ["g", "h"]) == {}, "a group may end before the next flush"
    file.flush()
    file.flush()  # nothing more
    again = only(tmp_path).rollout(TASK)
    assert again is not None
    assert again.verdict == done.verdict
    assert only(tmp_path, index=1).end is None
    assert all(same(a, b) for a, b in zip(only(tmp_path, "h", 3).completions, (first, second), strict=True))
    (path,) = tmp_path.glob("*.arrow")
    assert len(list(module.record_batches(path))) == 1


def test_a_group_that_was_handed_on_before_the_second_flush_is_not_written(tmp_path: Path) -> None:
    first, _ = two_turns()
    file = DraftFile(tmp_path, "w0")
    file.add("g", 0, 0, first)
    file.add("h", 0, 0, first)
    file.flush()
    file.add("i", 0, 0, first)
    file.forget("g")
    file.flush()
    assert set(read_drafts(tmp_path, ["g", "h", "i"])) == {"h"}
    file.flush()
    assert set(read_drafts(tmp_path, ["g", "h", "i"])) == {"h", "i"}


def test_what_happens_in_a_group_that_is_being_written_is_in_the_next_record(tmp_path: Path) -> None:
    first, second = two_turns()
    file = DraftFile(tmp_path, "w0")
    file.add("g", 0, 0, first)
    written(file)
    file.add("g", 0, 1, second, known=9)
    file.flush()
    assert len(only(tmp_path).completions) == 2
    file.forget("g")
    assert not file._met


def test_a_rollout_that_starts_again_forgets_what_it_was(tmp_path: Path) -> None:
    first, second = two_turns()
    file = DraftFile(tmp_path, "w0")
    file.add("g", 0, 0, first)
    written(file)
    file.add("g", 0, 1, second, known=9)
    written(file)
    other = completion([1, 2, 3], 3, 6)
    file.add("g", 0, 0, other)
    written(file)
    (turn,) = only(tmp_path).completions
    assert same(turn, other)


def test_the_newest_draft_counts_whichever_worker_wrote_it(tmp_path: Path) -> None:
    first, second = two_turns()
    w1, w0 = DraftFile(tmp_path, "w1"), DraftFile(tmp_path, "w0")
    w0.add("g", 0, 0, first)
    written(w0)
    w0.add("g", 1, 0, first)
    written(w0)
    w1.add("g", 0, 0, first)
    written(w1)
    w1.add("g", 0, 1, second, known=9)
    written(w1)
    assert len(only(tmp_path).completions) == 2
    assert len(only(tmp_path, index=1).completions) == 1
    assert read_drafts(tmp_path, ["other"]) == {}


def test_drafts_go_on_over_segments_and_old_ones_go_when_their_groups_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1)
    first, second = two_turns()
    file = DraftFile(tmp_path, "w0")
    file.add("g", 0, 0, first)
    written(file)
    file.add("h", 0, 0, first)
    written(file)
    file.add("g", 0, 1, second, known=9)
    written(file)
    assert [same(a, b) for a, b in zip(only(tmp_path).completions, (first, second), strict=True)] == [True, True]
    prune(tmp_path, ["g"])
    assert len(list(tmp_path.glob("*.arrow"))) == 3, "two of g, and the one that is being written"
    prune(tmp_path, [])
    assert len(list(tmp_path.glob("*.arrow"))) == 1
    file.add("i", 0, 0, first)
    written(file)
    assert same(only(tmp_path, "i").completions[0], first)


@pytest.mark.parametrize("cut", [1, 50, 200])
def test_a_torn_end_loses_the_torn_record_alone(tmp_path: Path, cut: int) -> None:
    first, second = two_turns()
    file = DraftFile(tmp_path, "w0")
    file.add("g", 0, 0, first)
    written(file)
    (path,) = tmp_path.glob("*.arrow")
    whole = path.stat().st_size
    file.add("g", 0, 1, second, known=9)
    written(file)
    with path.open("r+b") as torn:
        torn.truncate(max(path.stat().st_size - cut, whole))
    assert len(only(tmp_path).completions) == 1
    assert number_of_the_next(tmp_path) == 1


def number_of_the_next(folder: Path) -> int:
    DraftFile(folder, "w0")
    return max(module.number(path) for path in folder.glob("w0.*"))


def test_two_halves_of_a_turn_train_as_what_they_are() -> None:
    whole = completion([1, 2], 10, 3, 5)
    first, rest = part(whole, 0, 4), replace(part(whole, 4, 10), finish_reason="stop")
    turn = joined(first, rest)
    assert same(turn, whole)
    other = joined(first, completion([1, 2], 6, 9))
    assert other.spans == (VersionSpan(start=0, stop=4, version=3), VersionSpan(start=4, stop=10, version=9))
    rollout = Rollout(
        id="r", env="math", task_key="k", completions=(other,), messages=(), verdict=Verdict(status=Status.OK, reward=1.0)
    )  # fmt: skip
    (trajectory,) = rollout_trajectories(rollout, 1.0)
    assert trajectory.versions.tolist() == [-1, -1, *[3] * 4, *[9] * 6]
    assert rollout.min_version == 3
