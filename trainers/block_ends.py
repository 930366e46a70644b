"""The end of a row under block diffusion: its last block is filled up with EOS.

Owns that filling. A decoder works on whole blocks, so a model must have seen what stands behind an end inside one.
"""

from dataclasses import dataclass
from typing import Any

from .epoch_order import add_eos_tail


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

    def longest_row(self, length: int) -> int:
        """How long a row of `length` tokens can become."""
        whole = length + -length % self.block_size
        return whole if self.max_length is None else max(length, min(whole, self.max_length))

    def extend(self, rows: list[dict[str, Any]], epoch: int) -> None:
        """Fills up `rows`, in place, and notes what each got as `tail_length`."""
        for row in rows:
            add_eos_tail(row, -len(row["labels"]) % self.block_size, self.token_id, self.max_length)
