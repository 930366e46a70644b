"""`a2d resume`: continues an interrupted run. The work is conversion.py's."""

import argparse
from pathlib import Path

from ..console import Console
from .convert_command import summarize


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser(
        "resume",
        help="continue an interrupted run",
        description="Continues a run after Ctrl-C, a kill or a full disk, to the same weights as an unbroken run.",
    )
    parser.add_argument("path", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..conversion import resume

    console = Console(json_output=args.json)
    summarize(resume(args.path, console=console), console)
    return 0
