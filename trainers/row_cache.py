"""A folder that keeps something computed once for each row of a dataset.

Owns the folder: a manifest says of which model, and `ab/ab12....safetensors` holds one row each, under the sha256 of
the manifest and the row's token ids. Every file appears whole or not at all, so writing can stop at any moment and go
on later. What is kept, anchor_cache.py and teacher_cache.py decide.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel


def weights_sha256(model: PreTrainedModel) -> str:
    """The sha256 over every weight of a model: its name, dtype, shape and bytes. An adapter in it does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_without_adapter(model.state_dict()).items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Where PEFT puts the layer that it wraps; what else lies beside it is the adapter's.
_WRAPPED = re.compile(r"(.*?)\.(base_layer|original_module)\.(.*)")


def _without_adapter(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that a model had before an adapter was put into it, under the names they had."""
    matches = {name: _WRAPPED.fullmatch(name) for name in state}
    wrappers = tuple({f"{match.group(1)}." for match in matches.values() if match})
    own = {}
    for name, match in matches.items():
        if match:
            own[f"{match.group(1).removesuffix('.token_adapter')}.{match.group(3)}"] = state[name]
        elif not name.startswith(wrappers):
            own[name] = state[name]
    return own


class RowCache:
    """
    A folder of one kind.

    Args:
        folder (`str` or `os.PathLike`): where it is.
        manifest (`dict[str, Any]`): `model_sha256`, `revision`, `dtype`, and what else decides the contents.
    """

    manifest_name: ClassVar[str]  # the file that holds the manifest
    what: ClassVar[str]  # what the folder is called in messages
    argument: ClassVar[str]  # the argument that names it
    script: ClassVar[str]  # what writes it

    def __init__(self, folder: str | os.PathLike, manifest: dict[str, Any]):
        self.folder = Path(folder)
        self.manifest = manifest

    @classmethod
    def create(cls, folder: str | os.PathLike, manifest: dict[str, Any]) -> Self:
        """
        A folder to write into: a new one, or one that was begun with the same manifest.

        Raises:
            ValueError: it belongs to another model or was begun with other settings.
        """
        cache, path = cls(folder, manifest), Path(folder) / cls.manifest_name
        if path.exists():
            found = json.loads(path.read_text())
            different = sorted(name for name in manifest if found.get(name) != manifest[name])
            if different:
                raise ValueError(
                    f"The {cls.what} {folder} was begun with another {', '.join(different)}: write to an empty folder."
                )
            return cache
        cache.folder.mkdir(parents=True, exist_ok=True)
        _write_whole(path, lambda unfinished: unfinished.write_text(json.dumps(manifest, indent=2) + "\n"))
        return cache

    @classmethod
    def of_model(cls, folder: str | os.PathLike, model: PreTrainedModel) -> Self:
        """
        A folder to read from.

        Args:
            folder (`str` or `os.PathLike`): where it is.
            model (`PreTrainedModel`): the teacher, or a student that has not been trained yet.

        Raises:
            ValueError: no such cache, or one of another model.
        """
        path = Path(folder) / cls.manifest_name
        if not path.is_file():
            raise ValueError(f"`{cls.argument}` {folder} holds no {cls.manifest_name}: write it with {cls.script}.")
        manifest = json.loads(path.read_text())
        own = weights_sha256(model)
        if manifest["model_sha256"] != own:
            raise ValueError(
                f"`{cls.argument}` {folder} was written with another model (sha256 {manifest['model_sha256'][:12]}, "
                f"this one is {own[:12]}): load the same checkpoint in the same dtype, or precompute it again."
            )
        return cls(folder, manifest)

    def path(self, input_ids: Sequence[int]) -> Path:
        """Where what is kept of a row is, or will be."""
        digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())
        digest.update(torch.as_tensor(input_ids, dtype=torch.int64).numpy().astype("<i8").tobytes())
        key = digest.hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def write_row(self, input_ids: Sequence[int], tensors: dict[str, torch.Tensor]) -> None:
        """Writes what is kept of a row."""
        path = self.path(input_ids)
        path.parent.mkdir(exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        tensors["input_ids"] = torch.as_tensor(input_ids, dtype=torch.int64)
        _write_whole(path, lambda unfinished: save_file(tensors, unfinished))

    def read_row(self, input_ids: Sequence[int], names: Sequence[str]) -> list[torch.Tensor] | None:
        """What is kept of a row under these names, or `None` where nothing is."""
        path = self.path(input_ids)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            if file.get_tensor("input_ids").tolist() != list(input_ids):
                raise ValueError(f"{path} does not hold the row that its name stands for: delete the file.")
            return [file.get_tensor(name) for name in names]

    def fill(
        self,
        rows: Sequence[dict[str, Any]],
        compute: Callable[[dict[str, torch.Tensor]], Iterator[dict[str, torch.Tensor]]],
        batch_size: int,
        device: torch.device,
    ) -> tuple[int, int]:
        """
        Writes every row that is not there yet, behind a progress bar.

        Args:
            rows (`Sequence[dict]`): prepared rows, as the trainer will read them.
            compute (`Callable`): from `input_ids` and `attention_mask` of a batch, `(B, L)`, to what is kept of each
                of its rows.
            batch_size (`int`): rows per call.
            device (`torch.device`): where the batches go.

        Returns:
            `tuple[int, int]`: rows written, and rows that were there already.
        """
        todo = [i for i in range(len(rows)) if not self.path(rows[i]["input_ids"]).is_file()]
        todo.sort(key=lambda i: len(rows[i]["input_ids"]))  # rows of like length share a batch
        for start in tqdm(range(0, len(todo), batch_size), desc=f"Writing the {self.what}", unit="batch"):
            batch = [rows[i]["input_ids"] for i in todo[start : start + batch_size]]
            length = max(map(len, batch))
            inputs = {
                "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in batch], device=device),
                "attention_mask": torch.tensor(
                    [[1] * len(row) + [0] * (length - len(row)) for row in batch], device=device
                ),
            }
            for row, tensors in zip(batch, compute(inputs), strict=True):
                self.write_row(row, tensors)
        return len(todo), len(rows) - len(todo)


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.writing")
    write(unfinished)
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    unfinished.rename(path)
