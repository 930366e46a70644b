"""The arguments of one decoding call, read and checked: prompts, lengths, special tokens.

Owns every refusal that depends on the prompt or the model's config, one clear sentence each; fields that are wrong by
themselves are refused in generation_config_a2d.py. Changes nothing of the model.

Shapes: B rows, P columns of the prompts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import logging

from .configuration_a2d import A2DConfig
from .decoding_names_a2d import SELECTORS
from .generation_config_a2d import A2DGenerationConfig


logger = logging.get_logger(__name__)

# Arguments of `GenerationMixin.generate` that only make sense left to right.
_AUTOREGRESSIVE_ARGUMENTS = (
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "past_key_values",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
)


def decoding_parameters(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of a call's keyword arguments for [`A2DGenerationConfig`]; refuses those of other decoders."""
    arguments = {name: value for name, value in kwargs.items() if name not in ("input_ids", "token_type_ids")}
    for name in _AUTOREGRESSIVE_ARGUMENTS:
        value = arguments.pop(name, None)
        if value is not None and value is not False:
            raise ValueError(f"`{name}` has no meaning in diffusion decoding: remove it.")
    return arguments


def read_prompts(
    inputs: torch.LongTensor | None,
    input_ids: torch.LongTensor | None,
    attention_mask: torch.Tensor | None,
    config: A2DGenerationConfig,
    model_config: A2DConfig,
    device: torch.device,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """
    The prompts and what is real in them. A row without a single token gets a BOS, where there is one.

    Args:
        inputs, input_ids (`torch.LongTensor` of shape `(B, P)`, *optional*): the prompts, under either name.
        attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 1 for tokens, 0 for padding. Without it pad
            tokens count as padding, unless they are EOS as well: the rule of `GenerationMixin`.
        config ([`A2DGenerationConfig`]), model_config ([`A2DConfig`]): of the call and of the model.
        device (`torch.device`): where an empty prompt is put.

    Returns:
        `torch.LongTensor` and `torch.BoolTensor`, both of shape `(B, P)`.
    """
    if inputs is not None and input_ids is not None:
        raise ValueError("Pass the prompt once: as `inputs` or as `input_ids`.")
    given = inputs if inputs is not None else input_ids
    if given is None:
        if attention_mask is not None:
            raise ValueError("`attention_mask` came without a prompt: pass `input_ids` too.")
        given = torch.zeros((1, 0), dtype=torch.long, device=device)
    if not isinstance(given, torch.Tensor) or given.ndim != 2 or given.is_floating_point() or given.shape[0] == 0:
        is_tensor = isinstance(given, torch.Tensor)
        what = f"shape {tuple(given.shape)}, {given.dtype}" if is_tensor else type(given).__name__
        raise ValueError(f"`input_ids` must be a tensor of token ids with the shape (rows, tokens), not {what}.")
    given = given.long()
    if attention_mask is None:
        pad = config.pad_token_id
        known = pad is not None and pad not in config.eos_token_ids
        attention_mask = given != pad if known else torch.ones_like(given, dtype=torch.bool)
        if not bool(attention_mask.all()):
            logger.warning_once("No `attention_mask` was passed: pad tokens in `input_ids` are taken for padding.")
    if tuple(attention_mask.shape) != tuple(given.shape):
        raise ValueError(
            f"`attention_mask` must have the shape {tuple(given.shape)} of `input_ids`, not "
            f"{tuple(attention_mask.shape)}."
        )
    attention_mask = attention_mask.to(device=given.device, dtype=torch.bool)

    real = given[attention_mask]
    if real.numel() and not (0 <= int(real.min()) and int(real.max()) < model_config.vocab_size):
        raise ValueError(
            f"`input_ids` holds ids from {int(real.min())} to {int(real.max())}, but the vocabulary has "
            f"{model_config.vocab_size} rows: is it the model's own tokenizer?"
        )
    empty_B = ~attention_mask.any(-1)
    if bool(empty_B.any()):
        if config.bos_token_id is None:
            if model_config.token_shift:
                raise ValueError(
                    "This model reads each token from the position before it (`token_shift`), so an empty prompt "
                    "needs a first token: pass a prompt, or set `bos_token_id`."
                )
        elif given.shape[1] == 0:
            given = given.new_full((given.shape[0], 1), config.bos_token_id)
            attention_mask = torch.ones_like(given, dtype=torch.bool)
        else:
            given, attention_mask = given.clone(), attention_mask.clone()
            given[empty_B, -1], attention_mask[empty_B, -1] = config.bos_token_id, True
    return given, attention_mask


def read_negative_prompts(
    negative_ids: torch.LongTensor | None,
    negative_mask: torch.Tensor | None,
    input_ids: torch.LongTensor,
    max_new_tokens: int,
    mask_token_id: int,
    config: A2DGenerationConfig,
    model_config: A2DConfig,
) -> tuple[torch.LongTensor | None, torch.Tensor | None]:
    """
    The negative prompts of a guided call, one for each prompt, and what is real in them.

    Returns:
        `torch.LongTensor` and `torch.BoolTensor` of shape `(B, N)`; `None` twice where there are none.
    """
    if negative_ids is None:
        if negative_mask is not None:
            raise ValueError("`negative_prompt_attention_mask` came without `negative_prompt_ids`: pass both.")
        return None, None
    if config.guidance_scale is None or config.guidance_scale == 1:
        raise ValueError("`negative_prompt_ids` do nothing without guidance: set `guidance_scale`, for example to 2.")
    if config.guidance_keep_tokens:
        raise ValueError("`guidance_keep_tokens` are about the prompt, which `negative_prompt_ids` replace: pass one.")
    if bool((input_ids == mask_token_id).any()):
        raise ValueError(
            "`negative_prompt_ids` take the place of the whole prompt, which holds masks to fill: leave them out."
        )
    shape = tuple(negative_ids.shape)
    rows = input_ids.shape[0]
    if len(shape) != 2 or shape[0] not in (1, rows) or shape[1] == 0 or negative_ids.is_floating_point():
        raise ValueError(
            f"`negative_prompt_ids` must be token ids of the shape (1, tokens) or ({rows}, tokens), not {shape}."
        )
    if negative_mask is None:
        negative_mask = torch.ones_like(negative_ids)
    if tuple(negative_mask.shape) != shape:
        raise ValueError(
            f"`negative_prompt_attention_mask` must have the shape {shape} of `negative_prompt_ids`, not "
            f"{tuple(negative_mask.shape)}."
        )
    negative_mask = negative_mask.to(device=input_ids.device, dtype=torch.bool)
    longest, context = int(negative_mask.sum(-1).max()), model_config.max_position_embeddings
    if context is not None and longest + max_new_tokens > context:
        raise ValueError(
            f"`negative_prompt_ids` hold {longest} tokens and {max_new_tokens} are to follow, but the model's context "
            f"is {context}: shorten one of them."
        )
    return negative_ids.to(input_ids.device).long().expand(rows, -1), negative_mask.expand(rows, -1)


def count_new_tokens(
    config: A2DGenerationConfig,
    by_caller: set[str],
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor,
    model_config: A2DConfig,
) -> int:
    """How many masks to append. What the caller asked for must fit the context; a default shrinks to what fits."""
    prompt = int(attention_mask.sum(-1).max())
    context = model_config.max_position_embeddings
    if context is not None and prompt > context:
        raise ValueError(f"The prompt has {prompt} tokens, the model's context only {context}: shorten `input_ids`.")
    if config.max_new_tokens is not None:
        new, name = config.max_new_tokens, "max_new_tokens"
    else:
        new, name = config.max_length - input_ids.shape[1], "max_length"
        if new < 0:
            raise ValueError(
                f"`max_length={config.max_length}` is shorter than the prompt of {input_ids.shape[1]} tokens: raise "
                "it, or use `max_new_tokens`."
            )
    if context is not None and prompt + new > context:
        if name in by_caller:
            raise ValueError(
                f"`{name}` asks for {new} tokens after a prompt of {prompt}, but the model's context is {context}: "
                f"at most {context - prompt} fit."
            )
        new = context - prompt
    return new


def check_masks(
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor,
    mask_token_id: int,
    max_new_tokens: int,
    model_config: A2DConfig,
) -> None:
    """Refuses a call with nothing to fill, and a mask where the model cannot score one."""
    masked_BP = attention_mask & (input_ids == mask_token_id)
    if max_new_tokens == 0 and not bool(masked_BP.any()):
        raise ValueError(
            f"Nothing to generate: `max_new_tokens` comes to 0 and `input_ids` holds no mask token ({mask_token_id})."
        )
    if model_config.token_shift and bool((masked_BP & (attention_mask.cumsum(-1) == 1)).any()):
        raise ValueError(
            "This model reads each token from the position before it (`token_shift`), so the first token of a row "
            "cannot be a mask: put a BOS token before it."
        )


def check_idle_parameters(config: A2DGenerationConfig, arguments: Mapping[str, Any]) -> None:
    """Refuses arguments of the call that would silently do nothing."""
    sampling = config.sampling_temperature > 0
    by_chance = sampling or config.selector == "random" or callable(config.selector)
    by_chance = by_chance or config.remasking not in (None, "p2")
    if config.num_return_sequences > 1 and not by_chance:
        raise ValueError(
            f"`num_return_sequences={config.num_return_sequences}` would return the same text each time: set a "
            "`temperature` above 0."
        )
    for name in ("threshold", "entropy_bound"):
        if name in arguments and config.selector in SELECTORS and config.selector != name:
            raise ValueError(f'`{name}` does nothing with `selector="{config.selector}"`: set `selector="{name}"`.')
    uses = {
        "remasking_eta": ("remdm_cap", "remdm_rescale", "remdm_loop"),
        "remasking_loop": ("remdm_loop",),
    }
    for name, rules in uses.items():
        if arguments.get(name) is not None and config.remasking not in rules:
            raise ValueError(f'`{name}` does nothing without `remasking="{rules[0]}"`: set it, or leave this out.')
    for name in ("block_add_threshold", "decoded_token_threshold"):
        if arguments.get(name) is not None and config.pipeline_depth == 1:
            raise ValueError(f"`{name}` does nothing with one open block: set `pipeline_depth`, for example to 4.")
    for name in ("max_cache_len", "compile_config"):
        if arguments.get(name) is not None and config.cache_implementation != "static":
            raise ValueError(
                f'`{name}` is about a static cache: set `cache_implementation="static"`, or leave it out.'
            )
    if arguments.get("cache_implementation") == "static" and config.use_cache is False:
        raise ValueError('`cache_implementation="static"` does nothing with `use_cache=False`: leave one of them out.')
    if arguments.get("guidance_keep_tokens") and config.guidance_scale in (None, 1):
        raise ValueError("`guidance_keep_tokens` do nothing without guidance: set `guidance_scale`.")
    idle = [f"`{name}`" for name in ("top_k", "top_p", "min_p") if arguments.get(name) is not None and not sampling]
    if idle:
        logger.warning_once(f"Without a `temperature` above 0 the likeliest token is taken: {', '.join(idle)} idle.")


def mask_token_of(config: A2DGenerationConfig, model_config: A2DConfig) -> int:
    """The mask token of the call, checked against the vocabulary."""
    mask_token_id = model_config.mask_token_id if config.mask_token_id is None else config.mask_token_id
    if mask_token_id is None or mask_token_id >= model_config.vocab_size:
        raise ValueError(
            f"`mask_token_id` must be an id below the vocabulary's {model_config.vocab_size} rows, not "
            f"{mask_token_id}: set `model.config.mask_token_id`."
        )
    return mask_token_id


def pad_token_of(config: A2DGenerationConfig, has_criteria: bool) -> int:
    """What fills a row behind its end: the pad token, or else EOS."""
    if config.pad_token_id is not None and config.pad_token_id >= 0:
        return config.pad_token_id
    if config.eos_token_ids:
        return config.eos_token_ids[0]
    if has_criteria:
        raise ValueError("`stopping_criteria` leave rows of different lengths: set `pad_token_id` to fill them up.")
    return 0  # no row ends early, so nothing is ever filled up
