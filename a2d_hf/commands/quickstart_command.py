"""`a2d quickstart`: the whole pipeline, offline. The work is quickstart.py's."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser(
        "quickstart",
        help="the whole pipeline on an embedded corpus, offline, in minutes",
        description="Trains a small parent on text that every Python carries, then detects, converts, proves, trains, "
        "evaluates and samples, and writes a one-page report. Needs no network and no GPU.",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder to make, or an unfinished one to continue (default: runs/quickstart, or the next free number)",
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="about how long it may take on two CPU cores")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..quickstart import run_quickstart

    return run_quickstart(args.out, minutes=args.minutes)
