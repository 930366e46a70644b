"""The live draft of a text that is being denoised, at the bottom of a terminal as well as at its top.

Owns the one thing that the library's streamer leaves open: room below the cursor. Imports transformers.
"""

import shutil
import unicodedata
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
        """Shows a draft, as much of it as the screen holds; takes the one before off the screen."""
        self._clear_draft()
        columns, lines = shutil.get_terminal_size()
        text = self.tokenizer.decode(value.flatten(), **self.decode_kwargs)
        shown, rows = _that_fits(text, columns, max(lines - 2, 1))
        print("\033D" * rows + f"\033[{rows}A", end="")  # down, scrolling at the end, and up again in the same column
        print(f"\0337\033[33m{shown}\033[0m", end="", flush=True)  # remembers the place; yellow
        self._has_draft = True


def _that_fits(text: str, columns: int, most: int) -> tuple[str, int]:
    """The beginning of `text` that takes `most` rows of a screen, and how many rows that is; the cut is marked."""
    # The first row may already be full to the last column.
    rows, column = 1, columns
    for place, letter in enumerate(text):
        width = 8 if letter == "\t" else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if letter == "\n" or column + width > columns:
            rows, column = rows + 1, 0
        if rows > most:
            return f"{text[: max(place - 1, 0)]}…", most
        column += 0 if letter == "\n" else width
    return text, rows
