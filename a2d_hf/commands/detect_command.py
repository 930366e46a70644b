"""`a2d detect`: whether and how a model converts, from its config.json alone.

Owns the command's flags and its exit code. Imports no torch.
"""

import argparse

from ..console import Console
from ..errors import BadInput


DESCRIPTION = """
Says from config.json alone, in under a second, whether a model converts to a diffusion language model and at what
cost, or exactly why it does not. Uses no network and loads no weights.
"""
EPILOG = "Exit codes: 0 converts, 1 refused, 2 bad input. So `a2d detect SRC && a2d convert SRC --out RUN` composes."


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser("detect", help="does this model convert?", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("src", metavar="SRC", help="model folder, config.json, or Hub id in the local cache")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--gpu", metavar="NAME", help="also plan the hours on this GPU, for example h100")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """
    Runs the command.

    Returns:
        `int`: 0 where the model converts, 1 where it is refused, 2 where the files are at fault.
    """
    from ..detection import Detection, detect
    from ..detection.config_reading import NotDownloaded
    from ..detection.paradigm import Reason
    from ..detection.plan import find_gpu
    from ..detection.rendering import render
    from ..detection.weights import Weights

    find_gpu(args.gpu)
    console = Console(json_output=args.json)
    try:
        found = detect(args.src, gpu=args.gpu)
    except BadInput as error:
        if args.json:  # whoever reads JSON gets JSON; the sentence goes to stderr as for every command
            weights = Weights(present=False, download=error.download if isinstance(error, NotDownloaded) else None)
            reason = Reason("config.invalid", str(error))
            console.json(Detection(args.src, "unsupported", [reason], weights=weights, bad_input=True).to_dict())
        raise
    if args.json:
        console.json(found.to_dict())
    elif found.exit_code != 2:
        render(found, console)
    if found.exit_code == 2:
        raise BadInput(f"SRC {args.src}: {found.reasons[-1].message}")
    return found.exit_code
