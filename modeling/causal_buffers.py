"""Opens models that carry their own causal buffer instead of asking transformers for a mask.

Owns the search for such buffers (square, lower-triangular, yes-or-no; GPT-Neo's and the first GPT's, banded ones
included) and the hooks that stand the pattern in for one while its module runs. GPT-Neo is the trap of every other
converter: it passes an identity test, and never opens.
"""

import torch

from .attention_interface import current_pattern


def open_causal_buffers(backbone: torch.nn.Module) -> int:
    """
    Hooks every module with a causal buffer of its own.

    Args:
        backbone (`torch.nn.Module`): the parent.

    Returns:
        `int`: how many modules were hooked; on the meta device, those that may have one.
    """
    found = 0
    for module in backbone.modules():
        for name, buffer in list(module._buffers.items()):
            # While weights are loaded a buffer has a shape and no values: what it is shows when the module runs.
            if buffer is not None and _is_square(buffer) and (buffer.is_meta or _is_causal_buffer(buffer)):
                _hook(module, name)
                found += 1
    return found


def _is_square(buffer: torch.Tensor) -> bool:
    if buffer.ndim < 2 or buffer.shape[-1] != buffer.shape[-2] or buffer.shape[-1] < 2:
        return False
    return buffer.numel() == buffer.shape[-1] ** 2


def _is_causal_buffer(buffer: torch.Tensor) -> bool:
    square_LL = buffer.reshape(buffer.shape[-2:])
    yes_LL = square_LL != 0
    values = square_LL[yes_LL].unique()
    return values.numel() == 1 and bool(yes_LL.diagonal().all()) and not bool(yes_LL.triu(1).any())


def _hook(module: torch.nn.Module, name: str) -> None:
    # Around every call of the module, so that a recomputation under activation checkpointing swaps again.
    lent: list[torch.Tensor] = []
    is_causal: list[bool] = []

    def stand_in(module, args, kwargs):
        state = current_pattern()
        if state is None:
            return
        if not is_causal:
            is_causal.append(_is_causal_buffer(module._buffers[name]))
        if not is_causal[0]:
            return
        hidden = args[0] if args else next(value for value in kwargs.values() if isinstance(value, torch.Tensor))
        own = module._buffers[name]
        causal_LL = own.reshape(own.shape[-2:]) != 0
        size = causal_LL.shape[-1]
        windowed = not bool(causal_LL[-1].all())
        keep = windowed and state.windows == "keep"

        def own_rule(b, h, q, k):
            return causal_LL[q, k]

        index = torch.arange(size, device=own.device)
        batch = torch.arange(hidden.shape[0], device=own.device)
        rule = state.rule(own_rule if keep else None)
        mask_B1LL = rule(batch[:, None, None, None], None, index[None, None, :, None], index[None, None, None, :])
        lent.append(own)
        module._buffers[name] = mask_B1LL.expand(-1, 1, size, size).to(own.dtype)

    def give_back(module, args, kwargs, output):
        if lent:
            module._buffers[name] = lent.pop()

    module.register_forward_pre_hook(stand_in, with_kwargs=True)
    module.register_forward_hook(give_back, with_kwargs=True, always_call=True)
