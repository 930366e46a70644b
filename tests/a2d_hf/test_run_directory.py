"""Run directories: what is written, what survives a kill, who may change them."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from a2d_hf.errors import BadInput, SaveFailed
from a2d_hf.run_directory import EventLog, RunDirectory, find_runs, read_events


def test_create_writes_a_running_manifest_and_the_first_event(tmp_path):
    run = RunDirectory.create(tmp_path / "run", kind="conversion", stage="started")
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert (manifest["schema_version"], manifest["status"], manifest["stage"]) == (1, "running", "started")
    events, _ = read_events(run.path / "events.jsonl")
    assert [(e["seq"], e["event"], e["schema_version"]) for e in events] == [(0, "run_started", 1)]


def test_update_is_read_back_and_leaves_no_temporary(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    run.update(stage="converted", gates={"identity": {"passed": True}})
    assert RunDirectory.open(run.path).manifest["gates"] == {"identity": {"passed": True}}
    assert sorted(entry.name for entry in run.path.iterdir()) == ["events.jsonl", "manifest.json"]


def test_seq_goes_on_after_the_run_is_taken_again(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    run.event("one")
    run.release()
    again = RunDirectory.open(run.path)
    again.take()
    again.event("two")
    assert [e["seq"] for e in read_events(run.path / "events.jsonl")[0]] == [0, 1, 2]


def test_a_torn_last_line_is_skipped_and_the_log_goes_on(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.append("one")
    log.close()
    with open(path, "a") as file:
        file.write('{"schema_version": 1, "seq": 1, "ev')
    log = EventLog(path)
    assert log.torn == 1
    log.append("two")
    log.close()
    events, skipped = read_events(path)
    assert [(e["seq"], e["event"]) for e in events] == [(0, "one"), (1, "two")]
    assert skipped == 1


def test_a_running_manifest_without_a_process_reads_as_interrupted(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    assert RunDirectory.open(run.path).status == "running"
    run.release()
    assert RunDirectory.open(run.path).status == "interrupted"


def test_a_second_process_may_not_take_the_run(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    code = textwrap.dedent(
        """
        import sys, pathlib
        from a2d_hf.errors import Refused
        from a2d_hf.run_directory import RunDirectory
        run = RunDirectory.open(pathlib.Path(sys.argv[1]))
        print(run.status)
        try:
            run.take()
        except Refused as error:
            print(error)
        """
    )
    result = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[0] == "running"
    assert "another process" in result.stdout


def test_taking_a_run_puts_a_half_exchanged_model_right(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    run.release()
    (run.path / ".model.replaced").mkdir()
    again = RunDirectory.open(run.path)
    again.take()
    assert again.model_path.is_dir()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda p: p.write_text("x"), "is a file"),
        (lambda p: (p.mkdir(), (p / "x").write_text("")), "is not empty"),
        (lambda p: (p.mkdir(), (p / "manifest.json").write_text("{}")), "a2d resume"),
    ],
)
def test_check_free_refuses(tmp_path, make, word):
    make(tmp_path / "run")
    with pytest.raises(BadInput, match=word):
        RunDirectory.check_free(tmp_path / "run")


def test_check_free_refuses_a_file_on_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="is a file"):
        RunDirectory.check_free(tmp_path / "file" / "run")


def test_check_free_refuses_a_folder_that_is_not_writable(tmp_path, monkeypatch):
    # Tests may run as root, who may write anywhere: ask the question as another user would be answered.
    monkeypatch.setattr("a2d_hf.run_directory.os.access", lambda path, mode: False)
    with pytest.raises(BadInput, match="not writable"):
        RunDirectory.check_free(tmp_path / "run")


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("a2d_hf.atomic_files.os.fsync", full)
    with pytest.raises(SaveFailed, match="No space left"):
        RunDirectory.create(tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "no manifest.json"), ("", "cannot be read"), ("[]", "not the manifest"), ("{", "cannot be read")],
)
def test_open_refuses_what_is_no_run(tmp_path, content, word):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(BadInput, match=word):
        RunDirectory.open(tmp_path)


def test_open_refuses_another_schema_version(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    manifest = run.manifest | {"schema_version": 99}
    run.manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="schema version 99"):
        RunDirectory.open(run.path)


def test_open_refuses_a_missing_path_and_a_file(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        RunDirectory.open(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        RunDirectory.open(tmp_path / "file")


def test_find_runs_passes_over_what_is_none(tmp_path):
    for name in ("b", "a", "deep/c"):
        RunDirectory.create(tmp_path / name).release()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"not": "a run"}')
    assert [run.path.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)] == ["a", "b", "deep/c"]


def test_events_of_a_killed_writer_are_all_there(tmp_path):
    # Lines go to the kernel one by one: a SIGKILL right after `append` loses none.
    path = tmp_path / "events.jsonl"
    code = textwrap.dedent(
        """
        import os, pathlib, signal, sys
        from a2d_hf.run_directory import EventLog
        log = EventLog(pathlib.Path(sys.argv[1]))
        for number in range(5):
            log.append("step", step=number)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True)
    assert result.returncode == -9
    assert [event["step"] for event in read_events(path)[0]] == [0, 1, 2, 3, 4]
    assert os.path.getsize(path) > 0
