"""Training and evaluation text: from a file or a Hub data set to rows that the trainers understand.

Owns reading, checking and hashing of data, the cutting of running text into rows, and the held-out split. Tokenizing
and truncating belong to `a2d_hf.trainers.dataset_preparation`. Reads the data, writes nothing.
"""

import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput, first_sentence


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# The forms that the trainers read, and the column names of well-known sets that mean the same.
FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("text",), ("input_ids",))
ALIASES = {
    ("prompt", "response"): ("prompt", "completion"),
    ("question", "answer"): ("prompt", "completion"),
    ("instruction", "output"): ("prompt", "completion"),
    ("input", "output"): ("prompt", "completion"),
}
# What means something beside the columns of a form.
KEPT = {"tools", "chat_template_kwargs", "labels", "completion_mask", "assistant_masks"}
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
HINT = 'a row needs "text", or "prompt" and "completion", or "messages"'


@dataclass
class Rows:
    """
    What a data source holds.

    Attributes:
        name (`str`): the path or Hub name, as given.
        sha256 (`str`): hash over the bytes of the file, or over the rows of a Hub set.
        columns (`tuple[str, ...]`): the form of the rows, one of `FORMS`.
        running_text (`bool`): one long text, to be cut into rows, rather than rows.
        rows (`list[dict]`): the rows; for running text one row with the whole text of each file.
        notes (`list[str]`): what the user should be told.
    """

    name: str
    sha256: str
    columns: tuple[str, ...]
    running_text: bool
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def read_rows(
    source: str | Path, argument: str = "--data", where: dict[str, str] | None = None, config: str | None = None
) -> Rows:
    """
    Reads data: a `.txt`, `.jsonl`, `.json` or `.parquet` file (the first three also `.gz`), or a Hub data set as
    `name` or `name:split`.

    Args:
        source (`str` or `Path`): the file or the name.
        argument (`str`, *optional*, defaults to `"--data"`): what the user calls it.
        where (`dict[str, str]`, *optional*): columns and the value that a row must have there to be kept; a `*` in it
            stands for any text.
        config (`str`, *optional*): configuration of a Hub data set.

    Returns:
        [`Rows`]

    Raises:
        [`BadInput`]: missing, unreadable, empty, or a row without text; the sentence names the row.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise BadInput(f"{argument} {source} is a folder: give one file ({', '.join(SUFFIXES)}).")
    if not path.exists():
        if path.suffix in (*SUFFIXES, ".gz") or str(source).startswith((".", "/", "~")):
            raise BadInput(f"{argument} {source} does not exist.")
        return _read_hub(str(source), argument, where, config)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in SUFFIXES:
        raise BadInput(f"{argument} {source} has an unknown ending: use {', '.join(SUFFIXES)}.")
    try:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise BadInput(f"{argument} {source} cannot be read: {error}.") from error
    if not content.strip():
        raise BadInput(f"{argument} {source} is empty.")
    if suffix == ".parquet":
        rows = list(_parquet_rows(content, argument, source))
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadInput(f"{argument} {source} is not UTF-8 text (byte {error.start}): convert it first.") from error
        if suffix == ".txt":
            return Rows(str(source), digest, ("text",), True, [{"text": text}])
        rows = list(_json_rows(text, suffix, argument, source))
    return _checked(rows, str(source), digest, argument, where)


def _json_rows(text: str, suffix: str, argument: str, source: str | Path) -> Iterator[tuple[str, Any]]:
    if suffix == ".json":
        try:
            document = json.loads(text)
        except ValueError:
            document = None  # JSON lines under the wrong ending are common: read below
        if isinstance(document, list):
            for number, row in enumerate(document, start=1):
                yield f"row {number}", row
            return
        if isinstance(document, dict) and "\n" in text.strip():
            raise BadInput(f"{argument} {source} holds one JSON object: give a list of rows, or one row per line.")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            raise BadInput(f"{argument} {source}, line {number} is not JSON ({error}).") from error


def _parquet_rows(content: bytes, argument: str, source: str | Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise BadInput(f"{argument} {source} is not a readable parquet file: {error}.") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", row


def _read_hub(name: str, argument: str, where: dict[str, str] | None, config: str | None) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    identifier, _, split = name.partition(":")
    try:
        dataset = load_dataset(identifier, config, split=split or "train")
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise BadInput(
            f"{argument} {name} is neither a file nor a data set that can be loaded: {first_sentence(error)}"
        ) from error
    digest = hashlib.sha256()
    rows = []
    for number, row in enumerate(dataset, start=1):
        rows.append((f"row {number}", row))
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return _checked(rows, name, digest.hexdigest(), argument, where)


def _checked(
    rows: list[tuple[str, Any]], name: str, digest: str, argument: str, where: dict[str, str] | None = None
) -> Rows:
    """The rows in one of the forms that the trainers read; the first row decides which."""
    if not rows:
        raise BadInput(f"{argument} {name} is empty.")
    first = rows[0][1]
    if not isinstance(first, dict):
        raise BadInput(f"{argument} {name}, {rows[0][0]} is not an object: {HINT}.")
    columns = next((form for form in (*FORMS, *ALIASES) if all(column in first for column in form)), None)
    if columns is None:
        found = ", ".join(sorted(map(str, first))) or "nothing"
        raise BadInput(f"{argument} {name}, {rows[0][0]} has no text (it has {found}): {HINT}.")
    if where:
        rows = _filtered(rows, name, argument, where)
    checked = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise BadInput(f"{argument} {name}, {place} is not an object: {HINT}.")
        for column in columns:
            if not _has_content(row.get(column)):
                raise BadInput(
                    f'{argument} {name}, {place} has no text in "{column}": fill it in, or leave the row out.'
                )
        checked.append(row)
    result = Rows(name, digest, columns, False, checked)
    if columns in ALIASES:
        _rename(result)
    keep = {*result.columns, *KEPT}
    result.rows = [{key: value for key, value in row.items() if key in keep} for row in result.rows]
    return result


def _filtered(rows: list[tuple[str, Any]], name: str, argument: str, where: dict[str, str]) -> list[tuple[str, Any]]:
    for column, value in where.items():
        if column not in rows[0][1]:
            found = ", ".join(sorted(map(str, rows[0][1])))
            raise BadInput(f"{argument} {name} has no column {column} (it has {found}).")
        rows = [(place, row) for place, row in rows if isinstance(row, dict) and has_value(row, column, value)]
    if not rows:
        wanted = " and ".join(f"{column} = {value}" for column, value in where.items())
        raise BadInput(f"{argument} {name} has no row with {wanted}: nothing is left.")
    return rows


def has_value(row: Mapping[str, Any], column: str, value: str) -> bool:
    """Whether a row has `value` in `column`; a `*` in the value stands for any text."""
    pattern = ".*".join(map(re.escape, value.split("*")))
    return re.fullmatch(pattern, str(row.get(column)), re.DOTALL) is not None


def _has_content(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list) and bool(value)


def _rename(result: Rows) -> None:
    prompt, completion = result.columns
    with_input = prompt == "instruction" and any(row.get("input") for row in result.rows)
    renamed = []
    for row in result.rows:
        if isinstance(row[prompt], list) and isinstance(row[completion], str):  # turns, and the text of the last one
            renamed.append({"prompt": row[prompt], "completion": [{"role": "assistant", "content": row[completion]}]})
            continue
        # The instruction form keeps its material apart; below the instruction is where its users put it.
        extra = f"\n\n{row['input']}" if with_input and row.get("input") else ""
        renamed.append({"prompt": row[prompt] + extra, "completion": row[completion]})
    read = f'"{prompt}"' + (' and "input"' if with_input else "")
    result.notes.append(f'{read} read as "prompt", "{completion}" as "completion"')
    result.rows, result.columns = renamed, ("prompt", "completion")


@contextmanager
def explained_tokenizing(what: str) -> Iterator[None]:
    """Turns what a tokenizer or the preparation of rows cannot take into [`BadInput`] about `what`."""
    try:
        yield
    except Exception as error:
        # The tokenizers library raises plain `Exception`, for example for a letter that a vocabulary does not have.
        if not isinstance(error, ValueError) and type(error) is not Exception:
            raise
        raise BadInput(f"{what}: {first_sentence(error)}") from error


def cut_text(text: str, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[str]:
    """
    Cuts running text into rows of at most `max_length` tokens, special tokens included, at the ends of lines where
    possible. The rows, joined, are the text: nothing is lost and nothing is said twice.

    Args:
        text (`str`): the text.
        tokenizer (`PreTrainedTokenizerBase`): counts the tokens.
        max_length (`int`): tokens per row.

    Returns:
        `list[str]`: the rows, in order.
    """
    room = max_length - len(tokenizer("").input_ids)
    if room < 1:
        raise BadInput(f"--max-length {max_length} leaves no room for text beside the tokenizer's special tokens.")
    lines = text.splitlines(keepends=True)
    counts = [len(ids) for ids in tokenizer(lines, add_special_tokens=False).input_ids]
    rows: list[str] = []
    current: list[str] = []
    length = 0
    for line, count in zip(lines, counts, strict=True):
        if current and length + count > room:
            rows.append("".join(current))
            current, length = [], 0
        current.append(line)
        length += count
    rows.append("".join(current))
    # Counting line by line is close, not exact: a tokenizer may join across lines or add a leading space.
    return [piece for row in rows for piece in _halved(row, tokenizer, max_length)]


def _halved(text: str, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[str]:
    if len(tokenizer(text).input_ids) <= max_length or len(text) == 1:
        return [text]
    middle = len(text) // 2
    space = text.rfind(" ", 1, middle + 1)
    cut = space if space > 0 else middle
    return _halved(text[:cut], tokenizer, max_length) + _halved(text[cut:], tokenizer, max_length)


def as_dataset(rows: Rows, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> "Dataset":
    """The rows as a `datasets.Dataset`, running text cut to `max_length` tokens."""
    from datasets import Dataset

    if rows.running_text:
        with explained_tokenizing(f"--data {rows.name} cannot be tokenized"):
            texts = [piece for row in rows.rows for piece in cut_text(row["text"], tokenizer, max_length)]
        return Dataset.from_list([{"text": text} for text in texts if text.strip()])
    return Dataset.from_list(rows.rows)


def hold_out(dataset: "Dataset", fraction: float, running_text: bool, seed: int) -> tuple["Dataset", "Dataset | None"]:
    """
    Splits off rows that are never trained on. Of running text the end is held out, since neighbouring pieces share
    their story; of rows a seeded draw.

    Args:
        dataset (`Dataset`): all rows.
        fraction (`float`): share to hold out, at least one row; 0 for none.
        running_text (`bool`): whether the rows were cut from one text.
        seed (`int`): decides the draw.

    Returns:
        `tuple[Dataset, Dataset | None]`: rows to train on, rows held out.
    """
    if not 0 <= fraction < 1:
        raise BadInput(f"--held-out {fraction} must be at least 0 and below 1.")
    if fraction == 0:
        return dataset, None
    total = len(dataset)
    count = max(1, round(total * fraction))
    if count >= total:
        raise BadInput(f"--data has {total} row(s), too few to hold any out: give more, or pass --held-out 0.")
    if running_text:
        return dataset.select(range(total - count)), dataset.select(range(total - count, total))
    order = list(range(total))
    random.Random(seed).shuffle(order)
    return dataset.select(sorted(order[count:])), dataset.select(sorted(order[:count]))
