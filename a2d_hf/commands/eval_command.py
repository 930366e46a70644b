"""`a2d eval`: held-out NELBO beside the parent's NLL, and accuracy by masked share. Estimators are evaluate.py's."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_files import explained_writes, write_json
from ..console import Console
from ..conversion_settings import DEVICES
from ..errors import A2DError, BadInput


if TYPE_CHECKING:
    from ..converted_model import ConvertedModel


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a converted model on held-out text, beside its parent",
        description="Reports the NELBO per token (an upper bound on the negative log-likelihood) with its standard "
        "error, the parent's NLL on the same tokens, and how many masked tokens one forward pass gets right. Writes "
        "eval/report.json into a run directory.",
    )
    parser.add_argument("path", metavar="RUN", help="run directory, or folder of a converted checkpoint")
    parser.add_argument("--data", metavar="D", help="text to measure on (default: what the run held out)")
    parser.add_argument("--parent", metavar="SRC", help="folder of the parent (default: where the run found it)")
    parser.add_argument("--mc-samples", type=int, default=8, metavar="N", help="masks drawn per row")
    parser.add_argument("--max-tokens", type=int, default=65536, metavar="N", help="most tokens to measure on")
    parser.add_argument("--max-length", type=int, metavar="N", help="most tokens per row (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows per forward pass")
    parser.add_argument("--seed", type=int, default=0, help="decides the masks")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a parent that needs its own code")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    for flag, value in (
        ("--mc-samples", args.mc_samples),
        ("--max-tokens", args.max_tokens),
        ("--batch-size", args.batch_size),
    ):
        if value < 1:
            raise BadInput(f"{flag} must be 1 or more, not {value}.")
    from ..converted_model import find_converted, resolve_device

    found = find_converted(args.path)
    console = Console(json_output=args.json)
    from .. import evaluate

    device = resolve_device(args.device)
    model, tokenizer = found.load(device, args.trust_remote_code)
    rows, text = _rows(found, args, tokenizer, model)
    rows = evaluate.usable_rows(rows, args.max_tokens)

    sequences = args.mc_samples * len(rows)
    with console.progress("NELBO", sequences, "sequence") as bar:
        nelbo = evaluate.diffusion_nelbo(
            model, rows, mc_samples=args.mc_samples, batch_size=args.batch_size, seed=args.seed, advance=bar.advance
        )
    with console.progress("masked accuracy", len(evaluate.RATIOS) * len(rows), "sequence") as bar:
        accuracy = evaluate.masked_accuracy(
            model, rows, batch_size=args.batch_size, seed=args.seed, advance=bar.advance
        )
    model_config = model.config
    del model
    report = {
        "schema_version": 1,
        "model": found.path.name if found.run is None else found.run.path.name,
        "text": text,
        "mc_samples": args.mc_samples,
        "seed": args.seed,
        "objective": model_config.objective,
        "block_size": model_config.block_size,
        "nelbo": nelbo.to_dict(),
        "parent": _parent(found, args, rows, device, console),
        "masked_accuracy": accuracy,
        "caveat": "The NELBO is an upper bound on the negative log-likelihood, not a perplexity.",
    }
    if found.run is not None:
        with explained_writes(found.run.eval_path):
            found.run.eval_path.mkdir(exist_ok=True)
        write_json(found.run.eval_path / "report.json", report)
    _show(report, found, console)
    return 0


def _rows(
    found: "ConvertedModel", args: argparse.Namespace, tokenizer: Any, model: Any
) -> tuple[list, dict[str, Any]]:
    """Rows to measure on, and what the report says of them."""
    from ..conversion_settings import ConversionSettings
    from ..data_reading import read_data
    from ..training_run import prepare_data, read_held_out

    if args.data is None:
        rows = [] if found.run is None else read_held_out(found.run)
        if not rows:
            raise BadInput(f"RUN {args.path} holds no held-out text: give some with --data.")
        return rows, {"name": "held out from the run's data", "sha256": found.run.manifest["data"]["sha256"]}
    settings = ConversionSettings(
        source="", held_out=0.0, max_length=args.max_length, token_shift=model.config.token_shift
    )
    data = prepare_data(read_data(args.data), tokenizer, settings, model.config.max_position_embeddings)
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in data.train]
    return rows, {"name": data.facts["name"], "sha256": data.facts["sha256"], "notes": data.facts["notes"]}


def _parent(
    found: "ConvertedModel", args: argparse.Namespace, rows: list, device: str, console: Console
) -> dict[str, Any]:
    """The parent's NLL on the same tokens, or why there is none."""
    from .. import evaluate
    from ..source import inspect_source
    from ..surgery import load_parent

    if args.parent is None and (found.run is None or "source" not in found.run.manifest):
        return {"available": False, "reason": "the checkpoint does not say where its parent is: give --parent"}
    place = args.parent or found.run.manifest["source"]["path"]
    try:
        source = inspect_source(place, "--parent")
    except A2DError as error:
        if args.parent is not None:
            raise
        return {"available": False, "reason": f"the parent is not where it was: {error}"}
    expected = found.manifest and found.manifest["source"]["sha256"]
    if expected and source.fingerprint()["sha256"] != expected:
        return {"available": False, "reason": f"{place} is not the parent: its files have another hash"}
    parent = load_parent(source.path, args.trust_remote_code, dtype="auto").to(device)
    with console.progress("NLL of the parent", len(rows), "row") as bar:
        nll = evaluate.autoregressive_nll(parent, rows, batch_size=args.batch_size, advance=bar.advance)
    return {"available": True, "reason": None, "name": source.name, "nll": nll.to_dict()}


def _show(report: dict[str, Any], found: "ConvertedModel", console: Console) -> None:
    if console.json_output:
        console.json(report)
        return
    nelbo, parent = report["nelbo"], report["parent"]
    rows = [["conversion, NELBO (upper bound)", nelbo["nats_per_token"], nelbo["standard_error"], nelbo["tokens"]]]
    if parent["available"]:
        nll = parent["nll"]
        rows.append([f"parent {parent['name']}, NLL", nll["nats_per_token"], nll["standard_error"], nll["tokens"]])
    console.table([f"text: {report['text']['name']}", "nats/token", "± s.e.", "tokens"], rows)
    if not parent["available"]:
        console.note(f"parent: unavailable, {parent['reason']}")
    console.line()
    console.table(
        ["masked", "predicted exactly by one forward", "tokens"],
        [[f"{row['ratio']:.0%}", f"{row['accuracy']:.1%}", row["tokens"]] for row in report["masked_accuracy"]],
    )
    if found.run is not None:
        console.line()
        console.note(f"written to {Path(found.run.eval_path) / 'report.json'}")
