"""Which checkpoints of a training run are whole.

Owns the marker that is written last into a checkpoint folder, after everything else is on the disk. A run killed at
any moment leaves at most one folder without it, and that folder is never resumed from.
"""

import json
import os
import re
import struct
from pathlib import Path
from typing import Any


COMPLETE_MARKER = "complete.json"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(folder: str | os.PathLike, resume_key: dict[str, Any] | None = None) -> None:
    """
    Writes the marker of a finished checkpoint: the size of each of its files, flushed to the disk beforehand.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint.
        resume_key (`dict`, *optional*): what a run must have in common with this one to continue it exactly.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE_MARKER)
    for path in files:
        _flush(path)
    for parent in {path.parent for path in files}:
        _flush(parent)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    temporary = folder / f".{COMPLETE_MARKER}.writing"
    temporary.write_text(json.dumps({"resume_key": resume_key, "files": sizes}, indent=2) + "\n", encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, folder / COMPLETE_MARKER)
    _flush(folder)
    _flush(folder.parent)


def read_marker(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The marker of a checkpoint, or `None` where it is missing or unreadable."""
    try:
        marker = json.loads((Path(folder) / COMPLETE_MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and isinstance(marker.get("files"), dict) else None


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint has its marker, every file the marker names at its size, and whole safetensors files."""
    folder = Path(folder)
    marker = read_marker(folder)
    if marker is None or "trainer_state.json" not in marker["files"]:
        return False
    for name, size in marker["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return False
        if path.suffix == ".safetensors" and safetensors_size(path) != size:
            return False
    return True


def safetensors_size(path: str | os.PathLike) -> int | None:
    """The size in bytes that the header of a safetensors file announces, or `None` where it has no valid header."""
    try:
        with open(path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > os.path.getsize(path):
                return None
            header = json.loads(file.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error):
        return None
    return 8 + header_bytes + max(ends, default=0)


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoint folders of a run, whole or not, the newest first."""
    if not Path(output_dir).is_dir():
        return []
    found = [
        (int(match.group(1)), path)
        for path in Path(output_dir).iterdir()
        if path.is_dir() and (match := _CHECKPOINT_NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint of a run that is whole, or `None`."""
    return next((str(path) for path in list_checkpoints(output_dir) if is_complete(path)), None)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
