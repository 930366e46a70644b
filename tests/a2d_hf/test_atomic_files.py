"""A file or folder is the old one or the new one, whatever happens while it is written."""

import errno
import os

import pytest

from a2d_hf import atomic_files
from a2d_hf.atomic_files import explained_writes, recover_folder, replaced_folder, write_json, write_text
from a2d_hf.errors import SaveFailed


def failing(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def test_write_text_replaces_the_content(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new\n")
    assert path.read_text() == "new\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("number", "word"),
    [(errno.ENOSPC, "No space left"), (errno.EROFS, "read-only"), (errno.EACCES, "cannot be written")],
)
def test_a_failed_write_leaves_the_old_content_and_says_why(tmp_path, monkeypatch, number, word):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(atomic_files.os, "fsync", failing(number))
    with pytest.raises(SaveFailed, match=word) as caught:
        write_text(path, "new")
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(IsADirectoryError):
        with explained_writes(tmp_path):
            raise IsADirectoryError(errno.EISDIR, "x")


@pytest.mark.parametrize(
    "message",
    [
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
        "PytorchStreamWriter failed writing file data/3: file write failed",
    ],
)
def test_a_full_disk_is_recognised_in_other_libraries_words(tmp_path, message):
    with pytest.raises(SaveFailed):
        with explained_writes(tmp_path):
            raise RuntimeError(message)


def test_replaced_folder_exchanges_whole_folders(tmp_path):
    target = tmp_path / "model"
    for content in ("old", "new"):
        with replaced_folder(target) as folder:
            (folder / "weights").write_text(content)
            if content == "new":
                assert (target / "weights").read_text() == "old"
    assert (target / "weights").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_failure_while_filling_leaves_the_old_folder(tmp_path):
    target = tmp_path / "model"
    with replaced_folder(target) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(SaveFailed):
        with replaced_folder(target) as folder:
            (folder / "weights").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "weights").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    with replaced_folder(target) as folder:
        (folder / "weights").write_text("old")
    rename = os.rename

    def fail_for_new(source, destination):
        if str(source).endswith(".writing"):
            raise OSError(errno.EIO, "I/O error")
        rename(source, destination)

    monkeypatch.setattr(atomic_files.os, "rename", fail_for_new)
    with pytest.raises(OSError):
        with replaced_folder(target) as folder:
            (folder / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"


def test_recover_puts_the_old_folder_back_after_a_kill_between_the_renames(tmp_path):
    (tmp_path / ".model.replaced").mkdir()
    (tmp_path / ".model.replaced" / "weights").write_text("old")
    (tmp_path / ".model.writing").mkdir()
    recover_folder(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_recover_removes_the_old_folder_after_a_kill_behind_the_renames(tmp_path):
    for name, content in ((".model.replaced", "old"), ("model", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(content)
    recover_folder(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
