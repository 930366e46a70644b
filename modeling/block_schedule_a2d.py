"""Which positions a forward pass looks at, how many of them it commits, and which are put back.

Owns the plain schedule: one block after the other, with or without P2 remasking. Its two siblings have its form:
remdm_a2d.py and pipelined_a2d.py. Knows nothing of models.

Shapes: R rows of the canvas, B of them that are not finished, T positions of the canvas.
"""

import torch

from .canvas_a2d import Canvas
from .selectors_a2d import Candidates, Selector, choose_commits


class BlockSchedule:
    """
    One block of each row at a time.

    Args:
        canvas ([`Canvas`]): the state of the call.
    """

    def __init__(self, canvas: Canvas):
        self.canvas = canvas

    def scope(self) -> torch.Tensor:
        """The positions to score now, `(R, T)`."""
        return self.canvas.scope()

    def num_commits(self) -> torch.Tensor:
        """How many of them `steps` wants committed, `(R,)`."""
        return self.canvas.num_commits()

    def choose(self, select: Selector, candidates: Candidates, rows_B: torch.Tensor) -> torch.Tensor:
        """Which candidates to commit, `(B, T)`; at least one in each row."""
        return choose_commits(select, candidates)

    def put_back(self, candidates: Candidates, chosen_BT: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor | None:
        """Which positions to mask again once the chosen ones are committed, `(B, T)`; `None` for none."""
        return candidates.mask_BL & ~chosen_BT if self.canvas.remasking else None

    def advance(self) -> None:
        """Told that the canvas has taken the commits."""
