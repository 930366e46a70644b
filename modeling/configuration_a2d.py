"""The configuration of a converted checkpoint: the parent's own config plus what makes it a diffusion model.

Owns the fields of `config.json` that this project adds. Touches nothing else.
"""

import copy
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig


OBJECTIVES = ("mdlm", "bd3lm")
CLEAN_CONTEXTS = ("block", "causal")
SLIDING_WINDOWS = ("keep", "open")


class A2DConfig(PreTrainedConfig):
    r"""
    Configuration of [`A2DForMaskedDiffusion`].

    Args:
        text_config (`PreTrainedConfig` or `dict`):
            The configuration of the autoregressive parent, unchanged.
        mask_token_id (`int`):
            Vocabulary id of the mask token. Its logit is never sampled by a decoder.
        objective (`str`, *optional*, defaults to `"mdlm"`):
            `"mdlm"` (masked diffusion over the whole sequence, https://huggingface.co/papers/2406.07524) or `"bd3lm"`
            (block diffusion, https://huggingface.co/papers/2503.09573). Decides the attention pattern that `forward`
            uses when none is given: bidirectional for MDLM, block-causal for BD3LM.
        block_size (`int`, *optional*):
            Tokens per block; needed for `objective="bd3lm"`, and the default block of the decoder otherwise.
        token_shift (`bool`, *optional*, defaults to `False`):
            Whether the prediction for position i is read from the hidden state at position i - 1, as in the parent.
            `forward` does the shift; no caller ever shifts.
        clean_context (`str`, *optional*, defaults to `"block"`):
            How finished text attends to itself in a BD3LM model: `"block"` (block-causal) or `"causal"`.
        sliding_window (`str`, *optional*, defaults to `"keep"`):
            What happens to the parent's sliding or chunked windows when attention opens: `"keep"` makes them
            symmetric with the same size, `"open"` removes them.
        parent_vocab_size (`int`, *optional*):
            Embedding rows of the parent, where the conversion added some. Its causal mode is read from these alone.
    """

    model_type = "a2d"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        mask_token_id: int | None = None,
        objective: str = "mdlm",
        block_size: int | None = None,
        token_shift: bool = False,
        clean_context: str = "block",
        sliding_window: str = "keep",
        parent_vocab_size: int | None = None,
        **kwargs,
    ):
        if isinstance(text_config, dict):
            text_config = copy.deepcopy(text_config)
            model_type = text_config.pop("model_type", None)
            if model_type is None:
                raise ValueError("`text_config` has no `model_type`: pass the parent's whole configuration.")
            text_config = AutoConfig.for_model(model_type, **text_config)
        elif text_config is None:
            # transformers builds a default instance of every config class when it computes differences.
            text_config = AutoConfig.for_model("llama")
        if objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, not {objective!r}.")
        if clean_context not in CLEAN_CONTEXTS:
            raise ValueError(f"`clean_context` must be one of {', '.join(CLEAN_CONTEXTS)}, not {clean_context!r}.")
        if sliding_window not in SLIDING_WINDOWS:
            raise ValueError(f"`sliding_window` must be one of {', '.join(SLIDING_WINDOWS)}, not {sliding_window!r}.")
        if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
            raise ValueError(f"`block_size` must be a positive integer or None, not {block_size!r}.")
        if objective == "bd3lm" and block_size is None:
            raise ValueError('`objective="bd3lm"` needs a `block_size`, for example 32.')

        self.text_config = text_config
        self.mask_token_id = mask_token_id
        self.objective = objective
        self.block_size = block_size
        self.token_shift = token_shift
        self.clean_context = clean_context
        self.sliding_window = sliding_window
        self.parent_vocab_size = parent_vocab_size
        # Derived from the parent: a stale copy in config.json must not win over `text_config`.
        for derived in ("vocab_size", "tie_word_embeddings"):
            kwargs.pop(derived, None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, _text_value(text_config, name))
        # The base class hands these down to `text_config`, which may belong to a model that is already built: what
        # nobody asked to change stays as the parent has it, and as each part of a parent of several parts has it.
        kwargs.setdefault("attn_implementation", {"": text_config._attn_implementation, "text_config": {}})
        kwargs.setdefault("experts_implementation", {"": text_config._experts_implementation, "text_config": {}})
        dtype = kwargs.pop("dtype", None) or text_config.dtype
        super().__init__(dtype=dtype, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Also takes the parent's own dictionary: PEFT reads the folder that a conversion in memory came from."""
        if config_dict.get("model_type") not in (None, cls.model_type):
            config_dict = {"text_config": config_dict}
        return super().from_dict(config_dict, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix; PEFT and the trainers read it here."""
        return self.text_config.get_text_config().vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int):
        self.text_config.get_text_config().vocab_size = value

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether input and output embeddings share storage; PEFT merges wrongly when a wrapper hides it."""
        return bool(_text_value(self.text_config, "tie_word_embeddings"))

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool):
        self.text_config.tie_word_embeddings = value

    @property
    def max_position_embeddings(self) -> int | None:
        """Longest sequence the parent was built for, in tokens, or `None` where its positions have no end."""
        return _text_value(self.text_config.get_text_config(), "max_position_embeddings")

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["vocab_size"] = self.vocab_size
        output["tie_word_embeddings"] = self.tie_word_embeddings
        return output


def _text_value(config: PreTrainedConfig, name: str) -> Any:
    """A value that some parents do not define (`max_position_embeddings` under ALiBi, `pad_token_id` of old ones)."""
    return getattr(config, name, None)
