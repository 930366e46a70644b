"""Hidden states of a frozen teacher on disk: written once, read instead of running it.

Owns the folder: `anchors.json` says of which model, and `ab/ab12....safetensors` holds one row each, under the sha256
of model, revision, dtype, layers and token ids. Every file appears whole or not at all, so writing can stop at any
moment and go on later.

Shapes: B rows, L tokens, T tokens of one row, D hidden size, K layers.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .teachers import FrozenCopy


MANIFEST = "anchors.json"


def weights_sha256(model: PreTrainedModel) -> str:
    """The sha256 over every weight of a model: its name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class AnchorCache:
    """
    A folder of anchors.

    Args:
        folder (`str` or `os.PathLike`): where it is.
        manifest (`dict[str, Any]`): `model_sha256`, `revision`, `dtype` (of the anchors) and `layers`.
    """

    def __init__(self, folder: str | os.PathLike, manifest: dict[str, Any]):
        self.folder = Path(folder)
        self.manifest = manifest

    @classmethod
    def create(cls, folder: str | os.PathLike, manifest: dict[str, Any]) -> "AnchorCache":
        """
        A folder to write into: a new one, or one that was begun with the same model, dtype and layers.

        Raises:
            ValueError: it belongs to another model, dtype or set of layers.
        """
        cache, path = cls(folder, manifest), Path(folder) / MANIFEST
        if path.exists():
            found = json.loads(path.read_text())
            different = sorted(name for name in manifest if found.get(name) != manifest[name])
            if different:
                raise ValueError(
                    f"The anchor cache {folder} was begun with another {', '.join(different)}: write to an empty "
                    "folder."
                )
            return cache
        cache.folder.mkdir(parents=True, exist_ok=True)
        _write_whole(path, lambda unfinished: unfinished.write_text(json.dumps(manifest, indent=2) + "\n"))
        return cache

    @classmethod
    def open(cls, folder: str | os.PathLike, model: PreTrainedModel, layers: Sequence[int]) -> "AnchorCache":
        """
        A folder to read from.

        Args:
            folder (`str` or `os.PathLike`): where it is.
            model (`PreTrainedModel`): the teacher, or a student that has not been trained yet.
            layers (`Sequence[int]`): the layers that will be read.

        Raises:
            ValueError: no such cache, one of another model, or one without these layers.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"`anchor_cache` {folder} holds no {MANIFEST}: write it with scripts/precompute_anchors.py."
            )
        manifest = json.loads(path.read_text())
        own = weights_sha256(model)
        if manifest["model_sha256"] != own:
            raise ValueError(
                f"`anchor_cache` {folder} holds anchors of another model (sha256 {manifest['model_sha256'][:12]}..., "
                f"this one is {own[:12]}...): load the same checkpoint in the same dtype, or precompute them again."
            )
        missing = sorted(set(layers) - set(manifest["layers"]))
        if missing:
            raise ValueError(
                f"`anchor_cache` {folder} holds the layers {manifest['layers']} and not {missing}: set `align_layers` "
                "to some of them, or precompute the others."
            )
        return cls(folder, manifest)

    def path(self, input_ids: Sequence[int]) -> Path:
        """Where the anchors of a row are, or will be."""
        digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())
        digest.update(torch.as_tensor(input_ids, dtype=torch.int64).numpy().astype("<i8").tobytes())
        key = digest.hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def write(self, input_ids: Sequence[int], layers_KTD: dict[int, torch.Tensor]) -> None:
        """Writes the anchors of a row, one `(T, D)` tensor per layer."""
        path = self.path(input_ids)
        path.parent.mkdir(exist_ok=True)
        tensors = {f"layer_{layer}": tensor.contiguous() for layer, tensor in layers_KTD.items()}
        tensors["input_ids"] = torch.as_tensor(input_ids, dtype=torch.int64)
        _write_whole(path, lambda unfinished: save_file(tensors, unfinished))

    def read(self, input_ids: Sequence[int], layers: Sequence[int]) -> list[torch.Tensor] | None:
        """The anchors of a row, one `(T, D)` tensor per wanted layer; `None` where there are none."""
        path = self.path(input_ids)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            if not torch.equal(file.get_tensor("input_ids"), torch.as_tensor(input_ids, dtype=torch.int64)):
                raise ValueError(f"{path} belongs to another row: the cache is damaged, precompute it again.")
            return [file.get_tensor(f"layer_{layer}") for layer in layers]


def precompute_anchors(
    model: PreTrainedModel,
    rows: Sequence[dict[str, Any]],
    folder: str | os.PathLike,
    layers: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 8,
    revision: str | None = None,
) -> tuple[int, int]:
    """
    Writes the anchors of every row that has none yet.

    Args:
        model ([`A2DForMaskedDiffusion`]): the teacher.
        rows (`Sequence[dict]`): prepared rows, as the trainer will read them.
        folder (`str` or `os.PathLike`): where to; made where it does not exist.
        layers (`Sequence[int]`): which hidden states; 0 is the embedding's output.
        dtype (`torch.dtype`): what they are kept in.
        batch_size (`int`): rows per forward pass.
        revision (`str`, *optional*): revision of the teacher; part of the key.

    Returns:
        `tuple[int, int]`: rows written, and rows that were there already.
    """
    layers = sorted(layers)
    cache = AnchorCache.create(
        folder,
        {
            "model_sha256": weights_sha256(model),
            "revision": revision,
            "dtype": str(dtype).removeprefix("torch."),
            "layers": layers,
        },
    )
    todo = [i for i in range(len(rows)) if not cache.path(rows[i]["input_ids"]).is_file()]
    todo.sort(key=lambda i: len(rows[i]["input_ids"]))  # rows of like length share a batch
    teacher, device = FrozenCopy(model.eval()), next(model.parameters()).device
    for start in tqdm(range(0, len(todo), batch_size), desc="Precomputing anchors", unit="batch"):
        batch = [rows[i]["input_ids"] for i in todo[start : start + batch_size]]
        length = max(map(len, batch))
        ids_BL = torch.tensor([row + [0] * (length - len(row)) for row in batch], device=device)
        mask_BL = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch], device=device)
        hidden = teacher.hidden_states({"input_ids": ids_BL, "attention_mask": mask_BL})
        for b, row in enumerate(batch):
            cache.write(row, {layer: hidden[layer][b, : len(row)].to("cpu", dtype) for layer in layers})
    return len(todo), len(rows) - len(todo)


def _write_whole(path: Path, write) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.writing")
    write(unfinished)
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    unfinished.rename(path)
