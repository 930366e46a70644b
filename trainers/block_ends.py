"""The end of a row under block diffusion: its last block is filled up with EOS.

Owns that filling. A decoder works on whole blocks, so a model must have seen what stands behind an end inside one.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockEnds:
    """
    Fills the last block of each row that ends with EOS with further ones. They are targets, and left out of the
    reported NELBO. Takes the place of [`EOSTail`].

    Attributes:
        token_id (`int`): the EOS token.
        block_size (`int`): tokens per block, counted from the start of the row.
        max_length (`int`, *optional*): no row grows beyond this.
    """

    token_id: int
    block_size: int
    max_length: int | None

    def extend(self, rows: list[dict[str, Any]], epoch: int) -> None:
        """Fills up `rows`, in place, and notes what each got as `tail_length`."""
        for row in rows:
            length = -len(row["labels"]) % self.block_size
            if row["labels"][-1] != self.token_id:
                length = 0  # cut short, or never meant to stop
            elif self.max_length is not None:
                length = min(length, max(self.max_length - len(row["labels"]), 0))
            row["input_ids"] = list(row["input_ids"]) + [self.token_id] * length
            row["labels"] = list(row["labels"]) + [self.token_id] * length
            row["tail_length"] = length
