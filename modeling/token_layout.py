"""Where every token of a forward pass stands: logical positions, padding, documents, copies of the sequence.

Owns the one reading of `attention_mask`, `position_ids` and `document_ids`; the attention pattern and the token shift
both work on what it finds.

Shapes: B rows, L tokens of this pass, K = cached tokens + L.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from .attention_pattern import AttentionPattern


@dataclass
class TokenLayout:
    """
    Attributes:
        shape (`tuple[int, int]`): (B, L).
        seen (`int`): tokens in the cache.
        device (`torch.device`): where index tensors live.
        position_BK (`torch.Tensor` of shape `(B or 1, K)`, *optional*): logical positions; `None` means 0, 1, 2, ...
        valid_BK (`torch.Tensor`, *optional*): False at padding; `None` means no padding.
        document_BK (`torch.Tensor`, *optional*): documents of packed rows.
        copy_K (`torch.Tensor`, *optional*): which copy of the sequence a token belongs to; 1 marks an open tail.
        placed (`bool`): whether the caller gave the positions.
    """

    shape: tuple[int, int]
    seen: int
    device: torch.device
    position_BK: torch.Tensor | None = None
    valid_BK: torch.Tensor | None = None
    document_BK: torch.Tensor | None = None
    copy_K: torch.Tensor | None = None
    placed: bool = False

    @classmethod
    def of(
        cls,
        pattern: AttentionPattern,
        shape: tuple[int, int],
        device: torch.device,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> "TokenLayout":
        """Reads the arguments of a forward pass; raises `ValueError` where they contradict each other."""
        rows, length = shape
        seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        total, copies = seen + length, pattern.copies
        if pattern.noisy_length is not None:
            if position_ids is None:
                raise ValueError(
                    "A bd3lm pattern with `noisy_length` needs `position_ids`: its copies leave out tokens."
                )
            if length <= pattern.views * pattern.noisy_length:
                raise ValueError(
                    f"{pattern.views} noisy view(s) of {pattern.noisy_length} tokens leave nothing of an input of "
                    f"{length} for the clean copy."
                )
        elif length % copies:
            raise ValueError(
                f"The bd3lm pattern with {copies - 1} noisy view(s) needs an input length divisible by {copies}, got "
                f"{length}."
            )
        if copies > 1 and seen:
            raise ValueError("The bd3lm pattern is for training and takes no cache; decode with block_causal.")
        layout = cls((rows, length), seen, device, placed=position_ids is not None)
        if attention_mask is not None:
            if tuple(attention_mask.shape) != (rows, total):
                raise ValueError(
                    f"`attention_mask` must have the shape ({rows}, {total}) of the tokens, cached ones included, not "
                    f"{tuple(attention_mask.shape)}."
                )
            valid_BK = attention_mask.to(device=device, dtype=torch.bool)
            layout.valid_BK = None if bool(valid_BK.all()) else valid_BK
        for name, given in (("position_ids", position_ids), ("document_ids", document_ids)):
            with_cached = name == "position_ids" and given is not None and given.shape[-1] == total
            if given is not None and given.shape[-1] != length and not with_cached:
                raise ValueError(f"`{name}` must have one entry per token ({length}), not {given.shape[-1]}.")
        if document_ids is not None:
            if seen:
                raise ValueError("`document_ids` cannot be combined with a cache.")
            layout.document_BK = document_ids.to(device)
        elif position_ids is not None and attention_mask is None and not seen and copies == 1:
            layout.document_BK = _documents_of(position_ids.to(device))
        layout._place(pattern, position_ids)
        return layout

    def _place(self, pattern: AttentionPattern, position_ids: torch.Tensor | None) -> None:
        """Logical positions count the real tokens of each row, document and copy from 0."""
        (rows, length), device = self.shape, self.device
        total, copies = self.seen + length, pattern.copies
        if pattern.noisy_length is not None:
            self.copy_K = (torch.arange(length, device=device) // pattern.noisy_length).clamp(max=pattern.views)
            self.position_BK = position_ids.to(device)
            return
        if copies > 1:
            self.copy_K = torch.arange(copies, device=device).repeat_interleave(length // copies)
        elif pattern.tail:
            self.copy_K = (torch.arange(total, device=device) >= total - pattern.tail).long()
        if self.valid_BK is not None or self.document_BK is not None:
            valid_BK = self.valid_BK
            if valid_BK is None:
                valid_BK = torch.ones((rows, total), dtype=torch.bool, device=device)
            count_BCK = (valid_BK.view(rows, copies, -1).long().cumsum(-1) - 1).clamp(min=0)
            if self.document_BK is not None:
                document_BCK = self.document_BK.expand(rows, -1).reshape(rows, copies, -1)
                starts_BCK = torch.ones_like(document_BCK, dtype=torch.bool)
                starts_BCK[..., 1:] = document_BCK[..., 1:] != document_BCK[..., :-1]
                first_BCK = torch.where(starts_BCK, count_BCK, 0).cummax(-1).values
                count_BCK = count_BCK - first_BCK
            self.position_BK = count_BCK.reshape(rows, total)
        elif copies > 1:
            self.position_BK = torch.arange(length // copies, device=device).repeat(copies)[None]
        if position_ids is not None:
            given_BL = position_ids.to(device)
            if self.seen and given_BL.shape[-1] == length:
                before_BK = self.position_BK
                if before_BK is None:
                    before_BK = torch.arange(total, device=device)[None]
                given_BL = torch.cat([before_BK[:, : self.seen].expand(rows, -1), given_BL.expand(rows, -1)], dim=-1)
            self.position_BK = given_BL

    @property
    def position_BL(self) -> torch.Tensor | None:
        """Logical positions of this pass's tokens, `(B, L)`, or `None` where they are the natural ones."""
        if self.position_BK is None:
            return None
        return self.position_BK[:, self.seen :].expand(self.shape[0], -1)

    @property
    def moves_positions(self) -> bool:
        """Whether a real token stands elsewhere than the parent would put it; padding on the right moves none."""
        if self.position_BK is None:
            return False
        if self.copy_K is not None:
            return True  # every copy counts from 0; answered without waiting for the device
        natural_K = torch.arange(self.position_BK.shape[1], device=self.device)
        moved_BK = self.position_BK != natural_K
        return bool((moved_BK if self.valid_BK is None else moved_BK & self.valid_BK).any())

    def library_mask(self, attention_mask: torch.Tensor | None, needed: bool) -> torch.Tensor | None:
        """
        The 2-D mask for the parent. With a pattern in force it is always there: without one, transformers guesses
        packed documents from the positions, and recurrent layers and old position embeddings read it directly.
        """
        if attention_mask is not None or not needed:
            return attention_mask
        return torch.ones((self.shape[0], self.seen + self.shape[1]), dtype=torch.long, device=self.device)

    def shifted_source(self, pattern: AttentionPattern) -> torch.Tensor:
        """
        Which position's hidden state scores each position under token shift: the one before it; -1 where nothing
        stands before it (start of a row or document), -2 where it was in the pass before this one (with a cache).

        In the doubled sequence of block diffusion the first token of a block is read from the CLEAN copy's previous
        position, so that block size 1 is the parent's own next-token prediction.

        Returns:
            `torch.LongTensor` of shape `(B, L)`.
        """
        (rows, length), device = self.shape, self.device
        here_L = torch.arange(length, device=device)
        source_BL = (here_L - 1).expand(rows, length)
        position_BL = self.position_BL
        if position_BL is None:
            position_BL = (here_L + self.seen).expand(rows, length)
        if pattern.copies > 1:
            opens_block_BL = (position_BL % pattern.block_size == 0) & (self.copy_K < pattern.views)
            source_BL = torch.where(opens_block_BL, self._clean_place(pattern, position_BL) - 1, source_BL)
        if self.seen:
            source_BL = source_BL.masked_fill(here_L == 0, -2)
        return source_BL.masked_fill(position_BL == 0, -1)

    def _clean_place(self, pattern: AttentionPattern, position_BL: torch.Tensor) -> torch.Tensor:
        """Where each token of a noisy copy stands in the clean one, as an index of this pass: `(L,)` or `(B, L)`."""
        length, device = self.shape[1], self.device
        if pattern.noisy_length is None:
            one = length // pattern.copies
            return pattern.views * one + torch.arange(length, device=device) % one
        # Copies that leave out tokens: by the token's number among those of its row, documents told apart. Padding, on
        # either side, is no one's place.
        first = pattern.views * pattern.noisy_length
        number_BL = position_BL.long()
        if self.document_BK is not None:
            number_BL = number_BL + self.document_BK * length
        clean_BS = number_BL[:, first:].contiguous()
        if self.valid_BK is not None:
            valid_BS = self.valid_BK[:, first:]
            before_BS = valid_BS.cumsum(dim=-1) == 0
            clean_BS = clean_BS.masked_fill(~valid_BS, torch.iinfo(torch.int64).max).masked_fill(before_BS, -1)
        return first + torch.searchsorted(clean_BS, number_BL.contiguous()).clamp(max=length - first - 1)


def _documents_of(position_ids_BL: torch.Tensor) -> torch.Tensor | None:
    """Documents of packed rows that are marked only by positions starting again, as TRL and transformers pack."""
    steps_BL = torch.diff(position_ids_BL, prepend=position_ids_BL[:, :1] - 1, dim=-1)
    document_BL = (steps_BL != 1).cumsum(-1)
    return document_BL if bool(document_BL.any()) else None


def rows_through_head(
    wanted_BL: torch.Tensor | None, source_BL: torch.Tensor | None, shape: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    Which rows of the flattened hidden states the head must see.

    Args:
        wanted_BL (`torch.BoolTensor` of shape `(B, L)`, *optional*): positions to score; `None` means all.
        source_BL (`torch.LongTensor` of shape `(B, L)`, *optional*): see [`TokenLayout.shifted_source`].
        shape (`tuple[int, int]`): (B, L).
        device (`torch.device`): where the hidden states live.

    Returns:
        Indices of shape `(N,)` (`None`: everything, as it stands), and booleans of shape `(N,)` that mark positions
        with nothing before them (`None`: there are none).
    """
    if wanted_BL is not None and tuple(wanted_BL.shape) != tuple(shape):
        raise ValueError(
            f"`labels` and `logits_mask` must have the shape {tuple(shape)}, not {tuple(wanted_BL.shape)}."
        )
    if wanted_BL is None and source_BL is None:
        return None, None
    if source_BL is None:
        return wanted_BL.to(device).flatten().nonzero()[:, 0], None
    if bool((source_BL == -2 if wanted_BL is None else (source_BL == -2) & wanted_BL.to(device)).any()):
        raise ValueError(
            "With `token_shift` the first token of a pass with a cache is scored by the last hidden state of the pass "
            "before: leave it out of `logits_mask` and keep the logits of that pass, or give that token again."
        )
    blind_BL = source_BL < 0
    flat_BL = source_BL.clamp(min=0) + torch.arange(shape[0], device=device)[:, None] * shape[1]
    if wanted_BL is None:
        return flat_BL.flatten(), blind_BL.flatten()
    wanted_BL = wanted_BL.to(device)
    return flat_BL[wanted_BL], blind_BL[wanted_BL]
