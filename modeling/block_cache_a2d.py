"""The exact key-value cache of block decoding: finished blocks are computed once, only the active block runs again.

Owns where the keys and values of every row lie, which tokens of a row a forward pass needs, and the mapping between
canvas and pass. Exact because a BD3LM model never lets a finished block see what comes after it, whether it attends
openly inside or causally (`clean_context`). Knows nothing of selectors or schedules.

One forward per step and none besides: a block is committed in the same pass that denoises its successor for the first
time (MultiBD), and the prompt is read in the first. Rows may stand in different blocks: a row's slots in the cache are
its logical positions, so that what a row computes is what it would compute alone.

Shapes: B rows, T positions of the canvas, S slots of the cache, P columns of clean tokens not cached yet, W columns of
a pass: P clean ones, then the active block; N positions scored, V vocabulary rows.
"""

import functools
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from .attention_pattern import AttentionPattern


if TYPE_CHECKING:
    from .generation_a2d import A2DGenerationMixin


class BlockCacheLayer(DynamicLayer):
    """
    Keys and values of one layer in buffers that are written in place: the active block is written and taken back at
    every step, where [`~transformers.cache_utils.DynamicLayer`] would copy the whole cache each time.

    Args:
        capacity (`int`, *optional*, defaults to 0): slots to make room for at once; more are added when needed.
    """

    def __init__(self, capacity: int = 0):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, because a slot that a row may not look at still meets its weight of 0: NaN times 0 would be NaN.
        self.keys, self.values = (
            states.new_zeros((*states.shape[:-2], self.capacity, states.shape[-1]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the states behind those that are there, and returns all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        missing = self.length + count - self.keys.shape[-2]
        if missing > 0:
            self.keys, self.values = (
                torch.nn.functional.pad(states, (0, 0, 0, missing)) for states in (self.keys, self.values)
            )
        self.keys.narrow(-2, self.length, count).copy_(key_states)
        self.values.narrow(-2, self.length, count).copy_(value_states)
        self.length += count
        return self.keys.narrow(-2, 0, self.length), self.values.narrow(-2, 0, self.length)

    def get_seq_length(self) -> int:
        """Slots in use."""
        return self.length

    def reset(self) -> None:
        super().reset()
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens; as everywhere in transformers, their number is given as a negative one."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"`crop` takes the number of tokens to remove as a negative integer, not {tokens_to_remove}."
            )
        self.length = max(self.length + tokens_to_remove, 0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows."""
        if self.is_initialized:  # the buffers have rows even while no slot is in use
            self.keys, self.values = self.keys[indices], self.values[indices]

    def move(self, row_M: torch.Tensor, from_M: torch.Tensor, to_M: torch.Tensor) -> None:
        """Copies M slots, each within its row, to where they belong."""
        if self.is_initialized:
            for states in (self.keys, self.values):
                by_slot = states.movedim(-2, 1)
                by_slot[row_M, to_M] = by_slot[row_M, from_M]


class BlockCache:
    """
    The clean blocks of the rows of one decoding call.

    Args:
        rows (`int`): rows of the canvas.
        length (`int`): positions of the canvas.
        block_size (`int`): block size of the attention.
        token_shift (`bool`): whether a position is scored from the hidden state before it.
        device (`torch.device`): where the canvas lies.
    """

    def __init__(self, rows: int, length: int, block_size: int, token_shift: bool, device: torch.device):
        self.block_size, self.token_shift = block_size, token_shift
        self.cache = DynamicCache()
        self.cache.layer_class_to_replicate = functools.partial(BlockCacheLayer, length + block_size)
        self.rows_B = torch.arange(rows, device=device)
        # How many tokens of each row are cached, in slots 0, 1, 2, ...: whole blocks, unless causal passes add more.
        self.clean_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.opening_BV: torch.Tensor | None = None
        # Of the last pass: how many slots lay before its own, and the positions that wait for `accept`.
        self.last_slots, self.unsettled_BW = 0, None

    def logits_of(
        self,
        model: "A2DGenerationMixin",
        rows_B: torch.LongTensor,
        tokens_BT: torch.LongTensor,
        valid_BT: torch.Tensor,
        scope_BT: torch.Tensor,
        pattern: AttentionPattern | None,
    ) -> torch.Tensor:
        """
        The logits of the positions in `scope_BT`, `(N, V)` in row-major order, from one forward pass.

        Args:
            model ([`A2DForMaskedDiffusion`]): the model.
            rows_B (`torch.LongTensor` of shape `(B,)`): rows of the canvas; those that are missing never come back.
            tokens_BT (`torch.LongTensor` of shape `(B, T)`): the rows, packed to the left.
            valid_BT (`torch.BoolTensor` of shape `(B, T)`): False at padding.
            scope_BT (`torch.BoolTensor` of shape `(B, T)`): the positions to score, in one block of each row or in
                several.
            pattern (`AttentionPattern`, *optional*): block-causal, or bd3lm with a causal clean context; `None` is
                the model's own.
        """
        self._keep(rows_B)
        device = tokens_BT.device

        # Clean tokens that are not cached yet stand to the right of their columns, the active block to the left of
        # its own: a row's tokens are neighbours, with nothing between. (Where a causal pass has cached tokens of the
        # active block already, the block does not look at them: it runs again, openly.)
        start_B = scope_BT.long().argmax(-1) // self.block_size * self.block_size
        last_B = tokens_BT.shape[1] - 1 - scope_BT.flip(-1).long().argmax(-1)
        end_B = torch.minimum((last_B // self.block_size + 1) * self.block_size, valid_BT.sum(-1))
        before_B = torch.minimum(self.clean_B, start_B)
        pending_B = start_B - before_B
        pending, active = self._columns(int(pending_B.amax()), int((end_B - start_B).amax()))
        position_BW = start_B[:, None] + torch.arange(-pending, active, device=device)
        real_BW = (position_BW >= before_B[:, None]) & (position_BW < end_B[:, None])
        asked_BW = scope_BT.gather(1, position_BW.clamp(0, tokens_BT.shape[1] - 1)) & real_BW

        # Under token shift a block's first token is scored by the last hidden state of the block before, which is
        # in the pass that commits that one, and does not change afterwards: its logits are kept, though nobody may
        # ask for them yet.
        to_score_BW = asked_BW.clone()
        if self.token_shift:
            to_score_BW[:, pending] = real_BW[:, pending] & (pending_B > 0)

        if pattern is not None and pattern.kind == "bd3lm":
            # Without the doubled sequence of training: finished text is clean and causal, the block behind it open.
            pattern = AttentionPattern.open_tail(active) if pending else AttentionPattern.bidirectional()
        logits_MV = self._pass(model, tokens_BT, position_BW, real_BW, before_B, to_score_BW, pattern)
        self._settle(position_BW[:, :pending], start_B)
        return self._with_known(logits_MV, asked_BW, to_score_BW, pending) if self.token_shift else logits_MV

    def causal_logits_of(
        self,
        model: "A2DGenerationMixin",
        rows_B: torch.LongTensor,
        tokens_BT: torch.LongTensor,
        first_B: torch.LongTensor,
        end_B: torch.LongTensor,
    ) -> torch.Tensor:
        """
        What the causal mode says of the tokens in `[first, end]` of each row, from one pass over those before `end`
        that are not cached. [`~BlockCache.accept`] must follow.

        Args:
            model ([`A2DForMaskedDiffusion`]): the model.
            rows_B (`torch.LongTensor` of shape `(B,)`): rows of the canvas; those that are missing never come back.
            tokens_BT (`torch.LongTensor` of shape `(B, T)`): the rows, packed to the left.
            first_B (`torch.LongTensor` of shape `(B,)`): the first position to predict, at least 1.
            end_B (`torch.LongTensor` of shape `(B,)`): the last one; its token is not looked at.

        Returns:
            `torch.FloatTensor` of shape `(N, V)`: end - first + 1 predictions for each row, in row-major order.
        """
        self._keep(rows_B)
        before_B = torch.minimum(self.clean_B, first_B - 1)
        width = int((end_B - before_B).amax())
        position_BW = before_B[:, None] + torch.arange(width, device=tokens_BT.device)
        real_BW = position_BW < end_B[:, None]
        asked_BW = real_BW & (position_BW >= first_B[:, None] - 1)
        self.unsettled_BW = position_BW
        causal = AttentionPattern.causal()
        return self._pass(model, tokens_BT, position_BW, real_BW, before_B, asked_BW, causal)

    def accept(self, clean_B: torch.LongTensor) -> None:
        """Keeps, of the causal pass just made, the tokens before position `clean_B` of each row."""
        self._settle(self.unsettled_BW, clean_B)

    def _pass(
        self,
        model: "A2DGenerationMixin",
        tokens_BT: torch.LongTensor,
        position_BW: torch.LongTensor,
        real_BW: torch.Tensor,
        before_B: torch.LongTensor,
        asked_BW: torch.Tensor,
        pattern: AttentionPattern | None,
    ) -> torch.Tensor:
        """Runs the tokens at these positions behind the first `before_B` cached ones; their keys go into new slots."""
        slots, width = self.cache.get_seq_length(), position_BW.shape[1]
        cached_BS = torch.arange(slots, device=tokens_BT.device) < before_B[:, None]
        visible_BK = torch.cat([cached_BS, real_BW], dim=-1)
        ids_BW = tokens_BT.gather(1, position_BW.clamp(0, tokens_BT.shape[1] - 1))
        logits_NV = self._forward(model, ids_BW, visible_BK, asked_BW, pattern)
        if self.cache.get_seq_length() != slots + width:
            raise RuntimeError(
                f"{type(model).__name__} did not write to the cache it was given: pass `use_cache=False`."
            )
        self.last_slots = slots
        return logits_NV

    def _columns(self, pending: int, active: int) -> tuple[int, int]:
        """How many columns the next pass has for clean tokens, and how many for the active block, given the need."""
        return pending, active

    def _forward(
        self,
        model: "A2DGenerationMixin",
        ids_BW: torch.LongTensor,
        visible_BK: torch.Tensor,
        asked_BW: torch.Tensor,
        pattern: AttentionPattern | None,
    ) -> torch.Tensor:
        """One pass of the model over these tokens; of slots and tokens, only the visible ones are seen by anything."""
        return model(
            input_ids=ids_BW,
            attention_mask=None if bool(visible_BK.all()) else visible_BK.long(),
            attention_pattern=pattern,
            logits_mask=asked_BW,
            past_key_values=self.cache,
            use_cache=True,
        ).logits

    def _keep(self, rows_B: torch.Tensor) -> None:
        """Drops the rows that have finished."""
        if rows_B.shape[0] == self.rows_B.shape[0]:
            return
        kept_B = torch.searchsorted(self.rows_B, rows_B)
        self.rows_B, self.clean_B = rows_B, self.clean_B[kept_B]
        if self.opening_BV is not None:
            self.opening_BV = self.opening_BV[kept_B]
        for layer in self.cache.layers:
            layer.batch_select_indices(kept_B)

    def _settle(self, position_BP: torch.LongTensor, clean_B: torch.LongTensor) -> None:
        """
        Ends a pass: the first P of its columns go into the slots of their positions, as far as they lie before
        `clean_B` and are new; everything else of the pass is taken back.
        """
        slots, columns = self.last_slots, position_BP.shape[1]
        source_P = torch.arange(slots, slots + columns, device=position_BP.device)
        new_BP = (position_BP >= self.clean_B[:, None]) & (position_BP < clean_B[:, None])
        row_M, column_M = (new_BP & (position_BP != source_P)).nonzero(as_tuple=True)
        self.clean_B = torch.maximum(self.clean_B, clean_B)
        surplus = self.cache.get_seq_length() - int(self.clean_B.amax().clamp(min=slots))
        for layer in self.cache.layers:
            if row_M.numel():
                layer.move(row_M, source_P[column_M], position_BP[row_M, column_M])
            layer.crop(-surplus)

    def _with_known(
        self, logits_MV: torch.Tensor, asked_BW: torch.Tensor, scored_BW: torch.Tensor, pending: int
    ) -> torch.Tensor:
        """Adds the logits of first tokens that an earlier pass has scored, and keeps those that this one did."""
        if self.opening_BV is None:
            self.opening_BV = logits_MV.new_zeros((asked_BW.shape[0], logits_MV.shape[-1]))
        opening_B = scored_BW[:, pending]
        first_BW = torch.zeros_like(asked_BW)
        first_BW[:, pending] = True
        self.opening_BV[opening_B] = logits_MV[first_BW[scored_BW]]
        if torch.equal(asked_BW, scored_BW):
            return logits_MV
        logits_NV = logits_MV.new_empty((int(asked_BW.sum()), logits_MV.shape[-1]))
        was_scored_N = scored_BW[asked_BW]
        logits_NV[was_scored_N] = logits_MV[asked_BW[scored_BW]]
        logits_NV[~was_scored_N] = self.opening_BV[asked_BW[:, pending] & ~opening_B]
        return logits_NV
