"""Finding and loading a converted checkpoint, for the commands that use one.

Owns the reading of what a user gives as RUN: a run directory, or a plain folder (or Hub id) of a converted checkpoint.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput, Refused
from .run_directory import RunDirectory
from .source import find_weights, locate, read_config


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling.modeling_a2d import A2DForMaskedDiffusion


@dataclass
class ConvertedModel:
    """
    Attributes:
        path (`Path`): the checkpoint folder.
        name (`str`): what the user gave.
        run ([`RunDirectory`], *optional*): the run it belongs to.
        manifest (`dict`, *optional*): the checkpoint's `a2d_manifest.json`; `None` for one that this command line did
            not make.
    """

    path: Path
    name: str
    run: RunDirectory | None
    manifest: dict[str, Any] | None

    def load(
        self, device: str = "auto", trust_remote_code: bool = False
    ) -> "tuple[A2DForMaskedDiffusion, PreTrainedTokenizerBase]":
        """
        The model, in eval mode on `device`, and its tokenizer.

        Args:
            device (`str`, *optional*, defaults to `"auto"`): `cpu`, `cuda`, `mps`; auto takes what there is.
            trust_remote_code (`bool`, *optional*, defaults to `False`): for a parent that needs its own code.
        """
        from transformers.utils import logging

        from .modeling.modeling_a2d import A2DForMaskedDiffusion
        from .surgery import explained_loading, load_tokenizer

        logging.disable_progress_bar()
        tokenizer = load_tokenizer(self.path, trust_remote_code)
        with explained_loading(self.path):
            model = A2DForMaskedDiffusion.from_pretrained(
                self.path, trust_remote_code=trust_remote_code, local_files_only=True
            )
        return model.to(resolve_device(device)).eval(), tokenizer


def resolve_device(device: str) -> str:
    """`auto` becomes what the machine has; anything else must be there."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[device]:
        raise BadInput(f"--device {device} is not available here: use auto or cpu.")
    return device


def find_converted(given: str | Path, argument: str = "RUN") -> ConvertedModel:
    """
    Finds the checkpoint behind RUN and checks that it is a whole, converted one.

    Args:
        given (`str` or `Path`): a run directory, a checkpoint folder, or a Hub id in the local cache.
        argument (`str`, *optional*, defaults to `"RUN"`): what the user calls it.

    Raises:
        [`BadInput`]: there is none, or it is not converted.
        [`Refused`]: the run has not got that far.
    """
    path, _ = locate(given, argument)
    run = None
    if (path / "manifest.json").is_file() and not (path / "config.json").is_file():
        run = RunDirectory.open(path, argument)
        path = run.model_path
        if not path.is_dir():
            raise Refused(
                f"{argument} {given} has no model yet ({run.status}): continue it with `a2d resume {given}`."
            )
    config = read_config(path)
    if config["model_type"] != "a2d":
        raise BadInput(
            f"{argument} {given} is an autoregressive {config['model_type']} checkpoint: convert it first, with "
            f"`a2d convert {given} --out RUN`."
        )
    find_weights(path)
    file = path / "a2d_manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise BadInput(f"{file} is not JSON: {error}.") from error
    return ConvertedModel(path, str(given), run, manifest)
