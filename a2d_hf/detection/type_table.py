"""What transformers knows about every `model_type`, read from the table beside this file.

Owns the reading of `type_table.json`, which scripts/generate_type_table.py writes. Imports neither torch nor
transformers. The table states facts (kind, classes, defaults); the rules that turn them into a verdict live in
paradigm.py.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any


TABLE_FILE = Path(__file__).with_name("type_table.json")
# Types whose conversion has been proven by the project's own tests; the rest rest on the rules alone.
PROVEN_FILE = Path(__file__).with_name("proven_types.json")


@dataclass(frozen=True)
class TypeEntry:
    """
    One `model_type`.

    Attributes:
        model_type (`str`): the name.
        kind (`str`): decoder, multimodal, recurrent, encoder, encoder_decoder, diffusion, vision, audio, refused or
            other.
        lm (`tuple[str]`): its classes with a language-model head.
        base (`tuple[str]`): its classes without a head.
        defaults (`dict`): fields that a config may leave out, and their value then. A field that is missing here is
            not read by the type, whatever a config says.
        alias (`dict`): standard field name -> the name this type uses.
        layers (`tuple[str]`): the default kinds of its layers, to be repeated; empty where all are alike.
        leading_dense (`int`, *optional*): feed-forward layers before the first mixture of experts.
        positions (`str`): rope, alibi, learned, sinusoidal, relative or none.
        gated_ffn (`bool`): three feed-forward matrices instead of two.
        sinks (`bool`): whether attention has learned sinks.
        path (`tuple[str]`): of a multimodal type, the keys that lead to the text decoder's config.
        text (`str`, *optional*): of a multimodal type, the type of its text decoder.
        any_text (`bool`): whether a multimodal config names the type of its text decoder itself.
        renames_text (`bool`): whether an unknown type inside is read as `text` (types of older remote code).
        part_of (`str`, *optional*): the multimodal type that alone can build this text decoder.
        note (`str`, *optional*): why the type is refused.
    """

    model_type: str
    kind: str
    lm: tuple[str, ...] = ()
    base: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    leading_dense: int | None = None
    positions: str = "none"
    gated_ffn: bool = True
    sinks: bool = False
    path: tuple[str, ...] = ()
    text: str | None = None
    any_text: bool = False
    renames_text: bool = False
    part_of: str | None = None
    note: str | None = None


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE_FILE.read_text(encoding="utf-8"))


@cache
def entry_of(model_type: str) -> TypeEntry | None:
    """The table's entry of a type, or `None` where transformers does not know it."""
    row = _table()["types"].get(model_type)
    if row is None:
        return None
    tuples = {name: tuple(row[name]) for name in ("lm", "base", "layers", "path") if name in row}
    return TypeEntry(model_type=model_type, **(row | tuples))


@cache
def language_model_classes() -> frozenset[str]:
    """Every class with a language-model head, as `plain_name` writes it."""
    return frozenset(plain_name(name) for row in _table()["types"].values() for name in row.get("lm", ()))


@cache
def proven_types() -> frozenset[str]:
    """The types whose conversion the project's tests have proven."""
    return frozenset(json.loads(PROVEN_FILE.read_text(encoding="utf-8"))["types"])


def dequantizable_methods() -> frozenset[str]:
    """Quantization methods that transformers can undo while loading."""
    return frozenset(_table()["dequantizable"])


def table_version() -> str:
    """The version of transformers that the table was generated from."""
    return _table()["transformers"]


def plain_name(class_name: str) -> str:
    """A class name without case and punctuation: older files write MPTForCausalLM for MptForCausalLM."""
    return "".join(letter for letter in class_name.lower() if letter.isalnum())
