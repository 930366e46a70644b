"""Decoding parameters as a person types them: FIELD=VALUE, read, checked with the field's own sentence, and listed.

Owns what `--set` of `a2d sample` and `a2d chat` and `/set` of a conversation take, and which refusals need no model in
memory. The fields and their checks are [`A2DGenerationConfig`]'s. Imports no torch until a value is checked.
"""

import contextlib
import difflib
import json
import logging
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import Console
from .errors import BadInput


if TYPE_CHECKING:
    from .modeling.generation_config_a2d import A2DGenerationConfig

AUTO = "auto"  # what a person writes to give a field back to the checkpoint
# Fields whose value is a text, whatever it looks like; and those that hold several values.
_TEXTS = ("selector", "remasking", "self_speculation", "approximate_cache", "stop_strings", "cache_implementation")
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "guidance_keep_tokens", "remasking_loop")
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None}
_OFF = {"temperature": 0, "guidance_scale": 1, "use_cache": True}  # values that say what an unset field says
UNSET = "not set"
# Fields that a program sets, not a person at a shell, and what there is instead.
_NOT_TYPED = {
    "return_dict_in_generate": "what a text cost is always told",
    "output_history": "`a2d sample --trace FILE` shows each forward pass",
    "output_cache_deviation": "the measured deviation is read off the output in Python",
    "num_return_sequences": "give the prompt again, or another seed",
    "cache_config": "it takes a Python object",
    "compile_config": "it takes a Python object",
}


class DecodingSettings:
    """
    What a person has chosen, over what the checkpoint's own `generation_config.json` says.

    Args:
        own ([`A2DGenerationConfig`]): the checkpoint's.
        checkpoint (`Mapping[str, Any]`): its `config.json`.

    Attributes:
        chosen (`dict[str, Any]`): the fields chosen; `None` switches off one that the checkpoint sets.
    """

    def __init__(self, own: "A2DGenerationConfig", checkpoint: Mapping[str, Any]):
        self.own, self.checkpoint = own, checkpoint
        self.chosen: dict[str, Any] = {}

    @classmethod
    def of_checkpoint(cls, folder: Path) -> "DecodingSettings":
        """Those of a checkpoint folder, nothing chosen yet; reads two small files and no weights."""
        from .modeling.generation_config_a2d import A2DGenerationConfig
        from .source import read_config

        checkpoint = read_config(folder)
        try:
            if (folder / "generation_config.json").is_file():
                return cls(A2DGenerationConfig.from_pretrained(folder, local_files_only=True), checkpoint)
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder / 'generation_config.json'} cannot be used: {error}") from error
        return cls(A2DGenerationConfig.from_model_config(checkpoint), checkpoint)

    def choose(self, changes: Mapping[str, Any]) -> None:
        """
        Takes fields into force; `"auto"` gives one back to the checkpoint. All of them, or none.

        Raises:
            [`BadInput`]: with the field's own sentence; nothing has changed then.
        """
        from .modeling.generation_config_a2d import A2DGenerationConfig, set_fields

        for name, value in changes.items():
            if name in _NOT_TYPED:
                raise BadInput(f"`{name}` cannot be set here: {_NOT_TYPED[name]}.")
            if name not in typed_fields():
                try:
                    A2DGenerationConfig(**{name: str(value) if isinstance(value, list | dict) else value})
                except ValueError as error:  # unknown, another project's, or of the left-to-right decoders
                    raise BadInput(str(error)) from error
                raise BadInput(f"`{name}` does nothing in diffusion decoding: leave it out.")
        if not _is_stop(changes.get("stop_strings")):
            raise BadInput(f"`stop_strings` must be a text or a list of texts, not {changes['stop_strings']!r}.")
        kept = {name: value for name, value in (self.chosen | dict(changes)).items() if value != AUTO}
        set_by_checkpoint = set_fields(self.own)
        # None is news only where the checkpoint says something else.
        kept = {name: value for name, value in kept.items() if value is not None or name in set_by_checkpoint}
        self._check(kept)
        self.chosen = kept

    def in_force(self) -> "A2DGenerationConfig":
        """What a text is decoded with."""
        return self._combined(self.chosen)

    def _combined(self, chosen: Mapping[str, Any]) -> "A2DGenerationConfig":
        from .modeling.generation_config_a2d import A2DGenerationConfig

        return A2DGenerationConfig.combine(self.own, None, chosen)[0]

    def _check(self, chosen: Mapping[str, Any]) -> None:
        """Refuses what does not go together, as far as that can be known without the weights and the prompt."""
        from .modeling.approximate_cache_a2d import check_blocks
        from .modeling.decoding_call_a2d import check_idle_parameters
        from .modeling.self_speculation_a2d import check_speculation

        try:
            config = self._combined(chosen)
            check_idle_parameters(config, chosen)
            if config.self_speculation is not None:
                check_speculation(config, chosen)
            if config.approximate_cache is not None:
                checkpoint = self.checkpoint
                check_blocks(checkpoint.get("objective"), config.block_size or checkpoint.get("block_size"))
        except ValueError as error:
            raise BadInput(str(error)) from error

    # ----------------------------------------------------------------------------------------------------- listing

    def record(self) -> dict[str, Any]:
        """The fields in force that are set, for a report: enough to decode the same text again."""
        config = self.in_force()
        values = {name: vars(config)[name] for name in typed_fields() if name != "seed"}
        values["block_size"] = values["block_size"] or self.checkpoint.get("block_size")
        return {name: value for name, value in values.items() if value is not None}

    def lines(self) -> list[str]:
        """A line for each field in force, one for all that are not set; a star marks what is not the checkpoint's."""
        lines, unset = [], []
        for name in (name for name in typed_fields() if name != "seed"):
            shown = self.shown(name)
            if shown == UNSET:
                unset.append(name)
            else:
                lines.append(f"{'*' if '(checkpoint: ' in shown else ' '} {name:<24} {shown}")
        words = textwrap.wrap(f"not set: {', '.join(unset)}", 100, initial_indent="  ", subsequent_indent="    ")
        return lines + words

    def shown(self, name: str) -> str:
        """The value of a field in force, and behind it the checkpoint's own where that is another."""
        value, own = (self._said(name, vars(config)[name]) for config in (self.in_force(), self._combined({})))
        return value if value == own else f"{value}   (checkpoint: {own})"

    def _said(self, name: str, value: Any) -> str:
        """A value as it is shown; of an unset field what happens then."""
        if value is not None and value != _OFF.get(name):
            return value if isinstance(value, str) else json.dumps(value)
        block = self.checkpoint.get("block_size")
        unset = {
            "steps": "as many as the selector needs",
            "block_size": "the whole text" if block is None else f"{block}, as trained",
            "temperature": "0: the likeliest token",
            "guidance_scale": "1: off",
            "use_cache": "true",
            "mask_token_id": str(self.checkpoint.get("mask_token_id")),
        }
        return unset.get(name, UNSET)


def typed_fields() -> list[str]:
    """The fields of [`A2DGenerationConfig`] that a person may set, what decides the text first."""
    from .modeling.generation_config_a2d import DIFFUSION_FIELDS, SHARED_FIELDS

    first = ("max_new_tokens", "temperature")
    names = [*first, *(name for name in (*DIFFUSION_FIELDS, *SHARED_FIELDS) if name not in first)]
    return [name for name in names if name not in _NOT_TYPED]


def read_value(name: str, text: str) -> Any:
    """What a person means by `text`: a number, yes or no, a list as `1,2` or `[1, 2]`, else the text itself."""
    if text == AUTO:
        return AUTO
    if text.lower() == "none":
        return None
    if name in _TEXTS and not (name == "stop_strings" and text.startswith(("[", '"'))):
        return text
    if not text.startswith("[") and (name in _LISTS or (name == "eos_token_id" and "," in text)):
        text = f"[{text}]"
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float, json.loads):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) and value else [value]
    return value is None or all(isinstance(text, str) and text for text in texts)


def read_assignments(texts: Sequence[str], argument: str = "--set") -> dict[str, Any]:
    """
    Reads `FIELD=VALUE` texts.

    Args:
        texts (`Sequence[str]`): as they were given.
        argument (`str`, *optional*, defaults to `"--set"`): what the user calls it.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or not name or not value.strip():
            raise BadInput(f"{argument} {text} is no FIELD=VALUE: write for example {argument} remasking=p2.")
        if name in found:
            raise BadInput(f"{argument} sets `{name}` twice: leave one of them out.")
        found[name] = read_value(name, value.strip())
    return found


def with_flags(texts: Sequence[str] | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What `--set` and the flags of their own say together; one field said twice is refused."""
    found = read_assignments(texts or [])
    if "seed" in found:
        raise BadInput("--set seed is --seed: give that flag.")
    for name, value in flags.items():
        if value is not None and name in found:
            raise BadInput(f"`{name}` is given twice, with a flag of its own and with --set: leave one of them out.")
    return found | {name: value for name, value in flags.items() if value is not None}


def explain_flag(flag: str, known: Sequence[str]) -> str | None:
    """
    What to type for a flag that does not exist: a field that only `--set` reaches, or another project's name for one.

    Args:
        flag (`str`): as it was typed.
        known (`Sequence[str]`): the command's flags.
    """
    from .modeling.decoding_names_a2d import PEER_ARGUMENTS

    name = flag.lstrip("-").replace("-", "_")
    ours = re.match(r"`(\w+)", PEER_ARGUMENTS.get(name, ""))
    field = ours[1] if ours else name
    if field not in typed_fields():
        return None
    own = f"--{field.replace('_', '-')}"
    way = own if own in known else f"--set {field}=VALUE"
    return f"other projects' `{name}` is {PEER_ARGUMENTS[name]} here: {way}" if ours else f"write {way}"


def explain_field(name: str) -> str:
    """What [`A2DGenerationConfig`] says of a field, as text for a terminal."""
    from .modeling.generation_config_a2d import A2DGenerationConfig

    name = name.replace("-", "_")
    # Each parameter, or several that share their words, stands at one indent and its words, if any, one further in.
    for entry in re.split(r"\n {8}(?=\w)", A2DGenerationConfig.__doc__ or ""):
        head = entry.split("\n")[0]
        if re.search(rf"(^|, ){name}( \(|,|:)", head) and name in typed_fields():
            words = re.sub(r"\n\s*\n.*", "", entry, flags=re.S)  # not the title of the next group
            words = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"\1", " ".join(words.split()).replace("*optional*", ""))
            return re.sub(r",(?: ,)* (?=\))|, (?=,)", "", words.replace("`", "")).replace("defaults to", "default")
    close = difflib.get_close_matches(name, typed_fields(), n=1)
    raise BadInput(f"There is no field `{name}`" + (f": did you mean `{close[0]}`?" if close else "; see /settings."))


@contextlib.contextmanager
def said_by(console: Console) -> Iterator[None]:
    """While entered, what the decoder logs as a warning is a warning of the console."""

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.warn(record.getMessage())

    logger, handler = logging.getLogger("a2d_hf.modeling"), Said(logging.WARNING)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
