"""What `--data` names: one file or Hub data set, or a mixture of them in the compact form of data_mixture.py.

Owns how rows of several sources become the rows of one. Reads the data, writes nothing.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from .data import Rows, read_rows
from .data_mixture import Part, parse_mixture
from .errors import BadInput


def read_data(source: str | Path, argument: str = "--data", seed: int = 0) -> Rows:
    """
    Reads a file, a Hub data set `name[:split]`, or a mixture such as `A.jsonl[train:100]+B.jsonl`.

    Args:
        source (`str` or `Path`): what to read.
        argument (`str`, *optional*, defaults to `"--data"`): what the user calls it.
        seed (`int`, *optional*, defaults to 0): decides the order of a weighted mixture.

    Returns:
        [`Rows`]: of a mixture with one hash over the hashes of its sources and their options.

    Raises:
        [`BadInput`]: a source that cannot be read, or forms that do not go together.
    """
    if Path(source).expanduser().exists() or not re.search(r"[+\[]", str(source)):
        return read_rows(source, argument)
    parts = parse_mixture(str(source), argument)
    read = [_read_part(part, argument) for part in parts]
    if len({rows.running_text for rows in read}) > 1:
        text = next(rows.name for rows in read if rows.running_text)
        raise BadInput(f"{argument}: {text} is running text, the others have rows: put its pieces into rows first.")
    columns, listed = _in_one_form(read, argument)
    if parts[0].weight is not None and len(parts) > 1:
        mixed = _drawn(listed, [part.weight for part in parts], seed)
    else:
        mixed = [row for rows in listed for row in rows]
    notes = [note for rows in read for note in rows.notes]
    if len(parts) > 1 and not read[0].running_text:
        counts = [f"{_short(part)} {len(rows):,}" for part, rows in zip(parts, listed, strict=True)]
        notes.append(f"mixed {len(mixed):,} rows of {', '.join(counts)}")
    facts = [[rows.sha256, part.train, part.weight, part.where] for part, rows in zip(parts, read, strict=True)]
    digest = hashlib.sha256(json.dumps([facts, seed if parts[0].weight else None]).encode()).hexdigest()
    return Rows(" + ".join(map(_short, parts)), digest, columns, read[0].running_text, mixed, notes)


def _read_part(part: Part, argument: str) -> Rows:
    if part.test is not None:
        raise BadInput(f"{argument}: `test` of {part.path} is for the recipes: here --held-out sets rows aside.")
    name = part.path if part.split == "train" else f"{part.path}:{part.split}"
    rows = read_rows(name, argument, part.where, part.name)
    if rows.running_text and (part.train or part.weight or part.where):
        raise BadInput(f"{argument}: {part.path} is running text, which has no rows to choose among: leave [...] out.")
    if part.train is not None:
        rows.rows = rows.rows[: part.train]
    return rows


def _short(part: Part) -> str:
    """A source as the manifest names it: without the folders of this machine."""
    name = part.path.rsplit("/", 1)[-1] if part.path.startswith(("/", ".", "~")) else part.path
    return name + (f" ({', '.join(f'{k} {v}' for k, v in part.where.items())})" if part.where else "")


def _in_one_form(read: list[Rows], argument: str) -> tuple[tuple[str, ...], list[list[dict[str, Any]]]]:
    """The rows of each source, all with the same columns: prompts with completions go among messages as two turns."""
    forms = {rows.columns for rows in read}
    if len(forms) == 1:
        return read[0].columns, [rows.rows for rows in read]
    if not forms <= {("messages",), ("prompt", "completion")}:
        shown = "; ".join(f"{rows.name} has {' + '.join(rows.columns)}" for rows in read)
        raise BadInput(f"{argument}: these data sets do not go together: {shown}.")
    return ("messages",), [[_as_messages(row) for row in rows.rows] for rows in read]


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        return row
    turns: list[dict[str, Any]] = []
    for role, side in (("user", row["prompt"]), ("assistant", row["completion"])):
        turns += side if isinstance(side, list) else [{"role": role, "content": side}]
    rest = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
    return {"messages": turns, **rest}


def _drawn(listed: list[list[dict[str, Any]]], weights: list[float], seed: int) -> list[dict[str, Any]]:
    """Rows drawn by weight until one source is used up: the order of the recipes, by the same library and seed."""
    import datasets

    places = [
        datasets.Dataset.from_dict({"source": [i] * len(rows), "row": list(range(len(rows)))})
        for i, rows in enumerate(listed)
    ]
    shares = [weight / sum(weights) for weight in weights]
    drawn = datasets.interleave_datasets(places, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
    return [listed[i][row] for i, row in zip(drawn["source"], drawn["row"], strict=True)]
