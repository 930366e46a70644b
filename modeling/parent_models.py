"""Which models may be parents, and how one is built from its configuration.

Owns the checks and choices that a parent's class decides. No family is named here.
"""

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
    layers = _cache_layers(config)
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return plain and any(layer.is_sliding for layer in layers)


def has_recurrence(config: PreTrainedConfig) -> bool:
    """Whether some layers carry a state from left to right: state-space, linear attention, convolution."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _cache_layers(config))


def check_causal_lm(config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder model; only decoder language models convert.")
    known = type(config) in AutoModelForCausalLM._model_mapping
    if not known and not hasattr(transformers, (config.architectures or [""])[0]):
        raise ValueError(f"transformers has no causal language model of type {config.model_type!r}.")
