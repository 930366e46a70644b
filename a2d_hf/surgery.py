"""From an autoregressive checkpoint to a converted one: load, wrap, prove, save.

Owns what `a2d convert` does to a model before any training. Writes only the folder it is asked to write, atomically.
Everything is computed in fp32, where the gates can ask for a difference of exactly 0, and stored in the parent's own
precision, tensor by tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .atomic_files import replaced_folder, write_json
from .conversion_settings import ConversionSettings
from .errors import BadInput
from .model_card import write_model_card
from .modeling.attention_pattern import AttentionPattern
from .modeling.gates import GateResult, identity_gate, mask_row_gate, reach_gate
from .modeling.modeling_a2d import A2DForMaskedDiffusion
from .source import Source


CHECKPOINT_MANIFEST = "a2d_manifest.json"


@dataclass
class Operation:
    """
    A conversion in memory.

    Attributes:
        model ([`A2DForMaskedDiffusion`]): the conversion, fp32.
        parent (`PreTrainedModel`): the autoregressive model, loaded on its own, fp32; spent by the identity gate.
        tokenizer (`PreTrainedTokenizerBase`): the parent's, with the mask token.
        dtypes (`dict[str, torch.dtype]`): the parent's own precision, by parameter name.
    """

    model: A2DForMaskedDiffusion
    parent: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtypes: dict[str, torch.dtype]


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


def first_sentence(error: BaseException) -> str:
    """The first line of an error's text, shortened, ending in a full stop."""
    text = str(error).strip().split("\n")[0].strip() or type(error).__name__
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


def operate(source: Source, settings: ConversionSettings) -> Operation:
    """
    Converts a checkpoint in memory.

    Args:
        source ([`Source`]): the parent, checked.
        settings ([`ConversionSettings`]): which conversion.

    Returns:
        [`Operation`]

    Raises:
        [`BadInput`]: the files do not load.
    """
    tokenizer = load_tokenizer(source.path, settings.trust_remote_code)
    parent = load_parent(source.path, settings.trust_remote_code, dtype="auto")
    dtypes = {name: parameter.dtype for name, parameter in parent.named_parameters()}
    parent.float()
    with explained_loading(source.path):
        model = A2DForMaskedDiffusion.from_pretrained(
            source.path,
            tokenizer=tokenizer,
            mask_token_id=settings.mask_token_id,
            **settings.model_fields,
            token_shift=settings.token_shift,
            sliding_window=settings.sliding_window,
            allow_hybrid=settings.allow_hybrid,
            trust_remote_code=settings.trust_remote_code,
            dtype=torch.float32,
            local_files_only=True,
            weights_only=True,
        )
    _check_blocks(model.eval(), settings)
    return Operation(model, parent, tokenizer, dtypes)


@torch.no_grad()
def _check_blocks(model: A2DForMaskedDiffusion, settings: ConversionSettings) -> None:
    """One pass over a doubled sequence, which recurrent layers and some old position embeddings cannot read."""
    if settings.objective != "bd3lm":
        return
    ids_1C = torch.zeros((1, 4), dtype=torch.long)
    try:
        model(input_ids=ids_1C, attention_pattern=AttentionPattern.bd3lm(1), logits_mask=ids_1C.bool())
    except ValueError as error:
        raise BadInput(f"--objective bd3lm cannot serve this model: {first_sentence(error)}") from error


def prove(operation: Operation, seed: int, report: Callable[[GateResult], None]) -> dict[str, dict[str, Any]]:
    """
    Runs the gates, in order, up to the first that fails.

    Args:
        operation ([`Operation`]): the conversion; its parent's embeddings are grown in place where the model's were.
        seed (`int`): draws the probes.
        report (`Callable[[GateResult], None]`): told each result as it comes.

    Returns:
        `dict`: results by gate name, ready for JSON.
    """
    results: dict[str, dict[str, Any]] = {}
    gates = (
        lambda: mask_row_gate(operation.model),
        lambda: identity_gate(operation.model, operation.parent, seed=seed),
        lambda: reach_gate(operation.model, seed=seed),
    )
    for gate in gates:
        result = gate()
        report(result)
        results[result.name] = result.to_dict()
        if not result.passed:
            break
    return results


def parameter_dtypes(model: A2DForMaskedDiffusion) -> dict[str, torch.dtype]:
    """The precision of every parameter of the parent inside."""
    return {name: parameter.dtype for name, parameter in model.backbone.named_parameters()}


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
    Writes a converted checkpoint with everything that travels with it: weights, code, tokenizer, generation settings,
    `a2d_manifest.json` and a model card. Replaces `target` in one step.

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
        tokenizer.save_pretrained(folder)
        write_json(folder / CHECKPOINT_MANIFEST, manifest)
        write_model_card(folder, manifest)
