"""Which token is the mask, and what its embedding row holds.

Owns the policy that every conversion follows and the only numbers that a conversion writes: the mask token's rows in
the input and output embeddings, and the rows that had to be grown for it.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


MASK_TOKEN = "<|MASK|>"
ROW_MULTIPLE = 64
# Tokens that a vocabulary sets aside without giving them a meaning. `<|reserved_special_token_0|>` (Llama 3),
# `<unused0>` (Gemma), `<|placeholder1|>` (Phi), `[control_8]` and `<SPECIAL_12>` (Mistral), `>>UNUSED_0<<` (Falcon),
# `<｜place▁holder▁no▁0｜>` (DeepSeek), `<extra_id_0>`, `<|dummy_0|>`, ...
RESERVED = re.compile(
    r"(?:[<\[][|｜]?|>>)_?(reserved|unused|placeholder|place▁holder|extra|dummy|control|special)[\w\-▁ ]*?_?\d+_?"
    r"(?:[|｜]?[>\]]|<<)",
    re.I,
)
# A row whose norm is this far below the usual was never trained.
NEAR_ZERO = 0.1
# Rows of a matrix that are looked at together: it may lie in a file and be larger than memory. Few enough for a
# processor's cache: sixteen times as many took sixteen times as long.
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class MaskToken:
    """
    The choice of a mask token.

    Attributes:
        id (`int`): its vocabulary id.
        token (`str`): its text.
        strategy (`str`): `tokenizer` (the tokenizer has one), `free_row` (the first embedding row without a token),
            `reserved` (a token set aside by the vocabulary), `grow` (a new row) or `given` (by the caller).
        rows_before (`int`): embedding rows of the parent.
        rows_after (`int`): embedding rows of the conversion.
        trained_rows (`int`): rows below this one belong to tokens of the vocabulary.
        row_initialized (`bool`): whether the rows were set to the mean of the trained rows.
    """

    id: int
    token: str
    strategy: str
    rows_before: int
    rows_after: int
    trained_rows: int
    row_initialized: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_mask_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> MaskToken:
    """
    Chooses the mask token of a conversion: the tokenizer's own; else the first free embedding row; else a reserved
    special token; else a new row, with the matrix padded to a multiple of 64. Never the end-of-text, padding or
    unknown token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the parent's tokenizer; not changed.
        rows (`int`): rows of the parent's input embedding.

    Returns:
        [`MaskToken`]
    """
    vocabulary = tokenizer.get_vocab()
    next_id = max(vocabulary.values()) + 1
    taken = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id}
    own = tokenizer.mask_token_id
    if own is not None and own not in taken:
        return MaskToken(own, tokenizer.mask_token, "tokenizer", rows, _grown(rows, own), next_id)
    name, suffix = MASK_TOKEN, 0
    while name in vocabulary:
        suffix += 1
        name = f"<|MASK_{suffix}|>"
    if next_id < rows:
        return MaskToken(next_id, name, "free_row", rows, rows, next_id)
    reserved = sorted((i, t) for t, i in vocabulary.items() if RESERVED.fullmatch(t) and i not in taken and i < rows)
    if reserved:
        token_id, token = reserved[0]
        return MaskToken(token_id, token, "reserved", rows, rows, next_id)
    return MaskToken(next_id, name, "grow", rows, _grown(rows, next_id), next_id)


def _grown(rows: int, token_id: int) -> int:
    if token_id < rows:
        return rows
    return -(-(token_id + 1) // ROW_MULTIPLE) * ROW_MULTIPLE


def add_mask_token(tokenizer: PreTrainedTokenizerBase, choice: MaskToken) -> None:
    """
    Gives the tokenizer its mask token, in place.

    Raises:
        ValueError: where the tokenizer assigns another id than the chosen one.
    """
    if tokenizer.mask_token_id != choice.id:
        tokenizer.add_special_tokens({"mask_token": choice.token})
    if tokenizer.mask_token_id != choice.id:
        raise ValueError(
            f"The tokenizer gave {choice.token!r} the id {tokenizer.mask_token_id}, not {choice.id}: its vocabulary "
            "has holes; pass `mask_token_id` with the id of a token that is never used."
        )


@torch.no_grad()
def prepare_mask_rows(model: PreTrainedModel, choice: MaskToken) -> MaskToken:
    """
    Grows the embeddings where the mask token has no row, and gives an untrained mask row the mean of the trained rows
    (the same for an untied output row). A random or near-zero row would make gradients blow up (LLaDA2.0,
    https://huggingface.co/papers/2512.15745). On the meta device, where there are no numbers, the matrices only grow:
    the rows are then the business of whoever writes the files.

    Args:
        model (`PreTrainedModel`): the autoregressive parent; changed in place.
        choice ([`MaskToken`]): the mask token.

    Returns:
        [`MaskToken`]: the choice, with `row_initialized` filled in.
    """
    if choice.rows_after != choice.rows_before:
        model.resize_token_embeddings(choice.rows_after, mean_resizing=False)
    matrices = embedding_matrices(model)
    if matrices[0].is_meta or not rows_are_untrained(matrices[0], choice):
        return choice
    for matrix in matrices:
        matrix[written_rows(choice)] = mean_of_trained_rows(matrix, choice)
    return replace(choice, row_initialized=True)


def embedding_matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """The input embedding `(V, D)` and, where untied, the output one and its bias `(V,)`."""
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.weight)
        if head.bias is not None:
            matrices.append(head.bias)
    return matrices


def written_rows(choice: MaskToken) -> list[int]:
    """The rows that a conversion may write: the mask token's and those that were grown."""
    return sorted({choice.id, *range(choice.rows_before, choice.rows_after)})


def rows_are_untrained(matrix_VD: torch.Tensor, choice: MaskToken) -> bool:
    """Whether nothing has trained the mask token's row: it is new, stands for no token, or is near zero."""
    grown = choice.rows_after != choice.rows_before
    return grown or choice.strategy in ("free_row", "reserved", "grow") or is_near_zero(matrix_VD, choice.id)


def mean_of_trained_rows(matrix: torch.Tensor, choice: MaskToken) -> torch.Tensor:
    """
    The mean over the rows of the vocabulary's own tokens, to fp32 precision in the matrix's own type.

    Summed in fp64 on the CPU, a fixed number of rows at a time: the number is the same on every device, and for a
    matrix that is read from its file piece by piece.
    """
    stop, written = min(choice.trained_rows, choice.rows_before, matrix.shape[0]), set(written_rows(choice))
    total, count = torch.zeros(tuple(matrix.shape[1:]), dtype=torch.float64), 0
    for start in range(0, stop, _ROWS_AT_ONCE):
        end = min(start + _ROWS_AT_ONCE, stop)
        piece = matrix[start:end]
        if not written.isdisjoint(range(start, end)):
            piece = piece[[row - start for row in range(start, end) if row not in written]]
        total += piece.cpu().double().sum(dim=0)
        count += len(piece)
    return (total / count).float().to(matrix.device, matrix.dtype)


def is_near_zero(matrix_VD: torch.Tensor, row: int) -> bool:
    """Whether a row's norm says that it was never trained."""
    pieces = range(0, matrix_VD.shape[0], _ROWS_AT_ONCE)
    norms_V = torch.cat([matrix_VD[start : start + _ROWS_AT_ONCE].float().norm(dim=-1) for start in pieces])
    return bool(norms_V[row] < NEAR_ZERO * norms_V.median())
