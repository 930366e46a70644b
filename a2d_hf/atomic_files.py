"""Files and folders that are either the old one or the new one, never half of one.

Owns every write of a finished artefact: a temporary name in the same folder, fsync, rename. May touch only the target,
its temporary (`.NAME.writing`) and, for folders, the version being replaced (`.NAME.replaced`).
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import A2DError, SaveFailed


NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors wraps the system's message, sqlite has its own; torch.save has lost it by the time it complains.
NO_SPACE_PHRASES = (
    "No space left on device", "StorageFull", "QuotaExceeded", "PytorchStreamWriter failed writing",
    "database or disk is full",
)  # fmt: skip
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}


def explain_write_error(error: BaseException, target: Path) -> A2DError | None:
    """
    The one sentence for a failed write, or `None` where the error is of another kind.

    Args:
        error (`BaseException`): what was raised.
        target (`Path`): what was being written.

    Returns:
        [`SaveFailed`] or `None`
    """
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if code in NO_SPACE or any(phrase in text for phrase in NO_SPACE_PHRASES):
        return SaveFailed(f"No space left to write {target}: free some space on that disk and run the command again.")
    if code in NOT_WRITABLE or "Read-only file system" in text or "ReadOnlyFilesystem" in text:
        return SaveFailed(f"{target} cannot be written (read-only, or no permission): choose another place.")
    return None


@contextmanager
def explained_writes(target: Path) -> Iterator[None]:
    """Turns a full disk or a read-only target into [`SaveFailed`], and lets every other error through."""
    try:
        yield
    except A2DError:
        raise
    except Exception as error:
        explained = explain_write_error(error, target)
        if explained is None:
            raise
        raise explained from error


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a reader, or a crash at any moment, finds the old content or all of the new."""
    temporary = path.with_name(f".{path.name}.writing")
    with explained_writes(path):
        try:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def to_json(value: Any) -> str:
    """The one JSON form of this project's files: two spaces, keys in insertion order, a newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, atomically."""
    write_text(path, to_json(value))


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """
    Yields an empty folder to fill; when the block ends well it becomes `target`, replacing what stood there.

    The exchange is two renames. A kill between them leaves no `target`, but the old version under a name that
    [`recover_folder`] knows, and the new one complete.

    Args:
        target (`Path`): the folder to create or replace.

    Raises:
        [`SaveFailed`]: disk full or not writable; `target` is as it was and nothing half-written stays behind.
    """
    temporary = target.with_name(f".{target.name}.writing")
    replaced = target.with_name(f".{target.name}.replaced")
    with explained_writes(target):
        recover_folder(target)
        try:
            temporary.mkdir()
            yield temporary
            _sync_tree(temporary)
            if target.exists():
                os.rename(target, replaced)
            try:
                os.rename(temporary, target)
            except BaseException:
                if replaced.exists():
                    os.rename(replaced, target)
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """
    Cleans up after a kill inside [`replaced_folder`]: puts the old version back where the exchange was cut in two, and
    removes what was left half-written.
    """
    temporary = target.with_name(f".{target.name}.writing")
    replaced = target.with_name(f".{target.name}.replaced")
    if replaced.exists():
        if target.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, target)
    if temporary.exists():
        shutil.rmtree(temporary)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
