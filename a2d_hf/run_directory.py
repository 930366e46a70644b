"""A run directory: what a conversion leaves behind, and what `a2d resume`, `eval`, `sample` and `runs` read.

    manifest.json   what was converted from what, with which settings, on what, and how it went; replaced atomically
    events.jsonl    what happened, in order; only ever appended to
    model/          the converted checkpoint
    checkpoints/    the trainer's
    eval/           held-out rows and reports

Owns the first two and the names of the rest. Imports no torch: `a2d runs` reads a hundred of these in a second.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .atomic_files import explained_writes, recover_folder, write_json
from .errors import BadInput, Refused, SaveFailed


SCHEMA_VERSION = 1
LOCK_ATTEMPTS, LOCK_PAUSE_S = 10, 0.05
STATUSES = ("running", "completed", "failed", "interrupted")


def now() -> str:
    """The time, as every file of a run writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _flock(descriptor: int, kind: int) -> bool:
    """Whether the lock was granted. A file system without locks grants it: there is nobody to ask."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
    return True


class EventLog:
    """
    `events.jsonl`: one JSON object per line with `schema_version`, `seq`, `time`, `event` and the event's own fields.

    `seq` rises by one from line to line and goes on after a resume. A line is written in one call, so a kill can tear
    only the last one; a torn line is left where it is, closed with a newline, and skipped by every reader.

    Args:
        path (`Path`): the file; created where absent.
    """

    def __init__(self, path: Path):
        self.path = path
        events, self.torn = read_events(path)
        self.next_seq = events[-1]["seq"] + 1 if events else 0
        with explained_writes(path):
            self.descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            if os.fstat(self.descriptor).st_size and not self._ends_with_newline():
                os.write(self.descriptor, b"\n")

    def _ends_with_newline(self) -> bool:
        return os.pread(self.descriptor, 1, os.fstat(self.descriptor).st_size - 1) == b"\n"

    def append(self, event: str, **fields: Any) -> None:
        """Writes one event."""
        record = {"schema_version": SCHEMA_VERSION, "seq": self.next_seq, "time": now(), "event": event, **fields}
        with explained_writes(self.path):
            os.write(self.descriptor, (json.dumps(record, ensure_ascii=False) + "\n").encode())
        self.next_seq += 1

    def lock(self) -> bool:
        """Takes the run for this process; `False` where another one has it. A killed process holds nothing."""
        for _ in range(LOCK_ATTEMPTS):
            if _flock(self.descriptor, fcntl.LOCK_EX):
                return True
            time.sleep(LOCK_PAUSE_S)  # `a2d runs` looks at a run by holding it for an instant
        return False

    def close(self) -> None:
        """Closes the file, which also releases the run."""
        os.close(self.descriptor)


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """
    Reads an event log.

    Returns:
        `tuple`: the events in order, and how many lines were torn or foreign and have been skipped.
    """
    if not path.exists():
        return [], 0
    events, skipped = [], 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            skipped += 1
            continue
        if isinstance(record, dict) and isinstance(record.get("seq"), int):
            events.append(record)
        else:
            skipped += 1
    return events, skipped


class RunDirectory:
    """
    One run. Made by [`RunDirectory.create`] or [`RunDirectory.open`].

    Attributes:
        path (`Path`): the folder.
        manifest (`dict`): the content of `manifest.json` as last written or read.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self.events: EventLog | None = None
        self.made: list[Path] = []  # folders that [`create`] made, the innermost first

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def eval_path(self) -> Path:
        return self.path / "eval"

    @property
    def held_out_path(self) -> Path:
        return self.eval_path / "held_out.jsonl"

    @classmethod
    def check_free(cls, path: Path, argument: str = "--out") -> None:
        """
        Makes sure that a new run can stand at `path`: absent, or an empty folder.

        Raises:
            [`BadInput`]
        """
        if path.is_file() or (path.exists() and not path.is_dir()):
            raise BadInput(f"{argument} {path} is a file: give a new folder.")
        if path.is_dir() and any(entry.name != ".manifest.json.writing" for entry in path.iterdir()):
            hint = " or continue that run with `a2d resume`" if (path / "manifest.json").exists() else ""
            raise BadInput(f"{argument} {path} is not empty: give a new folder{hint}.")
        ancestor = path
        while not ancestor.exists():
            ancestor = ancestor.parent
        if not ancestor.is_dir():
            raise BadInput(f"{argument} {path} cannot be made: {ancestor} is a file.")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise BadInput(f"{argument} {path} cannot be made: {ancestor} is not writable.")

    @classmethod
    def create(cls, path: Path, **fields: Any) -> "RunDirectory":
        """
        Makes the folder with its first manifest, `status: running`, and takes it for this process.

        Args:
            path (`Path`): must pass [`RunDirectory.check_free`].
            fields: what the manifest says beside its schema version, status and times.
        """
        cls.check_free(path)
        manifest = {"schema_version": SCHEMA_VERSION, "status": "running", "created_at": now(), **fields}
        run = cls(path, manifest)
        run.made = [folder for folder in (path, *path.parents) if not folder.exists()]
        with explained_writes(path):
            path.mkdir(parents=True, exist_ok=True)
        try:
            write_json(run.manifest_path, manifest)
            run.take()
        except SaveFailed:
            run.discard()
            raise
        run.event("run_started")
        return run

    @classmethod
    def open(cls, path: Path, argument: str = "RUN") -> "RunDirectory":
        """
        Reads a run for looking at it; [`take`] before changing it.

        Raises:
            [`BadInput`]: no such folder, not a run, or a manifest that this version cannot read.
        """
        if not path.exists():
            raise BadInput(f"{argument} {path} does not exist.")
        if not path.is_dir():
            raise BadInput(f"{argument} {path} is a file: give a run directory.")
        file = path / "manifest.json"
        if not file.is_file():
            raise BadInput(f"{argument} {path} is not a run directory: it has no manifest.json.")
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise BadInput(f"{file} cannot be read: {error}.") from error
        if not isinstance(manifest, dict) or "status" not in manifest or "schema_version" not in manifest:
            raise BadInput(f"{file} is not the manifest of a run.")
        if manifest["schema_version"] != SCHEMA_VERSION:
            raise BadInput(
                f"{file} has schema version {manifest['schema_version']}, this a2d_hf reads {SCHEMA_VERSION}: "
                "use the version that wrote it."
            )
        return cls(path, manifest)

    def take(self) -> None:
        """
        Makes this process the only one that changes the run, and puts right what a kill left half-exchanged.

        Raises:
            [`Refused`]: another process is at work on it.
        """
        events = EventLog(self.path / "events.jsonl")
        if not events.lock():
            events.close()
            raise Refused(f"{self.path} is being worked on by another process: wait for it, or stop it first.")
        self.events = events
        recover_folder(self.model_path)

    def release(self) -> None:
        """Gives the run back."""
        if self.events is not None:
            self.events.close()
            self.events = None

    def discard(self) -> None:
        """Takes back a run that has only just begun, so that bad input leaves nothing behind."""
        self.release()
        for name in ("manifest.json", "events.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        for folder in self.made:
            folder.rmdir()

    def event(self, event: str, **fields: Any) -> None:
        """Appends to `events.jsonl`; the run must have been taken."""
        assert self.events is not None, "take the run before writing to it"
        self.events.append(event, **fields)

    def update(self, **fields: Any) -> None:
        """Sets manifest fields and writes the manifest, atomically."""
        self.manifest = {**self.manifest, **fields, "updated_at": now()}
        write_json(self.manifest_path, self.manifest)

    def finish(self, status: str, error: str | None = None) -> None:
        """The last word on a run: `completed`, `failed` or `interrupted`."""
        assert status in STATUSES[1:], status
        self.update(status=status, error=error, finished_at=now())
        self.event(f"run_{status}", **({"error": error} if error else {}))

    @property
    def status(self) -> str:
        """The manifest's status, except that a run that says `running` with no process behind it is `interrupted`."""
        status = self.manifest["status"]
        if status == "running" and self.events is None and not self._held():
            return "interrupted"
        return status

    def _held(self) -> bool:
        log = self.path / "events.jsonl"
        if not log.exists():
            return False
        descriptor = os.open(log, os.O_RDONLY)
        try:
            return not _flock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)


def find_runs(root: Path) -> Iterator[RunDirectory]:
    """The runs below `root` (and `root` itself), two levels deep, in order of name; what is no run is passed over."""
    for pattern in ("manifest.json", "*/manifest.json", "*/*/manifest.json"):
        for file in sorted(root.glob(pattern)):
            try:
                yield RunDirectory.open(file.parent)
            except BadInput:
                continue
