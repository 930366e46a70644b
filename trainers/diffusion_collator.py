"""From rows of ragged lengths to one batch.

Owns padding and the documents of packed rows, nothing else: labels were decided during preparation and noise is drawn
by the trainer.
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

    A pack, `{"documents": [row, row, ...]}`, becomes one sequence of its rows, one behind the other. The batch then
    also has `document_ids` of shape `(B, L)`, which of its rows each token belongs to, and the last four tensors have
    one entry for each of those rows.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [row.get("documents", [row]) for row in rows]
        length = max(sum(len(row["input_ids"]) for row in sequence) for sequence in sequences)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "labels": torch.full(shape, -100, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        document_ids, documents = torch.zeros(shape, dtype=torch.int64), 0
        for b, sequence in enumerate(sequences):
            start = 0
            for row in sequence:
                here = slice(start, start + len(row["input_ids"]))
                batch["input_ids"][b, here] = torch.as_tensor(row["input_ids"])
                batch["labels"][b, here] = torch.as_tensor(row["labels"])
                batch["attention_mask"][b, here] = 1
                document_ids[b, start:] = documents  # padding counts to the last row
                start, documents = here.stop, documents + 1
        if any("documents" in row for row in rows):
            batch["document_ids"] = document_ids
        # Rows that come straight from a prepared dataset stand at their own number, in epoch 0, without a tail.
        rows = [row for sequence in sequences for row in sequence]
        numbers = {
            "row_id": [row["row_id"] for row in rows],
            "epoch": [row.get("epoch", 0) for row in rows],
            "place": [row.get("place", row["row_id"]) for row in rows],
            "tail_length": [row.get("tail_length", 0) for row in rows],
        }
        return batch | {name: torch.tensor(values, dtype=torch.int64) for name, values in numbers.items()}
