"""ALiBi as a distance: -slope * |i - j|, wherever a pattern lets a position look to its right.

Owns the hooks that stand a distance in for the bias an ALiBi model hands to its attention. ALiBi is defined by
distance (https://huggingface.co/papers/2108.12409, section 3), but every implementation in transformers writes it as
slope * j, a function of the key alone: the softmax cancels what is the same for a whole row, so to the left both are
one. To the right they are opposites, and an opened model would favour whatever stands furthest to the right. The
slopes are read off the bias itself, the distances off the logical positions: padding, packed documents, cached blocks
and the doubled sequence of block diffusion need nothing of the parent, not even `position_ids`. With the parent's own
pattern nothing is touched, to the last bit.

Shapes: B rows, H heads, Q queries, K keys (cached ones included).
"""

import inspect

import torch

from .attention_interface import PatternInForce, current_pattern


# What transformers calls the bias in the signature of a layer.
_ARGUMENTS = ("alibi", "position_bias")


def measure_by_distance(backbone: torch.nn.Module) -> int:
    """
    Hooks every layer that takes an ALiBi bias.

    Args:
        backbone (`torch.nn.Module`): the parent.

    Returns:
        `int`: how many layers were hooked; 0 where the model has no ALiBi.
    """
    hooked: list[str] = []
    for name, module in backbone.named_modules():
        if any(name.startswith(f"{outer}.") for outer in hooked):
            continue
        parameters = inspect.signature(module.forward).parameters
        argument = next((a for a in _ARGUMENTS if a in parameters), None)
        if argument is not None and "attention_mask" in parameters:
            module.register_forward_pre_hook(_stand_in(backbone.config, argument), with_kwargs=True)
            hooked.append(name)
    return len(hooked)


def _stand_in(config, argument: str):
    heads = config.get_text_config().num_attention_heads

    def stand_in(module, args, kwargs):
        state, bias = current_pattern(), kwargs.get(argument)
        if state is None or bias is None or (state.pattern.is_causal and state.position_BK is None):
            return None
        hidden_BQD = args[0] if args else kwargs["hidden_states"]
        # One bias serves all layers of a pass; it is kept beside what replaces it, so that its id stays its own.
        if id(bias) not in state.kept:
            mask = kwargs["attention_mask"]
            edges = _Edges(state, hidden_BQD.shape[:2], mask.shape[-1], bias.device)
            # With a dimension for heads the bias has gone into the mask already, scaled as the scores are.
            if bias.ndim == 4:
                _check_added_once(config, kwargs)
                replaced = bias, edges.in_mask(mask)
            else:
                replaced = edges.beside_mask(heads, bias, mask)
            state.kept[id(bias)] = (bias, *replaced)
        _, bias, mask = state.kept[id(bias)]
        return args, {**kwargs, argument: bias, "attention_mask": mask}

    return stand_in


def _check_added_once(config, kwargs: dict) -> None:
    if config._attn_implementation == "eager" or kwargs.get("output_attentions"):
        raise ValueError(
            f"The eager attention of {config.model_type} in transformers adds ALiBi twice, in its mask and to the "
            'scores, and cannot be opened exactly: load the model with `attn_implementation="sdpa"`, and ask for no '
            "`output_attentions`."
        )


def _slopes(bias_XHQK: torch.Tensor) -> torch.Tensor:
    """
    The slope of each head, `(H, 1, 1)`: the bias is its multiple by whole numbers, of which one is 1, so it is the
    smallest that is not 0. Closed edges are far from it; with a single key there is no distance, and no slope.
    """
    size_XHQK = bias_XHQK.float().abs()
    slope_H = size_XHQK.masked_fill(size_XHQK == 0, torch.inf).amin(dim=(0, 2, 3))
    return slope_H.masked_fill(slope_H.isinf(), 0.0)[:, None, None]


class _Edges:
    """The edges of one pass: which are there, and how long they are."""

    def __init__(self, state: PatternInForce, shape: tuple[int, int], keys: int, device: torch.device):
        self.state, (self.rows, queries) = state, shape
        row_B = torch.arange(self.rows, device=device)
        query_Q, key_K = torch.arange(queries, device=device) + state.seen, torch.arange(keys, device=device)
        self.query_Q = query_Q
        self.grid = row_B[:, None, None, None], None, query_Q[None, None, :, None], key_K[None, None, None, :]
        position_BK = key_K[None] if state.position_BK is None else state.position_BK
        # A static cache has room for keys that do not exist yet.
        position_BK = torch.nn.functional.pad(position_BK, (0, max(0, keys - position_BK.shape[-1])))
        self.offset_BQK = position_BK[:, None, :] - position_BK[:, query_Q, None]

    def visible(self) -> torch.Tensor:
        """Booleans of shape `(B, 1, Q, K)`."""
        return self.state.rule(None)(*self.grid).expand(self.rows, 1, *self.offset_BQK.shape[1:])

    def _scores(self, slope_H11: torch.Tensor, offset_BQK: torch.Tensor, weigh_future: bool) -> torch.Tensor:
        scores_BHQK = -slope_H11 * offset_BQK.abs()[:, None]
        log_weight = self.state.pattern.future_log_weight
        if weigh_future and log_weight is not None:
            scores_BHQK = scores_BHQK + (offset_BQK > 0)[:, None] * log_weight
        return scores_BHQK

    def beside_mask(self, heads: int, bias: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A bias `(H, 1, K)` or `(B * H, 1, K)` that is added to the scores, with a query dimension."""
        slope_H11, offset_BQK = _slopes(bias.reshape(-1, heads, 1, bias.shape[-1])), self.offset_BQK
        if bias.shape[0] == self.rows * heads:
            offset_BQK = offset_BQK.expand(self.rows, -1, -1)
        elif offset_BQK.shape[0] > 1:
            moved_B1QK = self.visible() & (offset_BQK != offset_BQK[:1])[:, None]
            if self.state.valid_BK is not None:  # what padding would see does not matter
                moved_B1QK = moved_B1QK & self.state.valid_BK[:, None, self.query_Q, None]
            if bool(moved_B1QK.any()):
                raise ValueError(
                    "This model has one ALiBi bias for all rows of a batch, and here the same two columns are not "
                    "equally far apart in every row: pass such rows one at a time."
                )
            offset_BQK = offset_BQK[:1]
        yes_or_no = mask.dtype == torch.bool  # such a mask closes edges, and cannot weigh them
        if yes_or_no and self.state.pattern.future_log_weight is not None:
            mask = ~self.visible()
        scores_BHQK = self._scores(slope_H11, offset_BQK, weigh_future=yes_or_no)
        return scores_BHQK.flatten(0, 1).to(bias.dtype), mask

    def in_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask `(B, H, Q, K)` that holds the bias, with the distance in its place."""
        closed = torch.finfo(mask.dtype).min
        slope_H11 = _slopes(mask.masked_fill(mask == closed, 0.0))
        scores_BHQK = self._scores(slope_H11, self.offset_BQK, weigh_future=True).to(mask.dtype)
        return scores_BHQK.masked_fill(~self.visible(), closed)
