"""`a2d convert`: its arguments and its closing summary. The work is conversion.py's."""

import argparse

from ..console import Console
from ..conversion_settings import (
    ALIGN_POSITIONS,
    CLEAN_CONTEXTS,
    DEFAULT_ALIGN_POSITIONS,
    DEFAULT_ALIGN_WEIGHT,
    DEFAULT_BLOCK_SIZE,
    DEVICES,
    GATES,
    OBJECTIVES,
    SLIDING_WINDOWS,
    ConversionSettings,
)
from ..run_directory import RunDirectory


DEFAULTS = ConversionSettings(source="")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser(
        "convert",
        help="convert an autoregressive model, prove it, and with --data train it",
        description="Changes attention and objective of an autoregressive model, never its weights; proves that "
        "nothing else changed and that the change took effect; with --data also trains.",
    )
    parser.add_argument("source", metavar="SRC", help="folder of the parent, or a Hub id in the local cache")
    parser.add_argument("--out", required=True, metavar="RUN", help="run directory to make")
    parser.add_argument(
        "--data", metavar="D", help=".txt, .jsonl, .json or .parquet file, or a Hub data set name[:split]"
    )
    parser.add_argument("--objective", choices=OBJECTIVES, default=DEFAULTS.objective, help="training objective")
    parser.add_argument(
        "--token-shift", action=argparse.BooleanOptionalAction, default=DEFAULTS.token_shift,
        help="read predictions one position to the left, as the parent does: needs far less training, "
        "but serving engines of today read them in place",
    )  # fmt: skip
    parser.add_argument(
        "--sliding-window", choices=SLIDING_WINDOWS, default=DEFAULTS.sliding_window, help="keep or open the windows"
    )
    parser.add_argument("--mask-token-id", type=int, metavar="ID", help="an id that no text uses (default: by policy)")
    parser.add_argument(
        "--allow-hybrid", action="store_true", help="convert a parent whose recurrent layers stay causal, in part"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code found in the parent's folder"
    )
    parser.add_argument("--download", action="store_true", help="fetch SRC from the Hub where the cache lacks it")
    parser.add_argument("--copy", action="store_true", help="copy weights instead of sharing the parent's files")
    parser.add_argument(
        "--gates", choices=GATES, default=DEFAULTS.gates, help="prove on weights in memory, or streamed from disk"
    )
    _add_objectives(parser)
    training = parser.add_argument_group("training, with --data")
    training.add_argument(
        "--held-out", type=float, default=DEFAULTS.held_out, help="share of the data kept for evaluation"
    )
    training.add_argument(
        "--max-length", type=int, metavar="N", help="most tokens per row (default: context, up to 1024)"
    )
    budget = training.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=float, default=DEFAULTS.epochs, help="passes over the data")
    budget.add_argument("--max-steps", type=int, metavar="N", help="optimizer steps, instead of --epochs")
    training.add_argument(
        "--batch-size", type=int, default=DEFAULTS.batch_size, metavar="N", help="rows per forward pass"
    )
    training.add_argument(
        "--gradient-accumulation-steps", type=int, default=DEFAULTS.gradient_accumulation_steps, metavar="N",
        help="forward passes per optimizer step",
    )  # fmt: skip
    training.add_argument(
        "--learning-rate",
        type=float,
        metavar="X",
        help="peak (default: 1e-4 at hidden size 1024, falling with the size; ten times that with --lora-r)",
    )
    training.add_argument(
        "--lora-r", type=int, default=DEFAULTS.lora_r, metavar="N",
        help="train a LoRA adapter of this rank and merge it at the end (default: 0, train all weights)",
    )  # fmt: skip
    training.add_argument("--lora-alpha", type=int, metavar="N", help="its scale (default: twice the rank)")
    training.add_argument(
        "--lora-target-modules", type=_names, metavar="A,B", help="layers it adapts (default: all linear ones)"
    )
    training.add_argument("--seed", type=int, default=DEFAULTS.seed, help="decides split, order, noise and dropout")
    training.add_argument("--save-steps", type=int, metavar="N", help="steps between checkpoints (default: by time)")
    training.add_argument("--device", choices=DEVICES, default=DEFAULTS.device, help="where to train")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON on stdout")
    parser.set_defaults(run=run)


def _add_objectives(parser: argparse.ArgumentParser) -> None:
    blocks = parser.add_argument_group("block diffusion, with --objective bd3lm")
    blocks.add_argument(
        "--block-size", type=int, metavar="N", help=f"tokens per block (default: {DEFAULT_BLOCK_SIZE})"
    )
    blocks.add_argument(
        "--block-size-curriculum", type=_sizes, metavar="1,4,32",
        help="sizes to walk through in the first half of the training, each dividing the next",
    )  # fmt: skip
    blocks.add_argument(
        "--clean-context", choices=CLEAN_CONTEXTS,
        help=f"how finished text attends to itself (default: {CLEAN_CONTEXTS[0]})",
    )  # fmt: skip
    alignment = parser.add_argument_group("representation alignment, with --objective repalign")
    alignment.add_argument(
        "--align-weight", type=float, metavar="X",
        help=f"weight of the alignment with the parent's hidden states (default: {DEFAULT_ALIGN_WEIGHT:g})",
    )  # fmt: skip
    alignment.add_argument(
        "--align-positions", choices=ALIGN_POSITIONS, help=f"where to compare (default: {DEFAULT_ALIGN_POSITIONS})"
    )


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 1,4,32") from None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..conversion import convert

    settings = {name: vars(args)[name] for name in DEFAULTS.to_dict() if name not in ("source", "data")}
    console = Console(json_output=args.json)
    finished = convert(args.source, args.out, data=args.data, console=console, **settings)
    summarize(finished, console)
    return 0


def summarize(run: RunDirectory, console: Console) -> None:
    """What a finished conversion tells its user, also after a resume."""
    if console.json_output:
        console.json(run.manifest)
        return
    results = run.manifest["results"]
    labels = {
        "parent_nll": "parent, NLL",
        "nelbo_before": "conversion before training, NELBO",
        "nelbo_after": "conversion after training, NELBO",
    }
    rows = [
        [label, results[name]["nats_per_token"], results[name]["standard_error"], results[name]["tokens"]]
        for name, label in labels.items()
        if name in results
    ]
    if rows:
        console.line()
        console.table(["held-out text", "nats/token", "± s.e.", "tokens"], rows)
    console.line()
    console.line(console.style(f"Done: {run.path}", "green"))
    if run.manifest["training"] is None:
        console.note("converted, not trained: give --data to `a2d convert` to make it write text")
    else:
        console.note(f'a2d sample {run.path} -p "..."')
        console.note(f"a2d eval {run.path}")
