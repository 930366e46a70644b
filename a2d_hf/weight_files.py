"""Safetensors files as streams: single tensors and rows read where they lie, and one shard rewritten in small pieces.

Owns the bytes of weight files: where each tensor stands, how rows of it are read, how a file is shared with another
folder, and how one is written anew with some rows changed. Never holds more than a piece in memory, and maps no file
into it: pages of a mapped file count as the process's own. Writes only the files it is asked to write.
"""

import errno
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import EllipsisType

import torch

from .errors import BadInput
from .source import safetensors_header


PIECE = 1 << 24  # bytes read or written at once
# What the format calls its types (https://huggingface.co/docs/safetensors), as far as torch has them.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor in a safetensors file. Gives rows by slice, or all of itself (`tensor[...]`), read at that moment.

    Attributes:
        file (`Path`): where it lies.
        name (`str`): its name there.
        dtype (`torch.dtype`): as stored.
        shape (`tuple[int, ...]`): as stored.
        start (`int`): its first byte in the file.
    """

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def device(self) -> torch.device:
        """Where what is read comes to lie."""
        return _CPU

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: int | slice | EllipsisType) -> torch.Tensor:
        if index is Ellipsis:
            return self._read(self.start, self.bytes, self.shape)
        if isinstance(index, int):
            return self[index : index + 1][0]
        first, stop, _ = index.indices(self.shape[0])
        count = max(stop - first, 0)
        return self._read(self.start + first * self.row_bytes, count * self.row_bytes, (count, *self.shape[1:]))

    def rows(self, indices: list[int]) -> torch.Tensor:
        """Some rows, in the order asked for."""
        return torch.stack([self[index] for index in indices])

    def _read(self, start: int, length: int, shape: tuple[int, ...]) -> torch.Tensor:
        if length == 0:
            return torch.empty(shape, dtype=self.dtype)
        buffer = bytearray(length)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(start)
            view, done = memoryview(buffer), 0
            while done < length:
                got = file.readinto(view[done : done + PIECE])
                if not got:
                    raise BadInput(f"{self.file} has become shorter while it was read: is something writing to it?")
                done += got
        return torch.frombuffer(buffer, dtype=self.dtype).view(shape)


def stored_tensors(folder: Path, files: list[str]) -> dict[str, StoredTensor]:
    """
    Every tensor of a folder's safetensors files, by its name there.

    Raises:
        [`BadInput`]: a file is not whole, or stores a type that torch does not have.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        path = folder / file
        begin = _header_length(path)
        for name, entry in safetensors_header(path).items():
            if entry["dtype"] not in DTYPES:
                raise BadInput(f"{path} stores {name} as {entry['dtype']}, which torch does not have.")
            shape = tuple(entry["shape"])
            tensor = StoredTensor(path, name, DTYPES[entry["dtype"]], shape, begin + entry["data_offsets"][0])
            if tensor.bytes != entry["data_offsets"][1] - entry["data_offsets"][0]:
                raise BadInput(f"{path} is corrupt: {name} is not as long as its shape says; download it again.")
            found[name] = tensor
    return found


def _header_length(path: Path) -> int:
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def same_file(one: Path, other: Path) -> bool:
    """Whether two names lead to the same bytes on the same disk."""
    return os.path.samefile(one, other)


def share_file(source: Path, target: Path, copy: bool, advance: Callable[[int], None]) -> str:
    """
    Makes `target` a hard link to what `source` leads to, or a copy where no link can be made.

    Args:
        source (`Path`): an existing file; the links of a Hub snapshot are followed to the file itself.
        target (`Path`): must not exist.
        copy (`bool`): copy in any case.
        advance (`Callable[[int], None]`): told how many bytes are done.

    Returns:
        `str`: `linked` or `copied`.
    """
    real = source.resolve(strict=True)
    if not copy:
        try:
            os.link(real, target)
            advance(real.stat().st_size)
            return "linked"
        except OSError as error:
            # Another disk, a file system without links, a file of another user's: a copy serves as well.
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
    with open(real, "rb", buffering=0) as read, open(target, "xb", buffering=0) as write:
        while piece := read.read(PIECE):
            _write_all(write, piece)
            advance(len(piece))
        os.fsync(write.fileno())
    return "copied"


@dataclass(frozen=True)
class NewRows:
    """
    Rows to write into a stored tensor.

    Attributes:
        value (`torch.Tensor`): what each of them holds.
        rows (`list[int]`): which ones.
        count (`int`): how many rows the tensor has afterwards; those added are all in `rows`.
    """

    value: torch.Tensor
    rows: list[int]
    count: int


def rewrite_file(source: Path, target: Path, changes: Mapping[str, NewRows], advance: Callable[[int], None]) -> None:
    """
    Writes a safetensors file anew with some rows changed, every other byte as it was, tensors in the same order.

    Args:
        source (`Path`): the file to read.
        target (`Path`): the file to write; must not exist.
        changes (`Mapping[str, NewRows]`): by tensor name; all of them in this file.
        advance (`Callable[[int], None]`): told how many bytes of `source` are done.
    """
    tensors = stored_tensors(source.parent, [source.name])
    begin = _header_length(source)
    with open(source, "rb") as read:
        raw_header = read.read(begin)[8:]
    header = json.loads(raw_header)
    order = sorted(tensors, key=lambda name: (header[name]["data_offsets"], name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        rows = changes[name].count if name in changes else None
        length = tensor.bytes if rows is None else rows * tensor.row_bytes
        if rows is not None:
            header[name]["shape"] = [rows, *tensor.shape[1:]]
        header[name]["data_offsets"] = [offset, offset + length]
        offset += length
    if any(change.count != tensors[name].shape[0] for name, change in changes.items()):
        raw_header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw_header += b" " * (-len(raw_header) % 8)
    with open(source, "rb", buffering=0) as read, open(target, "xb", buffering=0) as write:
        _write_all(write, len(raw_header).to_bytes(8, "little") + raw_header)
        advance(begin)
        for name in order:
            first_byte = write.tell()
            read.seek(tensors[name].start)
            _copy(read, write, tensors[name].bytes, advance)
            if name in changes:
                _overwrite(write, first_byte, tensors[name].row_bytes, changes[name])
        os.fsync(write.fileno())


def _copy(read, write, length: int, advance: Callable[[int], None]) -> None:
    while length:
        piece = read.read(min(PIECE, length))
        if not piece:
            raise BadInput(f"{read.name} has become shorter while it was read: is something writing to it?")
        _write_all(write, piece)
        advance(len(piece))
        length -= len(piece)


def _overwrite(write, first_byte: int, row_bytes: int, change: NewRows) -> None:
    row = change.value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert len(row) == row_bytes, f"a row of {len(row)} bytes for one of {row_bytes}"
    for index in sorted(change.rows):
        write.seek(first_byte + index * row_bytes)
        _write_all(write, row)
    write.seek(first_byte + change.count * row_bytes)


def _write_all(write, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[write.write(view) :]


def differing_rows(one: StoredTensor, other: StoredTensor) -> set[int] | None:
    """
    The rows in which two stored tensors differ, to the bit; `None` where they have nothing in common to compare.

    Args:
        one, other ([`StoredTensor`]): `other` may have more rows, which count as differing.
    """
    if one.dtype != other.dtype or one.shape[1:] != other.shape[1:]:
        return None
    if not one.shape or not other.shape:
        alike = one.shape == other.shape and torch.equal(_bits(one[...]), _bits(other[...]))
        return set() if alike else None
    if other.shape[0] < one.shape[0]:
        return None
    differing = set(range(one.shape[0], other.shape[0]))
    step = max(1, PIECE // max(one.row_bytes, 1))
    for start in range(0, one.shape[0], step):
        stop = min(start + step, one.shape[0])
        mine, theirs = _bits(one[start:stop]), _bits(other[start:stop])
        if not torch.equal(mine, theirs):
            unequal = (mine != theirs).view(stop - start, -1).any(dim=1)
            differing |= {start + int(row) for row in unequal.nonzero().flatten()}
    return differing


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
