"""The exact cache of block decoding with constant shapes: what `torch.compile` and CUDA graphs need.

Owns the static form of block_cache_a2d.py, chosen with `cache_implementation="static"`: how many columns a pass has,
the one call of the parent that is compiled, and the refusals of what has no static form. Where keys lie and what sees
what is the same in both forms.

The first pass reads the prompt, in whatever shape, and is never compiled. After it there are two shapes: the open
blocks behind a commit as wide as they are, and the open blocks alone, where no row has anything to commit. Columns
that a row has no token for are padding, seen by nothing real; every pass writes the keys of its columns behind the S
slots of the clean tokens, and from there only clean tokens go into a slot. Rows that have finished stay, as padding.

Shapes: R rows of the canvas, B of them that are not finished, T positions of the canvas, S slots, W columns of a pass,
K = S + W, N positions scored, V vocabulary rows.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils import logging

from .attention_interface import pattern_in_force
from .attention_pattern import AttentionPattern
from .block_cache_a2d import BlockCache, BlockCacheLayer
from .canvas_a2d import Canvas
from .generation_config_a2d import A2DGenerationConfig
from .token_layout import TokenLayout


if TYPE_CHECKING:
    from .generation_a2d import A2DGenerationMixin


logger = logging.get_logger(__name__)

# The number of slots is a multiple of this: prompts of about one length share what was compiled.
SLOTS_MULTIPLE = 128
# The attention functions whose mask is an ordinary tensor.
_COMPILED_ATTENTION = ("sdpa", "eager")


class StaticBlockLayer(BlockCacheLayer):
    """
    Keys and values of one layer at an address that stays: slots for clean tokens, then room for the tokens of a pass.

    Args:
        slots (`int`): S.
        columns (`int`): the most columns of a pass of constant shape.
    """

    is_compileable = True

    def __init__(self, slots: int, columns: int):
        super().__init__(slots + columns)
        self.slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for states in (self.keys, self.values):
            torch._dynamo.mark_static_address(states)

    def crop(self, tokens_to_remove: int) -> None:
        """Ends a pass, whatever it has written: the next one begins behind the slots."""
        self.length = self.slots
        if self.keys.shape[-2] > self.capacity:  # a pass of its own width
            self.keys, self.values = (states[..., : self.capacity, :].clone() for states in (self.keys, self.values))
            for states in (self.keys, self.values):
                torch._dynamo.mark_static_address(states)


class StaticBlockCache(BlockCache):
    """
    The clean blocks of the rows of one decoding call, for passes of constant shape.

    Args:
        model ([`A2DForMaskedDiffusion`]): the model.
        config ([`A2DGenerationConfig`]): parameters of the call.
        canvas ([`Canvas`]): the rows; with guidance there are twice as many in a pass.
        attention_block (`int`): block size of the attention.
    """

    def __init__(self, model: "A2DGenerationMixin", config: A2DGenerationConfig, canvas: Canvas, attention_block: int):
        rows, length = canvas.tokens_RT.shape
        shift, device = model.config.token_shift, canvas.tokens_RT.device
        super().__init__(rows * canvas.passes, length, attention_block, shift, device)
        self.config = config
        # The decoder's blocks lie in those of the attention, of which the first need not be open from its beginning.
        span = config.pipeline_depth * canvas.block_size + attention_block - canvas.block_size
        self.open_columns = -(-min(span, length) // attention_block) * attention_block
        # Of the pass under way: columns of the open blocks, and whether its shape is one of the two.
        self.active, self.is_constant = 0, False
        self.call: Callable | None = None
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.backbone.forward).parameters

    def logits_of(
        self,
        model: "A2DGenerationMixin",
        rows_B: torch.LongTensor,
        tokens_BT: torch.LongTensor,
        valid_BT: torch.Tensor,
        scope_BT: torch.Tensor,
        pattern: AttentionPattern | None,
    ) -> torch.Tensor:
        """See [`BlockCache.logits_of`]. Rows that are missing stay in the pass, and nothing is asked of them."""
        rows, length = self.rows_B.shape[0], tokens_BT.shape[1]
        if not self.cache.layers:
            slots = -(-max(length, self.config.max_cache_len or 0) // SLOTS_MULTIPLE) * SLOTS_MULTIPLE
            layer = functools.partial(StaticBlockLayer, slots, 2 * self.open_columns)
            self.cache = Cache(layer_class_to_replicate=layer)
        tokens_RT, valid_RT, scope_RT = (
            values.new_zeros((rows, length)).index_copy(0, rows_B, values)
            for values in (tokens_BT, valid_BT, scope_BT)
        )
        # Such a row reads its first token again: a query that sees nothing would be NaN in some kernels.
        valid_RT = valid_RT & scope_RT.any(-1, keepdim=True)
        valid_RT[:, 0] = True
        return super().logits_of(model, self.rows_B, tokens_RT, valid_RT, scope_RT, pattern)

    def _columns(self, pending: int, active: int) -> tuple[int, int]:
        most = self.open_columns
        # Untouched blocks between two gaps may be more to commit at once: such a pass has a shape of its own.
        self.is_constant = self.cache.get_seq_length() > 0 and pending <= most and active <= most
        if self.is_constant:
            pending, active = most if pending else 0, most
        self.active = active
        return pending, active

    def _forward(
        self,
        model: "A2DGenerationMixin",
        ids_BW: torch.LongTensor,
        visible_BK: torch.Tensor,
        asked_BW: torch.Tensor,
        pattern: AttentionPattern | None,
    ) -> torch.Tensor:
        # Not through the model's own forward, which asks the device about values: here only the parent is called.
        pattern = model.resolve_pattern(pattern)
        mask_BK = visible_BK.long()
        layout = TokenLayout.of(pattern, tuple(ids_BW.shape), ids_BW.device, mask_BK, past_key_values=self.cache)
        state = model._pattern_in_force(pattern, layout)
        call = model.backbone
        if self.is_constant:
            self.call = self.call or self._choose_call(model)
            call = self.call
            state = dataclasses.replace(state, traced=call is not model.backbone)
        # All of the open blocks, because how many masks are left in them is no constant.
        width, shift = ids_BW.shape[1], int(self.token_shift)
        scored = min(self.active + shift, width)
        inputs = {"logits_to_keep": scored} if self.keeps_logits else {}
        if layout.position_BK is not None:
            inputs["position_ids"] = layout.position_BL
        with pattern_in_force(state):
            outputs = call(
                input_ids=ids_BW,
                attention_mask=mask_BK,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                **inputs,
            )
        if "left_alone" in state.kept:  # seen in the first pass, which is never compiled
            raise _no_static_form(f"{type(model.backbone).__name__}, with layers whose own rule counts slots")
        row_N, column_N = asked_BW.nonzero(as_tuple=True)
        # Indexed, which copies: the memory of the output is the next pass's under CUDA graphs.
        return outputs.logits[:, -scored:][row_N, column_N - shift - (width - scored)]

    def _choose_call(self, model: "A2DGenerationMixin") -> Callable:
        """The parent, compiled where transformers would compile it, or where `compile_config` was given."""
        config, backbone = copy.copy(self.config), model.backbone
        if config.compile_config is not None:
            # What transformers wants on devices where compiling seldom pays; here asking for it is enough.
            config.compile_config = copy.copy(config.compile_config)
            config.compile_config._compile_all_devices = True
        if not GenerationMixin._valid_auto_compile_criteria(model, {"past_key_values": self.cache}, config):
            return backbone
        attention = backbone.config._attn_implementation
        if attention not in _COMPILED_ATTENTION or model.alibi_layers:
            logger.warning_once(
                f"{type(backbone).__name__} with `attn_implementation={attention!r}` is decoded with a static cache, "
                "but not compiled: its attention mask is made of more than the static form hands over."
            )
            return backbone
        return backbone.get_compiled_call(config.compile_config)


def check_static_cache(model: "A2DGenerationMixin", is_exact: bool) -> None:
    """Refuses `cache_implementation="static"` where there is no such cache. `is_exact`: whether there is any."""
    parent = type(model.backbone).__name__
    if model.config.objective != "bd3lm":
        reason = "an MDLM checkpoint, in which everything sees everything and no cache is exact"
    elif not is_exact:
        reason = f"this call on a {parent}, for which no cache is exact"
    elif model.causal_buffers:
        reason = f"{parent}, which keeps a causal mask of its own"
    elif not model._accepts_position_ids:
        reason = f"{parent}, which takes no `position_ids`"
    else:
        return
    raise _no_static_form(reason)


def _no_static_form(reason: str) -> ValueError:
    return ValueError(f'`cache_implementation="static"` does not fit {reason}: leave it out.')
