"""Verified self-speculation: diffusion drafts several tokens, the causal mode of the same checkpoint decides on them.

Owns the draft, the two rules of acceptance and the loop over both. What comes out is what the causal mode would have
written token by token, in fewer forwards: the same tokens at temperature 0, the same distribution above it.

Shapes: B rows, T positions of the canvas, K predictions of a row's causal pass (its draft and one token more), N those
of all rows, V vocabulary rows.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList
from transformers.utils import logging

from .attention_pattern import AttentionPattern
from .block_cache_a2d import BlockCache
from .candidate_tokens_a2d import CandidateTokens, draw_tokens
from .canvas_a2d import Canvas
from .generation_config_a2d import A2DGenerationConfig
from .selectors_a2d import draw_uniform, top_scores


if TYPE_CHECKING:
    from .generation_a2d import A2DGenerationMixin


logger = logging.get_logger(__name__)

# Draft length of a checkpoint that knows no blocks.
DRAFT_SIZE = 8
# How PEFT starts a LoRA with something that it takes out of the base.
_MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_IDLE = ("steps", "selector", "threshold", "entropy_bound", "remasking")


def check_speculation(config: A2DGenerationConfig, arguments: Mapping[str, Any]) -> None:
    """Refuses what verification makes meaningless, one sentence each."""
    idle = [f"`{name}`" for name in _IDLE if arguments.get(name) is not None]
    if idle:
        raise ValueError(
            f"{', '.join(idle)} would do nothing with `self_speculation`, which commits what the causal mode agrees "
            "with: leave it out."
        )
    if config.draft_steps > 1 and config.sampling_temperature > 0:
        raise ValueError(
            f"`draft_steps={config.draft_steps}` with a `temperature` above 0: the rule of acceptance needs to know "
            "the distribution of a draft, which only one forward gives; set `draft_steps=1`."
        )


@contextlib.contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """While entered, the adapters that peft put into `model` are off: the parent is there again."""
    layers = [layer for layer in _adapter_layers(model) if not layer.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _adapter_layers(model: torch.nn.Module) -> list[Any]:
    # A model cannot hold an adapter in a process that never imported peft, and this file travels without it.
    tuners, other = (sys.modules.get(name) for name in ("peft.tuners.tuners_utils", "peft.utils.other"))
    if tuners is None or other is None:
        return []
    kinds = (tuners.BaseTunerLayer, other.AuxiliaryTrainingWrapper)
    return [module for module in model.modules() if isinstance(module, kinds)]


def _moved_base(model: torch.nn.Module) -> str | None:
    """What in the configuration of an adapter changes the weights it stands on, and so survives switching it off."""
    configs = [config for module in model.modules() for config in vars(module).get("peft_config", {}).values()]
    for fields in (vars(config) for config in configs):
        for name, value in (("bias", fields.get("bias")), ("init_lora_weights", fields.get("init_lora_weights"))):
            moves = value not in (None, "none") if name == "bias" else str(value).lower().startswith(_MOVES_BASE)
            if moves:
                return f'{name}="{value}"'
    return None


class SelfSpeculation:
    """
    One decoding call that drafts and verifies.

    A forward drafts the rest of the active block; a causal pass over the draft says what the causal mode would have
    written at each of its positions and at the one behind; the row takes the longest prefix that stands, and the
    causal mode's own next token. A draft and its verification write at least one token.

    With a causal clean context draft and verification share one cache: what a causal pass keeps is what the next draft
    reads. Else the verifying pass has a cache of its own.

    Args:
        model ([`A2DForMaskedDiffusion`]): the model.
        config ([`A2DGenerationConfig`]): parameters of the call.
        canvas ([`Canvas`]): the rows; changed in place.
        cache ([`BlockCache`], *optional*): the exact cache of the block decoder, where there is one.
        pattern (`AttentionPattern`, *optional*), attention_block (`int`, *optional*): see `_prepare_blocks`.
        propose ([`CandidateTokens`]): processors and warpers of both, draft and verification.
        generator (`torch.Generator`, *optional*): source of randomness.
    """

    def __init__(
        self,
        model: "A2DGenerationMixin",
        config: A2DGenerationConfig,
        canvas: Canvas,
        cache: BlockCache | None,
        pattern: AttentionPattern | None,
        attention_block: int | None,
        propose: CandidateTokens,
        generator: torch.Generator | None,
    ):
        self.model, self.canvas, self.cache, self.propose = model, canvas, cache, propose
        self.pattern, self.attention_block, self.generator = pattern, attention_block, generator
        self.draft_steps, self.samples = config.draft_steps, config.sampling_temperature > 0
        self._check(config.self_speculation)
        self.verifies_parent = config.self_speculation == "parent"
        rows, length = canvas.tokens_RT.shape
        shares = not self.verifies_parent and pattern is not None and pattern.kind == "bd3lm"
        if config.use_cache is False or not model.can_cache(rows):
            self.verifier = None
        elif shares:
            self.verifier = cache
        else:
            self.verifier = BlockCache(rows, length, canvas.block_size, False, canvas.tokens_RT.device)

    def _check(self, kind: str) -> None:
        canvas, model = self.canvas, self.model
        if bool((canvas.generated_RT & ~canvas.completion_RT).any()):
            raise ValueError("`self_speculation` continues a text: leave it out to fill mask tokens in `input_ids`.")
        if not bool(canvas.prompt_R1.all()):
            raise ValueError("`self_speculation` needs a first token: pass a prompt, or set `bos_token_id`.")
        if kind == "parent" and not _adapter_layers(model):
            raise ValueError(
                'With no adapter on the model its parent is not there to verify: use `self_speculation="causal"`.'
            )
        if kind == "parent" and (reason := _moved_base(model)) is not None:
            raise ValueError(
                f"`{reason}` of the adapter has changed the weights under it, so with the adapter off the parent is "
                'not there to verify: use `self_speculation="causal"`.'
            )
        if kind == "causal" and model.config.clean_context != "causal":
            logger.warning_once(
                'This checkpoint was not trained to keep a causal mode (`clean_context="causal"`): its text under '
                '`self_speculation="causal"` is that of weights which may have forgotten how to read left to right.'
            )

    def run(self, criteria: StoppingCriteriaList, stream: Any, history: list[torch.LongTensor] | None) -> int:
        """Decodes until no row has an open mask; returns the number of forward passes."""
        canvas, num_forwards, columns_checked = self.canvas, 0, 0
        while bool(canvas.alive_R.any()):
            rows = canvas.alive_R.nonzero()[:, 0]
            scope_BT = canvas.scope()[rows]
            drafted_BT, draft_NV = self._draft(rows, scope_BT)
            stream.draft(drafted_BT)
            chosen_BT, tokens_BT, confidence_BT = self._verify(rows, scope_BT, drafted_BT, draft_NV)
            canvas.forwards_R[rows] += self.draft_steps  # `commit` counts the verifying one
            canvas.commit(rows, chosen_BT, tokens_BT, confidence_BT)
            num_forwards += self.draft_steps + 1
            while criteria and columns_checked < canvas.settled_columns():
                columns_checked += 1
                done = criteria(canvas.sequences()[:, : canvas.prompt_columns + columns_checked], None)
                canvas.cut(columns_checked, done)
            stream.advance()
            if history is not None:
                history.append(canvas.sequences())
        return num_forwards

    def _draft(self, rows_B: torch.LongTensor, scope_BT: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
        """
        The rest of each row's active block by diffusion: tokens of shape `(B, T)`, and scores of shape `(N, V)`, after
        the warpers where tokens were drawn from them.
        """
        tokens_BT, valid_BT = self.canvas.tokens_RT[rows_B], self.canvas.valid_RT[rows_B]
        begin_B, open_BT = self.canvas.begin_R1[rows_B][:, 0], scope_BT
        for left in range(self.draft_steps, 0, -1):
            # Committed draft tokens stay in the scope: every row has a place in every forward, done or not.
            if self.cache is None:
                logits_NV = self.model._logits_of(tokens_BT, valid_BT, scope_BT, self.pattern, self.attention_block)
            else:
                logits_NV = self.cache.logits_of(self.model, rows_B, tokens_BT, valid_BT, scope_BT, self.pattern)
            row_N, position_N = scope_BT.nonzero(as_tuple=True)
            scores_NV, drawn_N = self.propose(
                logits_NV, tokens_BT, row_N, position_N == begin_B[row_N], self.generator
            )
            proposed_BT = tokens_BT.masked_scatter(scope_BT, drawn_N)
            confidence_BT = torch.zeros(scope_BT.shape, dtype=scores_NV.dtype, device=scores_NV.device)
            confidence_BT[scope_BT] = scores_NV.gather(-1, drawn_N[:, None])[:, 0].exp()
            num_B = (open_BT.sum(-1) + left - 1) // left
            chosen_BT = top_scores(confidence_BT, open_BT, num_B)
            tokens_BT, open_BT = torch.where(chosen_BT, proposed_BT, tokens_BT), open_BT & ~chosen_BT
        return tokens_BT, self.propose.warpers(None, scores_NV) if self.samples else scores_NV

    def _verify(
        self, rows_B: torch.LongTensor, scope_BT: torch.Tensor, drafted_BT: torch.LongTensor, draft_NV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.LongTensor, torch.Tensor]:
        """What stands of a draft: chosen positions, their tokens and the causal mode's confidence, `(B, T)` each."""
        canvas, device = self.canvas, drafted_BT.device
        length_B, width = canvas.length_R[rows_B], drafted_BT.shape[1]
        size_B = scope_BT.sum(-1)
        first_B = scope_BT.long().argmax(-1)
        end_B = first_B + size_B
        offset_K = torch.arange(int(size_B.amax()) + 1, device=device)
        row_N, column_N = (offset_K <= size_B[:, None]).nonzero(as_tuple=True)
        position_N = first_B[row_N] + column_N

        logits_NV = self._causal_logits(rows_B, drafted_BT, first_B, end_B)
        rows_T, row_of_N = drafted_BT, row_N
        if self.propose.processors:
            # Each prediction is processed as if the row ended before it.
            behind_NT = torch.arange(width, device=device) >= position_N[:, None]
            rows_T = drafted_BT[row_N].masked_fill(behind_NT, self.propose.mask_token_id)
            row_of_N = torch.arange(row_N.shape[0], device=device)
        begins_N = position_N == canvas.begin_R1[rows_B][row_N, 0]
        scores_NV, token_N = self.propose(logits_NV, rows_T, row_of_N, begins_N, self.generator)

        # Which drafted tokens stand; the prediction behind the draft has none to compare with.
        drafted_N = drafted_BT.gather(1, (first_B[:, None] + offset_K).clamp(max=width - 1))[row_N, column_N]
        in_draft_N = column_N < size_B[row_N]
        if self.samples:
            stands_N, token_N = self._accept_by_chance(scores_NV, draft_NV, drafted_N, token_N, in_draft_N)
        else:
            stands_N = in_draft_N & (token_N == drafted_N)
        stands_BK = torch.zeros((rows_B.shape[0], offset_K.shape[0]), dtype=torch.bool, device=device)
        stands_BK[row_N, column_N] = stands_N
        accepted_B = stands_BK.long().cumprod(-1).sum(-1)
        if self.verifier is not None:
            self.verifier.accept(first_B + accepted_B)

        taken_N = (column_N <= accepted_B[row_N]) & (position_N < length_B[row_N])
        token_N = torch.where(stands_N, drafted_N, token_N)
        where = (row_N[taken_N], position_N[taken_N])
        chosen_BT = torch.zeros_like(scope_BT)
        chosen_BT[where] = True
        tokens_BT = canvas.tokens_RT[rows_B].clone()
        tokens_BT[where] = token_N[taken_N]
        confidence_BT = torch.full(scope_BT.shape, float("nan"), device=device)
        confidence_BT[where] = scores_NV.gather(-1, token_N[:, None])[taken_N, 0].exp()
        return chosen_BT, tokens_BT, confidence_BT

    def _accept_by_chance(
        self,
        scores_NV: torch.Tensor,
        draft_NV: torch.Tensor,
        drafted_N: torch.LongTensor,
        token_N: torch.LongTensor,
        in_draft_N: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """
        Speculative sampling (https://huggingface.co/papers/2211.17192, algorithm 1): a drafted token x stands with
        probability min(1, p(x) / q(x)), and what replaces it is drawn from max(p - q, 0); so the outcome is a draw
        from p. It needs the tokens of a draft to be independent draws from known q, which those of one forward are.

        Returns:
            Booleans, and the tokens to take where the draft falls, `(N,)` each.
        """
        # -inf - -inf is NaN: probabilities, not their logarithms.
        p_MV = self.propose.warpers(None, scores_NV)[in_draft_N].softmax(-1)
        q_MV, drafted_M1 = draft_NV.softmax(-1), drafted_N[in_draft_N, None]
        chance_M = draw_uniform((p_MV.shape[0],), p_MV.device, self.generator)
        stands_M = chance_M * q_MV.gather(-1, drafted_M1)[:, 0] < p_MV.gather(-1, drafted_M1)[:, 0]
        rest_MV = (p_MV - q_MV).clamp(min=0)
        # Equal distributions leave no rest, and then nothing falls but by rounding.
        rest_MV = torch.where(rest_MV.sum(-1, keepdim=True) > 0, rest_MV, p_MV)
        stands_N, token_N = torch.zeros_like(in_draft_N), token_N.clone()
        stands_N[in_draft_N] = stands_M
        token_N[in_draft_N] = draw_tokens(rest_MV.log(), self.generator)
        return stands_N, token_N

    def _causal_logits(
        self, rows_B: torch.LongTensor, drafted_BT: torch.LongTensor, first_B: torch.Tensor, end_B: torch.Tensor
    ) -> torch.Tensor:
        """The causal mode's predictions of positions first, ..., end of each row, `(N, V)`."""
        with adapters_off(self.model) if self.verifies_parent else contextlib.nullcontext():
            if self.verifier is not None:
                return self.verifier.causal_logits_of(self.model, rows_B, drafted_BT, first_B, end_B)
            width = int(end_B.amax())
            position_T = torch.arange(width, device=drafted_BT.device)
            real_BT = position_T < end_B[:, None]
            return self.model(
                input_ids=drafted_BT[:, :width],
                attention_mask=None if bool(real_BT.all()) else real_BT.long(),
                attention_pattern=AttentionPattern.causal(),
                logits_mask=real_BT & (position_T >= first_B[:, None] - 1),
            ).logits
