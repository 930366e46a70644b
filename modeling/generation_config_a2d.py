"""`A2DGenerationConfig`: every choice that decoding takes, checked one by one, saved in `generation_config.json`.

Owns the names, the defaults and the checks of decoding parameters, and how several configurations combine into the one
that a call uses. Knows nothing of models or tensors.
"""

from collections.abc import Mapping
from typing import Any

from transformers import CompileConfig, GenerationConfig
from transformers.utils import logging

from .decoding_names_a2d import check_names, check_rules


logger = logging.get_logger(__name__)

# What this class adds to `GenerationConfig`.
DIFFUSION_FIELDS = (
    "steps",
    "block_size",
    "selector",
    "threshold",
    "entropy_bound",
    "remasking",
    "remasking_eta",
    "remasking_loop",
    "guidance_keep_tokens",
    "pipeline_depth",
    "block_add_threshold",
    "decoded_token_threshold",
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
    "guidance_scale",
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
            again (https://huggingface.co/papers/2502.03540). `"remdm_cap"`, `"remdm_rescale"`, `"remdm_conf"` and
            `"remdm_loop"` do so at random, at the rates of ReMDM (https://huggingface.co/papers/2503.00307); `steps`
            may then exceed the number of masks. See remdm_a2d.py. By default what is committed stays.
        remasking_eta (`float`, *optional*, defaults to 0.02):
            η of ReMDM: the largest share of committed tokens put back in a step (`"remdm_cap"`, `"remdm_loop"`), or
            the part of the largest possible share (`"remdm_rescale"`).
        remasking_loop (`list[float]`, *optional*, defaults to `[0.55, 0.05, 0.9]`):
            t_on, t_off and α of `"remdm_loop"`: between the times t_on and t_off tokens are put back and filled while
            the committed share stays at α.
        pipeline_depth (`int`, *optional*, defaults to 1):
            How many blocks may be open at once (D2F, https://huggingface.co/papers/2508.09192). 1 finishes one before
            the next. More need `selector="threshold"`, `"entropy_bound"` or a function. See pipelined_a2d.py.
        block_add_threshold (`float`, *optional*, defaults to 0.7):
            With `pipeline_depth`: the share of a block that is committed when the next one opens.
        decoded_token_threshold (`float`, *optional*, defaults to 0.95):
            With `pipeline_depth`: the share of a block from which the next one commits a token in every forward;
            below it, it only commits what its selector is sure of.

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
        guidance_scale (`float`, *optional*):
            Classifier-free guidance: how far to move from the prediction without the prompt, or with
            `negative_prompt_ids=`, to that with it. 1 is off, 0 ignores the prompt. See guidance_a2d.py.
        guidance_keep_tokens (`list[int]`, *optional*):
            Ids that stay where they are in the prompt when guidance masks it, such as those of a chat template.
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
        cache_implementation (`str`, *optional*, defaults to `"dynamic"`):
            `"static"` gives that cache of BD3LM models one place and its passes two shapes, for `torch.compile` and
            CUDA graphs; same text. See static_cache_a2d.py.
        max_cache_len (`int`, *optional*):
            Tokens that a static cache has room for at least: set it to the longest prompt and completion to come, and
            shorter calls go through what was compiled for the first.
        compile_config (`CompileConfig`, *optional*):
            How the denoising passes over a static cache are compiled. On CUDA they are, by default as
            [`~transformers.CompileConfig`] says; on a CPU only with this set. Never saved.
        disable_compile (`bool`, *optional*): `True` runs a static cache uncompiled.
        cache_config: accepted, without effect.
    """

    def __init__(self, **kwargs):
        check_names(kwargs, _known_names(), [*DIFFUSION_FIELDS, *SHARED_FIELDS])
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
        counts = ("steps", "block_size", "draft_steps", "num_return_sequences", "max_length", "pipeline_depth")
        for name in (*counts, "max_cache_len"):
            self._check(name, _is_int, lambda v: v >= 1, "a positive integer")
        for name in ("max_new_tokens", "top_k", "seed", "mask_token_id", "bos_token_id"):
            self._check(name, _is_int, lambda v: v >= 0, "an integer of at least 0")
        shares = ("threshold", "top_p", "min_p", "remasking_eta", "block_add_threshold", "decoded_token_threshold")
        for name in shares:
            self._check(name, _is_number, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        for name in ("temperature", "entropy_bound", "guidance_scale"):
            self._check(name, _is_number, lambda v: 0 <= v < float("inf"), "a number of at least 0")
        self._check("repetition_penalty", _is_number, lambda v: v > 0, "a number above 0")
        switches = ("do_sample", "use_cache", "return_dict_in_generate", "output_history", "output_cache_deviation")
        for name in (*switches, "disable_compile"):
            self._check(name, lambda v: isinstance(v, bool), lambda v: True, "a boolean")
        for name in ("suppress_tokens", "begin_suppress_tokens", "guidance_keep_tokens"):
            self._check(name, _is_id_list, lambda v: True, "a list of token ids")
        self._check("eos_token_id", lambda v: _is_int(v) or _is_id_list(v), lambda v: True, "a token id or a list")
        self._check(
            "compile_config", lambda v: isinstance(v, CompileConfig), lambda v: True, "a `transformers.CompileConfig`"
        )
        # Trainers and pipelines set negative pad ids for "none"; transformers only warns about them.
        self._check("pad_token_id", _is_int, lambda v: True, "a token id")
        if self.temperature == 0 and self.do_sample:
            raise ValueError(
                "`do_sample=True` needs a `temperature` above 0: raise it, or leave `do_sample` out for the most "
                "likely tokens."
            )
        check_rules(self)
        self._check_autoregressive_fields()
        if strict and callable(self.selector):
            raise ValueError("`selector` is a function, which cannot be saved: pass it to the call instead.")

    def _check(self, name: str, is_type, is_in_range, wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not (is_type(value) and is_in_range(value)):
            raise ValueError(f"`{name}` must be {wanted}, not {value!r}.")

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
            "remasking_eta": 0.02,
            "remasking_loop": [0.55, 0.05, 0.9],
            "pipeline_depth": 1,
            "block_add_threshold": 0.7,
            "decoded_token_threshold": 0.95,
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


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_int(item) and item >= 0 for item in value)
