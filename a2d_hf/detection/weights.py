"""Which weights lie beside a config, in what format, and whether they are whole, from file names and headers alone.

Owns the rules about weight files. Reads folder listings, indices and safetensors headers; never a tensor.
"""

import json
import re
import shlex
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..source import PICKLE, PICKLE_INDEX, SAFETENSORS, SAFETENSORS_INDEX, safetensors_header
from .config_reading import Source


# Formats that transformers cannot train from: how to know them, what to call them, what to do.
FOREIGN = (
    (re.compile(r".*\.gguf$"), "gguf", "GGUF weights (llama.cpp's quantized format)"),
    (re.compile(r".*\.onnx$"), "onnx", "ONNX weights"),
    (re.compile(r"tf_model(-\d+-of-\d+)?\.h5$"), "tensorflow", "TensorFlow weights"),
    (re.compile(r"flax_model.*\.msgpack$"), "flax", "Flax weights"),
    (re.compile(r"consolidated.*\.(safetensors|pth)$"), "consolidated", "weights in their trainer's own layout"),
    (re.compile(r"adapter_model\.(safetensors|bin)$"), "adapter", "an adapter without its base model"),
    (re.compile(r".*\.(ot|nemo|mlmodel|tflite|pte|npz|engine|ckpt|pth)$"), "other", "another framework's weights"),
    (re.compile(r"openvino_model\.(bin|xml)$"), "openvino", "OpenVINO weights"),
)  # fmt: skip
SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
# Tensors that only a quantized checkpoint has.
QUANTIZED_TENSOR = re.compile(r"\.(qweight|qzeros|weight_packed|absmax|SCB|weight_scale_inv)$")
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Weights:
    """
    The weights beside a config.

    Attributes:
        present (`bool`): whether all of them are there and can be read.
        format (`str`, *optional*): safetensors, pytorch, gguf, onnx, tensorflow, flax, consolidated, adapter, openvino
            or other.
        shards (`int`): files that hold them.
        bytes (`int`): their size together.
        download (`str`, *optional*): the command that fetches them, where they are missing.
        note (`str`, *optional*): how they are loaded, or what is odd about them.
        broken (`str`, *optional*): why they cannot be used although they are there.
        foreign (`str`, *optional*): why their format is refused.
        quantized (`bool`): whether the tensors themselves are stored quantized.
        parameters (`int`, *optional*): how many numbers they hold, where headers tell.
        dtypes (`dict`): safetensors' name of each stored type -> how many numbers are stored in it.
    """

    present: bool
    format: str | None = None
    shards: int = 0
    bytes: int = 0
    download: str | None = None
    note: str | None = None
    broken: str | None = None
    foreign: str | None = None
    quantized: bool = False
    parameters: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON answer."""
        return {
            "present": self.present,
            "format": self.format,
            "shards": self.shards,
            "bytes": self.bytes,
            "download": self.download,
            "note": self.note,
        }


def inspect_weights(source: Source, config: dict[str, Any]) -> Weights:
    """
    Looks at the weights that belong to a config.

    Args:
        source ([`Source`]): where the model is.
        config (`dict`): its config; it may name the repository it came from.
    """
    download = download_command(source, config)
    folder = source.folder
    if folder is None:
        return Weights(present=False, download=download)
    try:
        names = {entry.name for entry in folder.iterdir() if entry.is_file()}
        if (folder / "onnx").is_dir():
            names |= {entry.name for entry in (folder / "onnx").glob("*.onnx")}
    except OSError as error:
        raise BadInput(f"{folder} cannot be read: {error.strerror}.") from error
    try:
        if SAFETENSORS in names:
            return _safetensors(folder, [SAFETENSORS])
        if SAFETENSORS_INDEX in names:
            return _indexed(folder, SAFETENSORS_INDEX, download) or _missing(names, download)
        if PICKLE in names:
            return _pickled(folder, [PICKLE])
        if PICKLE_INDEX in names:
            return _indexed(folder, PICKLE_INDEX, download) or _missing(names, download)
    except OSError as error:
        return Weights(present=False, broken=f"the weights in {folder} cannot be read: {error.strerror}.")
    except BadInput as error:
        return Weights(present=False, format="safetensors", broken=str(error))
    stray = sorted(name for name in names if SHARD.fullmatch(name))
    if stray:
        index = SAFETENSORS_INDEX if stray[0].endswith(".safetensors") else PICKLE_INDEX
        return Weights(present=False, broken=f"{folder} holds {stray[0]} but not {index}: download it again.")
    return _missing(names, download)


def download_command(source: Source, config: dict[str, Any]) -> str:
    """The exact command that fetches the weights; a placeholder stands where the Hub id is unknown."""
    repo_id = source.repo_id
    if repo_id is None:
        named = config.get("_name_or_path")
        repo_id = named if isinstance(named, str) and HUB_ID.fullmatch(named) else None
    command = f"hf download {repo_id or 'OWNER/NAME'}"
    if source.repo_id is not None or source.folder is None:
        return command
    return f"{command} --local-dir {shlex.quote(str(source.folder))}"


def _missing(names: set[str], download: str) -> Weights:
    for pattern, kind, label in FOREIGN:
        found = sorted(name for name in names if pattern.fullmatch(name))
        if found:
            foreign = f"it holds only {label} ({found[0]}): convert the checkpoint with safetensors weights instead."
            if kind == "adapter":
                foreign = f"it holds only {label} ({found[0]}): merge it into its base model first."
            return Weights(present=False, format=kind, shards=len(found), foreign=foreign)
    return Weights(present=False, download=download)


def _indexed(folder: Path, index: str, download: str) -> Weights | None:
    """The shards that an index names; `None` where none of them is there."""
    try:
        placed = json.loads((folder / index).read_bytes())["weight_map"]
        shards = sorted(set(placed.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Weights(present=False, broken=f"{folder / index} is not a weight index: download it again.")
    if not shards or not all(isinstance(shard, str) for shard in shards):
        return Weights(present=False, broken=f"{folder / index} names no files: download it again.")
    if any("/" in shard or "\\" in shard for shard in shards):
        return Weights(present=False, broken=f"{folder / index} names files outside its folder: do not use it.")
    there = [shard for shard in shards if (folder / shard).is_file()]
    if not there:
        return None
    if absent := [shard for shard in shards if shard not in there]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        return Weights(
            present=False,
            format="safetensors" if index == SAFETENSORS_INDEX else "pytorch",
            shards=len(there),
            download=download,
            broken=f"{folder / index} names {absent[0]}{more}, which {'are' if more else 'is'} not there: {download}",
        )
    return _safetensors(folder, shards) if index == SAFETENSORS_INDEX else _pickled(folder, shards)


def _safetensors(folder: Path, files: list[str]) -> Weights:
    dtypes: Counter[str] = Counter()
    quantized = False
    for file in files:
        for name, tensor in safetensors_header(folder / file).items():
            shape = tensor.get("shape")
            dtypes[str(tensor.get("dtype"))] += prod(shape) if _is_shape(shape) else 0
            quantized = quantized or bool(QUANTIZED_TENSOR.search(name))
    quantized = quantized or any(dtype in dtypes for dtype in EIGHT_BITS)
    return Weights(
        present=True,
        format="safetensors",
        shards=len(files),
        bytes=sum((folder / file).stat().st_size for file in files),
        quantized=quantized,
        parameters=None if quantized else sum(dtypes.values()),
        dtypes=dict(dtypes),
    )


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def _pickled(folder: Path, files: list[str]) -> Weights:
    for file in files:
        with open(folder / file, "rb") as stream:
            start = stream.read(2)
        if len(start) < 2 or (start == b"PK" and not zipfile.is_zipfile(folder / file)):
            return Weights(present=False, format="pytorch", broken=f"{folder / file} is truncated: download it again.")
    return Weights(
        present=True,
        format="pytorch",
        shards=len(files),
        bytes=sum((folder / file).stat().st_size for file in files),
        note="pickled; loads with weights_only, which runs no code",
    )
