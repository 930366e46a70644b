"""The finished parts of an evaluation, kept so that an interrupted one goes on where it stopped.

Owns `eval/parts/`: one JSON file per part, named by the part and by a hash of everything that decides its result: the
files of the model, the text, the arguments, the versions of the libraries, the device. A part that is there is never
measured again; one that was cut short is not there.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .atomic_files import explained_writes, write_json
from .provenance import library_versions


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def folder_fingerprint(folder: Path) -> str:
    """Hash of the names, sizes and times of the files of a checkpoint: any change of them is another model."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return digest([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


class Parts:
    """
    Args:
        folder (`Path`, *optional*): where they are kept; `None` keeps nothing.
        shared (`dict`): what decides every part: seed, device.
        fresh (`bool`, *optional*, defaults to `False`): measure what is there already once more.

    Attributes:
        reused (`list[str]`): names of the parts that were there from an earlier call.
    """

    def __init__(self, folder: Path | None, shared: dict[str, Any], fresh: bool = False):
        self.folder, self.fresh = folder, fresh
        self.shared = shared | {"versions": library_versions()}
        self.reused: list[str] = []
        self._known: dict[str, dict[str, Any]] = {}  # by the hash of their keys: what this call has in hand already
        if folder is not None:
            with explained_writes(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, decides: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """
        A part, from its file or measured now and then written.

        Args:
            name (`str`): begins the file's name.
            decides (`dict`): plain values that decide the result besides those of all parts.
            measure (`Callable`): returns the result: `report` (the same at every call), and where it took the time
                `timing`.
        """
        key = self.shared | decides | {"part": name}
        if digest(key) not in self._known:
            self._known[digest(key)] = self._kept_or_measured(name, key, measure)
        return self._known[digest(key)]

    def _kept_or_measured(
        self, name: str, key: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        path = None if self.folder is None else self.folder / f"{name}-{digest(key)}.json"
        if path is not None and not self.fresh and path.is_file():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))["result"]
            except (ValueError, KeyError):
                kept = None  # not ours, or damaged: measured again and replaced
            if kept is not None:
                self.reused.append(name)
                return kept
        result = measure()
        if path is not None:
            write_json(path, {"key": key, "result": result})
        # As it would come back from the file: the report has the same bytes either way.
        return json.loads(json.dumps(result))
