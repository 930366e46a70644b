"""A file that grows by one finished line at a time: what a long run has done, when it was stopped at any moment.

Owns the form of such files: JSON lines, the first of which holds the settings of the run.
"""

import json
import os
from pathlib import Path
from typing import Any

from .atomic_files import explained_writes
from .errors import BadInput


class Journal:
    """
    Lines that are on disk as soon as they are added.

    Args:
        path (`Path`): the file; what is there already is read, and a last line that a kill has torn is cut off.
        settings (`dict`): of this run.

    Attributes:
        records (`list[dict]`): the lines behind the settings.

    Raises:
        [`BadInput`]: the file holds what other settings or another model wrote.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        records = [json.loads(line) for line in lines[:-1] if line.strip()]
        if records and records[0] != {"settings": settings}:
            raise BadInput(
                f"{path} was written with other settings or another model: give another --out, or remove it."
            )
        self.records = records[1:]
        if lines and lines[-1]:
            with explained_writes(path):
                os.truncate(path, sum(len(line) + 1 for line in lines[:-1]))
        if not records:
            self._append({"settings": settings})

    def add(self, record: dict[str, Any]) -> None:
        """Keeps one more record."""
        self._append(record)
        self.records.append(record)

    def _append(self, record: dict[str, Any]) -> None:
        with explained_writes(self.path), open(self.path, "ab") as file:
            file.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
