"""The canvas that decoding paints on: rows of prompt and mask tokens, and the bookkeeping of what is still open.

Owns the layout of ragged prompts, the blocks, the share of `steps` that each block gets, and when a row is finished.
Knows nothing of models, probabilities or selectors.

Every row is kept packed to the left, prompt and completion side by side and padding behind, whatever side the caller
padded on: so a row's positions and blocks are those it would have alone. `sequences` has the caller's columns again.

Shapes: R rows, P columns of the caller's prompts, T positions of the canvas.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class A2DGenerationOutput(ModelOutput):
    """
    Output of [`~A2DGenerationMixin.diffusion_generate`] with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(R, P + new)`):
            Prompt columns as they came in, masks among them filled, then the completions, which all start at column P
            and are filled up with `pad_token_id` where they end.
        tokens_per_forward (`torch.FloatTensor` of shape `(R,)`):
            Tokens generated, without what was dropped, over the forwards that the row took part in; a step with
            guidance is two of them.
        num_forwards (`int`): every forward pass of the model in the call, counted likewise.
        stop_reason (`list[str]`):
            For each row `"eos"`, `"stopping_criteria"`, `"length"` (all of `max_new_tokens`) or, where there were none
            to append, `"filled"`.
        confidences (`torch.FloatTensor` of shape `(R, P + new)`):
            Probability under the model of each generated token when it was committed; NaN at all other places.
        history (`list[torch.LongTensor]`, *optional*):
            With `output_history=True`: the sequences before the first and after each forward, open positions holding
            the mask token, `(R, P + max_new_tokens)` each.
        cache_deviation (`dict[str, float]`, *optional*):
            With `output_cache_deviation=True`: how far the logits of an approximate cache were from exact ones.
    """

    sequences: torch.LongTensor
    tokens_per_forward: torch.FloatTensor | None = None
    num_forwards: int | None = None
    stop_reason: list[str] | None = None
    confidences: torch.FloatTensor | None = None
    history: list[torch.LongTensor] | None = None
    cache_deviation: dict[str, float] | None = None


class Canvas:
    """
    The state of one decoding call.

    Args:
        input_ids (`torch.LongTensor` of shape `(R, P)`): prompts; mask tokens in them are filled too.
        attention_mask (`torch.BoolTensor` of shape `(R, P)`): False at padding, on any side.
        max_new_tokens (`int`): masks appended to each row.
        block_size (`int`, *optional*): positions per block; `None` makes the whole canvas one block.
        steps (`int`, *optional*): forwards per row over all blocks; `None` means one per mask.
        mask_token_id (`int`), eos_token_ids (`list[int]`), pad_token_id (`int`): special tokens.
        remasking (`bool`): whether commits may be taken back until their block is done.
        more_steps (`bool`): whether `steps` may exceed the number of masks.
        passes (`int`): forward passes that one step takes: 2 with guidance.
    """

    def __init__(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        block_size: int | None,
        steps: int | None,
        *,
        mask_token_id: int,
        eos_token_ids: list[int],
        pad_token_id: int,
        remasking: bool = False,
        more_steps: bool = False,
        passes: int = 1,
    ):
        device = input_ids.device
        rows, prompt_columns = input_ids.shape
        self.input_ids, self.prompt_columns, self.max_new_tokens = input_ids, prompt_columns, max_new_tokens
        self.mask_token_id, self.pad_token_id, self.remasking = mask_token_id, pad_token_id, remasking
        self.passes = passes
        self.eos_ids = torch.tensor(eos_token_ids, dtype=torch.long, device=device)

        # Real tokens first, in their order; then the completion; then padding.
        self.prompt_R1 = attention_mask.long().sum(-1, keepdim=True)
        self.length_R = self.prompt_R1[:, 0] + max_new_tokens
        width = int(self.length_R.max())
        self.position_1T = torch.arange(width, device=device)[None]
        self.valid_RT = self.position_1T < self.length_R[:, None]
        packed_RP = torch.argsort((~attention_mask).long(), dim=-1, stable=True)
        # Where each position of the canvas stands in `sequences`; padding goes to a spare last column.
        self.column_RT = prompt_columns + self.position_1T - self.prompt_R1
        in_prompt_RT = self.position_1T < self.prompt_R1
        both = min(width, prompt_columns)
        self.column_RT[:, :both] = torch.where(in_prompt_RT[:, :both], packed_RP[:, :both], self.column_RT[:, :both])
        self.column_RT = self.column_RT.masked_fill(~self.valid_RT, prompt_columns + max_new_tokens)
        spare = input_ids.new_full((rows, max_new_tokens + 1), mask_token_id)
        self.tokens_RT = torch.cat([input_ids, spare], dim=-1).gather(-1, self.column_RT)

        self.completion_RT = self.valid_RT & ~in_prompt_RT
        self.generated_RT = self.valid_RT & (self.tokens_RT == mask_token_id)
        self.confidence_RT = torch.full(self.tokens_RT.shape, float("nan"), device=device)
        self.begin_R1 = self.prompt_R1 if max_new_tokens else self._first(self.generated_RT)[:, None]

        self.block_size = block_size if block_size is not None else width
        self.block_1T = self.position_1T // self.block_size
        self._share_steps(steps, more_steps)
        self.active_block_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.step_in_block_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.forwards_R = torch.zeros(rows, dtype=torch.long, device=device)
        # Tokens of the completion that a stopping criterion leaves standing.
        self.cut_R = torch.full((rows,), max_new_tokens, device=device)
        self.stopped_R = torch.zeros(rows, dtype=torch.bool, device=device)
        self.update()

    def _share_steps(self, steps: int | None, more_steps: bool) -> None:
        """
        Gives each block of each row its forwards: in proportion to its masks, by rounding the running total, so that
        the shares sum to `steps` unless a block would get none or, without `more_steps`, more than it has masks.
        """
        blocks = int(self.block_1T.max()) + 1
        masks_RK = torch.zeros((self.tokens_RT.shape[0], blocks), dtype=torch.long, device=self.tokens_RT.device)
        masks_RK.scatter_add_(1, self.block_1T.expand_as(self.tokens_RT), self.generated_RT.long())
        total_R1 = masks_RK.sum(-1, keepdim=True)
        steps_R1 = total_R1 if steps is None else torch.full_like(total_R1, steps)
        steps_R1 = steps_R1 if more_steps else torch.minimum(steps_R1, total_R1)
        running_RK = (2 * steps_R1 * masks_RK.cumsum(-1) + total_R1) // (2 * total_R1).clamp(min=1)
        share_RK = torch.diff(running_RK, prepend=torch.zeros_like(total_R1), dim=-1)
        share_RK = share_RK.clamp(min=1)
        self.masks_RK = masks_RK
        self.steps_RK = share_RK if more_steps else torch.minimum(share_RK, masks_RK)

    def steps_of(self, block_B: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
        """The forwards that these rows have for these blocks, `(B,)`, at least 1."""
        last = self.steps_RK.shape[-1] - 1
        return self.steps_RK[rows_B, block_B.clamp(max=last)].clamp(min=1)

    def _first(self, which_RT: torch.Tensor) -> torch.Tensor:
        """The first True of each row; T where there is none."""
        return torch.where(which_RT, self.position_1T, self.position_1T.shape[-1]).amin(-1)

    # ------------------------------------------------------------------------------------------------ what is open

    def update(self) -> None:
        """
        Reads off the tokens what is still open: nothing after the first EOS of a completion, or after where a stopping
        criterion cut it.
        """
        self.masked_RT = self.generated_RT & (self.tokens_RT == self.mask_token_id)
        settled_RT = self.completion_RT & ~self.masked_RT
        if self.remasking:
            # What may still be taken back ends nothing.
            done_RT = self.block_1T < self._block_of(self._first(self.masked_RT))[:, None]
            settled_RT = settled_RT & (done_RT | ~self.masked_RT.any(-1, keepdim=True))
        self.eos_R = self._first(settled_RT & torch.isin(self.tokens_RT, self.eos_ids))
        self.end_R = torch.minimum(self.eos_R + 1, self.prompt_R1[:, 0] + self.cut_R).clamp(max=self.length_R)
        self.open_RT = self.masked_RT & (self.position_1T < self.end_R[:, None])
        self.first_open_R = self._first(self.open_RT)
        before_R, self.active_block_R = self.active_block_R, self._block_of(self.first_open_R)
        self.step_in_block_R = self.step_in_block_R.masked_fill(before_R != self.active_block_R, 0)
        self.alive_R = self.first_open_R < self.position_1T.shape[-1]

    def _block_of(self, position_R: torch.Tensor) -> torch.Tensor:
        return position_R // self.block_size

    def scope(self) -> torch.Tensor:
        """The positions to score now: masks of each row's active block; with remasking its committed tokens too."""
        active_RT = (self.block_1T == self.active_block_R[:, None]) & self.alive_R[:, None]
        return active_RT & (self.generated_RT if self.remasking else self.open_RT)

    def num_commits(self) -> torch.Tensor:
        """
        How many positions `steps` wants committed in this forward, `(R,)`, at least 1.

        The masks of a block are spread evenly over its steps, the earlier ones taking the remainder (LLaDA,
        https://huggingface.co/papers/2502.09992); a selector that has committed more so far is asked for less. With
        remasking it is how many tokens of the block stand after this step: ceil(n (i + 1) / steps).
        """
        block_R1 = self.active_block_R.clamp(max=self.masks_RK.shape[-1] - 1)[:, None]
        masks_R = self.masks_RK.gather(1, block_R1)[:, 0]
        steps_R = self.steps_RK.gather(1, block_R1)[:, 0].clamp(min=1)
        step_R = torch.minimum(self.step_in_block_R + 1, steps_R)
        if self.remasking:
            return ((masks_R * step_R + steps_R - 1) // steps_R).clamp(min=1)
        planned_R = masks_R // steps_R * step_R + torch.minimum(step_R, masks_R % steps_R)
        left_R = (self.masked_RT & (self.block_1T == block_R1)).sum(-1)
        return (planned_R - (masks_R - left_R)).clamp(min=1)

    def commit(self, rows: torch.Tensor, chosen_BT, tokens_BT, confidence_BT, again_BT=None) -> None:
        """
        Writes the chosen tokens, and masks again what is put back. Counts the forward.

        Args:
            rows (`torch.LongTensor` of shape `(B,)`): which rows of the canvas the others speak of.
            chosen_BT, tokens_BT, confidence_BT (`torch.Tensor` of shape `(B, T)`): the commit.
            again_BT (`torch.BoolTensor` of shape `(B, T)`, *optional*): what is put back.
        """
        self.tokens_RT[rows] = torch.where(chosen_BT, tokens_BT, self.tokens_RT[rows])
        self.confidence_RT[rows] = torch.where(chosen_BT, confidence_BT, self.confidence_RT[rows])
        if again_BT is not None:
            self.tokens_RT[rows] = self.tokens_RT[rows].masked_fill(again_BT, self.mask_token_id)
            self.confidence_RT[rows] = self.confidence_RT[rows].masked_fill(again_BT, float("nan"))
        self.forwards_R[rows] += self.passes
        self.step_in_block_R[rows] += 1
        self.update()

    # ------------------------------------------------------------------------------------------------------- output

    def sequences(self, tokens_RT: torch.Tensor | None = None, ended: bool = True) -> torch.LongTensor:
        """
        The rows in the caller's layout, `(R, P + max_new_tokens)`.

        Args:
            tokens_RT (`torch.LongTensor` of shape `(R, T)`, *optional*): other tokens than those committed so far.
            ended (`bool`, *optional*, defaults to `True`): fill up with `pad_token_id` behind the end of each row.
        """
        tokens_RT = self.tokens_RT if tokens_RT is None else tokens_RT
        if ended:
            tokens_RT = torch.where(self.position_1T < self.end_R[:, None], tokens_RT, self.pad_token_id)
        return self._columns(tokens_RT, self.input_ids, self.pad_token_id)

    def _columns(self, values_RT: torch.Tensor, prompt_RP: torch.Tensor, fill: float) -> torch.Tensor:
        rest = values_RT.new_full((values_RT.shape[0], self.max_new_tokens + 1), fill)
        return torch.cat([prompt_RP, rest], dim=-1).scatter(-1, self.column_RT, values_RT)[:, :-1]

    def settled_columns(self) -> int:
        """How many completion columns no row will change any more."""
        settled_R = self.active_block_R * self.block_size if self.remasking else self.first_open_R
        longest = (self.end_R - self.prompt_R1[:, 0]).amax()
        columns_R = torch.where(self.alive_R, settled_R - self.prompt_R1[:, 0], longest)
        return int(columns_R.amin().clamp(min=0))

    def cut(self, columns: int, done_R: torch.Tensor) -> None:
        """Ends the rows in `done_R` after `columns` tokens of their completion, unless they have ended before."""
        done_R = done_R.to(self.cut_R.device) & (self.end_R - self.prompt_R1[:, 0] >= columns) & ~self.stopped_R
        self.cut_R = torch.where(done_R, columns, self.cut_R)
        self.stopped_R = self.stopped_R | done_R
        self.update()

    def output(self, num_forwards: int, history: list[torch.LongTensor] | None) -> A2DGenerationOutput:
        """The result, cut to the longest completion."""
        new_R = self.end_R - self.prompt_R1[:, 0]
        columns = self.prompt_columns + int(new_R.amax())
        kept_RT = self.generated_RT & (self.position_1T < self.end_R[:, None])
        confidence_RT = self.confidence_RT.masked_fill(~kept_RT, float("nan"))
        blank_RP = torch.full(self.input_ids.shape, float("nan"), device=self.input_ids.device)
        reasons = []
        for stopped, eos in zip(self.stopped_R.tolist(), (self.eos_R < self.end_R).tolist(), strict=True):
            unforced = "length" if self.max_new_tokens else "filled"
            reasons.append("eos" if eos else "stopping_criteria" if stopped else unforced)
        return A2DGenerationOutput(
            sequences=self.sequences()[:, :columns],
            tokens_per_forward=kept_RT.sum(-1) / self.forwards_R.clamp(min=1),
            num_forwards=num_forwards,
            stop_reason=reasons,
            confidences=self._columns(confidence_RT, blank_RP, float("nan"))[:, :columns],
            history=history,
        )
