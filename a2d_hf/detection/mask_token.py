"""Which token will be the mask, from a tokenizer's files alone.

Owns the same policy that `modeling/mask_token.py` applies to a loaded tokenizer, as one function of plain numbers, and
the reading of those numbers from files. Where only a loaded tokenizer could tell, it says so. Reads files only.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


MASK_TOKEN = "<|MASK|>"
ROW_MULTIPLE = 64
RESERVED = re.compile(
    r"(?:[<\[][|｜]?|>>)_?(reserved|unused|placeholder|place▁holder|extra|dummy|control|special)[\w\-▁ ]*?_?\d+_?"
    r"(?:[|｜]?[>\]]|<<)",
    re.I,
)
ROLES = ("mask_token", "eos_token", "pad_token", "unk_token", "bos_token")
MERGES = re.compile(r',\s*"merges"\s*:\s*\[')
LARGEST_FILE = 2**28


@dataclass(frozen=True)
class MaskTokenPlan:
    """
    The mask token that a conversion would use.

    Attributes:
        strategy (`str`): `tokenizer` (it has one), `free_row` (the first embedding row without a token), `reserved` (a
            token that the vocabulary sets aside), `grow` (a new row) or `undetermined`.
        id (`int`, *optional*): its vocabulary id.
        token (`str`, *optional*): its text.
        rows (`int`, *optional*): embedding rows after the conversion.
    """

    strategy: str = "undetermined"
    id: int | None = None
    token: str | None = None
    rows: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON answer."""
        return asdict(self)


def choose_mask_token(vocabulary: dict[str, int], roles: dict[str, str | None], rows: int) -> MaskTokenPlan:
    """
    The policy: the tokenizer's own mask token; else the first free embedding row; else a reserved token; else a new
    row, padded to a multiple of 64. Never the end-of-text, padding, unknown or begin-of-text token.

    Args:
        vocabulary (`dict`): every token, added ones included, and its id.
        roles (`dict`): `mask_token`, `eos_token`, `pad_token`, `unk_token` and `bos_token` -> text, where set.
        rows (`int`): rows of the embedding.

    Returns:
        [`MaskTokenPlan`]
    """
    taken = {vocabulary.get(roles.get(role)) for role in ROLES[1:]}
    next_id = max(vocabulary.values()) + 1
    own = roles.get("mask_token")
    if own in vocabulary and vocabulary[own] not in taken:
        return MaskTokenPlan("tokenizer", vocabulary[own], own, _rows_for(vocabulary[own], rows))
    name, suffix = MASK_TOKEN, 0
    while name in vocabulary:
        suffix += 1
        name = f"<|MASK_{suffix}|>"
    if next_id < rows:
        return MaskTokenPlan("free_row", next_id, name, rows)
    reserved = [(i, t) for t, i in vocabulary.items() if RESERVED.fullmatch(t) and i not in taken and i < rows]
    if reserved:
        return MaskTokenPlan("reserved", *min(reserved), rows)
    return MaskTokenPlan("grow", next_id, name, _rows_for(next_id, rows))


def _rows_for(token_id: int, rows: int) -> int:
    return rows if token_id < rows else -(-(token_id + 1) // ROW_MULTIPLE) * ROW_MULTIPLE


def plan_mask_token(folder: Path | None, rows: int) -> MaskTokenPlan:
    """
    The mask token of a model whose tokenizer lies in a folder.

    Args:
        folder (`Path`, *optional*): the folder; `None` where there is only a config.
        rows (`int`): rows of the embedding, from the config.

    Returns:
        [`MaskTokenPlan`]: `undetermined` where there is no tokenizer, where its vocabulary is in a form that only its
        own code reads (SentencePiece, tiktoken), or where loading it would add tokens.
    """
    if folder is None:
        return MaskTokenPlan()
    try:
        vocabulary = _read_vocabulary(folder)
        settings = _read(folder / "tokenizer_config.json") or {}
        roles = _read_roles(settings, _read(folder / "special_tokens_map.json") or {})
    except (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        return MaskTokenPlan()  # a tokenizer that does not load is `a2d convert`'s to report
    if not vocabulary or any(text is not None and text not in vocabulary for text in roles.values()):
        return MaskTokenPlan()
    return choose_mask_token(vocabulary, roles, rows)


def _read(file: Path) -> Any:
    if not file.is_file() or file.stat().st_size > LARGEST_FILE:
        return None
    text = file.read_text(encoding="utf-8")
    # The merges are most of the file and say nothing about ids. A vocabulary entry "merges" has a number, not a list.
    if (cut := MERGES.search(text)) and file.name == "tokenizer.json":
        try:
            return json.loads(text[: cut.start()] + "}}")
        except ValueError:
            pass
    return json.loads(text)


def _read_vocabulary(folder: Path) -> dict[str, int] | None:
    whole = _read(folder / "tokenizer.json")
    if whole is not None:
        entries = whole["model"]["vocab"]
        vocabulary = dict(entries) if isinstance(entries, dict) else {token[0]: i for i, token in enumerate(entries)}
        vocabulary |= {token["content"]: token["id"] for token in whole.get("added_tokens") or ()}
    else:
        vocabulary = _read(folder / "vocab.json")
        if vocabulary is None:
            return None
    vocabulary |= _read(folder / "added_tokens.json") or {}
    added = (_read(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    vocabulary |= {_text(token): int(number) for number, token in added.items()}
    if not all(isinstance(t, str) and type(i) is int and i >= 0 for t, i in vocabulary.items()):
        raise ValueError("not a vocabulary")
    return vocabulary


def _read_roles(settings: dict[str, Any], special: dict[str, Any]) -> dict[str, str | None]:
    return {role: _text(settings.get(role, special.get(role))) for role in ROLES}


def _text(token: Any) -> str | None:
    """A token's text: files write it plain or as an object with its settings."""
    if isinstance(token, dict):
        token = token["content"]
    if token is not None and not isinstance(token, str):
        raise ValueError("not a token")
    return token
