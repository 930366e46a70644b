"""`a2d chat`: a conversation with a converted model.

Owns the flags and the reading of lines; what happens to a line is conversation.py's. Loads no library before it has
to.
"""

import argparse
import signal
import sys

from ..console import Console
from ..conversation import Conversation
from ..conversion_settings import DEVICES
from ..decoding_settings import DecodingSettings, explain_flag, with_flags
from ..errors import BadInput
from .sample_command import SELECTORS, SET_HELP


INTERRUPTED = 130


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a converted model",
        description="A conversation, one line per turn, with the answers drawn as they are denoised. With the "
        "tokenizer's chat template where it has one; otherwise each line continues the text so far. Type /help.",
    )
    parser.add_argument("path", metavar="RUN", help="run directory, or folder of a converted checkpoint")
    parser.add_argument("--no-chat-template", action="store_true", help="continue plain text, whatever the tokenizer")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens per answer (default: 128)")
    parser.add_argument("--steps", type=int, metavar="N", help="forward passes per answer (default: one per token)")
    parser.add_argument("--block-size", type=int, metavar="N", help="finish this many positions before the next ones")
    parser.add_argument("--selector", metavar="NAME", help=f"which positions a forward pass commits: {SELECTORS}")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token, above 0 samples")
    parser.add_argument("--set", action="append", metavar="FIELD=VALUE", help=SET_HELP)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first answer; each further one adds 1")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a parent that needs its own code")
    parser.set_defaults(run=run, explain_flag=explain_flag)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..converted_model import find_converted

    found = find_converted(args.path)
    console = Console()
    flags = ("max_new_tokens", "steps", "block_size", "selector", "temperature")
    settings = DecodingSettings.of_checkpoint(found.path)
    settings.choose(with_flags(args.set, {name: vars(args)[name] for name in flags}))
    if settings.chosen.get("max_new_tokens") == 0:
        raise BadInput("--max-new-tokens must be at least 1 in a conversation: an answer needs room.")
    if args.seed < 0:
        raise BadInput(f"--seed must be an integer of at least 0, not {args.seed}.")
    if found.manifest is not None and found.manifest["training"] is None:
        console.warn(f"{args.path} is converted but not trained: expect no sensible text.")
    model, tokenizer = found.load(args.device, args.trust_remote_code)
    template = tokenizer.chat_template is not None and not args.no_chat_template
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to put away, and Ctrl-C means something else here
    typed = sys.stdin is not None and sys.stdin.isatty()
    if typed:
        try:
            import readline  # noqa: F401  line editing and history in input()
        except ImportError:
            pass
        how = "with its chat template" if template else "plain text: each line continues what stands above it"
        console.line(f"{found.name}, {how}.")
        now = settings.in_force()
        most = f"at most {now.max_new_tokens} tokens" if now.max_new_tokens is not None else "to the end of max_length"
        console.line(
            f"selector {now.selector}, temperature {now.sampling_temperature:g}, {most} per answer: /settings for all."
        )
        console.line("Type a line; an empty one writes a text from nothing. /help for commands, /quit to leave.")
    conversation = Conversation(model, tokenizer, settings, found.name, template, args.seed, console)
    return converse(conversation, "> " if typed else "")


def converse(conversation: Conversation, prompt: str) -> int:
    """Reads lines until the end; returns the exit code."""
    console = conversation.console
    while True:
        try:
            line = input(prompt)
        except EOFError:
            if prompt:
                console.line()
            return 0
        except KeyboardInterrupt:
            console.line()
            return INTERRUPTED
        try:
            if not line.startswith("/"):
                conversation.answer(line.strip())
            elif not conversation.command(line.rstrip()):
                return 0
        except BadInput as error:
            console.error(str(error))
        except KeyboardInterrupt as stop:
            console.line(console.style(f"\n[stopped; {str(stop) or 'this turn is forgotten'}]", "dim"))
