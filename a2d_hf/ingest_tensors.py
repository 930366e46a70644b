"""The tensors of a checkpoint, read and written piece by piece.

Owns the listing of safetensors and `.bin` files as one table of tensors, the reading of any rows of any of them
without mapping or loading a file, and the streamed writing of a sharded safetensors folder. What the tensors mean is
decided elsewhere. Reads the source, writes only the folder it is given.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .errors import BadInput
from .source import PICKLE_INDEX, SAFETENSORS, SAFETENSORS_INDEX, Source, safetensors_header
from .surgery import explained_loading


# The names of types in a safetensors header (https://huggingface.co/docs/safetensors).
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE_BYTES = 1 << 26
SHARD_BYTES = 5 * 10**9


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, as configurations write it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor in a file of the source.

    Attributes:
        name (`str`): its name there.
        dtype (`torch.dtype`): as stored.
        shape (`tuple[int, ...]`): as stored.
        file (`Path`): which file.
        offset (`int`): where its bytes begin, contiguous and row by row.
        loaded (`torch.Tensor`, *optional*): the tensor itself, where its file cannot be read in parts.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int = 0
    loaded: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Rows when every dimension but the last is flattened; a scalar is one row of one number."""
        return prod(self.shape[:-1])

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop`, `(stop - start, shape[-1])`."""
        width = self.shape[-1] if self.shape else 1
        if self.loaded is not None:
            return self.loaded.reshape(-1, width)[start:stop] if self.numel else self.loaded.new_empty(0, width)
        size = width * self.dtype.itemsize
        with open(self.file, "rb") as file:
            file.seek(self.offset + start * size)
            data = bytearray(file.read((stop - start) * size))
        if len(data) != (stop - start) * size:
            raise BadInput(f"{self.file} is truncated: download it again.")
        if not data:
            return torch.empty(stop - start, width, dtype=self.dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(self.dtype).reshape(stop - start, width)

    def read(self) -> torch.Tensor:
        """All of it."""
        return self.read_rows(0, self.rows).reshape(self.shape)

    def row_spans(self, width: int | None = None, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """
        Ranges of rows that together are the tensor, each about [`PIECE_BYTES`] as fp32.

        Args:
            width (`int`, *optional*): numbers that a row becomes, where that is not `shape[-1]`.
            multiple (`int`, *optional*, defaults to 1): what the length of a range must be a multiple of.
        """
        width = width or (self.shape[-1] if self.shape else 1)
        step = max(PIECE_BYTES // max(4 * width, 1) // multiple, 1) * multiple
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)

    def pieces(self) -> Iterator[torch.Tensor]:
        """The tensor in order, unchanged, a part at a time."""
        for start, stop in self.row_spans():
            yield self.read_rows(start, stop)


@dataclass(frozen=True)
class PlannedTensor:
    """
    A tensor to be written.

    Attributes:
        name (`str`): under which name.
        dtype (`torch.dtype`): in which precision.
        shape (`tuple[int, ...]`): its shape.
        pieces (`Callable`): yields it in order, in parts whose bytes follow each other.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[torch.Tensor]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def stored_tensors(source: Source) -> dict[str, StoredTensor]:
    """
    Every tensor in a source's weight files.

    Args:
        source ([`Source`]): the parent, checked.

    Returns:
        `dict[str, StoredTensor]`: by name, in the order of the files. A name that two files hold is taken from the one
        that the index names.

    Raises:
        [`BadInput`]: a file that holds more than tensors, or a type that torch does not have.
    """
    index = next((name for name in (SAFETENSORS_INDEX, PICKLE_INDEX) if name in source.files), None)
    placed = json.loads((source.path / index).read_text(encoding="utf-8"))["weight_map"] if index else {}
    found: dict[str, StoredTensor] = {}
    for file in source.weights:
        path = source.path / file
        for tensor in _in_safetensors(path) if file.endswith(".safetensors") else _in_pickle(path):
            if placed.get(tensor.name, file) == file:
                found[tensor.name] = tensor
    missing = sorted(set(placed) - set(found))
    if missing:
        raise BadInput(f"{source.path / index} puts {missing[0]} into {placed[missing[0]]}, which does not hold it.")
    return found


def _in_safetensors(file: Path) -> Iterator[StoredTensor]:
    header = safetensors_header(file)
    with open(file, "rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise BadInput(f"{file} holds {name} as {entry['dtype']}, a type that cannot be read here.")
        yield StoredTensor(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), file, start + entry["data_offsets"][0])


def _in_pickle(file: Path) -> Iterator[StoredTensor]:
    """
    The tensors of a `.bin`, located without being read: loading under fake tensors tells where each storage begins in
    the archive. What is no such archive (files older than torch 1.6), or is not stored row by row, is loaded.
    """
    with explained_loading(file):
        with FakeTensorMode():
            located = _tensors_of(torch.load(file, weights_only=True, map_location="cpu"), file)
        loaded = None
        for name, tensor in located.items():
            begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
            shape = tuple(tensor.shape)
            if begin is not None and tensor.is_contiguous():
                offset = begin + tensor.storage_offset() * tensor.dtype.itemsize
                yield StoredTensor(name, tensor.dtype, shape, file, offset)
                continue
            if loaded is None:
                loaded = _tensors_of(torch.load(file, weights_only=True, map_location="cpu"), file)
            yield StoredTensor(name, tensor.dtype, shape, file, loaded=loaded[name].contiguous())


def _tensors_of(content: object, file: Path) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise BadInput(f"{file} is not a checkpoint: it holds no dictionary of named tensors.")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise BadInput(f"{file} holds no tensors.")
    return tensors


def write_sharded(
    folder: Path, tensors: list[PlannedTensor], advance: Callable[[int], None], shard_bytes: int = SHARD_BYTES
) -> None:
    """
    Writes tensors as safetensors, one file or shards with an index, never holding more than a piece of one.

    Args:
        folder (`Path`): where to; exists.
        tensors (`list[PlannedTensor]`): what, in order.
        advance (`Callable[[int], None]`): told the bytes just written.
        shard_bytes (`int`, *optional*): most bytes in a file that holds more than one tensor.
    """
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        _write_file(folder / SAFETENSORS, shards[0], advance)
        return
    placed = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, advance)
        placed |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: list[PlannedTensor], advance: Callable[[int], None]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Widest types first, so that every tensor begins at a multiple of its own size.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            written = 0
            for piece in tensor.pieces():
                assert piece.dtype == tensor.dtype, (tensor.name, piece.dtype, tensor.dtype)
                data = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(data)
                written += data.nbytes
                advance(data.nbytes)
            assert written == tensor.nbytes, (tensor.name, written, tensor.nbytes)
