"""The folder of the autoregressive parent: is everything there, is every shard whole, and which bytes are they.

Owns the checks that precede a conversion and the source's hash. Reads the folder, writes nothing, imports no torch: a
truncated shard of a 15 GB model is found in milliseconds, from its header.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BadInput


SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# What decides how a tokenizer behaves; any file of the first group means that there is one.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TOKENIZER_EXTRAS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
HASH_BLOCK = 1 << 22
# A Hub id: `name` or `organisation/name`, and nothing that looks like a path or a file.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True)
class Source:
    """
    A parent that has passed the checks.

    Attributes:
        path (`Path`): its folder.
        name (`str`): how people call it: the Hub id, or the folder's name.
        config (`dict`): its `config.json`.
        weights (`list[str]`): the weight files, in order.
        files (`list[str]`): every file that decides what the model computes, weights included, in order.
        licence (`str`, *optional*): as its model card states it.
    """

    path: Path
    name: str
    config: dict[str, Any]
    weights: list[str]
    files: list[str]
    licence: str | None

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum((self.path / name).stat().st_size for name in self.files)

    def fingerprint(self, advance: Callable[[int], None] | None = None) -> dict[str, Any]:
        """
        SHA-256 of every file, and one over all of them.

        Args:
            advance (`Callable[[int], None]`, *optional*): told how many bytes have just been read.

        Returns:
            `dict`: `sha256` (over the sorted lines `<hash>  <name>`) and `files` ({name: {sha256, bytes}}).
        """
        files = {
            name: {"sha256": file_sha256(self.path / name, advance), "bytes": (self.path / name).stat().st_size}
            for name in self.files
        }
        lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(files.items()))
        return {"sha256": hashlib.sha256(lines.encode()).hexdigest(), "files": files}


def file_sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
                if advance is not None:
                    advance(len(block))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def locate(source: str | Path, argument: str = "SRC", download: bool = False) -> tuple[Path, str]:
    """
    The folder of a local path or of a Hub id that is in the local cache.

    Args:
        source (`str` or `Path`): a folder, or `organisation/name`.
        argument (`str`, *optional*, defaults to `"SRC"`): what the user calls it.
        download (`bool`, *optional*, defaults to `False`): fetch what the cache lacks of a Hub id.

    Returns:
        `tuple[Path, str]`: the folder, and the name to call the model by.

    Raises:
        [`BadInput`]
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve(), path.resolve().name
    if path.exists():
        raise BadInput(f"{argument} {source} is a file: give the folder that holds config.json and the weights.")
    text = str(source)
    if text.count("/") != 1 or not HUB_ID.fullmatch(text):
        raise BadInput(f"{argument} {source} does not exist: give a folder, or a Hub id such as Qwen/Qwen3-0.6B.")
    from .hub_source import cached_snapshot, download_snapshot

    return (download_snapshot if download else cached_snapshot)(text, argument), text


def inspect_source(source: str | Path, argument: str = "SRC") -> Source:
    """
    Finds the parent and checks that its configuration, weights and tokenizer are there and whole.

    Args:
        source (`str` or `Path`): a folder, or a Hub id in the local cache.
        argument (`str`, *optional*, defaults to `"SRC"`): what the user calls it.

    Returns:
        [`Source`]

    Raises:
        [`BadInput`]: one sentence naming the file and what is wrong with it.
    """
    path, name = locate(source, argument)
    config = read_config(path)
    try:
        weights, index = find_weights(path)
    except BadInput as error:
        if "/" not in name:
            raise
        from .hub_source import download_line

        raise BadInput(f"{error} To fetch it whole, pass --download or run `{download_line(name)}`.") from error
    tokenizer = [file for file in (*TOKENIZER_FILES, *TOKENIZER_EXTRAS) if (path / file).is_file()]
    if not any(file in TOKENIZER_FILES for file in tokenizer):
        raise BadInput(f"{path} has no tokenizer: copy the parent's tokenizer.json and tokenizer_config.json there.")
    # Remote code and generation defaults decide what the parent computes too.
    code = sorted(file.name for file in path.glob("*.py"))
    extras = [file for file in ("generation_config.json", index) if file and (path / file).is_file()]
    return Source(
        path, name, config, weights, ["config.json", *weights, *extras, *tokenizer, *code], read_licence(path)
    )


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a model folder, or [`BadInput`] saying what is wrong with it."""
    file = path / "config.json"
    if not file.is_file():
        raise BadInput(f"{path} has no config.json: it is not a model folder.")
    try:
        text = file.read_text(encoding="utf-8")
        config = json.loads(text)
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        state = "is empty" if not file.stat().st_size else f"is not JSON ({error})"
        raise BadInput(f"{file} {state}.") from error
    if not isinstance(config, dict):
        raise BadInput(f"{file} is not a model's configuration: it holds no JSON object.")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise BadInput(f"{file} has no `model_type`: add the type that transformers knows the model by.")
    return config


def find_weights(path: Path) -> tuple[list[str], str | None]:
    """
    The weight files of a folder in the order transformers prefers them, each checked for being whole.

    Returns:
        `tuple[list[str], str | None]`: the files, and the index where there is one.

    Raises:
        [`BadInput`]: none there, a shard missing, truncated or corrupt.
    """
    if (path / SAFETENSORS).is_file():
        safetensors_header(path / SAFETENSORS)
        return [SAFETENSORS], None
    if (path / SAFETENSORS_INDEX).is_file():
        placed = _weight_map(path / SAFETENSORS_INDEX)
        headers = {shard: safetensors_header(path / shard) for shard in sorted(set(placed.values()))}
        for tensor, shard in placed.items():
            if tensor not in headers[shard]:
                raise BadInput(f"{path / SAFETENSORS_INDEX} puts {tensor} into {shard}, which does not hold it.")
        return list(headers), SAFETENSORS_INDEX
    if (path / PICKLE).is_file():
        _check_archive(path / PICKLE)
        return [PICKLE], None
    if (path / PICKLE_INDEX).is_file():
        shards = sorted(set(_weight_map(path / PICKLE_INDEX).values()))
        for shard in shards:
            _check_archive(path / shard)
        return shards, PICKLE_INDEX
    raise BadInput(f"{path} has no weights: it needs {SAFETENSORS}, a sharded set with its index, or {PICKLE}.")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BadInput(f"{index} is not a weight index: it needs an object `weight_map`.") from error
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise BadInput(f"{index} is not a weight index: `weight_map` must name a file for every tensor.")
    missing = sorted({shard for shard in placed.values() if not (index.parent / shard).is_file()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInput(f"{index} names {missing[0]}{more}, which is not there: download it again.")
    return placed


def safetensors_header(file: Path) -> dict[str, Any]:
    """
    The header of a safetensors file, after checking that the file is as long as its header says.

    Raises:
        [`BadInput`]: truncated or corrupt.
    """
    length = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        header_length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_length > length - 8:
            raise BadInput(f"{file} is truncated or not a safetensors file: download it again.")
        try:
            header = json.loads(stream.read(header_length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise BadInput(f"{file} is corrupt: its header cannot be read; download it again.") from error
    expected = 8 + header_length + end
    if length != expected:
        state = "truncated" if length < expected else "corrupt"
        raise BadInput(f"{file} is {state}: {length} bytes where its header says {expected}; download it again.")
    if not tensors:
        raise BadInput(f"{file} holds no tensors.")
    return tensors


def _check_archive(file: Path) -> None:
    # Old plain pickles are left to torch.load(weights_only=True), which refuses everything but tensors.
    with open(file, "rb") as stream:
        start = stream.read(2)
    if start == b"PK" and not zipfile.is_zipfile(file):
        raise BadInput(f"{file} is truncated: download it again.")
    if len(start) < 2:
        raise BadInput(f"{file} is empty: download it again.")


def read_licence(path: Path) -> str | None:
    """The licence that the model card (`README.md`) states in its header, or `None`."""
    card = path / "README.md"
    if not card.is_file():
        return None
    match = re.match(r"---\s*\n(.*?)\n---\s*\n", card.read_text(encoding="utf-8", errors="replace"), re.S)
    found = match and re.search(r"^license:\s*[\"']?([^\"'\n#]+?)[\"']?\s*$", match.group(1), re.M)
    return found.group(1) if found else None
