"""`A2DGenerationMixin`: the decoding loop of a converted model.

Owns the order of things: canvas, forward, candidate tokens, selector, commit, stop; and the checks of a call's
arguments. The parts live in canvas_a2d.py, candidate_tokens_a2d.py and selectors_a2d.py.

Shapes: R rows of the call, B rows that are not finished, P prompt columns, T positions of the canvas, N positions
scored in one forward, V vocabulary rows.
"""

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .approximate_cache_a2d import ApproximateCache
from .attention_pattern import AttentionPattern
from .block_cache_a2d import BlockCache
from .block_schedule_a2d import BlockSchedule
from .candidate_tokens_a2d import CandidateTokens
from .canvas_a2d import A2DGenerationOutput, Canvas
from .decoding_call_a2d import (
    check_idle_parameters,
    check_masks,
    count_new_tokens,
    decoding_parameters,
    mask_token_of,
    pad_token_of,
    read_negative_prompts,
    read_prompts,
)
from .generation_config_a2d import A2DGenerationConfig, set_fields
from .guidance_a2d import Guidance
from .pipelined_a2d import PipelinedBlocks
from .remdm_a2d import ReMDM, ReMDMRates
from .selectors_a2d import Candidates, make_selector
from .self_speculation_a2d import DRAFT_SIZE, SelfSpeculation, check_speculation
from .static_cache_a2d import StaticBlockCache, check_static_cache
from .stream_a2d import CanvasStream


logger = logging.get_logger(__name__)


class A2DGenerationMixin:
    """Gives [`A2DForMaskedDiffusion`] its `diffusion_generate`, and routes `generate` to it."""

    generation_config_class = A2DGenerationConfig
    output_modalities = ("text",)
    # What a model says of its parent: whether finished blocks may come from a cache, and rows stand at any position.
    _caches_blocks = False
    _accepts_position_ids = True

    def generate(
        self, inputs: torch.LongTensor | None = None, generation_config: GenerationConfig | None = None, **kwargs
    ) -> torch.LongTensor | A2DGenerationOutput:
        """[`~A2DGenerationMixin.diffusion_generate`] under the name that pipelines, trainers and PEFT call."""
        return self.diffusion_generate(inputs, generation_config, **kwargs)

    @torch.no_grad()
    def diffusion_generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        attention_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        negative_prompt_ids: torch.LongTensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor | A2DGenerationOutput:
        r"""
        Generates text, or fills the masks of a text, by masked diffusion.

        ```
        0. Read the arguments.
        1. Paint the canvas: each row's prompt, then `max_new_tokens` masks.
        2. Until no row has an open mask:
            a. Leave finished rows out, and take the masks of each row's active block: the first block with a mask.
               (With `pipeline_depth`, of several.)
            b. Forward: logits of those positions only; with guidance, those without the prompt beside them.
            c. Logits processors, then a candidate token for each position.
            d. The selector chooses which candidates to commit, row by row, at least one in each.
            e. Commit them; with remasking, put masks back on the rest of the block.
            f. Stop: a row ends at its first EOS, or where a stopping criterion says; what follows is dropped.
        3. Return the prompts with their completions.
        ```

        Mask tokens in the prompt are filled too. `max_new_tokens=0` fills them and appends nothing: infilling, several
        spans at once and anywhere in the text. (In a BD3LM checkpoint a mask sees its own block and those before it.)

        A row of a batch gets the tokens it would get alone, whatever the other rows and whatever the padding. At a
        temperature above 0 that holds for the distribution, not for one seed.

        Args:
            inputs (`torch.LongTensor` of shape `(B, P)`, *optional*):
                Prompts; also accepted as `input_ids`. `None` starts from the BOS token, and so does a row without a
                single token where the generation config has a BOS.
            generation_config ([`A2DGenerationConfig`], *optional*):
                Parameters of the call, over those of the model. A plain [`~transformers.GenerationConfig`] will do.
            logits_processor (`LogitsProcessorList`, *optional*):
                Applied before those that the parameters ask for, to one row of scores per masked position.
            stopping_criteria (`StoppingCriteriaList`, *optional*):
                Called as in autoregressive generation: on all rows, for each further column of the completions, once
                no row will change it any more.
            streamer (`BaseStreamer`, *optional*):
                Gets the prompt, then each finished block, and the draft of the block after each forward if it has a
                `put_draft` as [`~transformers.TextDiffusionStreamer`] does. One row only.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 1 for tokens, 0 for padding, on any side.
            generator (`torch.Generator`, *optional*): source of randomness; `seed` makes one for the call.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for `stop_strings` only.
            negative_prompt_ids (`torch.LongTensor` of shape `(B, N)` or `(1, N)`, *optional*):
                What to move away from, with `guidance_scale` above 1; stands in the prompt's place.
            negative_prompt_attention_mask (`torch.Tensor`, *optional*): 1 for its tokens, 0 for padding.
            kwargs: any field of [`A2DGenerationConfig`].

        Returns:
            `torch.LongTensor` of shape `(R, P + new)`, R = B * `num_return_sequences`: prompts and completions; or
            [`A2DGenerationOutput`] with `return_dict_in_generate=True`.

        Example:

        ```python
        >>> inputs = tokenizer(["Once upon a time"], return_tensors="pt")
        >>> ids = model.diffusion_generate(**inputs, max_new_tokens=64, steps=32)
        >>> print(tokenizer.batch_decode(ids, skip_special_tokens=True)[0])
        ```
        """
        # 0. Read the arguments.
        arguments = decoding_parameters(kwargs)
        config, by_caller = A2DGenerationConfig.combine(self.generation_config, generation_config, arguments)
        check_idle_parameters(config, arguments)
        mask_token_id = mask_token_of(config, self.config)
        input_ids, attention_mask = read_prompts(
            inputs, kwargs.get("input_ids"), attention_mask, config, self.config, self.device
        )
        max_new_tokens = count_new_tokens(config, by_caller, input_ids, attention_mask, self.config)
        check_masks(input_ids, attention_mask, mask_token_id, max_new_tokens, self.config)
        block_size, pattern, attention_block = self._prepare_blocks(config)
        if config.self_speculation is not None:
            check_speculation(config, arguments)
            block_size = block_size or DRAFT_SIZE
        if generator is None and config.seed is not None:
            generator = torch.Generator(device=input_ids.device).manual_seed(config.seed)
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if config.stop_strings is not None:
            if tokenizer is None:
                raise ValueError("`stop_strings` needs the tokenizer: pass `tokenizer=`.")
            criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        propose = CandidateTokens(config, mask_token_id, logits_processor or LogitsProcessorList())
        select = make_selector(config.selector, threshold=config.threshold, entropy_bound=config.entropy_bound)

        guided = config.guidance_scale is not None and config.guidance_scale != 1
        negative = read_negative_prompts(
            negative_prompt_ids, negative_prompt_attention_mask, input_ids, max_new_tokens, mask_token_id, config,
            self.config,
        )  # fmt: skip

        # 1. Paint the canvas.
        repeats = config.num_return_sequences
        canvas = Canvas(
            input_ids.repeat_interleave(repeats, dim=0),
            attention_mask.repeat_interleave(repeats, dim=0),
            max_new_tokens,
            block_size,
            config.steps,
            mask_token_id=mask_token_id,
            eos_token_ids=config.eos_token_ids,
            pad_token_id=pad_token_of(config, bool(criteria)),
            remasking=config.remasking is not None,
            more_steps=config.remasking not in (None, "p2"),
            passes=2 if guided else 1,
        )
        schedule = self._block_schedule(config, canvas, generator)
        guidance = None
        if guided:
            twins = [None if part is None else part.repeat_interleave(repeats, dim=0) for part in negative]
            keep_tokens = config.guidance_keep_tokens or []
            guidance = Guidance(canvas, config.guidance_scale, keep_tokens, *twins, attention_block=attention_block)
        approximate = None if config.approximate_cache is None else ApproximateCache(self, config, canvas)
        cache = approximate or self._block_cache(config, canvas, attention_block)
        stream = CanvasStream(streamer, canvas)
        history = [canvas.sequences()] if config.output_history else None
        num_forwards, columns_checked = 0, 0
        if config.self_speculation is not None:  # leaves no row alive
            parts = (self, config, canvas, cache, pattern, attention_block, propose, generator)
            num_forwards = SelfSpeculation(*parts).run(criteria, stream, history)

        # 2. Until no row has an open mask:
        while bool(canvas.alive_R.any()):
            # 2.a. Leave finished rows out, and take the masks of each row's active block.
            rows = canvas.alive_R.nonzero()[:, 0]
            scope_BT, tokens_BT = schedule.scope()[rows], canvas.tokens_RT[rows]

            # 2.b. Forward: logits of those positions only.
            asked = (rows, tokens_BT, canvas.valid_RT[rows], scope_BT)
            if guidance is not None:
                asked = guidance.doubled(*asked)
            if cache is None:
                logits_NV = self._logits_of(*asked[1:], pattern, attention_block)
            else:
                logits_NV = cache.logits_of(self, *asked, pattern)
            if guidance is not None:
                logits_NV = guidance.combined(logits_NV)
            num_forwards += canvas.passes

            # 2.c. Logits processors, then a candidate token for each position.
            row_N, position_N = scope_BT.nonzero(as_tuple=True)
            begins_N = position_N == canvas.begin_R1[rows][row_N, 0]
            log_probs_NV, drawn_N = propose(logits_NV, tokens_BT, row_N, begins_N, generator)
            # A committed token that remasking looks at again keeps its own identity.
            proposed_BT = tokens_BT.masked_scatter(scope_BT, drawn_N)
            proposed_BT = torch.where(canvas.masked_RT[rows], proposed_BT, tokens_BT)

            # 2.d. The selector chooses which candidates to commit.
            num_commits_B = torch.minimum(schedule.num_commits()[rows], scope_BT.sum(-1))
            candidates = Candidates(scope_BT, proposed_BT, log_probs_NV, num_commits_B, generator)
            chosen_BT = schedule.choose(select, candidates, rows)

            # 2.e. Commit them; with remasking, put masks back on the rest of the block.
            stream.draft(proposed_BT)
            again_BT = schedule.put_back(candidates, chosen_BT, rows)
            canvas.commit(rows, chosen_BT, proposed_BT, candidates.confidence_BL, again_BT)
            schedule.advance()

            # 2.f. Stop.
            while criteria and columns_checked < canvas.settled_columns():
                columns_checked += 1
                done = criteria(canvas.sequences()[:, : canvas.prompt_columns + columns_checked], None)
                canvas.cut(columns_checked, done)
            stream.advance()
            if history is not None:
                history.append(canvas.sequences())

        # 3. Return the prompts with their completions.
        stream.end()
        output = canvas.output(num_forwards, history)
        if approximate is not None:
            output.num_forwards += approximate.extra_forwards
            output.cache_deviation = approximate.deviation()
        return output if config.return_dict_in_generate else output.sequences

    # -------------------------------------------------------------------------------------------------- the forward

    def _logits_of(
        self,
        tokens_BT: torch.LongTensor,
        valid_BT: torch.Tensor,
        scope_BT: torch.Tensor,
        pattern: AttentionPattern | None,
        attention_block: int | None,
    ) -> torch.Tensor:
        """
        The logits of the positions in `scope_BT`, `(N, V)` in row-major order, from a pass over the whole rows.

        What no scored position can see is left off: padding that only finished rows needed and, under a block-causal
        pattern, the blocks behind the last active one.

        Args:
            tokens_BT (`torch.LongTensor` of shape `(B, T)`): the rows, packed to the left.
            valid_BT (`torch.BoolTensor` of shape `(B, T)`): False at padding.
            scope_BT (`torch.BoolTensor` of shape `(B, T)`): the positions to score.
            pattern (`AttentionPattern`, *optional*): the attention pattern; `None` is the model's own.
            attention_block (`int`, *optional*): block size of a block-causal attention; `None` where it is open.
        """
        end = int(valid_BT.sum(-1).amax())
        if attention_block is not None:
            last = int(scope_BT.any(0).nonzero().amax())
            end = min(end, (last // attention_block + 1) * attention_block)
        ids, valid, scope = tokens_BT[:, :end], valid_BT[:, :end], scope_BT[:, :end]
        if pattern is not None and pattern.kind == "bd3lm":
            # Finished text attends causally, an active block openly: as in training, the clean copy beside the noisy.
            ids, valid = torch.cat([ids, ids], dim=-1), torch.cat([valid, valid], dim=-1)
            scope = torch.cat([scope, torch.zeros_like(scope)], dim=-1)
        outputs = self(
            input_ids=ids,
            attention_mask=None if bool(valid.all()) else valid.long(),
            attention_pattern=pattern,
            logits_mask=scope,
        )
        return outputs.logits

    # ------------------------------------------------------------------------------------------------------- blocks

    def _prepare_blocks(self, config: A2DGenerationConfig) -> tuple[int | None, AttentionPattern | None, int | None]:
        """
        The decoder's block size (`None`: the whole canvas), the attention pattern (`None`: the model's own) and the
        block size of the attention (`None`: attention is open).
        """
        trained = self.config.block_size
        block_size = trained if config.block_size is None else config.block_size
        if self.config.objective != "bd3lm":
            return block_size, None, None
        attention_block = trained
        if trained % block_size:
            # A divisor splits a block without touching its attention; nothing else fits the grid it was trained on.
            logger.warning_once(
                f"This checkpoint was trained with blocks of {trained} tokens and is decoded with `block_size="
                f"{block_size}`, which changes its attention and costs quality; a divisor of {trained} does not."
            )
            attention_block = block_size
        if self.config.clean_context == "causal":
            return block_size, AttentionPattern.bd3lm(attention_block, clean_context="causal"), attention_block
        changed = attention_block != trained
        return block_size, AttentionPattern.block_causal(attention_block) if changed else None, attention_block

    def _block_schedule(
        self, config: A2DGenerationConfig, canvas: Canvas, generator: torch.Generator | None
    ) -> BlockSchedule:
        """Which positions each forward pass of a call is about."""
        if canvas.remasking and config.remasking != "p2":
            rates = ReMDMRates(config.remasking, config.remasking_eta, config.remasking_loop)
            return ReMDM(canvas, rates, generator)
        if config.pipeline_depth > 1:
            thresholds = config.block_add_threshold, config.decoded_token_threshold
            return PipelinedBlocks(canvas, config.pipeline_depth, *thresholds)
        return BlockSchedule(canvas)

    def _block_cache(
        self,
        config: A2DGenerationConfig,
        canvas: Canvas,
        attention_block: int | None,
    ) -> BlockCache | None:
        """The cache of a call, or `None` where it would not be exact: the text never depends on it."""
        rows, length = canvas.tokens_RT.shape
        rows *= canvas.passes
        if config.use_cache is False:
            return None
        is_exact = attention_block is not None and self.can_cache(rows)
        if config.pipeline_depth > 1 and self.config.clean_context == "causal":
            is_exact = False  # a later block reads the open one causally here, and a cached pass would read it openly
        if config.cache_implementation == "static":
            check_static_cache(self, is_exact)
            return StaticBlockCache(self, config, canvas, attention_block)
        if not is_exact:
            return None
        return BlockCache(rows, length, attention_block, self.config.token_shift, canvas.tokens_RT.device)

    def can_cache(self, rows: int) -> bool:
        """Whether what a row computes can be read from a cache, `rows` of them at different positions."""
        if not self._caches_blocks:
            return False
        if rows > 1 and not self._accepts_position_ids:
            return False  # rows would have to stand in the same block all the time
        return not (self.training and self.is_gradient_checkpointing)  # transformers takes the cache away then

    # ------------------------------------------------------------------------------------- what the ecosystem expects

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs: Any) -> dict[str, Any]:
        """Inputs of one forward pass. The decoder does not need it; PEFT stores and restores it around `generate`."""
        return {"input_ids": input_ids, **kwargs}

    def adjust_generation_fn(
        self,
        generation_config: GenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: str | None,
        cache_dir=None,
        force_download=False,
        proxies=None,
        local_files_only=False,
        token=None,
        revision=None,
        subfolder="",
        trust_remote_code=None,
        **kwargs,
    ) -> None:
        """Called by `from_pretrained`: loads `generation_config.json`, where there is one."""
        if generation_config is not None:
            self.generation_config = A2DGenerationConfig(**set_fields(generation_config))
            return
        if pretrained_model_name_or_path is None:
            return
        try:
            self.generation_config = A2DGenerationConfig.from_pretrained(
                pretrained_model_name_or_path,
                _from_auto=from_auto_class,
                _from_pipeline=from_pipeline,
                cache_dir=cache_dir,
                force_download=force_download,
                proxies=proxies,
                local_files_only=local_files_only,
                token=token,
                revision=revision,
                subfolder=subfolder,
            )
        except OSError:
            logger.info("No generation_config.json: decoding defaults come from the model's config.")
