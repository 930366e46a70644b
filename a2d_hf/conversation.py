"""A conversation with a converted model: its turns, its settings and its /commands. Decoding is the model's own.

Owns what `a2d chat` does with a line, and what a conversation remembers; the reading of lines is chat_command.py's,
the decoding parameters are decoding_settings.py's. Loads no library before it has to.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .atomic_files import write_json
from .console import Console
from .decoding_settings import (
    AUTO,
    DecodingSettings,
    explain_field,
    read_assignments,
    read_value,
    said_by,
    typed_fields,
)
from .errors import BadInput


HELP = """  /set FIELD VALUE   any decoding parameter, for example /set remasking p2; auto: the checkpoint's own
  /settings          all of them as they are now; a star marks what differs from the checkpoint's own
  /help FIELD        what a parameter does
  /steps N           forward passes per answer (auto: as many as the selector needs)
  /block N           finish this many positions before the next ones (auto: the checkpoint's)
  /selector NAME     confidence, margin, entropy, random, threshold, entropy_bound; a number behind the last two
  /temperature T     0 takes the likeliest token, above 0 samples
  /tokens N          most tokens per answer
  /seed N            seed of the next answer; each further one adds 1
  /negative TEXT     with /set guidance_scale 2: what to move away from; without TEXT nothing any more
  /undo              forget the last turn
  /retry             answer the last line again, with the next seed
  /reset             forget the conversation
  /save FILE         write the conversation and its settings as JSON
  /help              this list
  /quit              leave; so do Ctrl-D and, at the prompt, Ctrl-C
  An empty line writes a text from nothing. Ctrl-C while the model writes stops that answer. A line that begins with a
  slash is a command: put a space before it to say it."""
# Commands that are a shorter way to set a field.
SHORT = {
    "steps": "steps",
    "block": "block_size",
    "temperature": "temperature",
    "tokens": "max_new_tokens",
    "seed": "seed",
}
BOUNDS = ("threshold", "entropy_bound")
ENDS = {
    "eos": "the model ended",
    "stopping_criteria": "a stop string ended it",
    "length": "cut off after {} tokens",
}


class Conversation:
    """
    One conversation.

    Args:
        model ([`A2DForMaskedDiffusion`]), tokenizer (`PreTrainedTokenizerBase`): what answers.
        settings ([`DecodingSettings`]): how it decodes.
        name (`str`): what the user calls the model.
        template (`bool`): whether turns go through the tokenizer's chat template.
        seed (`int`): of the first answer.
        console ([`Console`]): where the answers go; drawn live on a terminal.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: DecodingSettings,
        name: str,
        template: bool,
        seed: int,
        console: Console,
    ):
        self.model, self.tokenizer, self.settings, self.name = model, tokenizer, settings, name
        self.template, self.seed, self.console = template, seed, console
        self.negative: str | None = None
        # Turns as (what was said, what was answered).
        self.turns: list[tuple[str, str]] = []
        self.saved: set[Path] = set()
        self.commands = {
            "set": self._set,
            "settings": self._show_settings,
            "selector": self._select,
            "negative": self._set_negative,
            "undo": self._undo,
            "retry": self._retry,
            "reset": self._reset,
            "save": self._save,
            "help": self._help,
        }

    # ---------------------------------------------------------------------------------------------------- commands

    def command(self, line: str) -> bool:
        """Obeys a /command; returns whether the conversation goes on. Raises [`BadInput`] for what it cannot do."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("quit", "exit"):
            return False
        if name in self.commands:
            self.commands[name](rest)
        elif name in SHORT:
            if len(rest.split()) != 1:
                example = 0.7 if name == "temperature" else 16
                raise BadInput(f"/{name} takes one value, for example /{name} {example}.")
            self._choose({SHORT[name]: read_value(SHORT[name], rest)})
        else:
            raise BadInput(self._unknown(name))
        return True

    def _unknown(self, name: str) -> str:
        field = name.replace("-", "_")
        if field in typed_fields():
            return f"There is no command /{name}: write /set {field} VALUE."
        near = difflib.get_close_matches(name, [*self.commands, *SHORT, "quit", "exit"], n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them; put a space before a line to say it."
        return f"There is no command /{name}: {hint}"

    def _set(self, rest: str) -> None:
        words = rest.split(None, 1)
        if not words:
            raise BadInput(
                "/set takes a field and a value, for example /set remasking p2; /settings lists the fields."
            )
        if "=" in words[0]:
            # Several at once, for those that only go together.
            self._choose(read_assignments(rest.split(), "/set"))
        elif len(words) == 2:
            name = words[0].replace("-", "_")
            self._choose({name: read_value(name, words[1])})
        else:
            raise BadInput(f"/set {words[0]} lacks a value: write for example /set {words[0]} {AUTO}.")

    def _select(self, rest: str) -> None:
        words = rest.split()
        if not words or len(words) > 2:
            raise BadInput("/selector takes a name, and a number behind threshold and entropy_bound.")
        change: dict[str, Any] = {"selector": words[0]}
        change |= {name: AUTO for name in BOUNDS if name in self.settings.chosen and words[0] != AUTO}
        if len(words) == 2:
            if words[0] not in BOUNDS:
                raise BadInput(f"/selector {words[0]} takes no number: leave {words[1]} out.")
            change[words[0]] = read_value(words[0], words[1])
        self._choose(change)

    def _choose(self, changes: Mapping[str, Any]) -> None:
        """Takes fields into force and says what they are now; all of them, or none."""
        changes = dict(changes)
        if changes.get("max_new_tokens") == 0 and not isinstance(changes["max_new_tokens"], bool):
            raise BadInput("`max_new_tokens` must be at least 1 in a conversation: an answer needs room.")
        seed = changes.pop("seed", None)
        if seed is not None:
            if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
                raise BadInput(f"`seed` must be an integer of at least 0, not {seed!r}.")
        self.settings.choose(changes)
        for name in changes:
            self.console.note(f"{name} {self.settings.shown(name)}")
        if seed is not None:
            self.seed = seed
            self.console.note(f"seed {seed} for the next answer; each further one adds 1")
        if self.negative is not None and "guidance_scale" in changes and not self._guided():
            self.console.note("the negative prompt rests: guidance_scale is 1")

    def _guided(self) -> bool:
        return self.settings.in_force().guidance_scale not in (None, 1)

    def _set_negative(self, rest: str) -> None:
        if rest and not self._guided():
            raise BadInput("/negative does nothing without guidance: write /set guidance_scale 2 first.")
        self.negative = rest or None
        self.console.note(f"negative prompt: {rest}" if rest else "no negative prompt")

    def _show_settings(self, rest: str) -> None:
        facts = {
            "model": f"{self.name}, on {self.model.device}",
            "chat template": "the tokenizer's" if self.template else "none: plain text",
            "seed": f"{self.seed}, of the next answer",
        }
        if self.negative is not None:
            facts["negative prompt"] = self.negative if self._guided() else f"{self.negative} (rests)"
        for name, value in facts.items():
            self.console.line(f"  {name:<24} {value}")
        for line in self.settings.lines():
            self.console.line(line)
        self.console.note("* = not as the checkpoint has it; /set FIELD VALUE changes one, /help FIELD explains it")

    def _undo(self, rest: str) -> None:
        if not self.turns:
            raise BadInput("There is nothing to undo: the conversation is empty.")
        self.console.note(f"forgotten: {self.turns.pop()[0]}")

    def _retry(self, rest: str) -> None:
        if not self.turns:
            raise BadInput("There is nothing to answer again: the conversation is empty.")
        last = self.turns.pop()
        try:
            self.answer(last[0])
        except (BadInput, KeyboardInterrupt) as error:
            self.turns.append(last)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt("the answer before stands") from None
            raise
        if self.turns[-1] == last:
            self.console.note("the same answer: /temperature 0.8 would vary it, and so may other /settings")

    def _reset(self, rest: str) -> None:
        self.turns = []
        self.console.note("forgotten")

    def _save(self, rest: str) -> None:
        if not rest:
            raise BadInput("/save takes a file, for example /save conversation.json.")
        file = Path(rest).expanduser().absolute()
        if file.is_dir() or not file.parent.is_dir():
            raise BadInput(f"/save {rest} is no file in a folder that exists: give one, for example talk.json.")
        if file.exists() and file not in self.saved:
            raise BadInput(f"/save {rest} exists already: give another name.")
        settings = self.settings.record()
        if self.negative is not None and self._guided():
            settings["negative_prompt"] = self.negative
        write_json(
            file,
            {"model": self.name, "chat_template": self.template, "settings": settings, "messages": self._messages()},
        )
        self.saved.add(file)
        self.console.note(f"{len(self.turns)} turn(s) in {rest}")

    def _help(self, rest: str) -> None:
        self.console.line(f"  {explain_field(rest)}" if rest else HELP)

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
        options = dict(self.settings.chosen)
        if self.negative is not None and self._guided():
            options["negative_prompt_ids"] = self._encode([], self.negative)["input_ids"]
        live = self.console.out.isatty()
        streamer = None
        if live:
            from .live_draft import LiveDraft

            streamer = LiveDraft(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            with said_by(self.console):
                output = self.model.diffusion_generate(
                    **(inputs or {}),
                    **options,
                    seed=self.seed,
                    streamer=streamer,
                    tokenizer=self.tokenizer,
                    return_dict_in_generate=True,
                )
        except ValueError as error:  # the decoder names the argument and the fix
            raise BadInput(str(error)) from error
        except KeyboardInterrupt:
            if streamer is not None:
                streamer.end()  # takes the draft off the screen
            raise
        self.seed += 1
        prompt = 0 if inputs is None else inputs["input_ids"].shape[1]
        text = self._completion(output.sequences[0], prompt)
        if not live:
            self.console.line(text)
        facts = f"{output.num_forwards} forwards, {float(output.tokens_per_forward[0]):.2f} tokens per forward"
        # A text from nothing begins with the BOS token, where there is one.
        given = prompt if inputs is not None else int(self.settings.in_force().bos_token_id is not None)
        end = ENDS[output.stop_reason[0]].format(output.sequences.shape[1] - given)
        from_nothing = "" if line else "; from nothing, no part of the conversation"
        self.console.line(self.console.style(f"[{facts}; {end}{from_nothing}]", "dim"))
        if line:
            self.turns.append((line, text))

    def _inputs(self, line: str) -> Any:
        """The prompt: the conversation so far and the new line, without the oldest turns if they do not fit."""
        from .data import explained_tokenizing

        context, config = self.model.config.max_position_embeddings, self.settings.in_force()
        wanted = config.max_new_tokens
        if wanted is not None and context is not None and "max_new_tokens" not in self.settings.chosen:
            wanted = min(wanted, context // 4)  # a default shrinks before turns are forgotten
        turns = self.turns
        while True:
            with explained_tokenizing("The text cannot be tokenized"):
                inputs = self._encode(turns, line).to(self.model.device)
            prompt = inputs["input_ids"].shape[1]
            whole = max(prompt, config.max_length) if wanted is None else prompt + wanted
            if context is None or whole <= context or not turns:
                break
            turns = turns[1:]
        if context is not None and prompt >= context:
            raise BadInput(f"That is {prompt} tokens, and the model's context holds {context}: say it in fewer words.")
        if len(turns) < len(self.turns):
            self.console.warn(
                f"the first {len(self.turns) - len(turns)} turn(s) are forgotten: the context holds {context} tokens."
            )
            self.turns = turns
        return inputs

    def _messages(self, turns: list[tuple[str, str]] | None = None) -> list[dict[str, str]]:
        messages = []
        for said, answered in self.turns if turns is None else turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
        return messages

    def _encode(self, turns: list[tuple[str, str]], line: str) -> Any:
        if not self.template:
            text = "".join(f"{said}{answered}\n" for said, answered in turns) + line
            return self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        messages = [*self._messages(turns), {"role": "user", "content": line}]
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
