"""Finds a model's `config.json` and reads values out of it without trusting any of them.

Owns the way from what the user typed (a folder, a config file, a Hub id in the local cache) to a dictionary, and the
typed access to that dictionary: names of older files, defaults of the type, and one clear sentence where a value
cannot be used. Reads files, writes nothing, uses no network.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .type_table import TypeEntry


HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
SNAPSHOT = re.compile(r"models--(.+?)--(.+)")
# No model has a dimension near this; beyond it a plan would overflow, so the number must be a mistake.
LARGEST_DIMENSION = 2**40
LARGEST_FILE = 2**26


class InvalidConfig(Exception):
    """The config file is there but cannot describe a model; the message is one sentence."""


class NotDownloaded(BadInput):
    """A Hub id that is not in the local cache; `download` is the command that fetches it."""

    def __init__(self, repo_id: str):
        self.download = f"hf download {repo_id}"
        super().__init__(
            f"SRC {repo_id} is neither a folder here nor a model in the local Hub cache; to fetch it from the Hub: "
            f"{self.download}"
        )


@dataclass(frozen=True)
class Source:
    """
    Where a model is.

    Attributes:
        name (`str`): what the user typed.
        config_file (`Path`, *optional*): its `config.json`; `None` where the folder has none.
        folder (`Path`, *optional*): the folder that may also hold weights and a tokenizer.
        repo_id (`str`, *optional*): its id on the Hub, where it can be told.
    """

    name: str
    config_file: Path | None
    folder: Path | None
    repo_id: str | None


def find_source(src: str | Path) -> Source:
    """
    Finds the model that `src` names.

    Args:
        src (`str` or `Path`): a folder, a `.json` config file, or a Hub id that is in the local cache.

    Returns:
        [`Source`]

    Raises:
        [`BadInput`]: nothing there, or something that is not a model; [`NotDownloaded`] for a Hub id.
    """
    text = str(src)
    try:
        path = Path(text).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"SRC {text!r} is not a path: {error}.") from error
    if is_folder:
        config = path / "config.json"
        return Source(text, config if config.is_file() else None, path, _repo_id_of(path))
    if is_file:
        if path.suffix != ".json":
            raise BadInput(f"SRC {text} is a file: give the folder that holds config.json, or that config.json.")
        return Source(text, path, path.parent if path.name == "config.json" else None, _repo_id_of(path.parent))
    if text.count("/") <= 1 and HUB_ID.fullmatch(text):
        return _find_in_cache(text)
    raise BadInput(f"SRC {text} does not exist: give a folder, a config.json, or a Hub id such as Qwen/Qwen3-0.6B.")


def _find_in_cache(repo_id: str) -> Source:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, "config.json")
    except HFValidationError as error:
        raise BadInput(f"SRC {repo_id} is neither a folder nor a Hub id: give a folder that exists.") from error
    if not isinstance(found, str):
        raise NotDownloaded(repo_id)
    return Source(repo_id, Path(found), Path(found).parent, repo_id)


def _repo_id_of(folder: Path) -> str | None:
    """The Hub id of a folder inside the Hub cache (`models--owner--name/snapshots/revision`)."""
    parts = folder.absolute().parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and (found := SNAPSHOT.fullmatch(parts[-3])):
        return f"{found[1]}/{found[2]}"
    return None


def read_json(file: Path) -> Any:
    """
    A JSON file's value.

    Raises:
        [`InvalidConfig`]: empty, not text, not JSON, or absurdly large or deep.
        [`BadInput`]: the file cannot be opened.
    """
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise InvalidConfig(f"{file.name} is {file.stat().st_size} bytes long, which no model's config is.")
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{file.name} is not UTF-8 text (byte {error.start}).") from error
    if not text.strip():
        raise InvalidConfig(f"{file.name} is empty.")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InvalidConfig(f"{file.name} is nested too deeply to be a model's config.") from error
    except ValueError as error:
        raise InvalidConfig(f"{file.name} is not JSON ({error}).") from error


def read_config(file: Path) -> dict[str, Any]:
    """The config of a model: a JSON object with a `model_type`. Raises as [`read_json`]."""
    config = read_json(file)
    if not isinstance(config, dict):
        raise InvalidConfig(f"{file.name} holds {_kind(config)} instead of an object.")
    model_type = config.get("model_type")
    if model_type is None or model_type == "":
        raise InvalidConfig(f"{file.name} has no `model_type`: add the type that transformers knows the model by.")
    if not isinstance(model_type, str):
        raise InvalidConfig(f"`model_type` is {_kind(model_type)} instead of text.")
    return config


class ConfigView:
    """
    Typed access to the config of one text model.

    A field is looked up under its standard name, then under the name that the type uses for it, then in the type's
    defaults: what transformers does. Every read checks the value, so that whatever stands in the file becomes either
    a usable value or [`InvalidConfig`] with the field's name.

    Args:
        raw (`dict`): the config, or the part of it that describes the text model.
        entry ([`TypeEntry`]): what is known about its type.
    """

    def __init__(self, raw: dict[str, Any], entry: TypeEntry):
        self.raw = raw
        self.entry = entry

    def get(self, name: str) -> Any:
        """The value of a field, unchecked; `a.b` reads `b` inside the object `a`. `None` where it is not set."""
        outer, _, inner = name.partition(".")
        if inner:
            part = self.raw.get(outer)
            return part.get(inner) if isinstance(part, dict) else None
        for key in (name, self.entry.alias.get(name)):
            if key in self.raw:
                return self.raw[key]
        return self.entry.defaults.get(name)

    def knows(self, name: str) -> bool:
        """Whether the type has this field at all: a `sliding_window` in a Llama config means nothing."""
        return name in self.entry.defaults or name in self.entry.alias

    def integer(self, *names: str, least: int = 1) -> int | None:
        """The first of these fields that is set, as a whole number of at least `least`."""
        for name in names:
            value = self.get(name)
            if value is None:
                continue
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidConfig(f"`{name}` is {_kind(value)} instead of a whole number.")
            if not least <= value <= LARGEST_DIMENSION:
                raise InvalidConfig(f"`{name}` is {_short(value)}: it must be at least {least} and of a sane size.")
            return value
        return None

    def needed(self, *names: str) -> int:
        """As [`integer`], for fields without which there is no model."""
        value = self.integer(*names)
        if value is None:
            raise InvalidConfig(f"`{names[0]}` is missing.")
        return value

    def number(self, name: str) -> float | None:
        """A field as a finite number."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidConfig(f"`{name}` is {_kind(value)} instead of a number.")
        if not math.isfinite(value) or abs(value) > LARGEST_DIMENSION:
            raise InvalidConfig(f"`{name}` is {_short(value)} instead of a finite number.")
        return float(value)

    def flag(self, name: str) -> bool | None:
        """A field as true or false."""
        value = self.get(name)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        raise InvalidConfig(f"`{name}` is {_kind(value)} instead of true or false.")

    def text(self, name: str) -> str | None:
        """A field as text."""
        value = self.get(name)
        if value is None or isinstance(value, str):
            return value
        raise InvalidConfig(f"`{name}` is {_kind(value)} instead of text.")

    def items(self, name: str, kind: type | tuple[type, ...]) -> list[Any] | None:
        """A field as a list whose elements are all of `kind`."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, kind) and not _sneaky(v, kind) for v in value):
            raise InvalidConfig(f"`{name}` is not a list of the right kind of values.")
        return value

    def table(self, name: str) -> dict[str, Any] | None:
        """A field as an object."""
        value = self.get(name)
        if value is None or isinstance(value, dict):
            return value
        raise InvalidConfig(f"`{name}` is {_kind(value)} instead of an object.")


def _sneaky(value: Any, kind: type | tuple[type, ...]) -> bool:
    """JSON's true is a Python int; a list of numbers must not hold it."""
    return isinstance(value, bool) and kind is int


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _short(value: Any) -> str:
    try:
        text = str(value)
    except ValueError:  # an integer with more digits than Python prints
        return "a huge number"
    return text if len(text) <= 30 else text[:27] + "..."
