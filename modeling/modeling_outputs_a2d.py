"""What a forward pass returns."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class A2DOutput(ModelOutput):
    """
    Output of [`A2DForMaskedDiffusion`].

    Attributes:
        loss (`torch.Tensor` of shape `()`, *optional*): returned when `labels` are given.
        logits (`torch.Tensor` of shape `(B, L, V)`, or `(N, V)` with `logits_mask`): scores of the token AT each
            position; `None` when `labels` are given.
        token_nll (`torch.Tensor` of shape `(N,)`): cross-entropy of each labelled position in nats, detached, in
            row-major order.
        token_hit (`torch.Tensor` of shape `(N,)`): whether each labelled position was predicted exactly.
        head_input (`torch.Tensor` of shape `(N, D)`): what went into the head for each labelled position, with
            gradient, for losses of a trainer's own.
        past_key_values, hidden_states, attentions: as the parent returns them.
        aux_loss (`torch.Tensor`, *optional*): the router loss of a mixture-of-experts parent.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    token_nll: torch.Tensor | None = None
    token_hit: torch.Tensor | None = None
    head_input: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None
