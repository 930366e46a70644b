"""The surgery itself: a converted checkpoint's weight files made of the parent's, without copying them.

Owns the weight files of an untrained conversion. They are hard links to the parent's own, under the parent's own names
and in its own layout; only a file that holds a row of the mask token that is not trained is written anew, in small
pieces. Proves afterwards, from the files, that nothing else differs. Writes only the folder it is asked to fill.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .atomic_files import write_json
from .errors import GateFailed, Refused
from .layer_streaming import check_complete, embedding_names, names_in_model
from .modeling.mask_token import MaskToken, mean_of_trained_rows, rows_are_untrained, written_rows
from .modeling.modeling_a2d import A2DForMaskedDiffusion
from .source import SAFETENSORS_INDEX, Source, find_weights
from .weight_files import (
    NewRows,
    StoredTensor,
    differing_rows,
    rewrite_file,
    same_file,
    share_file,
    stored_tensors,
)


@dataclass(frozen=True)
class Surgery:
    """
    What a conversion does to weight files, worked out before anything is written.

    Attributes:
        source ([`Source`]): the parent.
        stored (`Mapping[str, StoredTensor]`): its tensors.
        matrices (`list[list[str]]`): the stored names of the input embedding, of the untied output one and its bias.
        mask_token ([`MaskToken`]): the choice, complete.
        changes (`dict[str, NewRows]`): the rows to write, by stored name; empty where the mask token is trained.
    """

    source: Source
    stored: Mapping[str, StoredTensor]
    matrices: list[list[str]]
    mask_token: MaskToken
    changes: dict[str, NewRows]


def plan_surgery(source: Source, model: A2DForMaskedDiffusion) -> Surgery:
    """
    Works out what has to be written.

    Args:
        source ([`Source`]): a parent in safetensors files.
        model ([`A2DForMaskedDiffusion`]): the conversion, around [`~layer_streaming.empty_parent`], its embeddings
            grown already.

    Raises:
        [`BadInput`]: the files do not hold the whole model.
        [`Refused`]: an embedding is stored in parts, or fused with something else.
    """
    stored = stored_tensors(source.path, source.weights)
    inside = names_in_model(model.backbone, stored)
    matrices = []
    for group in embedding_names(model.backbone):
        names = sorted(name for name, target in inside.items() if target in group)
        if not names:
            raise Refused(f"{source.name} does not store {group[0]} as a tensor of its own, so no row can be written.")
        matrices.append(names)
    choice = model.mask_token
    embedding = stored[matrices[0][0]]
    if embedding.shape[0] != choice.rows_before:
        raise Refused(f"{source.name} stores an embedding of {embedding.shape[0]} rows, not {choice.rows_before}.")
    changes: dict[str, NewRows] = {}
    if rows_are_untrained(embedding, choice):
        choice = replace(choice, row_initialized=True)
        for names in matrices:
            value = mean_of_trained_rows(stored[names[0]], choice)
            for name in names:
                changes[name] = NewRows(value, written_rows(choice), choice.rows_after)
    return Surgery(source, stored, matrices, choice, changes)


def check_weights(source: Source, parent: PreTrainedModel) -> None:
    """Makes sure, before rows are grown, that the files hold every tensor that config.json asks for, and its shape."""
    check_complete(parent, stored_tensors(source.path, source.weights), source.path)


def stored_matrices(folder: Path, model: A2DForMaskedDiffusion) -> list[StoredTensor]:
    """The embedding matrices as they stand in a checkpoint's files, in the order of `embedding_matrices`."""
    stored = stored_tensors(folder, find_weights(folder)[0])
    inside = names_in_model(model.backbone, stored)
    groups = embedding_names(model.backbone)
    return [next(stored[name] for name, target in inside.items() if target in group) for group in groups]


def write_weights(surgery: Surgery, folder: Path, copy: bool, advance: Callable[[int], None]) -> dict[str, Any]:
    """
    Fills a folder with the conversion's weight files, and proves what is in them.

    Args:
        surgery ([`Surgery`]): what to do.
        folder (`Path`): where; holds no weights yet.
        copy (`bool`): copy the files that could be shared.
        advance (`Callable[[int], None]`): told how many of the parent's bytes are done.

    Returns:
        `dict`: `files` ({name: `linked`, `copied` or `rewritten`}), `tensors`, `tensors_identical` and
        `tensors_written` ({name: rows}), for the manifest.

    Raises:
        [`GateFailed`]: a tensor differs where it must not.
    """
    source, changes = surgery.source, surgery.changes
    done = {}
    for file in source.weights:
        here = {name: change for name, change in changes.items() if surgery.stored[name].file.name == file}
        if here:
            rewrite_file(source.path / file, folder / file, here, advance)
            done[file] = "rewritten"
        else:
            done[file] = share_file(source.path / file, folder / file, copy, advance)
    if (source.path / SAFETENSORS_INDEX).is_file() and SAFETENSORS_INDEX in source.files:
        _write_index(surgery, folder)
    return {"files": done, **prove_bytes(surgery, folder)}


def _write_index(surgery: Surgery, folder: Path) -> None:
    pairs = [(surgery.stored[name], change) for name, change in surgery.changes.items()]
    grown = [(tensor, change) for tensor, change in pairs if change.count != tensor.shape[0]]
    if not grown:
        shutil.copyfile(surgery.source.path / SAFETENSORS_INDEX, folder / SAFETENSORS_INDEX)
        return
    index = json.loads((surgery.source.path / SAFETENSORS_INDEX).read_text(encoding="utf-8"))
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        for tensor, change in grown:
            rows = change.count - tensor.shape[0]
            for key, each in (("total_size", tensor.row_bytes), ("total_parameters", change.value.numel())):
                if isinstance(metadata.get(key), int):
                    metadata[key] += rows * each
    write_json(folder / SAFETENSORS_INDEX, index)


def prove_bytes(surgery: Surgery, folder: Path) -> dict[str, Any]:
    """
    Compares the conversion's files with the parent's: the same file, or the same bytes in every tensor but for the
    rows that a conversion may write.

    Raises:
        [`GateFailed`]: a tensor differs elsewhere, is missing, or is too many.
    """
    ours = stored_tensors(folder, surgery.source.weights)
    identical, written, changed = 0, {}, sorted(surgery.stored.keys() ^ ours.keys())
    same = {file: same_file(surgery.source.path / file, folder / file) for file in surgery.source.weights}
    for name, tensor in surgery.stored.items():
        if name not in ours:
            continue
        if same[tensor.file.name] and name not in surgery.changes:
            identical += 1
            continue
        rows = differing_rows(tensor, ours[name])
        allowed = surgery.changes[name].rows if name in surgery.changes else []
        if rows is None or not rows <= set(allowed):
            changed.append(name)
        elif name in surgery.changes:
            written[name] = allowed
        else:
            identical += 1
    if changed:
        raise GateFailed(
            f"The identity gate failed: {len(changed)} tensor(s) in the files differ from the parent's, the first is "
            f"{changed[0]}. Nothing was trained or saved."
        )
    return {"tensors": len(ours), "tensors_identical": identical, "tensors_written": written}
