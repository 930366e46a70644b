"""Which checkpoints count as whole."""

import json

import pytest
import safetensors.torch
import torch

from a2d_hf.trainers.checkpoints import (
    COMPLETE_MARKER,
    is_complete,
    last_complete_checkpoint,
    list_checkpoints,
    mark_complete,
    read_marker,
    safetensors_size,
)


def write_checkpoint(folder, step, complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    safetensors.torch.save_file({"a": torch.ones(4, 3), "b": torch.zeros(5)}, path / "model.safetensors")
    (path / "optimizer.pt").write_bytes(b"x" * 100)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if complete:
        mark_complete(path, {"seed": 1})
    return path


def test_the_newest_whole_checkpoint_is_found_by_step_not_by_name(tmp_path):
    for step in (9, 10, 100):
        write_checkpoint(tmp_path, step, complete=step != 100)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_no_checkpoint_is_none(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "absent") is None


def test_other_folders_are_ignored(tmp_path):
    for name in ("checkpoint-5-old", "checkpoint-x", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert list_checkpoints(tmp_path) == []


def truncate_weights(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def tamper_header(path):
    # As many bytes as the marker says, but the header announces other tensors.
    file = path / "model.safetensors"
    tampered = file.read_bytes().replace(b"68]", b"72]")  # 12 + 5 numbers of 4 bytes end at 68
    assert tampered != file.read_bytes()
    file.write_bytes(tampered)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / COMPLETE_MARKER).unlink(),
        lambda path: (path / COMPLETE_MARKER).write_text("{"),
        lambda path: (path / COMPLETE_MARKER).write_text("[]"),
        lambda path: (path / "optimizer.pt").unlink(),
        lambda path: (path / "optimizer.pt").write_bytes(b"x" * 99),
        truncate_weights,
        tamper_header,
    ],
    ids=["no marker", "half a marker", "wrong marker", "file missing", "file short", "weights short", "header wrong"],
)
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage):
    write_checkpoint(tmp_path, 1)
    path = write_checkpoint(tmp_path, 2)
    assert is_complete(path)
    damage(path)
    assert not is_complete(path)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_marker_keeps_the_resume_key(tmp_path):
    assert read_marker(write_checkpoint(tmp_path, 1))["resume_key"] == {"seed": 1}


def test_safetensors_size_reads_the_header(tmp_path):
    path = write_checkpoint(tmp_path, 1) / "model.safetensors"
    assert safetensors_size(path) == path.stat().st_size
    path.write_bytes(b"\xff" * 64)
    assert safetensors_size(path) is None
    path.write_bytes(b"")
    assert safetensors_size(path) is None
