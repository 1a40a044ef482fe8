"""What of the job path needs no Ray, and the sentences of the set-up script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from infra.jobs import Head, JobError, Submission, free_ports, head_note, is_local, project_of, show_line
from infra.view import EVENT_MARK, PlainView
from tests.unit.stored_runs import events

ROOT = Path(__file__).resolve().parents[2]


def submission(folder: Path, config: Path, *, local: bool) -> Submission:
    return Submission(working_dir=folder, config=config, overrides=("name=a b; rm -rf /", "loop.steps=2"), local=local)


def test_the_entry_point_names_the_config_within_the_project_and_quotes_overrides(tmp_path: Path) -> None:
    entry = submission(tmp_path, tmp_path / "configs" / "a.yaml", local=False).entrypoint
    assert entry == "exec polyrl run configs/a.yaml 'name=a b; rm -rf /' loop.steps=2"


def test_a_config_outside_the_project_can_be_run_here_but_not_elsewhere(tmp_path: Path) -> None:
    outside = Path("/elsewhere/a.yaml")
    assert "/elsewhere/a.yaml" in submission(tmp_path, outside, local=True).entrypoint
    with pytest.raises(JobError, match="move it into that folder"):
        _ = submission(tmp_path, outside, local=False).entrypoint


def test_the_project_of_a_config_is_the_folder_with_the_pyproject(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "a.yaml"
    (tmp_path / "pyproject.toml").write_text("")
    assert project_of(config) == tmp_path
    assert project_of(ROOT / "configs" / "quickstart.yaml") == ROOT


def test_addresses_of_this_machine_are_known() -> None:
    assert is_local("http://127.0.0.1:8265")
    assert is_local("http://localhost:8265")
    assert is_local(Head(pid=1, address="http://10.0.0.1:1", folder="x"))
    assert not is_local("http://cluster.example:8265")


def test_the_note_of_a_head_that_has_ended_counts_for_nothing(tmp_path: Path) -> None:
    note = head_note(tmp_path)
    assert Head.load(note) is None
    Head(pid=os.getpid(), address="http://127.0.0.1:1", folder="/no/such/ray/folder").save(note)
    assert Head.load(note) is None, "this pid runs, but it is not that head"
    note.write_text("{")
    assert Head.load(note) is None


def test_free_ports_are_distinct() -> None:
    assert len(set(free_ports(5))) == 5


def test_a_job_log_turns_into_events_and_lines() -> None:
    console = Console(record=True, width=200, force_terminal=False)
    view = PlainView(console)
    for line in ["starting", "", EVENT_MARK + events()[0].to_json(), EVENT_MARK + "torn {"]:
        show_line(view, line)
    lines = console.export_text().splitlines()
    assert lines[0] == "starting"
    assert "run demo" in lines[1]
    assert lines[2].startswith(EVENT_MARK)
    assert view.state.run == "demo"


FULL_DISK = "#!/usr/bin/env bash\nprintf 'Filesystem 1024-blocks Used Available\\nx 10 9 1048576\\n'\n"


def bootstrap(folder: Path, *args: str, python: str = "", df: str = "") -> subprocess.CompletedProcess[str]:
    """The set-up script in a checkout of its own, on a machine with few commands: this Python or none, this `df` or none."""
    checkout, commands = folder / "checkout", folder / "bin"
    (checkout / "infra").mkdir(parents=True)
    commands.mkdir()
    shutil.copy(ROOT / "infra" / "bootstrap.sh", checkout / "infra")
    shutil.copytree(ROOT / "requirements", checkout / "requirements")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    for tool in ("awk", "bash", "cat", "dirname", "env", "grep", "sha256sum", "uname"):
        found = shutil.which(tool)
        assert found
        (commands / tool).symlink_to(found)
    (commands / "df").write_text(df)
    (commands / "df").chmod(0o755)
    environment = {"PATH": str(commands), "PYTHON": python}
    command = [str(commands / "bash"), "infra/bootstrap.sh", *args]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)


def test_set_up_without_a_fitting_python_says_so_in_one_sentence(tmp_path: Path) -> None:
    done = bootstrap(tmp_path)
    assert done.returncode == 1
    assert "Python 3.11, 3.12 or 3.13 is needed, found no Python at all" in done.stderr
    assert done.stderr.count("\n") == 1


def test_set_up_on_a_full_disk_says_so_in_one_sentence(tmp_path: Path) -> None:
    done = bootstrap(tmp_path, python=sys.executable, df=FULL_DISK)
    assert done.returncode == 1
    assert "1 GiB are free" in done.stderr
    assert "6 are needed" in done.stderr
    assert done.stderr.count("\n") == 1


def test_set_up_of_an_unknown_kind_says_what_there_is(tmp_path: Path) -> None:
    done = bootstrap(tmp_path, "tpu")
    assert done.returncode == 1
    assert "wanted cpu or gpu" in done.stderr
