"""A model larger than memory, run one decoder layer at a time from its weight files.

Owns the empty model (on the meta device), the check that a folder's tensors fill it, and the hooks that bring in the
weights of a layer before it runs and drop them after. Every tensor goes through transformers' own loader, so renamed,
fused and merged layouts (experts among them) arrive as `from_pretrained` would leave them. No family is named here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import meta_device_safe_creation_ops
from transformers.modeling_utils import LoadStateDictConfig

from .errors import BadInput
from .modeling.layer_edges import decoder_layers
from .modeling.parent_models import build_parent
from .weight_files import StoredTensor


def empty_parent(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with shapes and no numbers: its parameters are on the meta device, its computed buffers in memory."""
    before = config.dtype
    config.dtype = dtype
    try:
        with torch.device("meta"), meta_device_safe_creation_ops():
            model = build_parent(config)
    finally:
        config.dtype = before
    for tensor in (*model.parameters(), *(buffer for _, buffer in _persistent_buffers(model))):
        tensor._is_hf_initialized = True  # it comes from a file, or stays empty
    model._move_missing_keys_from_meta_to_device(set(), {"": "cpu"}, None, None)
    model._initialize_missing_keys(False)
    return model.eval()


def _persistent_buffers(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in computed]


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, Any], device: str, dtype: torch.dtype | None) -> Any:
    """
    Brings stored tensors into a model, by transformers' own rules.

    Args:
        model (`PreTrainedModel`): the parent's class.
        tensors (`Mapping[str, Any]`): tensors, or what gives one when indexed with `...`, by their names in the files.
        device (`str`): where they go.
        dtype (`torch.dtype`, *optional*): to what precision; the model's own by default.

    Returns:
        transformers' loading report: `missing_keys`, `mismatched_keys`, `conversion_errors`, ...
    """
    settings = LoadStateDictConfig(
        device_map={"": device}, dtype=dtype, weight_mapping=get_model_conversion_mapping(model)
    )
    report, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings)
    return report


def names_in_model(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """
    What each stored tensor becomes part of: its name in the files -> a parameter's name in the model. Tensors that
    the model has no use for are left out.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    parameters = model.state_dict()
    found = {}
    for name in stored:
        inside, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if inside not in parameters:
            inside, _ = rename_source_key(name, [], [], model.base_model_prefix, parameters)
        if inside in parameters:
            found[name] = inside
    return found


def check_complete(model: PreTrainedModel, stored: Mapping[str, StoredTensor], where: Any) -> None:
    """
    Loads shapes instead of weights, through every renaming and merging, and sees whether anything is left over.

    Args:
        model (`PreTrainedModel`): from [`empty_parent`].
        stored (`Mapping[str, StoredTensor]`): the folder's tensors.
        where: what to call the folder.

    Raises:
        [`BadInput`]: a tensor is missing, or of another shape than config.json says.
    """
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in stored.items()}
    report = load_tensors(model, shapes, "meta", None)
    if report.mismatched_keys:
        name, found, wanted = min(report.mismatched_keys)
        raise BadInput(
            f"{where} cannot be loaded: {name} has the shape {tuple(found)}, config.json asks for {tuple(wanted)}."
        )
    if report.conversion_errors:
        name, error = min(report.conversion_errors.items())
        raise BadInput(f"{where} cannot be loaded: {name}: {str(error).strip().splitlines()[-1]}")
    model._adjust_missing_and_unexpected_keys(report)
    there = {id(p) for n, p in _all_parameters(model) if n not in report.missing_keys}
    tied = model.all_tied_weights_keys or {}
    partners = {name: [tied[name]] for name in tied}
    for target, source in tied.items():
        partners.setdefault(source, []).append(target)
    missing = sorted(
        name
        for name in report.missing_keys
        if id(dict(_all_parameters(model)).get(name)) not in there
        and not any(partner not in report.missing_keys for partner in partners.get(name, []))
    )
    if missing:
        raise BadInput(
            f"The weights in {where} lack {len(missing)} tensor(s) that config.json asks for, the first is "
            f"{missing[0]}: this is not the whole model."
        )


def _all_parameters(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Parameters under every name they have: a tied one has two."""
    return list(model.named_parameters(remove_duplicate=False))


def embedding_names(model: PreTrainedModel) -> list[list[str]]:
    """
    Every name of the input embedding, of the untied output one, and of its bias, in the order of
    [`~mask_token.embedding_matrices`]; a tied head's names count as the embedding's.
    """
    head = model.get_output_embeddings()
    groups: list[list[str]] = []
    tied = model.all_tied_weights_keys or {}
    of = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    own = f"{of[id(model.get_input_embeddings())]}.weight"
    groups.append([own])
    if head is not None:
        name = of[id(head)]
        joined = head.weight is model.get_input_embeddings().weight or tied.get(f"{name}.weight") == own
        if joined or tied.get(own) == f"{name}.weight":
            groups[0].append(f"{name}.weight")
        else:
            groups.append([f"{name}.weight"])
        if head.bias is not None:
            groups.append([f"{name}.bias"])
    return groups


class LayerStream:
    """
    Makes an empty parent runnable: its layers are in memory only while they run.

    What lies outside the layers (norms, positions) is loaded for good; of the embedding matrices, only the rows of a
    small probe vocabulary: token i of the running model is the model's token `vocabulary[i]`.

    Args:
        model (`PreTrainedModel`): from [`empty_parent`]; changed in place.
        stored (`Mapping[str, StoredTensor]`): the folder's tensors.
        vocabulary (`list[int]`): the tokens that a probe may use.
        advance (`Callable[[int], None]`): told `1` whenever a layer has run.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): precision of the computation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stored: Mapping[str, StoredTensor],
        vocabulary: list[int],
        advance: Callable[[int], None],
        dtype: torch.dtype = torch.float32,
    ):
        self.model, self.dtype, self.advance = model, dtype, advance
        self.resident_bytes = 0
        inside = names_in_model(model, stored)
        matrices = embedding_names(model)
        in_matrices = {name for group in matrices for name in group}
        shared = {name for pair in (model.all_tied_weights_keys or {}).items() for name in pair} - in_matrices
        layers = decoder_layers(model)
        self.of_layer: dict[str, dict[str, StoredTensor]] = {name: {} for name, _ in layers}
        resident: dict[str, StoredTensor] = {}
        for name, target in inside.items():
            if target in in_matrices:
                continue
            layer = next((prefix for prefix in self.of_layer if target.startswith(f"{prefix}.")), None)
            # Weights that two layers share are never dropped.
            (resident if layer is None or target in shared else self.of_layer[layer])[name] = stored[name]
        for group in matrices:
            source = next(stored[name] for name, target in inside.items() if target in group)
            self._set_rows(group, source, vocabulary)
        if resident:
            load_tensors(model, resident, "cpu", dtype)
        if shared:
            model.tie_weights()
        self.kept = {id(parameter) for parameter in model.parameters() if not parameter.is_meta}
        self.handles = []
        for name, module in layers:
            self.handles.append(module.register_forward_pre_hook(self._bring(name)))
            self.handles.append(module.register_forward_hook(self._drop(), always_call=True))
        empty = [
            name
            for name, parameter in _all_parameters(model)
            if parameter.is_meta and not any(name.startswith(f"{prefix}.") for prefix in self.of_layer)
        ]
        if empty:
            raise BadInput(f"{empty[0]} is in no weight file.")

    def _set_rows(self, names: list[str], source: StoredTensor, vocabulary: list[int]) -> None:
        rows = torch.nn.Parameter(source.rows(vocabulary).to(self.dtype), requires_grad=False)
        for name in names:
            path, _, kind = name.rpartition(".")
            module = self.model.get_submodule(path)
            setattr(module, kind, rows)
            if isinstance(module, torch.nn.Embedding):
                module.num_embeddings, module.padding_idx = len(vocabulary), None

    def _bring(self, name: str) -> Callable:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            load_tensors(self.model, self.of_layer[name], "cpu", self.dtype)
            empty = next((own for own, parameter in module.named_parameters() if parameter.is_meta), None)
            if empty is not None:
                raise BadInput(f"{name}.{empty} is in no weight file.")

        return hook

    def _drop(self) -> Callable:
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> None:
            for part in module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    if id(parameter) not in self.kept:
                        empty = torch.empty_like(parameter, device="meta")
                        setattr(part, name, torch.nn.Parameter(empty, requires_grad=False))
            self.advance(1)

        return hook

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self.handles:
            handle.remove()
