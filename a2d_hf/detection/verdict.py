"""The answer to "does this model convert?".

Owns `detect` and the object it returns; asks the other rooms of this house and puts their answers together. Whatever
stands in a config file, the answer is a verdict with a reason, never a traceback.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .attention_shape import read_experts, read_heads
from .capabilities import capabilities
from .config_reading import InvalidConfig, Source, find_source, read_config
from .layers import LayerCount
from .mask_token import MaskTokenPlan, plan_mask_token
from .paradigm import Reason, TextModel, classify
from .parameters import count_parameters
from .plan import find_gpu, make_plan
from .quantization import original_name, read_quantization
from .type_table import proven_types
from .weights import Weights, inspect_weights


VERDICTS = ("supported", "hybrid", "unsupported")


@dataclass(frozen=True)
class Detection:
    """
    What `a2d detect` found out.

    Attributes:
        source (`str`): what was asked about.
        verdict (`str`): `supported`; `hybrid` (converts, but some layers must stay causal); or `unsupported`.
        reasons (`list[Reason]`): why it is unsupported, each with a code of `REASON_CODES`; empty otherwise.
        capabilities (`list[str]`): what the model is built of.
        model_type (`str`, *optional*): the type of the text model, or what the config states.
        text_only (`bool`): whether it is the text model of a multimodal one that converts, alone.
        inferred (`bool`): whether the verdict rests on the rules alone, because the project's own tests have not yet
            proven this type, or because the config does not name its class.
        layers ([`LayerCount`], *optional*): how many layers open.
        weights ([`Weights`]): the weights beside the config.
        mask_token ([`MaskTokenPlan`]): the token that would be the mask.
        plan (`dict`, *optional*): memory, tokens and hours.
        bad_input (`bool`): whether the files themselves are at fault.
    """

    source: str
    verdict: str
    reasons: list[Reason] = field(default_factory=list)
    capabilities: list[str] = field(default_factory=list)
    model_type: str | None = None
    text_only: bool = False
    inferred: bool = False
    layers: LayerCount | None = None
    weights: Weights = field(default_factory=lambda: Weights(present=False))
    mask_token: MaskTokenPlan = field(default_factory=MaskTokenPlan)
    plan: dict[str, Any] | None = None
    bad_input: bool = False

    @property
    def exit_code(self) -> int:
        """0 where it converts, 1 where it is refused, 2 where the files are at fault."""
        if self.bad_input:
            return 2
        return 1 if self.verdict == "unsupported" else 0

    def to_dict(self) -> dict[str, Any]:
        """The object that `a2d detect --json` prints."""
        layers = None
        if self.layers is not None:
            layers = {
                "open": self.layers.open,
                "total": self.layers.total,
                "summary": self.layers.sentence(),
            }
        return {
            "source": self.source,
            "model_type": self.model_type,
            "verdict": self.verdict,
            "reasons": [{"code": reason.code, "message": reason.message} for reason in self.reasons],
            "capabilities": list(self.capabilities),
            "text_only": self.text_only,
            "inferred": self.inferred,
            "layers": layers,
            "weights": self.weights.to_dict(),
            "mask_token": self.mask_token.to_dict(),
            "plan": self.plan,
        }


def detect(src: str | Path, *, gpu: str | None = None) -> Detection:
    """
    Says whether and how a model converts, from its `config.json`.

    Args:
        src (`str` or `Path`):
            A folder with a `config.json`, a config file, or a Hub id that is in the local cache.
        gpu (`str`, *optional*):
            A GPU to plan hours for, for example `"h100"`.

    Returns:
        [`Detection`]

    Raises:
        [`BadInput`]: `src` names nothing that could be a model, or `gpu` is not known.

    Example:

    ```python
    >>> from a2d_hf import detect

    >>> detect("Qwen/Qwen3-0.6B").verdict
    'supported'
    ```
    """
    find_gpu(gpu)
    source = find_source(src)
    if source.config_file is None:
        return _without_config(source)
    config: dict[str, Any] = {}
    try:
        config = read_config(source.config_file)
        return _with_config(source, config, gpu)
    except InvalidConfig as error:
        model_type = config.get("model_type")
        return Detection(
            source.name,
            "unsupported",
            [Reason("config.invalid", str(error))],
            model_type=model_type if isinstance(model_type, str) else None,
            bad_input=True,
        )


def _without_config(source: Source) -> Detection:
    """A folder without `config.json`: refused where its weights say why there is none, bad input otherwise."""
    if (source.folder / "model_index.json").is_file():
        raise BadInput(f"SRC {source.name} is a pipeline of diffusers, not a language model: it has no config.json.")
    weights = inspect_weights(source, {})
    if weights.foreign is None:
        raise BadInput(f"SRC {source.name} has no config.json: give the folder of a transformers model.")
    return Detection(source.name, "unsupported", [Reason("weights.format", weights.foreign)], weights=weights)


def _with_config(source: Source, config: dict[str, Any], gpu: str | None) -> Detection:
    weights = inspect_weights(source, config)
    found = classify(config)
    if not isinstance(found, TextModel):
        return Detection(source.name, "unsupported", found, model_type=config["model_type"], weights=weights)
    view, kinds = found.view, found.kinds
    quantization = read_quantization(config, view.raw, source.folder)
    heads = read_heads(view)
    experts = read_experts(view, kinds)
    parameters = count_parameters(view, kinds, heads, experts)
    tags = capabilities(view, kinds, heads, experts, quantization, config)
    if weights.format == "pytorch":
        tags.append("ingest.pickle")

    reasons = []
    if quantization is not None and not quantization.dequantizable:
        original = original_name(source.folder, [source.repo_id, _name(config), source.name])
        reasons.append(Reason("weights.quantized", quantization.refusal(original)))
    elif quantization is None and weights.quantized:
        message = "its tensors are quantized, but no `quantization_config` says how: convert their original instead."
        reasons.append(Reason("weights.quantized", message))
    if weights.foreign or weights.broken:
        reasons.append(Reason("weights.format", weights.foreign or weights.broken))

    verdict = "unsupported" if reasons else "hybrid" if found.layers.is_hybrid else "supported"
    # The count of a multimodal checkpoint's file includes what does not convert.
    stored = None if found.text_only else weights.parameters
    return Detection(
        source=source.name,
        verdict=verdict,
        reasons=reasons,
        capabilities=tags,
        model_type=found.model_type,
        text_only=found.text_only,
        inferred=not found.head_declared or found.model_type not in proven_types(),
        layers=found.layers,
        weights=weights,
        mask_token=plan_mask_token(source.folder, view.needed("vocab_size")),
        plan=None if reasons else make_plan(view, kinds, found.layers, heads, experts, parameters, stored, gpu),
        bad_input=weights.broken is not None,
    )


def _name(config: dict[str, Any]) -> str | None:
    name = config.get("_name_or_path")
    return name if isinstance(name, str) else None
