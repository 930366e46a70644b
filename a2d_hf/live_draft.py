"""The live draft of a text that is being denoised, at the bottom of a terminal as well as at its top.

Owns the one thing that the library's streamer leaves open: room below the cursor. Imports transformers.
"""

import shutil
from typing import Any

import torch
from transformers import TextDiffusionStreamer


class LiveDraft(TextDiffusionStreamer):
    """
    [`~transformers.TextDiffusionStreamer`] that scrolls before it draws.

    A draft is taken back by jumping to a remembered place on the screen. In the last lines of a terminal a draft of
    more than one line scrolls the text above away from that place, and each draft would leave a piece behind.
    """

    def put_draft(self, value: torch.Tensor, **kwargs: Any) -> None:
        """Shows a draft; takes the one before off the screen."""
        self._clear_draft()
        columns, lines = shutil.get_terminal_size()
        text = self.tokenizer.decode(value.flatten(), **self.decode_kwargs)
        # A letter takes two columns at most.
        rows = min(sum(2 * len(line) // columns + 1 for line in text.split("\n")), lines - 1)
        print("\033D" * rows + f"\033[{rows}A", end="")  # down, scrolling at the end, and up again in the same column
        super().put_draft(value, **kwargs)
