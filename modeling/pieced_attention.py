"""Attention under a mask that is mostly closed, in pieces: queries that stand together are given the keys they see.

Owns the cut of one call of scaled dot product attention into several. In block diffusion a noisy block sees itself and
the clean text before it: of W noisy copies and a clean one of L tokens each, at most L keys of (W + 1) L. A kernel
that is handed the whole mask multiplies all of them; on a GPU `flex_attention` leaves the others out, on a CPU nothing
does. Results are those of one call, but for the order of sums.

Shapes: B rows, H heads, Q queries, K keys, P queries of a piece, S keys that a piece sees, E numbers per head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


# Every piece keeps keys and values of its own for the backward pass: four of them per copy of the text are thrice the
# memory of one call, and more would save little time.
PIECES_PER_COPY = 4
FEWEST_QUERIES_OF_A_PIECE = 64
# Above this share of the keys cutting costs more than it saves.
MOST_KEYS_SEEN = 0.7


@dataclass(frozen=True)
class Piece:
    """
    Queries that stand together.

    Attributes:
        queries (`slice`): which they are.
        keys_S (`torch.LongTensor` of shape `(S,)`): the keys that at least one of them sees in at least one row.
        mask (`torch.BoolTensor` of shape `(B or 1, H or 1, P, S)`): who of them sees which of those.
    """

    queries: slice
    keys_S: torch.Tensor
    mask: torch.Tensor


def pieces_of(mask: torch.Tensor | None, copies: int, fewest: int = FEWEST_QUERIES_OF_A_PIECE) -> list[Piece] | None:
    """
    Cuts a mask.

    Args:
        mask (`torch.BoolTensor` of shape `(B or 1, H or 1, Q, K)`, *optional*): True where a query sees a key.
        copies (`int`): how many copies of the text stand side by side.
        fewest (`int`, *optional*, defaults to 64): queries of a piece, at the least.

    Returns:
        `list[Piece]`, or `None` where the mask is not of booleans, short, or closed in too few places.
    """
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[2] < 4 * fewest:
        return None
    queries, keys = mask.shape[2:]
    width = max(fewest, -(-queries // (PIECES_PER_COPY * copies)))
    pieces, used = [], 0
    for first in range(0, queries, width):
        stretch = slice(first, min(first + width, queries))
        part = mask[:, :, stretch]
        keys_S = part.any(dim=2).flatten(0, 1).any(dim=0).nonzero()[:, 0]
        if len(keys_S) == 0:  # padding only: what a query without keys gives is the kernel's to say
            keys_S = torch.zeros(1, dtype=torch.long, device=mask.device)
        used += part.shape[2] * len(keys_S)
        pieces.append(Piece(stretch, keys_S, part[..., keys_S]))
    return pieces if used <= MOST_KEYS_SEEN * queries * keys else None


def attend_in_pieces(attend: Callable, pieces: list[Piece], module: torch.nn.Module, query_BHQE, key, value, **kwargs):
    """
    Calls an attention function once per piece.

    Args:
        attend (`Callable`): the function, in the form that transformers registers.
        pieces (`list[Piece]`): the cut of its mask.
        module (`torch.nn.Module`): the attention module that calls it.

    Returns:
        `tuple`: what `attend` would return, the weights left out.
    """
    attended_BQHE = [
        attend(
            module,
            query_BHQE[:, :, piece.queries],
            key.index_select(2, piece.keys_S),
            value.index_select(2, piece.keys_S),
            piece.mask,
            **kwargs,
        )[0]
        for piece in pieces
    ]
    return torch.cat(attended_BQHE, dim=1), None
