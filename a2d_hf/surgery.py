"""From an autoregressive checkpoint to a converted one: written, loaded back, proven.

Owns what `a2d convert` does to a model before any training, and how a trained one is saved. The conversion is made of
files (zero_copy.py) and described from a model without numbers; what the gates then judge is what was written. Writes
only the folder it is given. The gates compute in fp32, where they can ask for a difference of exactly 0; what is
stored keeps the parent's own precision, tensor by tensor.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from .atomic_files import replaced_folder, write_json
from .console import Console
from .conversion_settings import ConversionSettings
from .errors import BadInput, first_sentence
from .layer_streaming import empty_parent
from .machine_memory import available_memory, peak_memory
from .model_card import write_model_card
from .modeling.checkpoint_writing import write_description
from .modeling.gates import GateResult, identity_gate, mask_row_gate, reach_gate
from .modeling.mask_token import MaskToken
from .modeling.modeling_a2d import A2DForMaskedDiffusion
from .modeling.parent_models import check_causal_lm
from .source import Source
from .streamed_gates import StreamedPair, check_blocks, shrunk_gates, streamed_identity
from .weight_files import stored_tensors
from .zero_copy import check_weights, plan_surgery, stored_matrices, write_weights


CHECKPOINT_MANIFEST = "a2d_manifest.json"


@dataclass
class Operation:
    """
    A conversion whose weights are written, and what it takes to prove and to describe it.

    Attributes:
        source ([`Source`]): the parent.
        folder (`Path`): where the conversion is being written.
        description ([`A2DForMaskedDiffusion`]): the conversion without numbers, in the precision that is stored.
        parent_config (`PreTrainedConfig`): the parent's configuration, untouched.
        tokenizer (`PreTrainedTokenizerBase`): the parent's, with the mask token.
        mask_token ([`MaskToken`]): the choice.
        weights (`dict`): what became of each file and tensor, for the manifest.
        mode (`str`): `full` or `streamed`: how the gates run.
        seconds (`float`): what writing the weights took.
        peak_memory (`int`): most bytes in memory until they were written.
        model ([`A2DForMaskedDiffusion`], *optional*): the conversion as read back from `folder`, fp32; only in mode
            `full`.
        parent (`PreTrainedModel`, *optional*): the autoregressive model, fp32, spent by the identity gate; likewise.
    """

    source: Source
    folder: Path
    description: A2DForMaskedDiffusion
    parent_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    mask_token: MaskToken
    weights: dict[str, Any]
    mode: str
    seconds: float
    peak_memory: int
    model: A2DForMaskedDiffusion | None = None
    parent: PreTrainedModel | None = None

    @property
    def parameters(self) -> int:
        """How many numbers the conversion has."""
        return sum(parameter.numel() for parameter in self.description.parameters())


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or [`BadInput`]."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # each tokenizer class fails in its own way; all of them mean the files are wrong
        raise BadInput(f"The tokenizer in {path} cannot be loaded: {first_sentence(error)}") from error


def load_parent(path: Path, trust_remote_code: bool = False, dtype: torch.dtype | str = torch.float32):
    """
    Loads an autoregressive checkpoint and makes sure that no weight was made up.

    Args:
        path (`Path`): the folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run Python code found there.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): precision; `"auto"` for its own.

    Returns:
        `PreTrainedModel`, in eval mode.

    Raises:
        [`BadInput`]: corrupt, of another shape than config.json says, or with weights missing.
    """
    with explained_loading(path):
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            local_files_only=True,
            weights_only=True,
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise BadInput(
            f"The weights in {path} lack {len(missing)} tensor(s) that config.json asks for, the first is "
            f"{missing[0]}: this is not the whole model."
        )
    return model.eval()


class explained_loading:
    """Turns what the loaders raise on bad files into [`BadInput`]. Out of memory is not bad input."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if isinstance(error, BadInput) or not isinstance(error, Exception) or isinstance(error, MemoryError):
            return
        if isinstance(error, UnpicklingError) or "Weights only load failed" in str(error):
            raise BadInput(
                f"The weights in {self.path} are a pickle that holds more than tensors, which could run code: convert "
                "them to safetensors first."
            ) from error
        raise BadInput(f"{self.path} cannot be loaded: {first_sentence(error)}") from error


def operate(source: Source, settings: ConversionSettings, folder: Path, console: Console) -> Operation:
    """
    Writes the weights of a conversion and, where both fit into memory, loads it and its parent for the gates.

    Args:
        source ([`Source`]): the parent, checked.
        settings ([`ConversionSettings`]): which conversion.
        folder (`Path`): where to write; the caller makes it appear when all is proven.
        console ([`Console`]): for the progress.

    Returns:
        [`Operation`]

    Raises:
        [`BadInput`]: the files do not load.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(source.path, settings.trust_remote_code)
    with explained_loading(source.path):
        parent_config = AutoConfig.from_pretrained(
            source.path, trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
        check_causal_lm(parent_config, settings.allow_hybrid)
    description, mask_token, weights = _write_weights(source, settings, folder, console, tokenizer, parent_config)
    description.mask_token = mask_token
    description.adjust_generation_fn(None, False, None, source.path, local_files_only=True)
    operation = Operation(
        source, folder, description, parent_config, tokenizer, mask_token, weights,
        mode="full", seconds=time.monotonic() - started, peak_memory=peak_memory(),
    )  # fmt: skip
    if settings.gates == "streamed" or (settings.gates == "auto" and not _fits(operation.parameters)):
        operation.mode = "streamed"
        return operation
    operation.parent = load_parent(source.path, settings.trust_remote_code)
    write_description(description, folder)
    with explained_loading(folder):
        operation.model = A2DForMaskedDiffusion.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, weights_only=True
        ).eval()
    operation.model.mask_token = mask_token
    if settings.objective == "bd3lm":
        check_blocks(operation.model)
    return operation


def _fits(parameters: int) -> bool:
    """Whether parent and conversion, both in fp32, leave half of the memory free."""
    return 2 * 4 * parameters < available_memory() / 2


def _write_weights(
    source: Source,
    settings: ConversionSettings,
    folder: Path,
    console: Console,
    tokenizer: PreTrainedTokenizerBase,
    parent_config: PreTrainedConfig,
) -> tuple[A2DForMaskedDiffusion, MaskToken, dict[str, Any]]:
    config = copy.deepcopy(parent_config)
    stored = stored_tensors(source.path, source.weights).values()
    own = next((tensor.dtype for tensor in stored if tensor.dtype.is_floating_point), torch.float32)
    with explained_loading(source.path):
        parent = empty_parent(config, config.dtype or own)
        check_weights(source, parent)
        description = _wrap(parent, settings, tokenizer)
    surgery = plan_surgery(source, description)
    with console.progress("linking the weights", sum(t.bytes for t in stored), "byte") as bar:
        weights = write_weights(surgery, folder, settings.copy, bar.advance)
    return description, surgery.mask_token, weights


def _wrap(
    parent: PreTrainedModel, settings: ConversionSettings, tokenizer: PreTrainedTokenizerBase
) -> A2DForMaskedDiffusion:
    return A2DForMaskedDiffusion.from_causal_lm(
        parent,
        tokenizer=tokenizer,
        mask_token_id=settings.mask_token_id,
        allow_hybrid=settings.allow_hybrid,
        **settings.model_fields,
        token_shift=settings.token_shift,
        sliding_window=settings.sliding_window,
    )


def prove(
    operation: Operation, seed: int, report: Callable[[GateResult], None], console: Console
) -> dict[str, dict[str, Any]]:
    """
    Runs the gates, in order, up to the first that fails.

    Args:
        operation ([`Operation`]): the conversion; its parent's embeddings are grown in place where the model's were.
        seed (`int`): draws the probes.
        report (`Callable[[GateResult], None]`): told each result as it comes.
        console ([`Console`]): for the progress of what takes long.

    Returns:
        `dict`: results by gate name, ready for JSON.
    """
    results: dict[str, dict[str, Any]] = {}
    for gate in (_mask_row, *((_identity, _reach) if operation.mode == "full" else (_streamed,))):
        for result in gate(operation, seed, console):
            report(result)
            results[result.name] = result.to_dict()
            if not result.passed:
                return results
    return results


def _mask_row(operation: Operation, seed: int, console: Console) -> list[GateResult]:
    # The rows as they were written, in the precision that they were written in.
    return [mask_row_gate(operation.description, stored_matrices(operation.folder, operation.description))]


def _identity(operation: Operation, seed: int, console: Console) -> list[GateResult]:
    result = identity_gate(operation.model, operation.parent, seed=seed)
    result.detail = {"mode": "full", **result.detail}
    return [result]


def _reach(operation: Operation, seed: int, console: Console) -> list[GateResult]:
    result = reach_gate(operation.model, seed=seed)
    result.detail = {"mode": "full", **result.detail}
    return [result]


def _streamed(operation: Operation, seed: int, console: Console) -> list[GateResult]:
    identity, reach = shrunk_gates(operation.description.config, operation.parent_config, seed)
    if not identity.passed:
        return [identity]
    pair = StreamedPair(
        operation.source,
        operation.folder,
        operation.description.config,
        operation.parent_config,
        operation.mask_token,
        seed,
    )
    with console.progress("identity on the real weights", pair.steps, "layer") as bar:
        return [streamed_identity(identity, pair.compare(bar.advance)), reach]


def finish_checkpoint(operation: Operation, manifest: dict[str, Any]) -> None:
    """
    Writes what travels with the weights that stand in the operation's folder: configuration, code, tokenizer,
    generation settings, `a2d_manifest.json` and a model card.

    Args:
        operation ([`Operation`]): proven.
        manifest (`dict`): provenance; no times and no paths, so that the same conversion gives the same bytes.
    """
    model = operation.description
    # Where the parent lay on this machine is no business of the checkpoint's.
    model.config.text_config._name_or_path = manifest["source"]["name"]
    write_description(model, operation.folder)
    _write_companions(operation.folder, operation.tokenizer, manifest)


def _write_companions(folder: Path, tokenizer: PreTrainedTokenizerBase, manifest: dict[str, Any]) -> None:
    tokenizer.save_pretrained(folder)
    write_json(folder / CHECKPOINT_MANIFEST, manifest)
    write_model_card(folder, manifest)


def restore_dtypes(model: A2DForMaskedDiffusion, dtypes: dict[str, torch.dtype]) -> None:
    """Brings every parameter back to the precision of `dtypes`, in place; exact for what was not trained."""
    for name, parameter in model.backbone.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def save_checkpoint(
    target: Path,
    model: A2DForMaskedDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    dtypes: dict[str, torch.dtype],
    manifest: dict[str, Any],
) -> None:
    """
    Writes a trained checkpoint with everything that travels with it: weights, code, tokenizer, generation settings,
    `a2d_manifest.json` and a model card. Replaces `target` in one step, its files with it: those that the untrained
    conversion shares with its parent are let go, never written to.

    Args:
        target (`Path`): the folder.
        model ([`A2DForMaskedDiffusion`]): what to save; its parameters are brought to `dtypes` in place.
        tokenizer (`PreTrainedTokenizerBase`): with the mask token.
        dtypes (`dict[str, torch.dtype]`): precision to store.
        manifest (`dict`): provenance; no times and no paths, so that the same conversion gives the same bytes.
    """
    restore_dtypes(model, dtypes)
    # Where the parent lay on this machine is no business of the checkpoint's.
    model.config.text_config._name_or_path = manifest["source"]["name"]
    with replaced_folder(target) as folder:
        model.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # written for the owner alone; the rest of the folder is not
            file.chmod((folder / "config.json").stat().st_mode)
        _write_companions(folder, tokenizer, manifest)
