"""`A2DForMaskedDiffusion`: an unchanged autoregressive model that answers as a diffusion model.

Owns the composition (a parent built from its own config), the forward pass under an attention pattern, and how such a
checkpoint is read and written. No per-family code: the pattern reaches the parent through attention_interface.py.

Shapes: B rows, L tokens, V vocabulary rows, D hidden size, N rows of logits that somebody asked for.
"""

import contextlib
import dataclasses
import inspect
import os
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from .alibi_distance import measure_by_distance
from .attention_interface import PatternInForce, install, keep_pattern, pattern_in_force
from .attention_pattern import AttentionPattern
from .causal_buffers import open_causal_buffers
from .checkpoint_writing import CheckpointWriting
from .configuration_a2d import A2DConfig
from .generation_a2d import A2DGenerationMixin
from .generation_config_a2d import A2DGenerationConfig
from .last_layer import LastLayer, shows_layers
from .mask_token import MaskToken, add_mask_token, choose_mask_token, prepare_mask_rows
from .modeling_outputs_a2d import A2DOutput
from .output_head import HeadRows, OutputHead, head_rows
from .parent_models import build_parent, cache_forgets, caches_blocks, check_causal_lm, check_text_only, has_recurrence
from .token_layout import TokenLayout, rows_through_head


# What `from_pretrained` passes on to the parent's tokenizer and configuration.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class A2DForMaskedDiffusion(CheckpointWriting, PreTrainedModel, A2DGenerationMixin):
    """
    A masked diffusion language model made of an autoregressive one.

    `backbone` is the parent, unchanged. `logits[:, i]` scores the token at position i, whatever the parent's own
    convention; the one exception is `attention_pattern="causal"`, which returns the parent's raw next-token logits.

    Args:
        config ([`A2DConfig`]): the configuration.
        backbone (`PreTrainedModel`, *optional*): a parent that exists already; wrapped without copying.
    """

    config_class = A2DConfig
    # Said here, because PreTrainedModel's own answer would come before the mixin's.
    generation_config_class = A2DGenerationConfig
    # Not "backbone": the checkpoints of some parents (Mamba, Nemotron-H) use that very prefix in their own names.
    base_model_prefix = "parent"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss divides by `num_items_in_batch` itself.
    accepts_loss_kwargs = True

    def __init__(self, config: A2DConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        install()
        if backbone is None:
            backbone = build_parent(config.text_config)
        self.parent = backbone
        self.causal_buffers = open_causal_buffers(backbone)
        self.alibi_layers = measure_by_distance(backbone)
        # One object for both, so that resizing or another attention implementation is seen by both.
        config.text_config = backbone.config
        config.text_config.architectures = [type(backbone).__name__]
        config._attn_implementation_internal = backbone.config._attn_implementation
        prefix = self.base_model_prefix
        tied = backbone.all_tied_weights_keys or {}
        self._tied_weights_keys = {f"{prefix}.{target}": f"{prefix}.{source}" for target, source in tied.items()}
        self._accepts_position_ids = "position_ids" in inspect.signature(backbone.forward).parameters
        self._has_recurrence = has_recurrence(backbone.config)
        self._caches_blocks = caches_blocks(backbone)
        # Models of the old kind call a kernel of their own, which reads "no mask" as "causal".
        self._none_means_open = bool(type(backbone)._supports_attention_backend)
        self.output_head = OutputHead(backbone)
        self.last_layer = LastLayer(backbone)
        self.mask_token: MaskToken | None = None
        self.post_init()

    @property
    def backbone(self) -> PreTrainedModel:
        """The parent, unchanged."""
        return self.parent

    # ------------------------------------------------------------------------------------------------ construction
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args,
        config: PreTrainedConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        mask_token_id: int | None = None,
        objective: str | None = None,
        block_size: int | None = None,
        token_shift: bool | None = None,
        clean_context: str | None = None,
        sliding_window: str | None = None,
        allow_hybrid: bool = False,
        **kwargs,
    ) -> "A2DForMaskedDiffusion":
        """
        Loads a converted checkpoint, or converts an autoregressive one in memory.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or Hub id, converted or autoregressive.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): the parent's tokenizer; gets its mask token. Loaded from
                the same place by default. Only read for an autoregressive checkpoint.
            mask_token_id (`int`, *optional*): an id that no text uses, instead of the policy of `mask_token.py`.
            objective, block_size, token_shift, clean_context, sliding_window: fields of [`A2DConfig`]; for a converted
                checkpoint they override what it was saved with.
            allow_hybrid (`bool`, *optional*, defaults to `False`): convert though recurrent layers stay causal.
            kwargs: passed to [`~transformers.PreTrainedModel.from_pretrained`].

        Returns:
            [`A2DForMaskedDiffusion`]
        """
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        given = (objective, block_size, token_shift, clean_context, sliding_window)
        names = ("objective", "block_size", "token_shift", "clean_context", "sliding_window")
        fields = {name: value for name, value in zip(names, given, strict=True) if value is not None}
        if config is None:
            config = AutoConfig.from_pretrained(
                pretrained_model_name_or_path, trust_remote_code=kwargs.get("trust_remote_code", False), **hub
            )
        if config.model_type == A2DConfig.model_type:
            if mask_token_id is not None:
                fields["mask_token_id"] = mask_token_id
            if fields:
                config = cls.config_class.from_dict({**config.to_dict(), **fields})
            kwargs.pop("trust_remote_code", None)
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        check_text_only(config, str(pretrained_model_name_or_path))
        check_causal_lm(config, allow_hybrid)
        if tokenizer is None and mask_token_id is None:
            tokenizer = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, trust_remote_code=kwargs.get("trust_remote_code", False), **hub
            )
        kwargs.pop("trust_remote_code", None)
        model = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=cls.config_class(text_config=config, **fields), **kwargs
        )
        model._adopt_mask_token(tokenizer, mask_token_id)
        return model

    @classmethod
    def from_causal_lm(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        mask_token_id: int | None = None,
        allow_hybrid: bool = False,
        **fields: Any,
    ) -> "A2DForMaskedDiffusion":
        """
        Wraps a model object in memory, without copying: training the result trains the same weights.

        Args:
            model (`PreTrainedModel`): a causal language model.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer; gets its mask token.
            mask_token_id (`int`, *optional*): an id that no text uses; needed where no tokenizer is given.
            allow_hybrid (`bool`, *optional*, defaults to `False`): convert though recurrent layers stay causal.
            fields: `objective`, `block_size`, `token_shift`, `clean_context`, `sliding_window` of [`A2DConfig`].

        Returns:
            [`A2DForMaskedDiffusion`]
        """
        model.config.architectures = [type(model).__name__]
        check_causal_lm(model.config, allow_hybrid)
        wrapped = cls(cls.config_class(text_config=model.config, **fields), backbone=model)
        wrapped.train(model.training)
        wrapped.name_or_path = model.name_or_path
        if model.generation_config is not None:
            wrapped.generation_config = A2DGenerationConfig.from_dict(model.generation_config.to_dict())
        if hasattr(model, "hf_quantizer"):
            wrapped.hf_quantizer = model.hf_quantizer
            wrapped.is_quantized = model.is_quantized
        wrapped._adopt_mask_token(tokenizer, mask_token_id)
        return wrapped

    def _adopt_mask_token(self, tokenizer: PreTrainedTokenizerBase | None, mask_token_id: int | None) -> None:
        rows = self.get_input_embeddings().weight.shape[0]
        if mask_token_id is not None:
            if not 0 <= mask_token_id < rows:
                raise ValueError(f"`mask_token_id` {mask_token_id} is outside the vocabulary of {rows} rows.")
            choice = MaskToken(mask_token_id, "", "given", rows, rows, trained_rows=rows)
        elif tokenizer is not None:
            choice = choose_mask_token(tokenizer, rows)
            add_mask_token(tokenizer, choice)
        else:
            raise ValueError("Pass the parent's `tokenizer`, or a `mask_token_id` that no text uses.")
        self.mask_token = prepare_mask_rows(self, choice)
        self.config.mask_token_id = choice.id
        if choice.rows_after != choice.rows_before:
            self.config.parent_vocab_size = choice.rows_before

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for the answer in this file; it is in the parent's, which checks for itself

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    # -------------------------------------------------------------------------------------------------- embeddings
    def get_input_embeddings(self) -> torch.nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: torch.nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    def _init_weights(self, module: torch.nn.Module) -> None:
        # The parent knows how its own modules start.
        self.backbone._init_weights(module)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=None, **kwargs) -> None:
        function = gradient_checkpointing_func or torch.utils.checkpoint.checkpoint
        super()._set_gradient_checkpointing(enable, keep_pattern(function), **kwargs)

    # ----------------------------------------------------------------------------------------------------- forward
    def resolve_pattern(self, attention_pattern: AttentionPattern | str | None) -> AttentionPattern:
        """Turns what a caller passed as `attention_pattern` into an [`AttentionPattern`]."""
        if isinstance(attention_pattern, AttentionPattern):
            return attention_pattern
        default = "bidirectional" if self.config.objective == "mdlm" else "block_causal"
        return AttentionPattern.named(attention_pattern or default, self.config.block_size)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        attention_pattern: AttentionPattern | str | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.FloatTensor | None = None,
        logits_mask: torch.BoolTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> A2DOutput | tuple:
        """
        One pass of the parent under an attention pattern.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): token ids. For the `bd3lm` pattern L is the doubled
                length `[x_t ; x_0]`.
            attention_mask (`torch.Tensor` of shape `(B, L)` or `(B, K)` with a cache, *optional*): 1 for tokens, 0 for
                padding, on any side.
            position_ids (`torch.LongTensor` of shape `(B, L)`, or `(B, K)` with a cache, *optional*): logical
                positions. By default they count the tokens of each row, document and copy from 0, so that padding
                moves nothing.
            document_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): for packed rows: which document each token
                belongs to. Documents never see each other.
            attention_pattern ([`AttentionPattern`] or `str`, *optional*): `"bidirectional"`, `"causal"`,
                `"block_causal"` or a pattern. Default: bidirectional for MDLM, block-causal for BD3LM.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): target ids, -100 where there is none. Only
                labelled positions go through the head.
            loss_weights (`torch.FloatTensor` of shape `(B, L)`, *optional*): with `labels`: the loss is the weighted
                SUM of cross-entropies.
            logits_mask (`torch.BoolTensor` of shape `(B, L)`, *optional*): only these positions go through the head;
                `logits` are then `(N, V)` in row-major order.
            num_items_in_batch (`int`, *optional*): with `labels` and no `loss_weights`: what the summed cross-entropy
                is divided by, instead of the number of labels.
            kwargs: passed on to the parent.

        Returns:
            [`A2DOutput`]
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if labels is not None and logits_mask is not None:
            raise ValueError("Pass `labels` or `logits_mask`, not both.")
        tokens = input_ids if input_ids is not None else inputs_embeds
        shape, device = tokens.shape[:2], tokens.device
        pattern = self.resolve_pattern(attention_pattern)

        # 1. Where every token stands: logical positions, padding, documents, copies.
        layout = TokenLayout.of(pattern, shape, device, attention_mask, position_ids, document_ids, past_key_values)

        if self._has_recurrence and (layout.copy_K is not None or layout.document_BK is not None):
            raise ValueError(
                f"{type(self.backbone).__name__} has recurrent layers, which read packed documents and the doubled "
                'sequence of block diffusion as one text: train it with `objective="mdlm"`, one document per row.'
            )

        # 2. Which hidden state scores which position, and which of them are wanted.
        wanted_BL = labels != -100 if labels is not None else logits_mask
        shifted = self.config.token_shift and not pattern.is_causal
        source_BL = layout.shifted_source(pattern) if shifted else None
        rows_N, blind = rows_through_head(wanted_BL, source_BL, shape, device)

        # 3. The parent, with the pattern in force.
        state = self._pattern_in_force(pattern, layout)
        keeps_all = use_cache or past_key_values is not None
        keeps_all = keeps_all or shows_layers(self.config.text_config, output_hidden_states, kwargs)
        if state is not None and labels is not None and not keeps_all:
            rows_read = self.last_layer.rows_read(rows_N, tokens, self._open_attention)
            state = dataclasses.replace(state, rows_read=rows_read)
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        if layout.moves_positions:
            if not (self._accepts_position_ids or self.alibi_layers):
                raise ValueError(
                    f"{type(self.backbone).__name__} takes no `position_ids`, so it cannot serve padding on the left, "
                    "packed documents or the doubled sequence of block diffusion."
                )
            if self._accepts_position_ids:
                inputs["position_ids"] = layout.position_BL
        if output_hidden_states is not None:
            inputs["output_hidden_states"] = output_hidden_states
        if use_cache and past_key_values is None and state is not None and cache_forgets(self.backbone.config):
            # The parent's own choice drops what has left a causal window, but an opened layer still looks there.
            past_key_values = DynamicCache()
        if past_key_values is not None:
            inputs["past_key_values"] = past_key_values
        head = self.get_output_embeddings()
        in_chunks = labels is not None and self.output_head.runs_in_chunks(head, tokens)
        wanted = None if rows_N is None else HeadRows(rows_N, catch=in_chunks)
        with pattern_in_force(state), head_rows(head, wanted, self.get_input_embeddings()):
            outputs = self.backbone(
                **inputs,
                # Given even where it is all ones: without it transformers guesses packing from the positions.
                attention_mask=layout.library_mask(attention_mask, needed=state is not None),
                use_cache=bool(use_cache),
                return_dict=True,
                **kwargs,
            )

        # 4. Scores of the wanted positions, or the loss over the labelled ones.
        result = A2DOutput(
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            aux_loss=outputs.get("aux_loss"),
        )
        if labels is None:
            logits = outputs.logits if rows_N is None else outputs.logits[0]
            if blind is not None:
                logits = logits.masked_fill(blind[..., None], 0.0)  # nothing stands before them: uniform
            result.logits = logits.view(*shape, -1) if wanted_BL is None else logits
        else:
            if blind is not None and bool(blind.any()):
                raise ValueError(
                    "`labels` mark the first token of a row or document, which nothing stands before: with "
                    "`token_shift` it cannot be predicted; set its label to -100."
                )
            weights_N = None if loss_weights is None else loss_weights[wanted_BL]
            result.head_input = wanted.caught_ND
            result.loss, result.token_nll, result.token_hit = self.output_head.loss(
                head, outputs.logits, wanted, labels[wanted_BL], weights_N, num_items_in_batch
            )
        return result if return_dict is None or return_dict else result.to_tuple()

    def _open_attention(self) -> contextlib.AbstractContextManager[None]:
        pattern, fast_path = AttentionPattern.bidirectional(), self._none_means_open
        return pattern_in_force(PatternInForce(pattern, self.config.sliding_window, fast_path=fast_path))

    def _pattern_in_force(self, pattern: AttentionPattern, layout: TokenLayout) -> PatternInForce | None:
        windows = self.config.sliding_window
        # Rows that stand at different places of one cache: windows would count slots instead of positions.
        ragged = layout.seen > 0 and layout.valid_BK is not None
        # The parent's own ALiBi counts columns: where a caller placed the tokens, even the causal pattern is ours.
        counted = layout.placed and self.alibi_layers > 0
        if pattern.is_causal and layout.document_BK is None and not ragged and not counted:
            return None  # the parent's own path, fast kernels and all
        if pattern.is_causal:
            windows = "keep"  # the causal pattern is the parent's, whatever happens to windows when it opens
        return PatternInForce(
            pattern=pattern,
            windows=windows,
            position_BK=layout.position_BK,
            valid_BK=layout.valid_BK,
            document_BK=layout.document_BK,
            copy_K=layout.copy_K,
            fast_path=self._none_means_open,
            seen=layout.seen,
        )
