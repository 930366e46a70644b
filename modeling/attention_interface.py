"""Puts an attention pattern in force around a forward pass of any transformers model.

Owns the wrappers around the mask and attention functions that transformers keeps under the names `sdpa`, `eager`,
`flex_attention` and `flash_attention_*`. Every model goes on using its own attention implementation (sinks, soft-caps
and all); only the answer to "which positions see which" changes, and only while a pattern is in force in the current
context. With none in force the library's own functions run untouched, so other models in the process never notice.

Shapes: B rows, Q queries, K keys (cached ones included).
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from .attention_pattern import AttentionPattern, Place
from .last_layer import RowsRead, attend_from_rows_read
from .pieced_attention import Piece, attend_in_pieces, pieces_of


@dataclass(frozen=True, eq=False)
class PatternInForce:
    """
    A pattern together with what one forward pass knows about its tokens.

    Attributes:
        pattern (`AttentionPattern`): the rule.
        windows (`str`): `"keep"` (the model's own windows, mirrored across the diagonal) or `"open"`.
        position_BK (`torch.Tensor`, *optional*): logical position of every key; `None` means 0, 1, 2, ...
        valid_BK (`torch.Tensor`, *optional*): booleans, False at padding; `None` means no padding.
        document_BK (`torch.Tensor`, *optional*): document of every key; documents never see each other.
        copy_K (`torch.Tensor`, *optional*): which copy a key belongs to (`bd3lm` only).
        fast_path (`bool`): whether "everything visible" may be expressed by passing no mask at all.
        seen (`int`): tokens in the cache, before the first query.
        kept (`dict`): what the layers of one pass share (alibi_distance.py), under `"left_alone"` whether one of them
            has a rule of its own that is not causal, under `"pieces"` the masks that were cut.
        traced (`bool`): that the pass is for `torch.compile`, so that nothing in it may look at values: an earlier
            pass has found no such rule, and no rows are left out (`rows_read`).
        rows_read (`RowsRead`, *optional*): the rows that the last layer is computed for; `None` means all.
    """

    pattern: AttentionPattern
    windows: str = "keep"
    position_BK: torch.Tensor | None = None
    valid_BK: torch.Tensor | None = None
    document_BK: torch.Tensor | None = None
    copy_K: torch.Tensor | None = None
    fast_path: bool = True
    seen: int = 0
    kept: dict = field(default_factory=dict)
    traced: bool = False
    rows_read: RowsRead | None = None

    def rule(self, own: Callable | None) -> Callable:
        """
        The mask function, in the form that transformers' mask builders call: `(b, h, q, k) -> bool`.

        Args:
            own (`Callable`, *optional*): the model's own causal rule, where it has a window or chunk to keep.
        """
        pattern, position_BK, valid_BK, document_BK = self.pattern, self.position_BK, self.valid_BK, self.document_BK
        copy_K = self.copy_K
        left_B = None if valid_BK is None or own is None else (valid_BK.cumsum(-1) == 0).sum(-1)

        def edge(b, h, q, k):
            # Static caches ask for more keys than there are tokens: those keys do not exist yet.
            end = next((t.shape[-1] for t in (position_BK, valid_BK, document_BK, copy_K) if t is not None), None)
            allowed = None
            if end is not None:
                allowed = k < end
                q, k = q.clamp(max=end - 1), k.clamp(max=end - 1)
            p_q, p_k = (q, k) if position_BK is None else (_at(position_BK, b, q), _at(position_BK, b, k))
            c_q, c_k = (None, None) if copy_K is None else (copy_K[q], copy_K[k])
            seen = pattern.edge(Place(p_q, c_q), Place(p_k, c_k))
            if own is not None:
                # The model's rule is causal. Asked about (later, earlier) it is symmetric, and on logical positions it
                # also serves packed documents and the doubled sequence of block diffusion.
                # Chunks are counted from behind the padding on the left, which the model's rule takes off itself.
                late, early = torch.maximum(p_q, p_k), torch.minimum(p_q, p_k)
                if left_B is not None:
                    late, early = late + left_B[b], early + left_B[b]
                seen = seen & own(b, h, late, early)
            if document_BK is not None:
                seen = seen & (_at(document_BK, b, q) == _at(document_BK, b, k))
            if valid_BK is not None:
                seen = seen & _at(valid_BK, b, k)
            return seen if allowed is None else seen & allowed

        return edge

    def everything_visible(self, q_length: int, kv_length: int, q_offset, local_size: int | None) -> bool:
        """Whether every query sees every key, so that a kernel needs no mask."""
        if not self.fast_path or any(t is not None for t in (self.valid_BK, self.document_BK, self.copy_K)):
            return False
        if self.windows == "keep" and local_size is not None and kv_length > local_size:
            return False
        if self.pattern.is_open:
            return True
        if self.pattern.kind == "block_causal" and self.position_BK is None and isinstance(q_offset, int):
            first, last = q_offset // self.pattern.block_size, (q_offset + q_length - 1) // self.pattern.block_size
            return first == last and kv_length == q_offset + q_length
        return False


def _at(values_BK: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    # One row for all: leaving `b` out keeps the mask at batch size 1, which the builders then expand for free.
    return values_BK[0][i] if values_BK.shape[0] == 1 else values_BK[b, i]


_IN_FORCE: ContextVar[PatternInForce | None] = ContextVar("a2d_pattern_in_force", default=None)
# What a layer is marked with once it has run open. A copy of this file, loaded with a checkpoint, wraps the same
# functions and must not take this one's marks for its own.
_RAN_OPEN = f"_a2d_ran_open_in_{__name__}"
_RECOMPUTING: ContextVar[bool] = ContextVar("a2d_recomputing", default=False)


class _Traced(threading.local):
    """The pattern in force once more: `torch.compile` follows a thread's own attribute, and stops at a context's."""

    state: PatternInForce | None = None


_TRACED = _Traced()


@contextlib.contextmanager
def pattern_in_force(state: PatternInForce | None) -> Iterator[None]:
    """Puts a pattern in force for the current context; `None` restores the library's own behaviour."""
    token, before, _TRACED.state = _IN_FORCE.set(state), _TRACED.state, state
    try:
        if state is None or state.rows_read is None:
            yield
        else:
            with state.rows_read.in_force():
                yield
    finally:
        _IN_FORCE.reset(token)
        _TRACED.state = before


def current_pattern() -> PatternInForce | None:
    """The pattern in force in this context, if any."""
    return _TRACED.state if torch.compiler.is_compiling() else _IN_FORCE.get()


def keep_pattern(checkpoint_function: Callable) -> Callable:
    """
    Wraps an activation-checkpointing function so that the recomputation sees the pattern of the forward pass.

    Backward runs after `forward` has returned, on CUDA in another thread: the context is gone by then, and without
    this a layer would be recomputed under the causal rule and give silently wrong gradients.
    """

    @functools.wraps(checkpoint_function)
    def checkpoint(function, *args, **kwargs):
        state = _IN_FORCE.get()

        def with_pattern(*inner_args, **inner_kwargs):
            token = _RECOMPUTING.set(True)
            try:
                with pattern_in_force(state):
                    return function(*inner_args, **inner_kwargs)
            finally:
                _RECOMPUTING.reset(token)

        return checkpoint_function(with_pattern, *args, **kwargs)

    return checkpoint


def _wrap_mask_function(name: str, library_function: Callable) -> Callable:
    @functools.wraps(library_function)
    def mask(*args, **kwargs):
        state = current_pattern()
        if state is None or args:
            return library_function(*args, **kwargs)
        own = kwargs["mask_function"]
        if own is causal_mask_function:
            own = None
        elif not state.traced and _sees_the_future(own, kwargs):
            # Not causal to begin with (a vision tower, cross-attention): not ours to change.
            state.kept["left_alone"] = True
            return library_function(**kwargs)
        local_size = kwargs.get("local_size")
        if state.windows == "open" and local_size is not None:
            own = None
        # `eager` of old models, and layers that index into their mask, want one even where it says nothing.
        may_skip = name != "eager" and kwargs.get("allow_is_causal_skip", True)
        if may_skip and state.everything_visible(
            kwargs["q_length"], kwargs["kv_length"], kwargs.get("q_offset", 0), local_size
        ):
            return None
        if name.startswith("flash"):
            return _flash_mask(name, state, library_function, kwargs)
        kwargs.update(
            mask_function=state.rule(own),
            attention_mask=None,  # padding is part of the rule
            local_size=None,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
        )
        built = library_function(**kwargs)
        log_weight = state.pattern.future_log_weight
        return built if log_weight is None else _weigh_future_edges(name, built, state, log_weight, kwargs)

    return mask


def _sees_the_future(own: Callable, kwargs: dict) -> bool:
    """Whether a model's own rule lets position 0 see position 1."""
    if kwargs["kv_length"] < 2:
        return False
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=kwargs.get("device", "cpu"))
    return bool(torch.as_tensor(own(zero, zero, zero, zero + 1)).any())


def _flash_mask(name: str, state: PatternInForce, library_function: Callable, kwargs: dict):
    if not state.pattern.is_open or state.document_BK is not None:
        raise ValueError(
            f"`attn_implementation={name!r}` cannot express the {state.pattern.kind} pattern; load the model with "
            '`attn_implementation="sdpa"` or `"flex_attention"`.'
        )
    kwargs["attention_mask"] = state.valid_BK
    return library_function(**kwargs)


def _weigh_future_edges(name: str, built, state: PatternInForce, log_weight: float, kwargs: dict) -> torch.Tensor:
    if not isinstance(built, torch.Tensor):
        raise ValueError(
            f'`attn_implementation={name!r}` cannot weigh edges; use `form="stochastic"`, or `"sdpa"` or `"eager"`.'
        )
    dtype, device = kwargs["dtype"], built.device
    q_1Q1 = torch.arange(kwargs["q_length"], device=device)[None, :, None] + kwargs.get("q_offset", 0)
    k_11K = torch.arange(kwargs["kv_length"], device=device)[None, None, :] + kwargs.get("kv_offset", 0)
    if state.position_BK is not None:
        b_B11 = torch.arange(state.position_BK.shape[0], device=device)[:, None, None]
        q_1Q1, k_11K = _at(state.position_BK, b_B11, q_1Q1), _at(state.position_BK, b_B11, k_11K)
    weight_B1QK = ((k_11K > q_1Q1).to(dtype) * log_weight)[:, None]
    if built.dtype == torch.bool:
        built = torch.where(built, torch.zeros((), dtype=dtype, device=device), torch.finfo(dtype).min)
    # The closed edges stay at the least finite number: adding to it would overflow to -inf in half precision.
    return torch.where(built < 0, built, built + weight_B1QK)


def _wrap_attention_function(name: str, library_function: Callable) -> Callable:
    @functools.wraps(library_function)
    def attention(module, query, key, value, attention_mask=None, *args, **kwargs):
        state = current_pattern()
        if attention_mask is None and state is not None:
            # Only `everything_visible` leads here: without a mask the kernel must not fall back to its causal form.
            kwargs["is_causal"] = False
            if torch.is_grad_enabled() and module.training:
                setattr(module, _RAN_OPEN, True)
        elif attention_mask is None and not _RECOMPUTING.get() and _RAN_OPEN in module.__dict__:
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "A layer was recomputed in backward after its attention pattern was gone, which would give wrong "
                    "gradients: checkpoint with `gradient_checkpointing=True` (or "
                    "`model.gradient_checkpointing_enable()`) instead of an activation-checkpointing wrapper."
                )
        if state is not None and state.windows == "open" and kwargs.get("sliding_window") is not None:
            kwargs["sliding_window"] = None  # flash kernels apply the window themselves
        if name == "sdpa" and not (state is not None and state.traced):
            attend = functools.partial(_attend_in_pieces, state, library_function)
            return attend_from_rows_read(attend, module, query, key, value, attention_mask, *args, **kwargs)
        return library_function(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def _attend_in_pieces(
    state: PatternInForce | None, attend: Callable, module, query, key, value, attention_mask, *args, **kwargs
):
    """Cuts the mask of block diffusion on a CPU, once for all layers that share it; leaves every other call alone."""
    pieces = None
    if state is not None and state.pattern.kind == "bd3lm" and query.device.type == "cpu" and not args:
        pieces = _pieces_kept(state, attention_mask)
    if pieces is None or kwargs.get("position_bias") is not None:
        return attend(module, query, key, value, attention_mask, *args, **kwargs)
    return attend_in_pieces(attend, pieces, module, query, key, value, **kwargs)


def _pieces_kept(state: PatternInForce, mask: torch.Tensor | None) -> list[Piece] | None:
    cut = state.kept.setdefault("pieces", [])
    for known, pieces in cut:
        if known is mask:
            return pieces
    cut.append((mask, pieces_of(mask, state.pattern.copies)))
    return cut[-1][1]


_installed = False


def install() -> None:
    """
    Wraps the functions that transformers has registered, once per copy of this module; safe to call again.

    A checkpoint loaded with `trust_remote_code` brings its own copy of this file. Copies stack: each answers only to
    its own context, and hands everything else on.
    """
    global _installed
    if _installed:
        return
    _installed = True
    masks, attentions = AttentionMaskInterface(), AttentionInterface()
    for name in ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"):
        if name in masks:
            AttentionMaskInterface.register(name, _wrap_mask_function(name, masks[name]))
        # `eager` is each model's own function: it is handed an explicit mask and needs no wrapper.
        if name in attentions:
            AttentionInterface.register(name, _wrap_attention_function(name, attentions[name]))
