"""Which token each masked position would get: from raw logits to log-probabilities and a drawn token.

Owns the logits processors of the decoder and the draw. Knows nothing of positions, blocks or selectors.

Shapes: B rows of L tokens, N scored positions in them, V vocabulary rows.
"""

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .generation_config_a2d import A2DGenerationConfig


# Numbers drawn at a time, in fp64: 32 MiB.
_DRAWS = 2**22


class CandidateTokens:
    """
    Turns the logits of masked positions into log-probabilities and candidate tokens.

    Args:
        config ([`A2DGenerationConfig`]): the decoding parameters.
        mask_token_id (`int`): never a candidate.
        processors (`LogitsProcessorList`): the caller's own, applied first. They get one row of `input_ids` and of
            `scores` for each masked position; in `input_ids` the positions still open, and padding, hold the mask
            token.
    """

    def __init__(self, config: A2DGenerationConfig, mask_token_id: int, processors: LogitsProcessorList):
        self.mask_token_id = mask_token_id
        self.begin_suppress_tokens = list(config.begin_suppress_tokens or [])
        self.temperature = config.sampling_temperature

        self.processors = LogitsProcessorList(processors)
        if config.repetition_penalty is not None and config.repetition_penalty != 1.0:
            self.processors.append(RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)))
        if config.suppress_tokens:
            self.processors.append(SuppressTokensLogitsProcessor(config.suppress_tokens))

        self.warpers = LogitsProcessorList()
        if self.temperature > 0:
            if self.temperature != 1.0:
                self.warpers.append(TemperatureLogitsWarper(self.temperature))
            if config.top_k:
                self.warpers.append(TopKLogitsWarper(config.top_k))
            if config.top_p is not None and config.top_p < 1.0:
                self.warpers.append(TopPLogitsWarper(config.top_p))
            if config.min_p:
                self.warpers.append(MinPLogitsWarper(config.min_p))

    def __call__(
        self,
        logits_NV: torch.Tensor,
        rows_BL: torch.Tensor,
        row_N: torch.Tensor,
        begins_N: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            logits_NV (`torch.Tensor` of shape `(N, V)`): the model's logits.
            rows_BL (`torch.LongTensor` of shape `(B, L)`): the rows that the positions stand in.
            row_N (`torch.LongTensor` of shape `(N,)`): which of them each position stands in.
            begins_N (`torch.BoolTensor` of shape `(N,)`): whether the position begins its row's completion.
            generator (`torch.Generator`, *optional*): where to draw from.

        Returns:
            Log-probabilities of shape `(N, V)`, fp32, before the warpers; and tokens of shape `(N,)`: the likeliest at
            temperature 0, else drawn after the warpers.
        """
        # Before the caller's processors, so that no share of a top-p goes to the mask token; and after them, so that
        # no processor brings it back.
        scores_NV = self._without_mask_token(logits_NV.float())
        if self.processors:
            scores_NV = self._without_mask_token(self.processors(rows_BL[row_N], scores_NV))
        if self.begin_suppress_tokens:
            vocabulary_V = torch.arange(scores_NV.shape[-1], device=scores_NV.device)
            banned_V = torch.isin(vocabulary_V, vocabulary_V.new_tensor(self.begin_suppress_tokens))
            scores_NV = scores_NV.masked_fill(begins_N[:, None] & banned_V, float("-inf"))
        best_N, tokens_N = scores_NV.max(dim=-1)
        if bool(best_N.isneginf().any()):
            raise ValueError(
                "No token is left for a masked position: `suppress_tokens`, `begin_suppress_tokens` and the "
                "`logits_processor` together forbid the whole vocabulary."
            )
        if bool(best_N.isnan().any()):
            raise ValueError("The model returned NaN logits; check its weights and dtype.")
        if self.temperature > 0:
            tokens_N = draw_tokens(self.warpers(None, scores_NV), generator)  # they look at scores only
        return scores_NV.log_softmax(dim=-1), tokens_N

    def _without_mask_token(self, scores_NV: torch.Tensor) -> torch.Tensor:
        return scores_NV.index_fill(-1, torch.tensor([self.mask_token_id], device=scores_NV.device), float("-inf"))


def draw_tokens(scores_NV: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """
    Draws one token per row from softmax(scores), by the Gumbel-max trick in fp64.

    In fp32 the largest Gumbel numbers are cut off, which sharpens the distribution as if the temperature were lower
    (https://huggingface.co/papers/2409.02908); masked diffusion draws every position of every step, so it shows.

    Args:
        scores_NV (`torch.Tensor` of shape `(N, V)`): log-probabilities up to a constant; -inf is never drawn.
        generator (`torch.Generator`, *optional*): where to draw from; torch's global state by default.

    Returns:
        `torch.LongTensor` of shape `(N,)`.
    """
    where = scores_NV.device if generator is None else generator.device
    tokens = []
    for chunk in scores_NV.split(max(1, _DRAWS // scores_NV.shape[-1])):
        exponential = torch.empty(chunk.shape, dtype=torch.float64, device=where).exponential_(generator=generator)
        tokens.append((chunk.double() - exponential.to(chunk.device).log()).argmax(dim=-1))
    return torch.cat(tokens)
