"""From rows of ragged lengths to one batch.

Owns padding, nothing else: labels were decided during preparation and noise is drawn by the trainer.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class DiffusionCollator:
    """
    Pads rows on the right. Padding is never attended to and never a target.

    Args:
        pad_token_id (`int`): what fills `input_ids`; never read by the model.
        pad_to_multiple_of (`int`, *optional*): rounds the padded length up.

    Returns a dictionary of `torch.LongTensor`: `input_ids`, `labels` (-100 where a token is never masked) and
    `attention_mask`, all of shape `(B, L)`; `row_id`, `epoch` and `place`, which decide a row's noise, and
    `tail_length`, the EOS tokens added at its end, all of shape `(B,)`.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "labels": torch.full(shape, -100, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        for b, row in enumerate(rows):
            tokens = len(row["input_ids"])
            batch["input_ids"][b, :tokens] = torch.as_tensor(row["input_ids"])
            batch["labels"][b, :tokens] = torch.as_tensor(row["labels"])
            batch["attention_mask"][b, :tokens] = 1
        # Rows that come straight from a prepared dataset stand at their own number, in epoch 0, without a tail.
        numbers = {
            "row_id": [row["row_id"] for row in rows],
            "epoch": [row.get("epoch", 0) for row in rows],
            "place": [row.get("place", row["row_id"]) for row in rows],
            "tail_length": [row.get("tail_length", 0) for row in rows],
        }
        return batch | {name: torch.tensor(values, dtype=torch.int64) for name, values in numbers.items()}
