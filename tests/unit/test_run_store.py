from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import rl_core.run_store as run_store
from infra.dashboard.rollouts import Filter, Rollouts
from rl_core.config import ConfigError, RunConfig
from rl_core.config_files import parse_config
from rl_core.events import Event
from rl_core.run_store import NoSuchRun, RunStore, StoredRun, create_run_dir, list_runs
from rl_core.segments import number_of
from tests.unit.stored_runs import completion, events, group, store_run

WRITER = """
import sys, time
from pathlib import Path
from rl_core.run_store import RunStore
store = RunStore(Path(sys.argv[1]))
print("up", flush=True)
time.sleep(60)
"""


def note(text: str) -> Event:
    return Event(kind="note", data={"text": text})


def texts(run: StoredRun) -> list[str]:
    return [str(e.data["text"]) for e in run.events()]


def test_an_event_is_readable_as_soon_as_emit_returns(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.emit(note("a"))
    assert texts(StoredRun(tmp_path)) == ["a"]
    store.emit(note("b"))
    assert texts(StoredRun(tmp_path)) == ["a", "b"]
    store.close()


def test_a_torn_last_line_is_not_an_event_and_is_cut_off_when_the_run_goes_on(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.emit(note("whole"))
    store.close()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "note", "data": {"te')
    assert texts(StoredRun(tmp_path)) == ["whole"]
    again = RunStore(tmp_path)
    again.emit(note("next"))
    again.close()
    assert texts(StoredRun(tmp_path)) == ["whole", "next"]


def test_events_from_many_threads_stay_whole_lines(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    threads = [threading.Thread(target=lambda k=k: [store.emit(note(f"{k}-{i}" * 50)) for i in range(50)]) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    store.close()
    assert len(texts(StoredRun(tmp_path))) == 200


def test_every_rollout_comes_back_with_its_figures(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.add_groups([group("g1", rewards=(1.0, 0.0, None))], "train", 5)
    store.close()
    rows = StoredRun(tmp_path).sql("SELECT * FROM rollouts ORDER BY rollout_id")
    assert [r["reward"] for r in rows] == [1.0, 0.0, None]
    assert [r["status"] for r in rows] == ["ok", "ok", "infra_error"]
    first = rows[0]
    assert (first["env"], first["task_key"], first["split"], first["label"], first["step"]) == ("math", "key-g1", "train", "train", 5)
    assert (first["num_prompt_tokens"], first["num_sampled_tokens"]) == (5, 3)
    assert (first["min_version"], first["max_version"]) == (2, 3)
    assert (first["drafted"], first["accepted"], first["engine_steps"]) == (4, 3, 3)
    assert json.loads(first["messages"])[1] == {"role": "assistant", "content": "7"}
    assert json.loads(first["components"]) == {"correct": 1.0}
    assert json.loads(first["task"]) == {"seed": 1, "public": {"q": "3+4"}, "private": {"gold": "7"}}
    assert (json.loads(first["turns"]), first["truncated"]) == ([], False)
    assert first["token_ids"] is None


def test_tokens_are_kept_when_asked_for(tmp_path: Path) -> None:
    store = RunStore(tmp_path, keep_tokens=True)
    store.add_groups([group("g1")], "train")
    store.close()
    row = StoredRun(tmp_path).sql("SELECT token_ids, logprobs FROM rollouts LIMIT 1")[0]
    assert row["token_ids"] == [[0, 1, 2]]
    assert row["logprobs"] == [[-0.5, -0.5, -0.5]]


def test_text_that_is_not_valid_unicode_is_stored_all_the_same(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.add_groups([group("g1", text="a\udc80\x00b")], "train")
    store.close()
    row = StoredRun(tmp_path).sql("SELECT messages FROM rollouts LIMIT 1")[0]
    assert json.loads(row["messages"])[1]["content"] == "a\udc80\x00b"


def test_segments_fill_up_and_none_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_store, "SEGMENT_ROWS", 4)
    store = RunStore(tmp_path)
    for i in range(5):
        store.add_groups([group(f"g{i}")], "train")
    store.close()
    files = sorted(p.name for p in (tmp_path / "rollouts").iterdir())
    assert files == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert StoredRun(tmp_path).sql("SELECT count(*) AS n FROM rollouts")[0]["n"] == 10


def test_a_second_writer_adds_segments_and_overwrites_none(tmp_path: Path) -> None:
    for i in range(2):
        store = RunStore(tmp_path)
        store.add_groups([group(f"g{i}")], "train")
        store.close()
    assert StoredRun(tmp_path).sql("SELECT count(DISTINCT group_id) AS n FROM rollouts")[0]["n"] == 2


def test_a_segment_never_gets_the_number_of_another_though_one_was_lost(tmp_path: Path) -> None:
    for number in range(3):
        store_groups(tmp_path, "train", [f"g{number}"])
    (tmp_path / "rollouts" / "part-00000.parquet").unlink()
    store_groups(tmp_path, "train", ["g3"])
    assert stored(tmp_path) == ["g1", "g2", "g3"]
    assert [Path(p).name for p in StoredRun(tmp_path).segments()] == [f"part-{i:05d}.parquet" for i in (1, 2, 3)]


def test_segments_are_in_the_order_of_their_numbers_beyond_five_digits(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for number in (99_999, 100_000, 7):
        (tmp_path / "rollouts" / f"part-{number:05d}.parquet").touch()
    assert [number_of(Path(p)) for p in StoredRun(tmp_path).segments()] == [7, 99_999, 100_000]


def store_groups(folder: Path, label: str, names: list[str], max_bytes: int | None = None) -> None:
    """One life of a writer, which leaves one segment."""
    store = RunStore(folder, max_bytes=max_bytes)
    store.add_groups([group(name, text=name * 50) for name in names], label)
    store.close()


def stored(folder: Path) -> list[str]:
    return [row["group_id"] for row in StoredRun(folder).sql("SELECT DISTINCT group_id FROM rollouts ORDER BY 1")]


def test_everything_is_kept_unless_a_size_is_given(tmp_path: Path) -> None:
    assert RunConfig().store.max_bytes is None
    for number in range(3):
        store_groups(tmp_path, "train", [f"g{number}"])
    assert stored(tmp_path) == ["g0", "g1", "g2"]
    assert texts(StoredRun(tmp_path)) == []


def test_beyond_the_size_the_oldest_rollouts_of_training_go_with_a_note_and_held_out_ones_stay(tmp_path: Path) -> None:
    store_groups(tmp_path, "before", ["held-out"])
    store = RunStore(tmp_path)
    store.add_groups([group("g0")], "train")
    store.add_groups([group("held-out too")], "during")
    store.close()
    for number in range(1, 4):
        store_groups(tmp_path, "train", [f"g{number}"])
    looking = Rollouts(StoredRun(tmp_path))
    assert looking.count(Filter()) == 12
    size = sum(p.stat().st_size for p in (tmp_path / "rollouts").iterdir())
    store_groups(tmp_path, "honeypot", ["g4"], max_bytes=size)
    assert stored(tmp_path)[-2:] == ["held-out", "held-out too"]
    kept = [name for name in stored(tmp_path) if name.startswith("g")]
    assert kept
    assert kept == [f"g{i}" for i in range(5)][-len(kept) :], "the newest ones"
    assert len(kept) < 5
    [said] = texts(StoredRun(tmp_path))
    assert said.startswith(f"store.max_gib: {2 * (5 - len(kept))} rollouts of training were removed")
    assert sum(p.stat().st_size for p in (tmp_path / "rollouts").iterdir()) <= size
    assert looking.count(Filter()) == 2 * len(stored(tmp_path)), "who looks on finds every file"
    assert len(StoredRun(tmp_path).segments()) == 6


def test_a_size_too_small_for_one_segment_keeps_the_newest(tmp_path: Path) -> None:
    for number in range(3):
        store_groups(tmp_path, "train", [f"g{number}"], max_bytes=1)
    assert stored(tmp_path) == ["g2"]


def test_a_size_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"store.max_gib is -1.0, wanted 0 or more \(0 keeps all\)"):
        parse_config({"environments": {"math": {}}}, ["store.max_gib=-1"])


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with pytest.raises(ValueError, match="another process writes"):
        RunStore(tmp_path)
    store.close()
    RunStore(tmp_path).close()


def test_rollouts_that_cannot_be_written_are_an_error_and_not_a_silence(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    (tmp_path / "rollouts").rmdir()
    store.add_groups([group("g1")], "train")
    with pytest.raises(RuntimeError, match="rollouts could not be stored"):
        store.close()


def test_an_unknown_label_is_refused(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with pytest.raises(ValueError, match="wanted one of train, before, during, after"):
        store.add_groups([group()], "trian")
    store.close()


def test_a_run_without_rollouts_answers_queries_with_nothing(tmp_path: Path) -> None:
    RunStore(tmp_path).close()
    assert StoredRun(tmp_path).sql("SELECT rollout_id FROM rollouts") == []


def test_prompt_tokens_of_several_turns_do_not_count_what_the_policy_sampled() -> None:
    from dataclasses import replace

    rollout = replace(group().rollouts[0], completions=(completion(3, prompt=5), completion(4, prompt=5 + 3 + 2)))
    assert rollout.num_prompt == 7


@pytest.mark.parametrize(("ending", "state"), [(True, "finished"), (False, "killed")])
def test_the_state_of_a_run_that_nobody_writes_to(tmp_path: Path, ending: bool, state: str) -> None:
    assert StoredRun(store_run(tmp_path, finished=ending)).state == state


def test_a_run_is_running_while_its_writer_lives_and_killed_when_it_was_killed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"up\n"
    assert StoredRun(tmp_path).state == "running"
    writer.kill()
    writer.wait()
    writer.stdout.close()
    assert StoredRun(tmp_path).state == "killed"


def test_runs_are_found_by_id_part_path_and_latest(tmp_path: Path) -> None:
    for i, name in enumerate(("20260101-a", "20260102-b")):
        store_run(tmp_path / name)
        os.utime(tmp_path / name / "config.yaml", (i, i))
    assert [r.id for r in list_runs(tmp_path)] == ["20260101-a", "20260102-b"]
    assert RunStore.find(tmp_path, "latest").id == "20260102-b"
    assert RunStore.find(tmp_path, "20260101-a").id == "20260101-a"
    assert RunStore.find(tmp_path, "-a").id == "20260101-a"
    assert RunStore.find(Path("elsewhere"), str(tmp_path / "20260101-a")).id == "20260101-a"
    with pytest.raises(NoSuchRun, match="several runs match '2026'"):
        RunStore.find(tmp_path, "2026")
    with pytest.raises(NoSuchRun, match="no run 'zzz'"):
        RunStore.find(tmp_path, "zzz")
    with pytest.raises(NoSuchRun, match="polyrl run"):
        RunStore.find(tmp_path / "empty", "latest")


def test_a_new_run_folder_holds_the_config_and_never_collides(tmp_path: Path) -> None:
    config = RunConfig(name="my run/1", runs_dir=str(tmp_path))
    first, second = create_run_dir(config), create_run_dir(config)
    assert first != second
    assert first.name.endswith("my-run-1")
    assert "name: my run/1" in (first / "config.yaml").read_text()


def test_the_events_of_a_whole_run_survive_the_round_trip(tmp_path: Path) -> None:
    stored = [e.to_json() for e in StoredRun(store_run(tmp_path)).events()]
    again = [e.data for e in events()]
    assert [json.loads(line)["data"] for line in stored] == again
