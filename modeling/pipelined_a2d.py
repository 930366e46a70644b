"""Several blocks open at once: the next one starts before the last one is done.

Owns the rule of Discrete Diffusion Forcing (D2F, https://huggingface.co/papers/2508.09192), which d3LLM uses too, for
any selector that may commit nothing. Knows nothing of models.

Of the open blocks of a row, counted from the first that has a mask,

- the next one opens once `block_add_threshold` of the one before it is committed, up to `pipeline_depth` of them;
- a block is fully active when it is the first, or once `decoded_token_threshold` of the one before it is committed:
  it commits at least one token in every forward. Until then it commits what the selector is sure of, if anything:
  tokens of probability `threshold`, or as many of low entropy as `entropy_bound` allows without its free first one.

Every block is chosen for by itself, so that depth 1 is the plain schedule, token for token.

Shapes: R rows of the canvas, B of them that are not finished, T positions of the canvas, K blocks of a row.
"""

import dataclasses

import torch

from .block_schedule_a2d import BlockSchedule
from .canvas_a2d import Canvas
from .selectors_a2d import Candidates, Selector, choose_commits


class PipelinedBlocks(BlockSchedule):
    """
    The schedule of a call with `pipeline_depth` above 1.

    Args:
        canvas ([`Canvas`]): the state of the call.
        depth (`int`): most blocks open in a row.
        block_add_threshold (`float`), decoded_token_threshold (`float`): shares of a block, in [0, 1].
    """

    def __init__(self, canvas: Canvas, depth: int, block_add_threshold: float, decoded_token_threshold: float):
        super().__init__(canvas)
        self.depth = depth
        self.block_add_threshold, self.decoded_token_threshold = block_add_threshold, decoded_token_threshold

    def levels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Which blocks are open.

        Returns:
            `torch.LongTensor` and `torch.BoolTensor` of shape `(R, K)`: 0 for the first open block of a row, 1 for the
            next, -1 for those that are not open; and whether each of them is fully active.
        """
        canvas = self.canvas
        blocks_RT = canvas.block_1T.expand_as(canvas.tokens_RT)
        left_RK = torch.zeros_like(canvas.masks_RK).scatter_add_(1, blocks_RT, canvas.open_RT.long())
        done_RK = 1.0 - left_RK / canvas.masks_RK.clamp(min=1)
        number_K = torch.arange(left_RK.shape[1], device=left_RK.device)
        first_RK = number_K == canvas.active_block_R[:, None]
        before_RK = torch.nn.functional.pad(done_RK, (1, 0), value=1.0)[:, :-1]
        reached_RK = first_RK | (before_RK >= self.block_add_threshold)
        # Open only if every block since the first one let the next one in.
        chain_RK = torch.where(number_K < canvas.active_block_R[:, None], True, reached_RK).long().cumprod(-1).bool()
        has_masks_RK = left_RK > 0
        level_RK = has_masks_RK.long().cumsum(-1) - 1
        open_RK = chain_RK & has_masks_RK & (level_RK < self.depth) & canvas.alive_R[:, None]
        return level_RK.masked_fill(~open_RK, -1), first_RK | (before_RK >= self.decoded_token_threshold)

    def scope(self) -> torch.Tensor:
        levels_RK, _ = self.levels()
        return self.canvas.open_RT & (self._at_positions(levels_RK) >= 0)

    def choose(self, select: Selector, candidates: Candidates, rows_B: torch.Tensor) -> torch.Tensor:
        levels_RK, full_RK = self.levels()
        level_BT, full_BT = self._at_positions(levels_RK)[rows_B], self._at_positions(full_RK)[rows_B]
        level_N = level_BT[candidates.mask_BL]
        chosen_BT = torch.zeros_like(candidates.mask_BL)
        for level in range(int(level_N.max()) + 1):
            here_BT = candidates.mask_BL & (level_BT == level)
            left_B = here_BT.sum(-1)
            # `steps` speaks of the first block; the others are asked for one token, or none while half active.
            wanted_B = candidates.num_commits_B if level == 0 else (here_BT & full_BT).any(-1).long()
            block = dataclasses.replace(
                candidates,
                mask_BL=here_BT,
                log_probs_NV=candidates.log_probs_NV[level_N == level],
                num_commits_B=torch.minimum(wanted_B, left_B),
            )
            chosen_BT |= choose_commits(select, block)
        return chosen_BT

    def _at_positions(self, values_RK: torch.Tensor) -> torch.Tensor:
        return values_RK.gather(1, self.canvas.block_1T.expand_as(self.canvas.tokens_RT))
