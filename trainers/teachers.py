"""The frozen autoregressive parent beside a model in training.

Owns where its weights are (a copy, or under an adapter that is switched off) and how it is asked: clean text, the
causal pattern, no gradient. Must be made before the first step, while the model still is its parent.

Shapes: B rows, L tokens.
"""

import copy
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from transformers import PreTrainedModel

from .model_resolution import base_model


class Teacher:
    """
    A frozen parent.

    Args:
        model (`PreTrainedModel` or `PeftModel`): whose causal answers it gives.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        self.model = model

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """The teacher's answer to clean text: as [`A2DForMaskedDiffusion.forward`], causal and without a gradient."""
        raise NotImplementedError

    def hidden_states(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The hidden states of clean text, embeddings first, each `(B, L, D)`. Nothing passes the output head."""
        nothing_BL = torch.full_like(inputs["input_ids"], -100)
        return self(**inputs, labels=nothing_BL, output_hidden_states=True).hidden_states


class FrozenCopy(Teacher):
    """A teacher of its own weights; make it with `FrozenCopy.of(model)` where the model is still needed."""

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel) -> "FrozenCopy":
        """A copy of a model as it stands."""
        return cls(copy.deepcopy(base_model(model)).eval().requires_grad_(False))

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        return self.model(attention_pattern="causal", **inputs)


class AdaptersOff(Teacher):
    """The weights in training themselves, with the adapter switched off: the parent, for no memory at all."""

    model: PeftModel

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        training = self.model.training
        self.model.eval()  # no dropout
        try:
            with self.model.disable_adapter():
                return self.model(attention_pattern="causal", **inputs)
        finally:
            self.model.train(training)


# What PEFT takes out of the base to start an adapter with: without the adapter the parent is not there any more.
_MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def _refuse_moved_base(model: PeftModel) -> None:
    """Raises `ValueError` where a model is not its parent again when its adapter is switched off."""
    config = model.active_peft_config
    if config.peft_type.value != "LORA":
        return
    if config.bias != "none":
        raise ValueError(
            '`teacher="adapters_off"` needs an adapter that can be switched off, and `bias='
            f'"{config.bias}"` of this one trains the base: use `bias="none"`.'
        )
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.lower().startswith(_MOVES_BASE):
        raise ValueError(
            f'A teacher is the parent, and `init_lora_weights="{config.init_lora_weights}"` has moved a part of its '
            "weights into the adapter: with the adapter off it is not there. Use `init_lora_weights=True`, or "
            "`teacher_logits_cache` or `anchor_cache`, which need no teacher."
        )


def make_teacher(model: PreTrainedModel | PeftModel, kind: str | None) -> Teacher:
    """
    The teacher of a model that is about to be trained.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model.
        kind (`str`, *optional*): `frozen_copy` or `adapters_off`; `None` for the latter where there is an adapter.

    Raises:
        ValueError: no adapter to switch off, or one whose base is not the parent (trained biases, PiSSA and the like).
    """
    if kind is None:
        kind = "adapters_off" if is_peft_model(model) else "frozen_copy"
    if kind == "adapters_off":
        if not is_peft_model(model):
            raise ValueError('`teacher="adapters_off"` needs a model with an adapter: pass `peft_config`.')
        _refuse_moved_base(model)
        return AdaptersOff(model)
    if kind != "frozen_copy":
        raise ValueError(f"`teacher` must be 'frozen_copy' or 'adapters_off', not {kind!r}.")
    if is_peft_model(model):
        _refuse_moved_base(model)
        # The adapter's layers sit inside the base: copy both, and switch the copy's off for good.
        return AdaptersOff(copy.deepcopy(model).eval().requires_grad_(False))
    return FrozenCopy.of(model)


def causal_targets(
    labels_BL: torch.Tensor, attention_mask_BL: torch.Tensor, document_ids_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Labels for a causal pass: each label one position earlier, where the parent predicts it; -100 elsewhere. The first
    token of a row or a document has nothing before it, so nobody predicts it.

    Returns:
        `torch.LongTensor` of shape `(B, L)`.
    """
    targets_BL = torch.full_like(labels_BL, -100)
    follows_BL = attention_mask_BL[:, :-1].bool() & attention_mask_BL[:, 1:].bool()
    if document_ids_BL is not None:
        follows_BL = follows_BL & (document_ids_BL[:, :-1] == document_ids_BL[:, 1:])
    targets_BL[:, :-1] = labels_BL[:, 1:].masked_fill(~follows_BL, -100)
    return targets_BL
