"""Hidden states of a frozen teacher on disk: written once, read instead of running it.

Owns what an anchor is: the hidden states of chosen layers at every token of a row. The folder is a row_cache.py's.

Shapes: B rows, L tokens, T tokens of one row, D hidden size, K layers.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from transformers import PreTrainedModel

from .model_resolution import base_model
from .row_cache import RowCache, weights_sha256
from .teachers import AdaptersOff, FrozenCopy


class AnchorCache(RowCache):
    """A folder of anchors; its manifest also names the `layers`."""

    manifest_name = "anchors.json"
    what = "anchor cache"
    argument = "anchor_cache"
    script = "scripts/precompute_anchors.py"

    @classmethod
    def open(cls, folder: str | os.PathLike, model: PreTrainedModel, layers: Sequence[int]) -> "AnchorCache":
        """
        A folder to read from.

        Args:
            folder (`str` or `os.PathLike`): where it is.
            model (`PreTrainedModel`): the teacher, or a student that has not been trained yet.
            layers (`Sequence[int]`): the layers that will be read.

        Raises:
            ValueError: no such cache, one of another model, or one without these layers.
        """
        cache = cls.of_model(folder, model)
        missing = sorted(set(layers) - set(cache.manifest["layers"]))
        if missing:
            raise ValueError(
                f"`anchor_cache` {folder} holds the layers {cache.manifest['layers']} and not {missing}: set "
                "`align_layers` to some of them, or precompute the others."
            )
        return cache

    def read(self, input_ids: Sequence[int], layers: Sequence[int]) -> list[torch.Tensor] | None:
        """The anchors of a row, `(T, D)` per layer, or `None` where there are none."""
        return self.read_row(input_ids, [f"layer_{layer}" for layer in layers])


def precompute_anchors(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[dict[str, Any]],
    folder: str | os.PathLike,
    layers: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 8,
    revision: str | None = None,
) -> tuple[int, int]:
    """
    Writes the anchors of every row that has none yet.

    Args:
        model ([`A2DForMaskedDiffusion`] or `PeftModel`): the teacher; an adapter is switched off.
        rows (`Sequence[dict]`): prepared rows, as the trainer will read them.
        folder (`str` or `os.PathLike`): where to; made where it does not exist.
        layers (`Sequence[int]`): which hidden states; 0 is the embedding's output.
        dtype (`torch.dtype`): what they are kept in.
        batch_size (`int`): rows per forward pass.
        revision (`str`, *optional*): revision of the teacher; part of the key.

    Returns:
        `tuple[int, int]`: rows written, and rows that were there already.
    """
    layers = sorted(layers)
    cache = AnchorCache.create(
        folder,
        {
            "model_sha256": weights_sha256(base_model(model)),
            "revision": revision,
            "dtype": str(dtype).removeprefix("torch."),
            "layers": layers,
        },
    )
    teacher = AdaptersOff(model) if is_peft_model(model) else FrozenCopy(model.eval())

    def anchors(inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        hidden = teacher.hidden_states(inputs)
        for b, length in enumerate(inputs["attention_mask"].sum(dim=-1).tolist()):
            yield {f"layer_{layer}": hidden[layer][b, :length].to("cpu", dtype) for layer in layers}

    return cache.fill(rows, anchors, batch_size, next(model.parameters()).device)
