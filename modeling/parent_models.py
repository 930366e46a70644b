"""Which models may be parents, and how one is built from its configuration.

Owns the checks and choices that a parent's class decides. No family is named here.
"""

import inspect

import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.configuration_utils import PreTrainedConfig


def build_parent(config: PreTrainedConfig) -> PreTrainedModel:
    """The parent from its configuration; the text model of a multimodal family has no entry in the auto classes."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config(config)
    name = (config.architectures or [None])[0]
    if name is None or not hasattr(transformers, name):
        raise ValueError(f"transformers has no causal language model of type {config.model_type!r}.")
    return getattr(transformers, name)._from_config(config)


def _cache_layers(config: PreTrainedConfig) -> list:
    """The layers of the cache that transformers makes for a parent: the one place that says what each layer keeps."""
    try:
        return DynamicCache(config=config.get_text_config()).layers
    except KeyError:  # a kind of layer that brings a cache of its own
        return []


def cache_forgets(config: PreTrainedConfig) -> bool:
    """Whether the cache that a parent makes for itself is all attention and drops tokens that left a window."""
    return _is_plain(config) and any(layer.is_sliding for layer in _cache_layers(config))


def caches_blocks(parent: PreTrainedModel) -> bool:
    """
    Whether finished blocks may be read from a cache: all that the parent remembers of a token are keys and values,
    with no state that runs from token to token and no index over them.
    """
    return "past_key_values" in inspect.signature(parent.forward).parameters and _is_plain(parent.config)


def _is_plain(config: PreTrainedConfig) -> bool:
    layers = _cache_layers(config)
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def recurrent_layers(config: PreTrainedConfig) -> list[bool]:
    """For each layer, whether all that mixes positions in it runs from left to right and so can never open."""
    return [
        isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, DynamicLayer)
        for layer in _cache_layers(config)
    ]


def has_recurrence(config: PreTrainedConfig) -> bool:
    """Whether some layers carry a state from left to right: state-space, linear attention, convolution."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _cache_layers(config))


def check_text_only(config: PreTrainedConfig, name: str) -> None:
    """Raises `ValueError` for a multimodal checkpoint: its text model has to be taken out of the files first."""
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(
            f"{name} is multimodal ({config.model_type}): `a2d convert {name} --out RUN` takes its text model out and "
            "converts it alone."
        )


def check_causal_lm(config: PreTrainedConfig, allow_hybrid: bool = False) -> None:
    """Raises `ValueError` for what is no parent, and for a hybrid unless its user accepts that it opens in part."""
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder model; only decoder language models convert.")
    known = type(config) in AutoModelForCausalLM._model_mapping
    if not known and not hasattr(transformers, (config.architectures or [""])[0]):
        raise ValueError(f"transformers has no causal language model of type {config.model_type!r}.")
    if has_recurrence(config) and not allow_hybrid:
        recurrent = recurrent_layers(config)
        raise ValueError(
            f"{config.model_type} is a hybrid: {len(recurrent) - sum(recurrent)} of {len(recurrent)} layers open, the "
            "recurrent rest goes on reading from left to right; pass `allow_hybrid=True` to convert it all the same."
        )
