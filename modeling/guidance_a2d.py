"""Classifier-free guidance: the prediction with the prompt against that without it, or with a negative one.

Owns the unconditional canvas and the formula. Knows nothing of models or selectors.

    log p_guided = log p(. | negative) + s (log p(. | prompt) - log p(. | negative)),    s = `guidance_scale`,

up to a constant, as [`~transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor`] has it
(https://huggingface.co/papers/2306.17806): s = 1 is the plain prediction and costs no second pass, s = 0 ignores the
prompt, s > 1 leans on it. (LLaDA, https://huggingface.co/papers/2502.09992, counts from 0: its `cfg_scale` is s - 1.)
In the unconditional canvas everything that was given is a mask, except the tokens named in `guidance_keep_tokens`; or
the negative prompt stands in the prompt's place, before the same completion.

Both canvases go through the model as one batch of twice the rows; that is two forward passes, and counted so.

Shapes: R rows of the canvas, B of them that are not finished, T positions of the canvas, U of the wider of the two, N
positions scored, V vocabulary rows.
"""

import torch

from .canvas_a2d import Canvas


# What a probability of 0 counts in the formula: finite, so that 0 against 0 is 0 and not NaN.
_NEVER = -1e9


class Guidance:
    """
    The second half of a guided batch.

    Args:
        canvas ([`Canvas`]): the state of the call.
        scale (`float`): s.
        keep_tokens (`list[int]`): ids of the prompt that stay visible.
        negative_ids, negative_mask (`torch.Tensor` of shape `(R, P)`, *optional*): negative prompts and what is real
            in them.
        attention_block (`int`, *optional*): block size of a block-causal attention. A negative prompt is then filled
            up with masks in front, so that the completion stands in the same blocks.
    """

    def __init__(
        self,
        canvas: Canvas,
        scale: float,
        keep_tokens: list[int],
        negative_ids: torch.LongTensor | None = None,
        negative_mask: torch.Tensor | None = None,
        attention_block: int | None = None,
    ):
        self.canvas, self.scale, self.negative = canvas, scale, negative_ids is not None
        mask, device = canvas.mask_token_id, canvas.tokens_RT.device
        if negative_ids is None:
            self.front_R1 = canvas.prompt_R1
            given_RT = canvas.valid_RT & ~canvas.generated_RT
            kept_RT = torch.isin(canvas.tokens_RT, torch.tensor(keep_tokens, dtype=torch.long, device=device))
            self.given_RU = canvas.tokens_RT.masked_fill(given_RT & ~kept_RT, mask)
        else:
            length_R1 = negative_mask.long().sum(-1, keepdim=True)
            self.front_R1 = length_R1
            if attention_block is not None:
                self.front_R1 = length_R1 + (canvas.prompt_R1 - length_R1) % attention_block
            width = int((self.front_R1 + canvas.length_R[:, None] - canvas.prompt_R1).max())
            # The real tokens end where the completion begins.
            packed_RP = negative_ids.gather(1, torch.argsort((~negative_mask).long(), dim=-1, stable=True))
            place_1U = torch.arange(width, device=device)[None]
            source_RU = place_1U - (self.front_R1 - length_R1)
            inside_RU = (source_RU >= 0) & (source_RU < length_R1)
            self.given_RU = torch.where(
                inside_RU, packed_RP.gather(1, source_RU.clamp(0, max(packed_RP.shape[1] - 1, 0))), mask
            )
        self.shift_R1 = canvas.prompt_R1 - self.front_R1

    def doubled(
        self, rows_B: torch.Tensor, tokens_BT: torch.LongTensor, valid_BT: torch.Tensor, scope_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The batch of a forward pass followed by its unconditional twin, both as wide as the wider one.

        Args and returns: `rows_B`, the rows of the canvas, then `(B, T)` tokens, what is real, and what to score.
        """
        canvas, width = self.canvas, tokens_BT.shape[1]
        place_1U = torch.arange(self.given_RU.shape[1], device=tokens_BT.device)[None]
        source_BU = (place_1U + self.shift_R1[rows_B]).clamp(0, width - 1)
        front_BU = place_1U < self.front_R1[rows_B]
        length_BU = place_1U < (canvas.length_R[:, None] - self.shift_R1)[rows_B]
        # Holes in the prompt are filled in both canvases; with a negative prompt there are none.
        written_BU = canvas.generated_RT[rows_B].gather(1, source_BU) & length_BU
        if self.negative:
            written_BU = ~front_BU & length_BU
        twin_BU = torch.where(written_BU, tokens_BT.gather(1, source_BU), self.given_RU[rows_B])
        scope_BU = scope_BT.gather(1, source_BU) & written_BU
        wide = max(width, twin_BU.shape[1])
        halves = (
            ((tokens_BT, twin_BU), canvas.mask_token_id),
            ((valid_BT, length_BU), False),
            ((scope_BT, scope_BU), False),
        )
        tokens, valid, scope = (
            torch.cat([torch.nn.functional.pad(half, (0, wide - half.shape[1]), value=fill) for half in pair], dim=0)
            for pair, fill in halves
        )
        return torch.cat([rows_B, rows_B + canvas.tokens_RT.shape[0]]), tokens, valid, scope

    def combined(self, logits_MV: torch.Tensor) -> torch.Tensor:
        """The guided scores `(N, V)`, up to a constant, of the 2 N rows of logits that the doubled batch gave."""
        with_NV, without_NV = (half.float().log_softmax(-1).clamp(min=_NEVER) for half in logits_MV.chunk(2))
        return without_NV + self.scale * (with_NV - without_NV)
