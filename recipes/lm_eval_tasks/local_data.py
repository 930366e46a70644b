"""Where the task files beside this one find their data: the folder named by the variable A2D_EVAL_DATA.

What is wrong with a file is said in one sentence, before a model is asked anything.
"""

import json
import os
from pathlib import Path

import datasets


def load(file: str, fields: list[str], **ignored) -> dict[str, datasets.Dataset]:
    """
    The rows of a local JSONL file, as the split `test`.

    Args:
        file (`str`): its name in the folder.
        fields (`list[str]`): what every row must have.
        ignored: what the harness passes on from the command line.

    Raises:
        `SystemExit`: no folder, no file, or a row that the task cannot use.
    """
    folder = os.environ.get("A2D_EVAL_DATA")
    if not folder:
        raise SystemExit("A2D_EVAL_DATA is not set: name the folder that holds the .jsonl files of the local tasks.")
    path = Path(folder) / file
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: A2D_EVAL_DATA must name the folder that holds it.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            row = _row(path, number, line, fields)
            rows.append({name: row[name] for name in fields})
    if not rows:
        raise SystemExit(f"{path} is empty: it should hold one JSON object per line.")
    return {"test": datasets.Dataset.from_list(rows)}


def _row(path: Path, number: int, line: str, fields: list[str]) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SystemExit(f"{path}, line {number} is not JSON: {error}.") from error
    missing = [name for name in fields if not isinstance(row, dict) or row.get(name) is None]
    if missing:
        raise SystemExit(f"{path}, line {number} has no field {missing[0]!r}: each row needs {', '.join(fields)}.")
    if {"choices", "gold"} <= set(fields) and row["gold"] not in range(len(row["choices"])):
        raise SystemExit(f"{path}, line {number}: gold {row['gold']!r} is no index into its choices.")
    return row
