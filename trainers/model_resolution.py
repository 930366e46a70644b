"""From what a user passes as `model` to a diffusion model that can be trained.

Owns loading, wrapping and adapters. Never copies weights: a model object that is passed in is the one that is trained.
"""

import copy
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from a2d_hf.modeling.configuration_a2d import A2DConfig
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion

from .a2d_config import A2DTrainingConfig


logger = logging.get_logger(__name__)


def resolve_tokenizer(
    model: str | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    args: A2DTrainingConfig,
) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer passed, else the one that lies where the model came from; `None` for a model built in memory, which
    can be trained on rows of token ids.
    """
    if tokenizer is None:
        source = model if isinstance(model, str) else model.config.name_or_path
        if not source:
            return None
        revision = (args.model_init_kwargs or {}).get("revision")
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=args.trust_remote_code)
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"`eos_token` {args.eos_token!r} is not in the tokenizer's vocabulary.")
        tokenizer.eos_token = args.eos_token
    return tokenizer


def resolve_model(
    model: str | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    args: A2DTrainingConfig,
    fields: dict[str, Any],
    quantization_config: QuantizationConfigMixin | None = None,
    frozen: bool = False,
) -> PreTrainedModel | PeftModel:
    """
    A diffusion model of the wanted objective: loaded where `model` is a string, wrapped where it is a plain causal
    language model, as it stands where it is one already.

    Weights that are trained are loaded in fp32, frozen ones in the precision that they are computed in.

    Args:
        frozen (`bool`): whether the weights stay as they are, under an adapter.
        fields (`dict[str, Any]`): the fields of [`A2DConfig`] that the model must have: its objective and the like.

    Raises:
        ValueError: an adapter around a causal language model, or a model converted for another objective.
    """
    init = dict(args.model_init_kwargs or {})
    if isinstance(model, str):
        if quantization_config is not None:
            init["quantization_config"] = quantization_config
        computed_in = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        dtype = computed_in if frozen else torch.float32
        init = {"dtype": dtype, "trust_remote_code": args.trust_remote_code} | fields | init
        return A2DForMaskedDiffusion.from_pretrained(model, tokenizer=tokenizer, **init)
    config = base_model(model).config
    if config.model_type != A2DConfig.model_type:
        if is_peft_model(model):
            raise ValueError(
                "`model` is a PEFT model of a causal language model: wrap the base with "
                "`A2DForMaskedDiffusion.from_causal_lm` first, then add the adapter."
            )
        return A2DForMaskedDiffusion.from_causal_lm(model, tokenizer=tokenizer, **(fields | init))
    for name, wanted in fields.items():
        if getattr(config, name) != wanted:
            raise ValueError(
                f"`model` was converted for {name} {getattr(config, name)!r}, and this trainer trains {wanted!r}: "
                f"load it with `{name}={wanted!r}`."
            )
    if init:
        logger.warning(f"`model_init_kwargs` {sorted(init)} are not used: `model` is a diffusion model already.")
    return model


# What only shows when a model is asked. Keys are strings: older versions of PEFT know fewer types.
CANNOT_WORK = {
    "ADAPTION_PROMPT": "its virtual tokens stand before the text and are lost when diffusion decodes it",
    "POLY": "it needs `task_ids` in every forward pass",
    "XLORA": "it mixes adapters by a forward pass of its own, which knows nothing of the attention pattern",
}


def add_adapter(
    model: PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    args: A2DTrainingConfig,
) -> PreTrainedModel | PeftModel:
    """
    The model with the adapter of `peft_config`, if any.

    An adapter names the base it belongs to. A base that was converted in memory lies nowhere yet, and its parent is
    not it: loaded onto the parent, the adapter would find none of its layers and change nothing, without an error. So
    the base is saved first, in `base` of the output folder.

    LoRA without `target_modules` adapts every linear layer but the head (PEFT knows no default for our model type),
    and without `trainable_token_indices` trains the mask token's embedding row: no parent ever saw that token.

    Raises:
        ValueError: two adapters, or one that cannot work: the diffusion decoder would silently ignore virtual tokens.
    """
    config = peft_config
    if is_peft_model(model):
        if peft_config is not None:
            raise ValueError("`model` has an adapter already: pass it without `peft_config`, or merge it first.")
        config = model.active_peft_config
    if config is not None:
        kind = config.peft_type.value
        reason = CANNOT_WORK["ADAPTION_PROMPT"] if config.is_prompt_learning else CANNOT_WORK.get(kind)
        if reason is not None:
            raise ValueError(f"{kind} cannot work here: {reason}; use LoRA or another adapter of the weights.")
    _keep_quantized_layout(model)
    if peft_config is None:
        return _with_masters(model, args)
    if isinstance(peft_config, LoraConfig):
        peft_config = copy.copy(peft_config)
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        if peft_config.trainable_token_indices is None:
            peft_config.trainable_token_indices = [model.config.mask_token_id]
    elif peft_config.peft_type.value != "TRAINABLE_TOKENS":
        logger.warning(
            f"{peft_config.peft_type.value} does not train the mask token's embedding row, which no parent ever saw: "
            "LoRA does."
        )
    if model.mask_token is not None:
        model.name_or_path = _save_base(model, tokenizer, args)
    with warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return _with_masters(get_peft_model(model, peft_config), args)


def _with_masters(model: PreTrainedModel | PeftModel, args: A2DTrainingConfig) -> PreTrainedModel | PeftModel:
    """
    The model with every weight that is trained in fp32, where it is computed in half precision: a bf16 weight keeps 8
    bits, and an update smaller than 1/256 of it would be lost.
    """
    half = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16)
    }
    if half and (args.bf16 or args.fp16):
        for weight in half.values():
            weight.data = weight.data.float()
        logger.warning(f"{len(half)} weights came in half precision and are trained, and saved, in fp32.")
    elif half:
        logger.warning(
            f"{len(half)} weights are trained in half precision, where small updates are lost: load them with "
            "`dtype=torch.float32`, or set `bf16=True`, which keeps an fp32 copy of them."
        )
    return model


def _keep_quantized_layout(model: PreTrainedModel | PeftModel) -> None:
    """
    On some CPUs bitsandbytes repacks 4-bit weights at their first pass in eval mode. No gradient goes through them
    from then on, without an error, and PEFT merges into the wrong numbers: a model in training keeps the layout.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")  # an extra; whoever quantized the model has imported it
    if bitsandbytes is None:
        return
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: A2DTrainingConfig) -> str:
    folder = Path(args.output_dir).absolute() / "base"
    if args.should_save:
        unfinished = folder.with_name(".base.writing")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        logger.warning(f"The model was converted in memory; the adapter's base is saved in {folder}.")
    return str(folder)


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model under its adapter, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model
