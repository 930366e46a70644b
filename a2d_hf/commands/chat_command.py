"""`a2d chat`: a conversation with a converted model. Decoding is the model's own.

Owns the reading of lines, the /commands and the history; loads no library before it has to.
"""

import argparse
import signal
import sys
from typing import Any

from ..console import Console
from ..conversion_settings import DEVICES
from ..errors import BadInput
from .sample_command import SELECTORS


HELP = """  /steps N           forward passes per answer (auto: as many as the selector needs)
  /block N           finish this many positions before the next ones (auto: the checkpoint's)
  /selector NAME     confidence, margin, entropy, random, threshold, entropy_bound; a number behind the last two
  /temperature T     0 takes the likeliest token, above 0 samples
  /tokens N          most tokens per answer
  /reset             forget the conversation
  /help              this list
  /quit              leave; so do Ctrl-D and, at the prompt, Ctrl-C
  An empty line writes a text from nothing. Ctrl-C while the model writes stops that answer."""
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
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="most tokens per answer")
    parser.add_argument("--steps", type=int, metavar="N", help="forward passes per answer (default: one per token)")
    parser.add_argument("--block-size", type=int, metavar="N", help="finish this many positions before the next ones")
    parser.add_argument("--selector", choices=SELECTORS, help="which positions a forward pass commits")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token, above 0 samples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first answer; each further one adds 1")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a parent that needs its own code")
    parser.set_defaults(run=run)


class Chat:
    """
    One conversation.

    Args:
        model ([`A2DForMaskedDiffusion`]), tokenizer (`PreTrainedTokenizerBase`): what answers.
        options (`dict`): decoding parameters, as [`A2DGenerationConfig`] names them.
        template (`bool`): whether turns go through the tokenizer's chat template.
        seed (`int`): of the first answer.
        console ([`Console`]): where the answers go; drawn live on a terminal.
    """

    def __init__(
        self, model: Any, tokenizer: Any, options: dict[str, Any], template: bool, seed: int, console: Console
    ):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.template, self.seed, self.console = template, seed, console
        # Turns as (what was said, what was answered).
        self.turns: list[tuple[str, str]] = []

    # ---------------------------------------------------------------------------------------------------- settings

    def command(self, line: str) -> bool:
        """Obeys a /command; returns whether the conversation goes on. Raises [`BadInput`] for what it cannot do."""
        name, *values = line[1:].split()
        settings = {"steps": ("steps", int), "block": ("block_size", int), "tokens": ("max_new_tokens", int)}
        settings |= {"temperature": ("temperature", float)}
        if name in ("quit", "exit"):
            return False
        if name == "help":
            self.console.line(HELP)
        elif name == "reset":
            self.turns = []
            self.console.note("forgotten")
        elif name == "selector":
            self._select(values)
        elif name in settings and len(values) == 1:
            option, kind = settings[name]
            free = values[0] == "auto" and option in ("steps", "block_size")
            self._set({option: None if free else _number(name, values[0], kind)})
        elif name in settings:
            raise BadInput(f"/{name} takes one value, for example /{name} {0.7 if name == 'temperature' else 16}.")
        else:
            raise BadInput(f"There is no command /{name}; /help lists them.")
        return True

    def _select(self, values: list[str]) -> None:
        if not values or values[0] not in SELECTORS or len(values) > 2:
            raise BadInput(f"/selector takes one of {', '.join(SELECTORS)}.")
        bounds = {"threshold": "threshold", "entropy_bound": "entropy_bound"}
        change: dict[str, Any] = {"selector": values[0], "threshold": None, "entropy_bound": None}
        if len(values) == 2:
            if values[0] not in bounds:
                raise BadInput(f"/selector {values[0]} takes no number: leave {values[1]} out.")
            change[bounds[values[0]]] = _number("selector", values[1], float)
        self._set(change)

    def _set(self, change: dict[str, Any]) -> None:
        from ..modeling.generation_config_a2d import A2DGenerationConfig

        options = {name: value for name, value in (self.options | change).items() if value is not None}
        try:
            A2DGenerationConfig(**options)
        except ValueError as error:
            raise BadInput(str(error)) from error
        self.options = options
        self.console.note(", ".join(f"{name} {value}" for name, value in options.items()))

    # ---------------------------------------------------------------------------------------------------- answering

    def answer(self, line: str) -> None:
        """Answers one line; an empty one gets a text from nothing, outside the conversation."""
        inputs = self._inputs(line) if line else None
        mask_token_id = self.model.config.mask_token_id
        if inputs is not None and bool((inputs["input_ids"] == mask_token_id).any()):
            raise BadInput(
                f"The text holds the mask token {self.tokenizer.decode([mask_token_id])}, which stands for what is "
                "still to be written: leave it out."
            )
        live = self.console.out.isatty()
        streamer = None
        if live:
            from ..live_draft import LiveDraft

            streamer = LiveDraft(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            output = self.model.diffusion_generate(
                **(inputs or {}), **self.options, seed=self.seed, streamer=streamer, return_dict_in_generate=True
            )
        except ValueError as error:  # the decoder names the argument and the fix
            raise BadInput(str(error)) from error
        except KeyboardInterrupt:
            if streamer is not None:
                streamer.end()  # takes the draft off the screen
            raise
        self.seed += 1
        text = self._completion(output.sequences[0], 0 if inputs is None else inputs["input_ids"].shape[1])
        if not live:
            self.console.line(text)
        ends = {"eos": "the model ended", "length": f"cut off after {self.options['max_new_tokens']} tokens"}
        facts = f"{output.num_forwards} forwards, {float(output.tokens_per_forward[0]):.2f} tokens per forward"
        self.console.line(self.console.style(f"[{facts}; {ends[output.stop_reason[0]]}]", "dim"))
        if line:
            self.turns.append((line, text))

    def _inputs(self, line: str) -> Any:
        """The prompt: the conversation so far and the new line, without the oldest turns if they do not fit."""
        from ..data import explained_tokenizing

        context = self.model.config.max_position_embeddings
        turns = self.turns
        while True:
            with explained_tokenizing("The text cannot be tokenized"):
                inputs = self._encode(turns, line).to(self.model.device)
            whole = inputs["input_ids"].shape[1] + self.options["max_new_tokens"]
            if context is None or whole <= context or not turns:
                break
            turns = turns[1:]
        if len(turns) < len(self.turns):
            self.console.warn(
                f"the first {len(self.turns) - len(turns)} turn(s) are forgotten: the context holds {context} tokens."
            )
            self.turns = turns
        return inputs

    def _encode(self, turns: list[tuple[str, str]], line: str) -> Any:
        if not self.template:
            text = "".join(f"{said}{answered}\n" for said, answered in turns) + line
            return self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        messages = []
        for said, answered in turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": line})
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )

    def _completion(self, row: Any, prompt: int) -> str:
        new = self.tokenizer.decode(row[prompt:], skip_special_tokens=True)
        if self.template:
            return new.strip()
        # Decoded with the prompt and cut off again: alone, a tokenizer may drop the space before the first word.
        whole = self.tokenizer.decode(row, skip_special_tokens=True)
        start = self.tokenizer.decode(row[:prompt], skip_special_tokens=True)
        return whole[len(start) :] if whole.startswith(start) else new


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise BadInput(f"/{name} takes a number, not {text!r}.") from error


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..converted_model import find_converted

    found = find_converted(args.path)
    console = Console()
    if found.manifest is not None and found.manifest["training"] is None:
        console.warn(f"{args.path} is converted but not trained: expect no sensible text.")
    options = {"max_new_tokens": args.max_new_tokens, "steps": args.steps, "block_size": args.block_size}
    options |= {"selector": args.selector, "temperature": args.temperature}
    options = {name: value for name, value in options.items() if value is not None}

    from ..modeling.generation_config_a2d import A2DGenerationConfig

    try:
        A2DGenerationConfig(**options)
    except ValueError as error:
        raise BadInput(str(error)) from error
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
        console.line(f"{found.name}, {how}. /help for commands, /quit to leave.")
    return converse(Chat(model, tokenizer, options, template, args.seed, console), "> " if typed else "")


def converse(chat: Chat, prompt: str) -> int:
    """Reads lines until the end; returns the exit code."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                chat.console.line()
            return 0
        except KeyboardInterrupt:
            chat.console.line()
            return INTERRUPTED
        try:
            if not line.startswith("/"):
                chat.answer(line)
            elif not chat.command(line):
                return 0
        except BadInput as error:
            chat.console.error(str(error))
        except KeyboardInterrupt:
            chat.console.line(chat.console.style("\n[stopped; this turn is forgotten]", "dim"))
