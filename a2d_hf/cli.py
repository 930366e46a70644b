"""The command `a2d`: its parser, and the one place where errors become a sentence and an exit code.

Exit codes: 0 done, 1 refused or gate failed, 2 bad input, 130 interrupted. Imports no torch: `a2d --help` answers at
once, and each command loads what it needs when it runs.
"""

import argparse
import difflib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .commands import (
    chat_command,
    convert_command,
    data_command,
    detect_command,
    eval_code_command,
    eval_command,
    push_command,
    quickstart_command,
    resume_command,
    runs_command,
    sample_command,
)
from .console import Console
from .errors import A2DError


COMMANDS = (
    detect_command,
    convert_command,
    data_command,
    sample_command,
    chat_command,
    eval_code_command,
    eval_command,
    runs_command,
    resume_command,
    push_command,
    quickstart_command,
)
INTERRUPTED = 130


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of an argument to its help, where there is one that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with the nearest flag where one was mistyped."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        Console().error(f"{message} (see `{self.prog} --help`).")
        raise SystemExit(2)

    def reject_unknown(self, arguments: Sequence[str]) -> NoReturn:
        """Ends with the sentence for arguments that nobody knows."""
        unknown = arguments[0].split("=")[0]
        known = [flag for action in self._actions for flag in action.option_strings]
        explain = self.get_default("explain_flag")
        if explain is not None and (words := explain(unknown, known)):
            self.error(f"unknown flag {unknown}: {words}")
        near = difflib.get_close_matches(unknown, known, n=1)
        kind = "flag" if unknown.startswith("-") else "argument"
        self.error(f"unknown {kind} {unknown}" + (f": did you mean {near[0]}?" if near else ""))


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """
    The parser of `a2d` with every command.

    Returns:
        `tuple`: the parser, and the parser of each command by name.
    """
    parser = Parser(
        prog="a2d",
        description="Turn any open-weight autoregressive language model into a diffusion language model.",
        epilog="Exit codes: 0 done, 1 refused or gate failed, 2 bad input, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"a2d_hf {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser, dict(subparsers.choices)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; `sys.argv[1:]` by default.

    Returns:
        `int`: the exit code.
    """
    _quiet_libraries()
    parser, commands = build_parser()
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            commands[args.command].reject_unknown(unknown)
    except SystemExit as stop:
        return int(stop.code or 0)
    console = Console(json_output=vars(args).get("json", False))
    try:
        # A job scheduler's stop deserves the same care as Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return commands[args.command].get_default("run")(args)
    except A2DError as error:
        console.error(str(error))
        return error.exit_code
    except KeyboardInterrupt as stop:
        console.error(str(stop) or "interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`, a closed pager) has seen enough; without this Python complains while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _quiet_libraries() -> None:
    """Our own words only: the libraries' advice to programmers and their bars stay out of a user's terminal."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is installed


if __name__ == "__main__":
    raise SystemExit(main())
