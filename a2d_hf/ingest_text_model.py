"""The text model of a multimodal checkpoint: which class it is, and which stored tensor becomes which of its own.

Owns the choice of the class, the derivation of names, and the proof in numbers. No family is named here: both models
are built without storage, what transformers would load into the multimodal one is followed through its own renaming
rules, and the text model's tensors are found inside it by path and shape. Reads configurations, touches no file.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, initialization
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto import modeling_auto

from .errors import Refused, first_sentence
from .shrinking import shrink_config


# The auto classes that may know a multimodal model, the most complete first.
WHOLE_MAPPINGS = (
    "MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
)  # fmt: skip
PROBE_TOKENS = 40
# A shrunk copy that is larger than this has kept some tower at its size: too large to build only for a proof.
PROOF_PARAMETERS = 2 * 10**8


@dataclass
class TextModel:
    """
    The text model inside a multimodal one.

    Attributes:
        whole (`PreTrainedModel`): the multimodal model, without storage.
        model (`PreTrainedModel`): the causal language model that its text part is, without storage.
        inside (`dict[str, str]`): names in the text model -> names in the multimodal one.
        same_type (`bool`): whether transformers has a causal language model of the text part's own type.
    """

    whole: PreTrainedModel
    model: PreTrainedModel
    inside: dict[str, str]
    same_type: bool


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a configuration holds a text model's beside others."""
    return config.get_text_config(decoder=True) is not config


def find_text_model(config: PreTrainedConfig, name: str) -> tuple[TextModel, dict[str, Any]]:
    """
    The text model of a multimodal configuration, as a causal language model of transformers, and the proof that it is.

    Where transformers has none of the text part's own type, one whose type has the same words and no others
    (`qwen3_vl_text` -> `qwen3`) may stand in, if the proof shows in numbers that it computes the same.

    Args:
        config (`PreTrainedConfig`): the multimodal configuration.
        name (`str`): what to call the checkpoint.

    Returns:
        `tuple[TextModel, dict]`: the models, and `max_abs_diff` and `tokens` of [`prove_text_model`], or `not_run`.

    Raises:
        [`Refused`]: there is no such class, its tensors are not inside, or it computes something else.
    """
    text = config.get_text_config(decoder=True)
    whole = build_empty(whole_class(config, name), config)
    problem = f"transformers has no causal language model for its text part, `{text.model_type}`"
    for number, candidate in enumerate(text_configs(text)):
        candidate.tie_word_embeddings = _head_is_tied(whole)
        model = build_empty(AutoModelForCausalLM._model_mapping[type(candidate)], candidate)
        inside = _find_inside(model, whole)
        if not isinstance(inside, dict):
            problem = f"{inside} of {type(model).__name__} is not found in {type(whole).__name__}"
            continue
        proof = prove_text_model(config, number, name)
        own = candidate.model_type == text.model_type
        if proof.get("max_abs_diff") == 0.0 or (own and "not_run" in proof):
            return TextModel(whole, model, inside, own), proof
        problem = f"{type(model).__name__} does not compute what its text part does ({_outcome(proof)})"
    raise Refused(f"{name} is multimodal and its text model cannot be taken out alone: {problem}.")


def _outcome(proof: dict[str, Any]) -> str:
    if "not_run" in proof:
        return f"no comparison: {proof['not_run']}"
    return f"logits differ by {proof['max_abs_diff']:.2g} on a shrunk copy"


def text_configs(text: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Configurations of causal language models that a text part may be, the best first."""
    if type(text) in AutoModelForCausalLM._model_mapping:
        return [copy.deepcopy(text)]
    words = set(text.model_type.split("_"))
    kinds = [kind for kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if set(kind.split("_")) <= words]
    values = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        # Positions of text are the same on every axis, so sections of them change nothing; the proof shows it.
        values["rope_parameters"] = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    found = []
    for kind in sorted(kinds, key=len, reverse=True):
        candidate = AutoConfig.for_model(kind, **copy.deepcopy(values))
        found.append(candidate)
        # A switch that the text part does not have stands for something that it always or never does.
        for switch, value in candidate.to_dict().items():
            if isinstance(value, bool) and switch not in values:
                found.append(AutoConfig.for_model(kind, **copy.deepcopy(values), **{switch: not value}))
    return found


def whole_class(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class of the whole multimodal model."""
    for mapping_name in WHOLE_MAPPINGS:
        mapping = getattr(modeling_auto, mapping_name, None)
        if mapping is not None and type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    raise Refused(f"{name} is multimodal, and transformers has no class for all of it: its tensors cannot be named.")


def build_empty(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without storage, as `from_pretrained` makes one before it loads."""
    with torch.device("meta"), initialization.meta_device_safe_creation_ops(), initialization.no_init_weights():
        return model_class._from_config(copy.deepcopy(config))


def _head_is_tied(whole: PreTrainedModel) -> bool:
    head = whole.get_output_embeddings()
    names = {name for name, module in whole.named_modules() if module is head} if head is not None else set()
    return any(f"{name}.weight" in whole.all_tied_weights_keys for name in names)


def _body(model: PreTrainedModel) -> str:
    """The attribute, with its dot, under which a causal language model keeps everything but its head."""
    embeddings = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embeddings)
    return f"{path.split('.')[0]}."


def _find_inside(model: PreTrainedModel, whole: PreTrainedModel) -> dict[str, str] | str:
    """Where each of the text model's tensors is in the multimodal one; or the name of one that is nowhere."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    base = _body(model)
    body = [name for name in wanted if name.startswith(base)]
    found: dict[str, str] = {}
    if body:
        first = body[0].removeprefix(base)
        prefixes = [name.removesuffix(first) for name in there if name == first or name.endswith(f".{first}")]
        for prefix in sorted(prefixes, key=len):
            moved = {name: prefix + name.removeprefix(base) for name in body}
            unfit = [name for name in body if there.get(moved[name]) != wanted[name]]
            if not unfit:
                found |= moved
                break
        else:
            return unfit[0] if prefixes else body[0]
    heads = (model.get_output_embeddings(), whole.get_output_embeddings())
    if None not in heads:
        ours, theirs = (
            next(name for name, module in owner.named_modules() if module is head)
            for owner, head in zip((model, whole), heads, strict=True)
        )
        found |= {
            f"{ours}.{name}": f"{theirs}.{name}"
            for name, _ in heads[0].named_parameters()
            if there.get(f"{theirs}.{name}") == wanted[f"{ours}.{name}"]
        }
    for name in wanted.keys() - found.keys():
        if there.get(name) != wanted[name]:
            return name
        found[name] = name
    return found


class LoadingNames:
    """Under which name transformers would load a stored tensor into a model, by its own renaming rules."""

    def __init__(self, model: PreTrainedModel):
        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        self.base, self.state = model.base_model_prefix, model.state_dict()

    def __call__(self, stored: str) -> tuple[str, tuple[str, ...]]:
        """The first parameter that a stored tensor goes into, and the names of the operations on the way."""
        target, pattern = rename_source_key(stored, self.renamings, self.converters, self.base, self.state)
        if target not in self.state and stored in self.state:
            target, pattern = rename_source_key(stored, [], [], self.base, self.state)
        operations = () if pattern is None else tuple(type(op).__name__ for op in self.by_pattern[pattern].operations)
        return target, operations

    def is_alone(self, stored: str) -> bool:
        """Whether a stored tensor becomes exactly one parameter, with no other tensor's help."""
        pattern = rename_source_key(stored, self.renamings, self.converters, self.base, self.state)[1]
        rule = self.by_pattern.get(pattern)
        return rule is None or (len(rule.source_patterns) == len(rule.target_patterns) == 1 and "*" not in pattern)

    def targets(self, stored: str) -> list[str]:
        """Every parameter that a stored tensor goes into (a fused one is split into several)."""
        target, pattern = rename_source_key(stored, self.renamings, self.converters, self.base, self.state)
        if pattern is None or target not in self.state:
            return [self(stored)[0]]
        first, *others = self.by_pattern[pattern].target_patterns
        return [target, *(target.replace(first, other) for other in others)]


def names_in_text_model(text: TextModel, stored: list[str]) -> tuple[dict[str, str], set[str]]:
    """
    For every stored tensor of the text model: under which name the text model's own class would load it, with the same
    operations and into the tensor that corresponds. Where only the multimodal class has an operation on the way (a
    transposition of experts, say), [`converted_tensor`] has to do it.

    Args:
        text ([`TextModel`]): the two models.
        stored (`list[str]`): the names in the multimodal checkpoint.

    Returns:
        `tuple[dict[str, str], set[str]]`: stored name -> new name (what is not in it belongs to the rest of the
        model), and the stored names whose numbers need the multimodal class's operations.

    Raises:
        [`Refused`]: a stored text tensor that no name makes the text model load.
    """
    into_whole, into_text = LoadingNames(text.whole), LoadingNames(text.model)
    outside = {inside: name for name, inside in text.inside.items()}
    base = _body(text.model)
    renamed: dict[str, str] = {}
    converted: set[str] = set()
    for name in sorted(stored):
        target, operations = into_whole(name)
        if target not in outside:
            continue
        parts = name.split(".")
        tails = [".".join(parts[cut:]) for cut in range(len(parts))]
        candidates = [lead + tail for tail in tails for lead in ("", base)]
        wanted = (outside[target], operations)
        fitting = [candidate for candidate in candidates if into_text(candidate) == wanted]
        if not fitting and (not operations or into_whole.is_alone(name)) and into_text(outside[target])[1] == ():
            converted |= {name} if operations else set()
            fitting = [outside[target]]
        if not fitting:
            raise Refused(
                f"{name} is a tensor of the text model that {type(text.model).__name__} cannot load under any name: "
                "convert a text-only checkpoint instead."
            )
        # The text model's own spelling where it is one of them: the shortest that begins as its parameters do.
        renamed[name] = min(fitting, key=lambda new: (not new.startswith(base) and outside[target].startswith(base),
                                                      new.count(".")))  # fmt: skip
    return renamed, converted


def converted_tensor(text: TextModel, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A stored tensor after the operations that the multimodal class performs on it while loading."""
    names = LoadingNames(text.whole)
    target, pattern = rename_source_key(name, names.renamings, names.converters, names.base, names.state)
    rule = copy.deepcopy(names.by_pattern[pattern])
    rule.add_tensor(target, name, pattern, lambda: tensor)
    result = rule.convert(target, model=text.whole, config=text.whole.config)[target]
    return result[0] if isinstance(result, list) else result


def missing_tensors(model: PreTrainedModel, stored: list[str]) -> list[str]:
    """What a model would be without if these stored tensors were loaded into it."""
    names = LoadingNames(model)
    reached = {target for name in stored for target in names.targets(name)}
    for target, source in (model.all_tied_weights_keys or {}).items():
        if target in reached or source in reached:
            reached |= {target, source}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return sorted(
        name for name in names.state.keys() - reached if not any(pattern.search(name) for pattern in ignored)
    )


def unused_tensors(model: PreTrainedModel, stored: list[str]) -> set[str]:
    """The stored tensors that a model would not load."""
    names = LoadingNames(model)
    return {name for name in stored if not any(target in names.state for target in names.targets(name))}


def prove_text_model(config: PreTrainedConfig, number: int, name: str) -> dict[str, Any]:
    """
    Shows in numbers that the text model alone computes what the multimodal one does on text: both shrunk, with the
    same random weights, the largest difference between their logits.

    Args:
        config (`PreTrainedConfig`): the multimodal configuration.
        number (`int`): which of [`text_configs`].
        name (`str`): what to call the checkpoint.

    Returns:
        `dict`: `max_abs_diff` and `tokens`; or `not_run`, why the shrunk multimodal model does not run.
    """
    try:
        small = shrink_config(config)
        text_config = small.get_text_config(decoder=True)
        fit_sections(text_config)
        kind = whole_class(small, name)
        if (size := build_empty(kind, small).num_parameters()) > PROOF_PARAMETERS:
            return {"not_run": f"its shrunk copy still has {size:,} parameters"}
        whole = kind._from_config(small, dtype=torch.float32).eval()
        candidate = text_configs(text_config)[number]
        candidate.tie_word_embeddings = _head_is_tied(whole)
        model = AutoModelForCausalLM._model_mapping[type(candidate)]._from_config(candidate, dtype=torch.float32)
        inside = _find_inside(model, whole)
        if not isinstance(inside, dict):
            return {"not_run": f"{inside} is not found in the shrunk copy"}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for parameter in whole.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=0.15)
            weights = whole.state_dict()
            model.eval().load_state_dict({own: weights[theirs] for own, theirs in inside.items()})
            # Ids in the middle of the vocabulary: the first and the last are where placeholders of images are.
            vocabulary = candidate.get_text_config().vocab_size
            ids = torch.randint(vocabulary // 4, vocabulary // 2, (1, PROBE_TOKENS))
            difference = (whole(input_ids=ids).logits - model(input_ids=ids).logits).abs().max().item()
    except Exception as error:  # whatever a shrunk vision tower or a tower of sound fails with
        return {"not_run": f"the shrunk copy does not run: {first_sentence(error)}"}
    return {"max_abs_diff": difference, "tokens": PROBE_TOKENS}


def fit_sections(text: PreTrainedConfig) -> None:
    """Sections of a rotary embedding must fill what is left of a head, in place."""
    rope = text.to_dict().get("rope_parameters") or {}
    sections = rope.get("mrope_section")
    if sections:
        head = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
        half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        fitted = [section * half // sum(sections) for section in sections]
        fitted[0] += half - sum(fitted)
        text.rope_parameters["mrope_section"] = fitted
