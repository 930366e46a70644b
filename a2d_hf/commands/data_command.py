"""`a2d data preview`: rows as the model will read them, with what is trained on marked.

Owns the command's flags and how rows are shown. The way from data to rows is that of `a2d convert --data`.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from ..console import Console
from ..errors import BadInput, first_sentence


DESCRIPTION = """
Prepares data exactly as `a2d convert --data` would, and shows rows with what is trained on marked: in colour on a
terminal, between brackets elsewhere. Trains nothing and writes nothing.
"""
TIME = 0.5  # of the example under noise
HIDDEN = "▢"
OPEN, CLOSE = "⟦", "⟧"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser("data", help="look at data as a training would see it")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    preview = actions.add_parser(
        "preview", help="rows as the model reads them, targets marked", description=DESCRIPTION
    )
    preview.add_argument(
        "src", metavar="SRC", help="as --data of `a2d convert`: a file, a Hub name, or a mixture of them"
    )
    preview.add_argument("--model", required=True, metavar="M", help="whose tokenizer: model folder, RUN, or Hub id")
    preview.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show")
    preview.add_argument(
        "--max-length", type=int, metavar="N", help="most tokens per row (default: context, up to 1024)"
    )
    preview.add_argument(
        "--token-shift", action=argparse.BooleanOptionalAction, help="prepare for token shift (default: as the model)"
    )
    preview.add_argument("--seed", type=int, default=0, help="decides the example under noise, and a weighted mixture")
    preview.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """
    Runs the command.

    Returns:
        `int`: 0.
    """
    if args.rows < 1:
        raise BadInput(f"--rows {args.rows} must be at least 1.")
    if args.max_length is not None and args.max_length < 2:
        raise BadInput(f"--max-length {args.max_length} must be at least 2.")
    from ..data_reading import read_data

    rows = read_data(args.src, "SRC", args.seed)

    from ..conversion_settings import ConversionSettings
    from ..training_run import prepare_data

    tokenizer, config = _model(args.model)
    shift = config.get("token_shift", False) if args.token_shift is None else args.token_shift
    settings = ConversionSettings(source="", held_out=0.0, max_length=args.max_length, token_shift=shift)
    text_config = config.get("text_config") or config
    context = text_config.get("max_position_embeddings") or text_config.get("n_positions")
    data = prepare_data(rows, tokenizer, settings, context)
    report = _report(args, data, tokenizer)
    console = Console(json_output=args.json)
    if args.json:
        console.json(report)
    else:
        _show(report, console)
    return 0


def _model(name: str) -> tuple[Any, dict[str, Any]]:
    """The tokenizer and the configuration of a model folder, a run or a Hub id in the local cache."""
    from transformers import AutoTokenizer, PreTrainedConfig

    folder = Path(name).expanduser()
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not folder.exists() and name.startswith(("/", ".", "~")):
        raise BadInput(f"--model {name} does not exist.")
    place = str(folder) if folder.exists() else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        config, _ = PreTrainedConfig.get_config_dict(place, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"--model {name} has no tokenizer that can be loaded: {first_sentence(error)}") from error
    return tokenizer, config


def _report(args: argparse.Namespace, data: Any, tokenizer: Any) -> dict[str, Any]:
    lengths = [len(ids) for ids in data.train["input_ids"][:]]
    labels = data.train["labels"][:]
    eos = tokenizer.eos_token_id
    prepared = data.facts["train"]
    shown = [data.train[i] for i in range(min(args.rows, len(data.train)))]
    example = max(range(len(shown)), key=lambda i: sum(label != -100 for label in shown[i]["labels"]))
    return {
        "schema_version": 1,
        "source": data.facts["name"],
        "sha256": data.facts["sha256"],
        "form": data.facts["form"],
        "max_length": data.facts["max_length"],
        "counts": {
            "rows_given": prepared["source_rows"],
            "rows": prepared["rows"],
            "tokens": sum(lengths),
            "targets": sum(label != -100 for row in labels for label in row),
            "longest_row": max(lengths),
            "truncated_rows": prepared["truncated_rows"],
            "truncated_tokens": prepared["truncated_tokens"],
            "dropped_rows": prepared["dropped_rows"],
            "rows_cut_into_pieces": prepared["chunked_rows"],
            "rows_ending_with_eos": sum(ids[-1] == eos for ids in data.train["input_ids"][:]),
        },
        "notes": data.facts["notes"],
        "rows": [{"tokens": len(row["input_ids"]), "segments": _segments(row, tokenizer)} for row in shown],
        "masked_example": {"row": example, "t": TIME, "text": _masked(shown[example], tokenizer, args.seed)},
    }


def _segments(row: dict[str, list[int]], tokenizer: Any) -> list[dict[str, Any]]:
    """Runs of tokens that are all targets, or none of them."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if not runs or runs[-1][0] != (label != -100):
            runs.append((label != -100, []))
        runs[-1][1].append(token)
    return [{"trained": trained, "text": _decode(tokenizer, tokens)} for trained, tokens in runs]


def _masked(row: dict[str, list[int]], tokenizer: Any, seed: int) -> str:
    """The row as the model sees it at time `TIME`: every target hidden with that probability."""
    draw = random.Random(seed)
    text, kept = "", []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label == -100 or draw.random() >= TIME:
            kept.append(token)
            continue
        text += _decode(tokenizer, kept) + HIDDEN
        kept = []
    return text + _decode(tokenizer, kept)


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False) if tokens else ""


def _show(report: dict[str, Any], console: Console) -> None:
    plain = console.style("", "green") == ""
    for number, row in enumerate(report["rows"]):
        console.step(f"Row {number}, {row['tokens']} tokens")
        text = "".join(_marked(segment, console, plain) for segment in row["segments"])
        console.line(_indented(text))
    console.step(f"Row {report['masked_example']['row']} at t = {TIME}, each {HIDDEN} a hidden token")
    console.line(_indented(report["masked_example"]["text"]))
    counts = report["counts"]
    console.step(f"{report['source']}: {report['form']}, rows of at most {report['max_length']} tokens")
    console.table(["what", "count"], [[name.replace("_", " "), f"{value:,}"] for name, value in counts.items()])
    for note in report["notes"]:
        console.note(note)
    console.note(
        f"{_mark('marked', plain, console)} is what is trained on: {counts['targets'] / counts['tokens']:.0%}"
    )


def _marked(segment: dict[str, Any], console: Console, plain: bool) -> str:
    return _mark(segment["text"], plain, console) if segment["trained"] else segment["text"]


def _mark(text: str, plain: bool, console: Console) -> str:
    return f"{OPEN}{text}{CLOSE}" if plain else console.style(text, "green")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))
