"""The rows of a batch, whether each has a sequence of its own or several are packed into one.

Owns the way between what belongs to a row (its number, epoch, place, tail) and what belongs to a token. A packed batch
has `document_ids`: for each token, which of the batch's rows it belongs to.

Shapes: B sequences, L tokens, R rows of the batch (R = B where nothing is packed), T tokens of one row.
"""

from collections.abc import Iterator

import torch

from .diffusion_noise import position_in_row


def by_token(values_R: torch.Tensor, document_ids_BL: torch.Tensor | None) -> torch.Tensor:
    """What belongs to a row, at each of its tokens: `(B, L)`, or `(B, 1)` where nothing is packed."""
    return values_R[:, None] if document_ids_BL is None else values_R[document_ids_BL.to(values_R.device)]


def sum_by_row(values_BL: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum over the tokens of each row, `(R,)`. Values at padding must be 0."""
    documents_BL = inputs.get("document_ids")
    if documents_BL is None:
        return values_BL.sum(dim=-1)
    empty_R = torch.zeros(inputs["row_id"].shape, dtype=torch.int64, device=values_BL.device)
    return empty_R.index_add(0, documents_BL.flatten(), values_BL.flatten().long())


def in_text(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens are neither padding nor EOS that were added behind a row, `(B, L)`."""
    mask_BL, documents_BL = inputs["attention_mask"], inputs.get("document_ids")
    length_R = sum_by_row(mask_BL, inputs) - inputs.get("tail_length", 0)
    return mask_BL.bool() & (position_in_row(mask_BL, documents_BL) < by_token(length_R, documents_BL))


def tokens_of_rows(inputs: dict[str, torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """For each row in turn: which sequence it stands in, and where its text stands there, `(T,)`."""
    text_BL, documents_BL = in_text(inputs), inputs.get("document_ids")
    for r in range(inputs["row_id"].shape[0]):
        if documents_BL is None:
            yield r, text_BL[r].nonzero()[:, 0]
        else:
            # An empty row cannot be: even a blank one has a token.
            found = (text_BL & (documents_BL == r)).nonzero()
            yield int(found[0, 0]), found[:, 1]


def packing_kwargs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model must be told about a batch that is packed."""
    return {"document_ids": inputs["document_ids"]} if "document_ids" in inputs else {}
