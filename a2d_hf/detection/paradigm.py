"""The rules that say what a model is: an autoregressive decoder that converts, or something else, and then what.

Owns the order in which the rules apply and the sentences of the reasons. A rule looks at the type's kind in the table,
at the declared architecture, and at the few fields that change what a type does; no rule names a single model.
Touches nothing.
"""

import re
from dataclasses import dataclass
from typing import Any

from .config_reading import ConfigView, InvalidConfig
from .layers import LayerCount, count_layers, layer_kinds
from .type_table import TypeEntry, entry_of, language_model_classes, plain_name


REASON_CODES = (
    "paradigm.encoder",
    "paradigm.encoder_decoder",
    "paradigm.recurrent",
    "paradigm.diffusion",
    "paradigm.vision",
    "task.no_lm_head",
    "code.remote",
    "architecture.unknown",
    "weights.format",
    "weights.quantized",
    "config.invalid",
)

# Names of diffusion language models. Word parts that no autoregressive model carries: "diffllama" (differential
# attention) must not match, and "dream" only as the beginning of a name.
DIFFUSION_NAME = re.compile(
    r"llada|sdar|diffusion|diffullama|diffugpt|diffucoder|(^|[-_])d(iff)?llm|mdlm|bd3lm|mmada|wedlm|rnd1|lavida|"
    r"^dream|^dimple|^(a2d|sedd|gidd|udlm|coda|tidar|refusion|sdlm)($|[-_])|(^|[-_])dlm($|[-_])|^a2dfor|^coda(?=language)",
    re.IGNORECASE,
)
# Settings that only a diffusion language model has.
DIFFUSION_FIELD = re.compile(r"(^|_)(dlm|diffusion|mdm|bd3lm|mdlm)(_|$)")
RECURRENT_NAME = re.compile(r"^(rwkv\d*|mamba\d*|retnet|xlstm|falcon_mamba|hgrn\d*|gated_deltanet)$", re.IGNORECASE)
LM_HEAD = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|DoubleHeadsModel)$")
OTHER_HEAD = re.compile(
    r"(For|With)\w*(Classification|Reward|QuestionAnswering|MultipleChoice|Regression|Embedding|Retrieval|Ranking|"
    r"Reranking|Scor\w+|FeatureExtraction|ValueHead|TokenScoring)|RewardModel|Embedd?ing(Model)?$|Reranker",
    re.IGNORECASE,
)
BARE_MODEL = re.compile(r"^(?!.*(LMHead|DoubleHeads|CausalLM)).*Model$")


@dataclass(frozen=True)
class Reason:
    """Why a model is refused: a code of `REASON_CODES` and one sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class TextModel:
    """
    The language model that a config describes.

    Attributes:
        view ([`ConfigView`]): its config.
        layers ([`LayerCount`]): how many of its layers open.
        kinds (`list[str]`): the kind of every layer.
        text_only (`bool`): whether it is a part of a multimodal model.
        head_declared (`bool`): whether the config names a class with a language-model head.
    """

    view: ConfigView
    layers: LayerCount
    kinds: list[str]
    text_only: bool
    head_declared: bool

    @property
    def model_type(self) -> str:
        """The type of the text model."""
        return self.view.entry.model_type


def classify(config: dict[str, Any]) -> TextModel | list[Reason]:
    """
    What a config describes.

    Args:
        config (`dict`): a config with a `model_type`.

    Returns:
        [`TextModel`] where it is an autoregressive decoder, else the reasons why it is not.

    Raises:
        [`InvalidConfig`]: it describes nothing.
    """
    model_type = config["model_type"]
    if model_type == "mistral" and "layer_types" in config:
        model_type = "ministral"  # as AutoConfig does
    architectures = _architectures(config)
    if reason := _diffusion(config, architectures):
        return [reason]
    entry = entry_of(model_type)
    if entry is None:
        return _unknown_type(config, architectures)
    if reasons := _wrong_kind(entry, config, architectures):
        return reasons
    if entry.part_of is not None:
        where = f"only as a part of `{entry.part_of}`"
        return [_needs_code(config, f"transformers has `{model_type}` {where}, without a causal language model")]
    head = _wrong_head(entry, config, architectures)
    if entry.kind == "multimodal":
        found = _text_part(entry, config, bool(architectures))
    else:
        found = _decoder(entry, config, text_only=False, head_declared=bool(architectures))
    if head is not None:
        return [head, *found] if isinstance(found, list) else [head]
    return found


def _decoder(
    entry: TypeEntry, config: dict[str, Any], *, text_only: bool, head_declared: bool
) -> TextModel | list[Reason]:
    view = ConfigView(config, entry)
    if view.flag("is_encoder_decoder"):
        message = "`is_encoder_decoder` is true: it reads its input with an encoder."
        return [Reason("paradigm.encoder_decoder", message)]
    if view.flag("add_cross_attention"):
        message = "`add_cross_attention` is true: it is the decoder half of an encoder-decoder model."
        return [Reason("paradigm.encoder_decoder", message)]
    # Inside a multimodal model (PaliGemma) the switch only says that the prompt is read both ways.
    both_ways = view.knows("use_bidirectional_attention") and not text_only and view.get("use_bidirectional_attention")
    if view.get("is_causal") is False or both_ways in (True, "all"):
        message = "its attention is bidirectional already: it is an encoder, not an autoregressive model."
        return [Reason("paradigm.encoder", message)]
    kinds = layer_kinds(view)
    layers = count_layers(kinds)
    if not layers.open:
        message = f"none of its {layers.total} layers has attention, so there is nothing to open."
        return [Reason("paradigm.recurrent", message)]
    view.needed("hidden_size"), view.needed("vocab_size"), view.needed("num_attention_heads")
    return TextModel(view, layers, kinds, text_only, head_declared)


def _text_part(entry: TypeEntry, config: dict[str, Any], head_declared: bool) -> TextModel | list[Reason]:
    """The language model inside a multimodal config."""
    part: Any = config
    for key in entry.path:
        inner = part.get(key)
        if inner is None and "hidden_size" in part:
            break  # written before transformers nested the text model's fields
        if inner is not None and not isinstance(inner, dict):
            raise InvalidConfig(f"`{key}` is not an object.")
        part = inner or {}
    else:
        if part is not config and (reason := _diffusion(part, _architectures(part))):
            return [reason]
    if part is not config and "tie_word_embeddings" in config:
        part = {"tie_word_embeddings": config["tie_word_embeddings"]} | part  # stated once, for the whole model
    text_type = entry.text
    if entry.any_text and part is not config and part.get("model_type") is not None:
        text_type = part["model_type"]
    if not isinstance(text_type, str):
        raise InvalidConfig("the `model_type` of the text model is not text.")
    text = entry if text_type == entry.model_type else entry_of(text_type)
    if text is None and entry.renames_text:
        text = entry_of(entry.text)
    if text is None:
        message = f"transformers does not know the text model's type `{text_type[:60]}`"
        return [_needs_code(config | part, message)]
    if text.kind == "multimodal" and text is not entry:
        return _text_part(text, part, head_declared)
    if reasons := _wrong_kind(text, part, []):
        return reasons
    return _decoder(text, part, text_only=True, head_declared=head_declared)


def _wrong_kind(entry: TypeEntry, config: dict[str, Any], architectures: list[str]) -> list[Reason]:
    """The reasons that follow from the kind of the type alone."""
    name = entry.model_type
    head = [Reason("task.no_lm_head", _no_head(a)) for a in architectures[:1] if OTHER_HEAD.search(a)]
    match entry.kind:
        case "decoder" | "multimodal":
            return []
        case "encoder":
            declared = any(plain_name(a) in map(plain_name, entry.lm) for a in architectures)
            if declared and config.get("is_decoder") is True and not config.get("add_cross_attention"):
                return []  # an encoder's layers trained left to right
            message = f"`{name}` is an encoder: it reads both ways already and was not trained to write."
            return [Reason("paradigm.encoder", message), *head]
        case "encoder_decoder":
            message = f"`{name}` is an encoder-decoder model: its decoder cannot work without the encoder's output."
            return [Reason("paradigm.encoder_decoder", message), *head]
        case "recurrent":
            message = f"`{name}` is recurrent: it has no attention that could be opened."
            return [Reason("paradigm.recurrent", message), *head]
        case "diffusion":
            return [Reason("paradigm.diffusion", f"`{name}` is a diffusion language model already.")]
        case "vision":
            return [Reason("paradigm.vision", f"`{name}` is a vision model, not a language model.")]
        case "audio":
            return [Reason("task.no_lm_head", f"`{name}` is an audio model, not a language model.")]
        case "refused":
            return [Reason("architecture.unknown", f"`{name}` does not convert: {entry.note}.")]
        case _:
            return [Reason("task.no_lm_head", f"`{name}` has no language model that writes text.")]


def _wrong_head(entry: TypeEntry, config: dict[str, Any], architectures: list[str]) -> Reason | None:
    """Whether the declared class is something else than the type with a language-model head."""
    if not architectures:
        return None
    plain = [plain_name(re.sub(r"^(TF|Flax)(?=[A-Z])", "", name)) for name in architectures]
    if any(name in language_model_classes() for name in plain):
        return None
    first = architectures[0]
    # Qwen2.5-Omni declares a "model" that transformers has under another name, heads included.
    whole = entry.kind == "multimodal" and plain[0] == plain_name(entry.model_type) + "model"
    if whole and plain[0] not in map(plain_name, entry.base):
        return None
    if OTHER_HEAD.search(first) or BARE_MODEL.search(first):
        return Reason("task.no_lm_head", _no_head(first))
    # AutoModelForCausalLM goes by the type, so another spelling of a causal class is no hindrance. A class inside a
    # multimodal type is another matter: its config has another shape.
    if LM_HEAD.search(first) and entry.kind == "decoder":
        return None
    return _needs_code(config, f"transformers has no class {first[:60]} for `{entry.model_type}`")


def _unknown_type(config: dict[str, Any], architectures: list[str]) -> list[Reason]:
    """The reasons for a type that transformers does not know, whatever its name and classes still give away."""
    name = config["model_type"]
    reasons = []
    if RECURRENT_NAME.match(name):
        reasons.append(Reason("paradigm.recurrent", f"`{name[:60]}` is recurrent: it has no attention to open."))
    if config.get("is_encoder_decoder") is True:
        reasons.append(Reason("paradigm.encoder_decoder", "`is_encoder_decoder` is true."))
    if any(a.endswith("ForMaskedLM") for a in architectures):
        reasons.append(Reason("paradigm.encoder", "it was trained to fill in masked words, as encoders are."))
    reasons += [Reason("task.no_lm_head", _no_head(a)) for a in architectures[:1] if OTHER_HEAD.search(a)]
    reasons.append(_needs_code(config, f"transformers does not know the type `{name[:60]}`"))
    return reasons


def _needs_code(config: dict[str, Any], fact: str) -> Reason:
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict) and any(str(key).startswith(("AutoModel", "AutoConfig")) for key in auto_map):
        return Reason("code.remote", f"{fact}: it would run code from the checkpoint's own repository.")
    return Reason("architecture.unknown", f"{fact}.")


def _no_head(architecture: str) -> str:
    return (
        f"it was saved as {architecture[:60]}, without a language-model head: convert the language model it was made "
        "from instead."
    )


def _architectures(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures")
    if names is None:
        return []
    if isinstance(names, str):
        return [names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidConfig("`architectures` is not a list of class names.")
    return [name for name in names if name]


def _diffusion(config: dict[str, Any], architectures: list[str]) -> Reason | None:
    """Whether a config is a diffusion language model: by its names, or by settings that only such a model has."""
    model_type = config.get("model_type")
    auto_map = config.get("auto_map")
    files = [str(value).split(".")[-1] for value in auto_map.values()] if isinstance(auto_map, dict) else []
    names = [name for name in (model_type, *architectures, *files) if isinstance(name, str)]
    named = next((name for name in names if DIFFUSION_NAME.search(name)), None)
    if named is not None:
        return Reason("paradigm.diffusion", f"`{named[:60]}` is a diffusion language model already.")
    field = next((key for key in config if DIFFUSION_FIELD.search(key) and config[key] not in (None, False)), None)
    entry = entry_of(model_type) if isinstance(model_type, str) else None
    if field is not None and (entry is None or entry.kind == "decoder"):
        return Reason("paradigm.diffusion", f"`{field[:60]}` is set: it is a diffusion language model already.")
    # An autoregressive model has no use for a mask token in its config.
    masked = type(config.get("mask_token_id")) is int
    blocks = any(config.get(key) is not None for key in ("block_size", "block_length", "bd_size", "canvas_length"))
    writes = any(LM_HEAD.search(name) for name in architectures)
    fitting = entry is None or (entry.kind == "decoder" and (blocks or config.get("is_causal") is False))
    if masked and writes and fitting:
        message = "it writes text and has a mask token: it is a diffusion language model already."
        return Reason("paradigm.diffusion", message)
    return None
