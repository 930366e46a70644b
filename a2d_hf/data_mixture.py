"""Which data sets a training reads, and how several become one.

Owns the compact form of a mixture, `A+B[lang:python,train:10000]`, and the loading of files, Hub sets and mixtures of
them as `datasets` objects, for the recipes. data.py owns the reading of one file for the command line, and the forms
that a row may have. Reads data, writes nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import ALIASES, FORMS, HINT, KEPT, SUFFIXES, has_value
from .errors import BadInput, first_sentence


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import DatasetMixtureConfig, ScriptArguments

# Keys of the compact form that say how to read; any other names a column that must hold the value.
OPTIONS = ("name", "split", "weight", "train", "test")
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class Part:
    """
    One data set of a mixture.

    Args:
        path (`str`): a file, a folder of files, or a Hub data set.
        name (`str`, *optional*): its configuration on the Hub.
        split (`str`, *optional*, defaults to `"train"`): which split to train on.
        weight (`float`, *optional*): share of the mixture; all parts have one, or none has.
        train, test (`int`, *optional*): most rows to train on, and rows to set aside for evaluation.
        where (`dict[str, str]`): columns and the value that a row must have there; a `*` in it stands for any text.
        columns (`list[str]`, *optional*): columns to keep.
    """

    path: str
    name: str | None = None
    split: str = "train"
    weight: float | None = None
    train: int | None = None
    test: int | None = None
    where: dict[str, str] = field(default_factory=dict)
    columns: list[str] | None = None


@dataclass
class TrainingData:
    """What to train on, and what to evaluate on where there is such a split."""

    train: "Dataset | IterableDataset"
    test: "Dataset | IterableDataset | None"


def parse_mixture(text: str, argument: str = "--dataset_name") -> list[Part]:
    """
    Reads the compact form: data sets joined by `+`, each with options in brackets, `key:value` joined by commas.

    `name` is the configuration on the Hub, `split` which split, `weight` the share of the mixture, `train` and `test`
    numbers of rows; any other key is a column, and only rows that have the value there are kept: `lang:python` where
    it is all of the text, `output:*python*` where it is part of it. A `+` or a bracket in the name of a file that
    exists is part of its name.

    Args:
        text (`str`): for example `allenai/tulu-3-sft-mixture + opc/stage1[lang:python,train:10_000]`.
        argument (`str`, *optional*, defaults to `"--dataset_name"`): what the user calls it.

    Returns:
        `list[Part]`
    """
    if Path(text).expanduser().exists():
        return [Part(text)]
    pieces = re.split(r"\+(?![^\[]*\])", text)
    parts, start = [], 0
    while start < len(pieces):
        # The longest run of pieces that is the name of a file; one piece where none is.
        ends = range(len(pieces), start + 1, -1)
        end = next((e for e in ends if Path("+".join(pieces[start:e]).strip()).expanduser().exists()), start + 1)
        parts.append(_parse_part("+".join(pieces[start:end]).strip(), argument))
        start = end
    weighted = [part.weight is not None for part in parts]
    if any(weighted) and not all(weighted):
        light = parts[weighted.index(False)].path
        raise BadInput(f"{argument}: {light} has no `weight`, others have: give one to each data set, or to none.")
    return parts


def _parse_part(text: str, argument: str) -> Part:
    if text and Path(text).expanduser().exists():
        return Part(text)
    match = re.fullmatch(r"([^\[\]]+?)\s*(?:\[([^\[\]]*)\])?", text)
    if match is None:
        raise BadInput(f"{argument}: {text or 'an empty name'} is no data set: write NAME or NAME[key:value,...].")
    part = Part(match.group(1).strip())
    for option in filter(None, (o.strip() for o in (match.group(2) or "").split(","))):
        key, colon, value = (side.strip() for side in option.partition(":"))
        if not colon or not key or not value:
            raise BadInput(f"{argument}: the option {option} of {part.path} is not of the form key:value.")
        if key in ("train", "test"):
            if not re.fullmatch(r"[1-9][\d_]*", value):
                raise BadInput(f"{argument}: {key} of {part.path} must be a number of rows, not {value}.")
            setattr(part, key, int(value))
        elif key == "weight":
            part.weight = _positive(value, f"{argument}: weight of {part.path}")
        elif key in OPTIONS:
            setattr(part, key, value)
        else:
            part.where[key] = value
    return part


def _positive(value: Any, what: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise BadInput(f"{what} must be a positive number, not {value}.")
    return number


def load_training_data(
    script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig", seed: int = 0, text_field: str = "text"
) -> TrainingData:
    """
    The data that a recipe's arguments name: `dataset_name`, which may be a mixture in the compact form, or `datasets`
    in the YAML, TRL's own form, where `fraction` is the weight.

    Args:
        script_args (`trl.ScriptArguments`): `dataset_name`, `dataset_config`, splits and streaming.
        dataset_args (`trl.DatasetMixtureConfig`): `datasets`, `test_split_size`, `streaming`.
        seed (`int`, *optional*, defaults to 0): decides the order of a weighted mixture, and what is set aside.
        text_field (`str`, *optional*, defaults to `"text"`): column of plain text, `dataset_text_field` of the
            training's configuration.

    Returns:
        [`TrainingData`]

    Raises:
        [`BadInput`]: a data set that cannot be loaded, rows without text, or forms that do not go together.
    """
    streaming = script_args.dataset_streaming or dataset_args.streaming
    if dataset_args.datasets:
        parts = [
            Part(
                entry.path if entry.data_files is None else str(entry.data_files),
                entry.name,
                entry.split,
                entry.fraction,
                columns=entry.columns,
            )
            for entry in dataset_args.datasets
        ]
    elif script_args.dataset_name is None:
        raise BadInput("--dataset_name is missing: give a folder, a file or a Hub data set.")
    else:
        parts = parse_mixture(script_args.dataset_name)
        for part in parts:
            part.name = part.name or (script_args.dataset_config if len(parts) == 1 else None)
            part.split = script_args.dataset_train_split if part.split == "train" else part.split
    loaded = [_load(part, script_args.dataset_test_split, streaming, seed, text_field) for part in parts]
    train = _mixed([one.train for one in loaded], [part.weight for part in parts], streaming, seed)
    tests = [one.test for one in loaded if one.test is not None]
    test = _mixed(tests, [None] * len(tests), streaming, seed) if tests else None
    if test is None and dataset_args.test_split_size is not None and not streaming:
        halves = train.train_test_split(test_size=dataset_args.test_split_size, seed=seed)
        train, test = halves["train"], halves["test"]
    return TrainingData(train, test)


def _load(part: Part, test_split: str, streaming: bool, seed: int, text_field: str) -> TrainingData:
    """One data set in a form of TRL's, filtered and cut to size."""
    path = Path(part.path).expanduser()
    keywords: dict[str, Any] = {"path": part.path, "name": part.name}
    if path.is_file():
        if path.suffix not in READERS:
            raise BadInput(f"{part.path} has an unknown ending: use {', '.join(SUFFIXES)}.")
        keywords = {"path": READERS[path.suffix], "data_files": str(path)}
    elif path.is_dir():
        keywords["path"] = str(path)
    splits = _load_splits(part, keywords, streaming)
    if part.split not in splits:
        raise BadInput(f"{part.path} has no split {part.split}: it has {', '.join(map(str, splits))}.")
    train, test = splits[part.split], splits.get(test_split) if test_split != part.split else None
    train, test = _in_form(part, train, text_field), None if test is None else _in_form(part, test, text_field)
    if next(iter(train), None) is None:
        kept = "".join(f" with {column} = {value}" for column, value in part.where.items())
        raise BadInput(f"{part.path} has no row{kept} in its split {part.split}: nothing is left to train on.")
    if part.test is not None:
        if streaming:
            train, test = train.skip(part.test), train.take(part.test)
        elif len(train) <= part.test:
            raise BadInput(f"{part.path} has {len(train)} rows, too few to set {part.test} aside.")
        else:
            halves = train.train_test_split(test_size=part.test, seed=seed)
            train, test = halves["train"], halves["test"]
    if part.train is not None:
        train = train.take(part.train)
    return TrainingData(train, test)


def _load_splits(part: Part, keywords: dict[str, Any], streaming: bool) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        return datasets.load_dataset(**keywords, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError, RuntimeError) as error:
        reason = first_sentence(error)
        script = "Dataset scripts are no longer supported" in reason
        hint = " Name a data set that is stored as parquet." if script else ""
        raise BadInput(f"{part.path} cannot be loaded: {reason}{hint}") from error


def _in_form(part: Part, dataset: Any, text_field: str) -> Any:
    """Filtered, and with the columns of one of TRL's forms."""
    columns = list(dataset.column_names or next(iter(dataset), {}))
    for column, value in part.where.items():
        if column not in columns:
            raise BadInput(f"{part.path} has no column {column} (it has {', '.join(columns)}).")
        dataset = dataset.filter(has_value, fn_kwargs={"column": column, "value": value})
    if part.columns is not None:
        dataset = dataset.select_columns(part.columns)
        columns = part.columns
    # What pairs an instruction with its answer says more than a text made of both.
    forms = [(text_field,) if form == ("text",) else form for form in (*FORMS[:3], *ALIASES, *FORMS[3:])]
    form = next((form for form in forms if all(column in columns for column in form)), None)
    if form is None:
        raise BadInput(f"{part.path} has no text (it has {', '.join(columns)}): {HINT}, or --dataset_text_field.")
    if form in ALIASES:
        renamed = {"prompt": form[0], "completion": form[1], "extra": "input" if form[0] == "instruction" else None}
        return dataset.map(_paired, fn_kwargs=renamed, remove_columns=[c for c in columns if c not in KEPT])
    return dataset.select_columns([column for column in columns if column in {*form, *KEPT}])


def _paired(row: dict[str, Any], prompt: str, completion: str, extra: str | None) -> dict[str, Any]:
    for column in (prompt, completion):
        if row[column] is None:
            raise BadInput(f"A row has nothing in its column {column!r}: leave such rows out of the data set.")
    material = f"\n\n{row[extra]}" if extra and row.get(extra) else ""
    if isinstance(row[prompt], list) and isinstance(row[completion], str):  # turns, and the text of the last one
        return {"prompt": row[prompt], "completion": [{"role": "assistant", "content": row[completion]}]}
    return {"prompt": row[prompt] + material, "completion": row[completion]}


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    turns = []
    for role, side in (("user", row["prompt"]), ("assistant", row["completion"])):
        turns += side if isinstance(side, list) else [{"role": role, "content": side}]
    return {"messages": turns}


def _mixed(sets: Sequence[Any], weights: Sequence[float | None], streaming: bool, seed: int) -> Any:
    """
    One data set of several. With weights a row's source is drawn by them until one source is used up, so that no row
    comes twice; without, rows are put one after the other, or alternate where they stream, until all are used up.
    """
    import datasets

    if len(sets) == 1:
        return sets[0]
    forms = [set(one.column_names or next(iter(one), {})) - KEPT for one in sets]
    if any(form != forms[0] for form in forms):
        if not all(form in ({"messages"}, {"prompt", "completion"}) for form in forms):
            shown = "; ".join(sorted({" + ".join(sorted(form)) for form in forms}))
            raise BadInput(f"These data sets do not go together, their rows have different forms: {shown}.")
        pairs = [one.map(_as_messages, remove_columns=["prompt", "completion"]) for one in sets if _is_paired(one)]
        sets = [pairs.pop(0) if _is_paired(one) else one for one in sets]
        sets = [_plain_messages(one) for one in sets]
    if weights[0] is not None:
        shares = [weight / sum(weights) for weight in weights]
        return datasets.interleave_datasets(
            list(sets), probabilities=shares, seed=seed, stopping_strategy="first_exhausted"
        )
    if streaming:
        return datasets.interleave_datasets(list(sets), stopping_strategy="all_exhausted_without_replacement")
    return datasets.concatenate_datasets(list(sets))


def _is_paired(dataset: Any) -> bool:
    return "prompt" in (dataset.column_names or next(iter(dataset), {}))


def _plain_messages(dataset: Any) -> Any:
    """Messages with role and content alone, which is what they share."""
    return dataset.map(lambda row: {"messages": [{k: m[k] for k in ("role", "content")} for m in row["messages"]]})
