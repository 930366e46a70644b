"""Where the task files beside this one find their data: the folder named by the variable A2D_EVAL_DATA."""

import os
from pathlib import Path

import datasets


def load(file: str, **ignored) -> dict[str, datasets.Dataset]:
    """
    The rows of a local JSONL file, as the split `test`.

    Args:
        file (`str`): its name in the folder.
        ignored: what the harness passes on from the command line.
    """
    folder = os.environ.get("A2D_EVAL_DATA")
    if not folder:
        raise SystemExit("A2D_EVAL_DATA is not set: name the folder that holds the .jsonl files of the local tasks.")
    path = Path(folder) / file
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: A2D_EVAL_DATA must name the folder that holds it.")
    if not path.stat().st_size:
        raise SystemExit(f"{path} is empty: it should hold one JSON object per line.")
    rows = datasets.load_dataset("json", data_files=str(path), split="train")
    return {"test": rows}
