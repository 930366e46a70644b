"""`A2DGenerationConfig`: every choice that decoding takes, checked one by one, saved in `generation_config.json`.

Owns the names, the defaults and the checks of decoding parameters, and how several configurations combine into the one
that a call uses. Knows nothing of models or tensors.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

SELECTORS = ("confidence", "margin", "entropy", "random", "threshold", "entropy_bound")
REMASKING = ("p2",)
SELF_SPECULATION = ("causal", "parent")
APPROXIMATE_CACHES = ("prefix", "dual")

# What this class adds to `GenerationConfig`.
DIFFUSION_FIELDS = (
    "steps",
    "block_size",
    "selector",
    "threshold",
    "entropy_bound",
    "remasking",
    "self_speculation",
    "draft_steps",
    "approximate_cache",
    "output_cache_deviation",
    "seed",
    "mask_token_id",
    "output_history",
)
# What it keeps of `GenerationConfig`, with the same meaning. The cache fields change speed, never the text.
SHARED_FIELDS = (
    "max_length",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "num_return_sequences",
    "return_dict_in_generate",
    "stop_strings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LIBRARY_FIELDS = frozenset(vars(GenerationConfig()))
# Values of the autoregressive fields under which they do nothing: what callers pass out of habit.
_NEUTRAL = GenerationConfig._get_default_generation_params()

# What other projects call these parameters.
_PEER_ARGUMENTS = {
    "alg": "`selector`",
    "algorithm": "`selector`",
    "sampler": "`selector`",
    "gen_length": "`max_new_tokens`",
    "block_length": "`block_size`",
    "canvas_length": "`block_size`",
    "num_steps": "`steps`",
    "num_inference_steps": "`steps`",
    "diffusion_steps": "`steps`",
    "denoising_steps": "`steps`",
    "max_denoising_steps": "`steps`",
    "steps_per_block": "`steps`, counted over the whole generation",
    "confidence_threshold": '`threshold`, with `selector="threshold"`',
    "gamma": '`entropy_bound`, with `selector="entropy_bound"`',
    "eb_gamma": '`entropy_bound`, with `selector="entropy_bound"`',
    "mask_id": "`mask_token_id`",
    "stochastic_transfer": '`selector="random"`',
    "return_dict": "`return_dict_in_generate`",
    "right_shift_logits": "`config.token_shift`; `forward` applies it, so remove the argument",
}
_PEER_SELECTORS = {
    "low_confidence": 'selector="confidence"',
    "low_confidence_static": 'selector="confidence"',
    "maskgit_plus": 'selector="confidence"',
    "topk": 'selector="confidence"',
    "max_prob": 'selector="confidence"',
    "topk_margin": 'selector="margin"',
    "margin_confidence": 'selector="margin"',
    "neg_entropy": 'selector="entropy"',
    "origin": 'selector="random"',
    "ancestral": 'selector="random"',
    "low_confidence_dynamic": 'selector="threshold"',
    "confidence_threshold": 'selector="threshold"',
    "eb": 'selector="entropy_bound"',
    "eb_sampler": 'selector="entropy_bound"',
    "p2": 'remasking="p2"',
}


class A2DGenerationConfig(GenerationConfig):
    """
    Parameters of [`~A2DGenerationMixin.diffusion_generate`]. `None` means "not set": what a call leaves unset is taken
    from the model's own `generation_config`, then from the defaults below.

    Args:
        > Parameters that control the length of the output

        max_new_tokens (`int`, *optional*, defaults to 128):
            How many mask tokens are appended to the prompt. 0 appends none: the masks already in the prompt are
            filled (infilling). An unset value shrinks to the room that is left in the model's context.
        max_length (`int`, *optional*):
            Length of prompt and completion together, in tokens; `max_new_tokens` wins where both are given.
        stop_strings (`str` or `list[str]`, *optional*):
            Texts that end a row once generated. Needs `tokenizer=` in the call.

        > Parameters that control which positions are committed

        steps (`int`, *optional*):
            Forward passes over the whole generation, shared among the blocks by their number of masks. Each forward
            commits at least one token and each block takes at least one forward, so that more steps than masks mean
            one per mask, and fewer steps than blocks mean one per block. The default is one token per forward for
            `confidence`, `margin`, `entropy` and `random`, and as few forwards as the rule allows for `threshold` and
            `entropy_bound`; given, it also caps the forwards of those two.
        block_size (`int`, *optional*):
            Finish this many positions before going on to the next ones (semi-autoregressive), on a grid that starts
            at the first token of each row. The default is the checkpoint's block size, or else the whole canvas. For
            a BD3LM checkpoint, a divisor of its block size leaves its attention as trained; any other value does not.
        selector (`str` or `Callable`, *optional*, defaults to `"confidence"`):
            Which masked positions a forward commits. As many as `steps` asks for, by the probability of the candidate
            token (`"confidence"`), by its lead over the runner-up (`"margin"`), by low entropy (`"entropy"`) or at
            random (`"random"`); or as many as the model is sure of: `"threshold"`, `"entropy_bound"`. A function gets
            [`Candidates`] and returns booleans. See selectors_a2d.py.
        threshold (`float`, *optional*, defaults to 0.9):
            For `selector="threshold"`: the probability from which a candidate is committed.
        entropy_bound (`float`, *optional*, defaults to 0.1):
            For `selector="entropy_bound"`: how many nats of joint dependence one forward may ignore.
        remasking (`str`, *optional*):
            `"p2"` puts masks back on the committed tokens of the block that the model trusts least, and fills them
            again (https://huggingface.co/papers/2502.03540). By default what is committed stays.

        self_speculation (`str`, *optional*):
            Diffusion only drafts, and a causal pass verifies: the text is that of the checkpoint's own causal mode
            (`"causal"`) or, with its adapters off, of its parent (`"parent"`), token for token at temperature 0 and
            in distribution above it. `block_size` bounds a draft; 8 where the checkpoint has no blocks.
        draft_steps (`int`, *optional*, defaults to 1): forwards per draft of `self_speculation`.

        > Parameters that control which token a position gets

        temperature (`float`, *optional*):
            0 takes the most likely token; above 0 the token is sampled. Unset: 1 with `do_sample=True`, else 0.
        do_sample (`bool`, *optional*): `False` means temperature 0.
        top_k (`int`, *optional*), top_p (`float`, *optional*), min_p (`float`, *optional*):
            Limit what may be sampled, as in [`~transformers.GenerationConfig`]; without effect at temperature 0. They
            and the temperature change the sampled token, not the probability that selectors see.
        repetition_penalty (`float`, *optional*): above 1 makes tokens that stand anywhere in the row less likely.
        suppress_tokens (`list[int]`, *optional*): ids never generated. The mask token never is.
        begin_suppress_tokens (`list[int]`, *optional*):
            Ids never generated at the first position after the prompt, or at the first mask when infilling.
        seed (`int`, *optional*):
            Seeds a generator of its own for the call. Unset, `generator=` of the call or torch's global state is used.

        > Parameters that control the output

        num_return_sequences (`int`, *optional*, defaults to 1): samples per prompt.
        return_dict_in_generate (`bool`, *optional*, defaults to `False`):
            Return [`A2DGenerationOutput`] instead of the token ids alone.
        output_history (`bool`, *optional*, defaults to `False`):
            Keep the sequences after each forward, in [`A2DGenerationOutput`]`.history`.

        > Special tokens

        mask_token_id (`int`, *optional*): overrides the id in the model's config.
        bos_token_id (`int`, *optional*): starts an empty prompt.
        eos_token_id (`int` or `list[int]`, *optional*): ends a row; what follows is dropped.
        pad_token_id (`int`, *optional*): fills what was dropped.

        > Cache

        use_cache (`bool`, *optional*, defaults to `True`): run finished BD3LM blocks once; same text.
        approximate_cache (`str`, *optional*):
            For MDLM models, faster and NOT the same text: within a block keep what the block's first forward computed
            for what stands before it (`"prefix"`), or for all but the block itself (`"dual"`).
        output_cache_deviation (`bool`, *optional*, defaults to `False`):
            Measure that cache against exact logits at every forward, one more pass each (not counted), and say so in
            [`A2DGenerationOutput`]`.cache_deviation`.
        cache_implementation, cache_config, max_cache_len, compile_config, disable_compile: accepted, without effect.
    """

    def __init__(self, **kwargs):
        _check_names(kwargs)
        for name in DIFFUSION_FIELDS:
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)

    # ----------------------------------------------------------------------------------------------------- checking

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """
        Checks every field and raises `ValueError` with its name.

        Args:
            strict (`bool`, *optional*, defaults to `False`): also refuse what cannot be saved.
            user_set_attributes (`set[str]`, *optional*): part of the library's signature; not needed here.
        """
        for name in ("steps", "block_size", "draft_steps", "num_return_sequences", "max_length"):
            self._check(name, _is_int, lambda v: v >= 1, "a positive integer")
        for name in ("max_new_tokens", "top_k", "seed", "mask_token_id", "bos_token_id"):
            self._check(name, _is_int, lambda v: v >= 0, "an integer of at least 0")
        for name in ("threshold", "top_p", "min_p"):
            self._check(name, _is_number, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        for name in ("temperature", "entropy_bound"):
            self._check(name, _is_number, lambda v: 0 <= v < float("inf"), "a number of at least 0")
        self._check("repetition_penalty", _is_number, lambda v: v > 0, "a number above 0")
        for name in ("do_sample", "use_cache", "return_dict_in_generate", "output_history", "output_cache_deviation"):
            self._check(name, lambda v: isinstance(v, bool), lambda v: True, "a boolean")
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            self._check(name, _is_id_list, lambda v: True, "a list of token ids")
        self._check("eos_token_id", lambda v: _is_int(v) or _is_id_list(v), lambda v: True, "a token id or a list")
        # Trainers and pipelines set negative pad ids for "none"; transformers only warns about them.
        self._check("pad_token_id", _is_int, lambda v: True, "a token id")
        if self.temperature == 0 and self.do_sample:
            raise ValueError(
                "`do_sample=True` needs a `temperature` above 0: raise it, or leave `do_sample` out for the most "
                "likely tokens."
            )
        self._check_selector()
        self._check_remasking()
        for name, values in (("self_speculation", SELF_SPECULATION), ("approximate_cache", APPROXIMATE_CACHES)):
            self._check(name, values.__contains__, lambda v: True, f"None or one of {', '.join(values)}")
        self._check_autoregressive_fields()
        if strict and callable(self.selector):
            raise ValueError("`selector` is a function, which cannot be saved: pass it to the call instead.")

    def _check(self, name: str, is_type, is_in_range, wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not (is_type(value) and is_in_range(value)):
            raise ValueError(f"`{name}` must be {wanted}, not {value!r}.")

    def _check_selector(self) -> None:
        if self.selector is None or callable(self.selector) or self.selector in SELECTORS:
            return
        if self.selector in _PEER_SELECTORS:
            raise ValueError(f"`selector={self.selector!r}` is called `{_PEER_SELECTORS[self.selector]}` here.")
        raise ValueError(f"`selector` must be one of {', '.join(SELECTORS)} or a function, not {self.selector!r}.")

    def _check_remasking(self) -> None:
        if self.remasking is None:
            return
        if self.remasking not in REMASKING:
            if self.remasking in SELECTORS or self.remasking in _PEER_SELECTORS:
                # dLLM and LLaDA call the choice of positions "remasking"; nothing is put back there.
                ours = _PEER_SELECTORS.get(self.remasking, f'selector="{self.remasking}"')
                raise ValueError(f"`remasking={self.remasking!r}` is called `{ours}` here.")
            raise ValueError(f"`remasking` must be None or one of {', '.join(REMASKING)}, not {self.remasking!r}.")
        if self.selector not in (None, "confidence"):
            raise ValueError('`remasking="p2"` ranks by confidence: use it with `selector="confidence"`.')

    def _check_autoregressive_fields(self) -> None:
        for name in _LIBRARY_FIELDS.difference(SHARED_FIELDS):
            value = getattr(self, name)
            if name.startswith("_") or name == "transformers_version" or not value or value == _NEUTRAL.get(name):
                continue
            raise ValueError(
                f"`{name}={value!r}` has no meaning in diffusion decoding: remove it, or pass a `logits_processor` or "
                "`stopping_criteria` of your own."
            )

    # --------------------------------------------------------------------------------------------- combining, saving

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        """What a call gets where neither it nor the model says anything."""
        return {
            "max_new_tokens": 128,
            "selector": "confidence",
            "threshold": 0.9,
            "entropy_bound": 0.1,
            "draft_steps": 1,
            "output_cache_deviation": False,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
            "output_history": False,
        }

    @classmethod
    def combine(
        cls, model: GenerationConfig, given: GenerationConfig | None, arguments: Mapping[str, Any]
    ) -> tuple["A2DGenerationConfig", set[str]]:
        """
        The configuration of one call: its arguments over the configuration given with it, over the model's own, over
        the defaults. Any of them may be a plain [`~transformers.GenerationConfig`].

        Args:
            model (`GenerationConfig`): the model's own configuration.
            given (`GenerationConfig`, *optional*): the `generation_config` of the call.
            arguments (`Mapping[str, Any]`): keyword arguments of the call. `None` switches an optional field off.

        Returns:
            The configuration, and the names that the caller set.
        """
        merged: dict[str, Any] = {}
        for layer in (set_fields(model), {} if given is None else set_fields(given), dict(arguments)):
            # Two names for one choice: what is said later counts, under whichever name.
            for newer, older in (("max_length", "max_new_tokens"), ("temperature", "do_sample")):
                if layer.get(newer) is not None and older not in layer:
                    merged.pop(older, None)
            if layer.get("do_sample") and "temperature" not in layer and merged.get("temperature") == 0:
                merged.pop("temperature")
            merged.update(layer)
        by_caller = {*arguments, *({} if given is None else set_fields(given))}
        for name, default in cls._get_default_generation_params().items():
            if merged.get(name) is None and not (name == "max_new_tokens" and merged.get("max_length") is not None):
                merged[name] = default
        return cls(**merged), by_caller

    @property
    def sampling_temperature(self) -> float:
        """The temperature in force: 0 means that the most likely token is taken."""
        if self.do_sample is False:
            return 0.0
        if self.temperature is None:
            return 1.0 if self.do_sample else 0.0
        return float(self.temperature)

    @property
    def eos_token_ids(self) -> list[int]:
        """`eos_token_id` as a list, empty where there is none."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if _is_int(self.eos_token_id) else list(self.eos_token_id)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if callable(self.selector):
            output["selector"] = repr(self.selector)  # for printing: `validate(strict=True)` refuses to save it
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_diff_dict().items() if value is not None}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "A2DGenerationConfig":
        """
        Reads a saved configuration. Of an autoregressive parent's file only the special tokens are taken: its
        sampling parameters were chosen for another way of decoding.
        """
        if not any(name in config_dict for name in DIFFUSION_FIELDS):
            config_dict = {name: config_dict[name] for name in SPECIAL_TOKENS if name in config_dict}
            config_dict |= cls._own_defaults()
        known = {name: value for name, value in config_dict.items() if name in _known_names()}
        if ignored := sorted(set(config_dict) - set(known)):
            logger.warning_once(f"Ignored in the saved generation config, not known here: {', '.join(ignored)}.")
        # `from_pretrained` of a model hands its own leftover arguments down to here.
        kwargs = {name: value for name, value in kwargs.items() if name in {*_known_names(), "return_unused_kwargs"}}
        return super().from_dict(known, **kwargs)

    @classmethod
    def from_model_config(cls, model_config) -> "A2DGenerationConfig":
        """
        The configuration of a model that was saved with none, or has just been converted.

        Args:
            model_config (`PreTrainedConfig` or `dict`): an [`A2DConfig`].
        """
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        special = {name: values[name] for name in SPECIAL_TOKENS if values.get(name) is not None}
        return cls(**special, **cls._own_defaults())

    @classmethod
    def _own_defaults(cls) -> dict[str, Any]:
        # Written out in the file, so that a checkpoint decodes tomorrow as it does today.
        defaults = cls._get_default_generation_params()
        return {name: defaults[name] for name in ("max_new_tokens", "selector")}


def set_fields(config: GenerationConfig) -> dict[str, Any]:
    """The fields of a configuration that were set to something, metadata left out."""
    return {
        name: value
        for name, value in vars(config).items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }


def _known_names() -> set[str]:
    return {*_LIBRARY_FIELDS, *DIFFUSION_FIELDS, "_commit_hash"}


def _check_names(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if name in _known_names():
            continue
        if name in _PEER_ARGUMENTS:
            if name in ("alg", "algorithm", "sampler") and value in _PEER_SELECTORS:
                raise ValueError(f"`{name}={value!r}` is called `{_PEER_SELECTORS[value]}` here.")
            raise ValueError(f"`{name}` is called {_PEER_ARGUMENTS[name]} here.")
        close = difflib.get_close_matches(name, [*DIFFUSION_FIELDS, *SHARED_FIELDS], n=1)
        hint = (
            f"did you mean `{close[0]}`?" if close else f"known are {', '.join([*DIFFUSION_FIELDS, *SHARED_FIELDS])}."
        )
        raise ValueError(f"Unknown decoding parameter `{name}`; {hint}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_int(item) and item >= 0 for item in value)
