"""What a streamer sees of decoding: the prompt, drafts of the active block, finished blocks.

Owns when which tokens are handed over. Reads the canvas, changes nothing.
"""

import torch
from transformers.generation.streamers import BaseStreamer

from .canvas_a2d import Canvas


class CanvasStream:
    """Feeds a streamer: prompt, drafts of the active block, finished blocks."""

    def __init__(self, streamer: BaseStreamer | None, canvas: Canvas):
        self.streamer, self.canvas, self.sent = streamer, canvas, 0
        if streamer is None:
            return
        if canvas.input_ids.shape[0] > 1:
            raise ValueError("`streamer` takes one row: pass one prompt, with `num_return_sequences=1`.")
        self.takes_drafts = hasattr(streamer, "put_draft")
        # Masks in the prompt are only filled later: the whole row follows again, then.
        self.sent = 0 if bool(canvas.generated_RT[0, : canvas.prompt_R1[0, 0]].any()) else canvas.prompt_columns
        streamer.put(canvas.input_ids.cpu())

    def draft(self, proposed_BT: torch.Tensor) -> None:
        """Shows the active block as it would be if every candidate were committed now."""
        if self.streamer is not None and self.takes_drafts:
            canvas = self.canvas
            end = torch.minimum((canvas.active_block_R[0] + 1) * canvas.block_size, canvas.end_R[0])
            shown_T = (canvas.column_RT[0] >= self.sent) & (canvas.position_1T[0] < end)
            self.streamer.put_draft(proposed_BT[0, shown_T].cpu())

    def advance(self) -> None:
        """Hands over the blocks that are done."""
        if self.streamer is None:
            return
        canvas = self.canvas
        done = int(canvas.active_block_R[0] * canvas.block_size if canvas.alive_R[0] else canvas.end_R[0])
        ready_T = (canvas.column_RT[0] >= self.sent) & (canvas.position_1T[0] < min(done, int(canvas.end_R[0])))
        if bool(ready_T.any()):
            self.streamer.put(canvas.tokens_RT[0, ready_T].cpu())
            self.sent = int(canvas.column_RT[0, ready_T].max()) + 1

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
