"""The approximate key-value caches of MDLM models: what lies outside the active block is computed once per block.

Owns what is kept at the start of a block, what each further forward runs again, and the measurement of how far its
logits are from exact ones. Approximate, because in a model that sees everything each committed token changes the keys
of all others; the exact cache, of block-causal models, is in block_cache_a2d.py. Knows nothing of selectors.

Shapes: B rows, T positions of the canvas, W columns of a pass; N positions scored, V vocabulary rows.
"""

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache

from .attention_pattern import AttentionPattern
from .block_cache_a2d import BlockCacheLayer
from .canvas_a2d import Canvas
from .generation_config_a2d import A2DGenerationConfig


if TYPE_CHECKING:
    from .generation_a2d import A2DGenerationMixin


def check_blocks(objective: str | None, block_size: int | None) -> None:
    """Refuses what a checkpoint's configuration and a call's parameters already rule out; needs no weights."""
    if objective == "bd3lm":
        raise ValueError("`approximate_cache` is for MDLM models; this one, BD3LM, has an exact cache: leave it out.")
    if block_size is None:
        raise ValueError("`approximate_cache` is refreshed block by block: set `block_size`, for example 32.")


class ApproximateCache:
    """
    Fast-dLLM's two schemes (https://huggingface.co/papers/2505.22618, section 3.2). The first forward of each block is
    a whole one, exact, and refreshes the cache. Until the block is done, `"prefix"` keeps what stands before it and
    runs the block and everything behind; `"dual"` keeps what stands behind it too, masks and all, and runs the block.

    A row refreshes when its own block begins, whatever the others do: rows of a batch get what they would get alone.

    Args:
        model ([`A2DForMaskedDiffusion`]): the model.
        config ([`A2DGenerationConfig`]): parameters of the call.
        canvas ([`Canvas`]): the canvas of the call.
    """

    def __init__(self, model: "A2DGenerationMixin", config: A2DGenerationConfig, canvas: Canvas):
        self.kind, self.measures = config.approximate_cache, config.output_cache_deviation
        self._check(model, config)
        rows, self.length = canvas.tokens_RT.shape
        self.block_size, self.lead = canvas.block_size, int(model.config.token_shift)
        self.layers: list[BlockCacheLayer] = []
        self.rows_B = torch.arange(rows, device=canvas.tokens_RT.device)
        # The block that each row was last refreshed for.
        self.start_B = torch.full_like(self.rows_B, -1)
        # Forwards beyond one per step: where some rows refresh and others do not.
        self.extra_forwards = 0
        self.worst, self.total, self.compared, self.changed, self.scored = 0.0, 0.0, 0, 0, 0

    def _check(self, model: "A2DGenerationMixin", config: A2DGenerationConfig) -> None:
        check_blocks(model.config.objective, config.block_size or model.config.block_size)
        if not model.can_cache(2):
            raise ValueError(
                "`approximate_cache` needs a parent that remembers keys and values alone and takes `position_ids`: "
                "leave it out."
            )
        if self.kind == "dual" and not _reads_position_ids(model):
            raise ValueError(
                '`approximate_cache="dual"` puts the block behind what follows it in the cache, and this parent reads '
                'positions off that order (ALiBi): use "prefix".'
            )

    def logits_of(
        self,
        model: "A2DGenerationMixin",
        rows_B: torch.LongTensor,
        tokens_BT: torch.LongTensor,
        valid_BT: torch.Tensor,
        scope_BT: torch.Tensor,
        pattern: AttentionPattern | None,
    ) -> torch.Tensor:
        """The logits of the positions in `scope_BT`, `(N, V)`; arguments as in [`~BlockCache.logits_of`]."""
        self._keep(rows_B)
        start_B = scope_BT.long().argmax(-1) // self.block_size * self.block_size
        fresh_B = start_B != self.start_B
        self.start_B = start_B
        if bool(fresh_B.all()):
            logits_NV, self.layers = self._whole(model, tokens_BT, valid_BT, scope_BT, pattern)
            return logits_NV
        if not bool(fresh_B.any()):
            return self._part(model, self.layers, tokens_BT, valid_BT, scope_BT, start_B, pattern)
        self.extra_forwards += 1
        old, new = (~fresh_B).nonzero()[:, 0], fresh_B.nonzero()[:, 0]
        kept = [_rows_of(layer, old) for layer in self.layers]
        by_part = self._part(model, kept, tokens_BT[old], valid_BT[old], scope_BT[old], start_B[old], pattern)
        by_whole, layers = self._whole(model, tokens_BT[new], valid_BT[new], scope_BT[new], pattern)
        for layer, refreshed in zip(self.layers, layers, strict=True):
            layer.keys[new, :, : self.length] = refreshed.keys[:, :, : self.length]
            layer.values[new, :, : self.length] = refreshed.values[:, :, : self.length]
        row_N = scope_BT.nonzero()[:, 0]
        logits_NV = by_whole.new_empty((row_N.shape[0], by_whole.shape[-1]))
        logits_NV[fresh_B[row_N]], logits_NV[~fresh_B[row_N]] = by_whole, by_part
        return logits_NV

    def _whole(self, model, tokens_BT, valid_BT, scope_BT, pattern) -> tuple[torch.Tensor, list[BlockCacheLayer]]:
        """An exact pass over whole rows, and the keys and values that it leaves."""
        cache = DynamicCache()
        cache.layer_class_to_replicate = BlockCacheLayer
        outputs = model(
            input_ids=tokens_BT,
            attention_mask=None if bool(valid_BT.all()) else valid_BT.long(),
            attention_pattern=pattern,
            logits_mask=scope_BT,
            past_key_values=cache,
            use_cache=True,
        )
        return outputs.logits, cache.layers

    def _part(self, model, layers, tokens_BT, valid_BT, scope_BT, start_B, pattern) -> torch.Tensor:
        """A pass over each row's block, with what stands behind it or without; its keys are taken back at once."""
        device, slots = tokens_BT.device, torch.arange(self.length, device=tokens_BT.device)
        end_B = valid_BT.sum(-1)
        if self.kind == "dual":
            end_B = torch.minimum(start_B + self.block_size, end_B)
        # Under token shift the block's first token is scored from the position before it, which runs again as well.
        begin_B = (start_B - self.lead).clamp(min=0)
        position_BW = begin_B[:, None] + torch.arange(int((end_B - begin_B).amax()), device=device)
        real_BW = position_BW < end_B[:, None]
        position_BW = position_BW.clamp(max=self.length - 1)
        kept_BT = valid_BT & ((slots < begin_B[:, None]) | (slots >= end_B[:, None]))
        visible_BK = torch.cat([kept_BT, real_BW], dim=-1)
        cache = DynamicCache()
        cache.layers = layers
        logits_NV = model(
            input_ids=tokens_BT.gather(1, position_BW),
            attention_mask=visible_BK.long(),
            attention_pattern=pattern,
            # Cached keys keep their places, those of the block come last: what sees what goes by position.
            position_ids=torch.cat([slots.expand_as(kept_BT), position_BW], dim=-1),
            logits_mask=scope_BT.gather(1, position_BW) & real_BW,
            past_key_values=cache,
            use_cache=True,
        ).logits
        for layer in layers:
            layer.crop(-position_BW.shape[1])
        if self.measures:
            exact_NV, _ = self._whole(model, tokens_BT, valid_BT, scope_BT, pattern)
            self._measure(logits_NV, exact_NV)
        return logits_NV

    def _measure(self, found_NV: torch.Tensor, exact_NV: torch.Tensor) -> None:
        apart_NV = (found_NV.float() - exact_NV.float()).abs()
        self.worst = max(self.worst, float(apart_NV.amax()))
        self.total += float(apart_NV.double().sum())
        self.compared += apart_NV.numel()
        self.changed += int((found_NV.argmax(-1) != exact_NV.argmax(-1)).sum())
        self.scored += found_NV.shape[0]

    def deviation(self) -> dict[str, float] | None:
        """
        What was measured, or `None` where nothing was: over the logits that came from the cache, the largest and the
        mean absolute difference from exact ones on the same canvas, and the share of positions whose likeliest token
        is another.
        """
        if not self.compared:
            return None
        return {
            "max_abs": self.worst,
            "mean_abs": self.total / self.compared,
            "argmax_changed": self.changed / self.scored,
        }

    def _keep(self, rows_B: torch.Tensor) -> None:
        """Drops the rows that have finished."""
        if rows_B.shape[0] == self.rows_B.shape[0]:
            return
        kept_B = torch.searchsorted(self.rows_B, rows_B)
        self.rows_B, self.start_B = rows_B, self.start_B[kept_B]
        for layer in self.layers:
            layer.batch_select_indices(kept_B)


def _reads_position_ids(model: "A2DGenerationMixin") -> bool:
    """Whether the position ids that the parent accepts change what it computes; ALiBi counts the tokens instead."""
    ids = torch.tensor([[0, 1]], device=model.device)
    near, far = (
        model.backbone(
            input_ids=ids, position_ids=ids * step, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits
        for step in (1, 5)
    )
    return not torch.equal(near, far)


def _rows_of(layer: BlockCacheLayer, rows: torch.Tensor) -> BlockCacheLayer:
    """A copy of a layer with these rows."""
    copy = BlockCacheLayer()
    copy.dtype, copy.device, copy.is_initialized, copy.length = layer.dtype, layer.device, True, layer.length
    copy.keys, copy.values = layer.keys[rows], layer.values[rows]
    return copy
