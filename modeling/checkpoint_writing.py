"""How a converted checkpoint is written.

Owns the layout of the folder: the parent's own `save_pretrained` writes the weights under the parent's names (shards,
ties and expert layouts are its business), then this model's configuration replaces the parent's and the code that
reads it travels along. Owns as well what `push_to_hub` adds: the model card and the manifest that `a2d convert` wrote.
Takes the model as it is, and changes only what its configuration says about itself.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files


# The auto classes that load a converted checkpoint.
AUTO_CLASSES = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM")
# What `a2d convert` writes beside a checkpoint, and a push takes along: parent, gates, licence, how to load.
TRAVELS_ALONG = ("README.md", "a2d_manifest.json")
MODEL_FILE = Path(__file__).with_name("modeling_a2d.py")


def write_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """
    Writes a checkpoint that a stranger loads with `trust_remote_code=True`, and that the parent's own class reads.

    Args:
        model (`A2DForMaskedDiffusion`): what to write.
        folder (`Path`): where.
        is_main_process (`bool`, *optional*, defaults to `True`): whether this process writes what is no tensor.
        state_dict (`dict[str, torch.Tensor]`, *optional*): weights to write instead of the model's own, by the names
            that they have inside it.
        kwargs: passed to the parent's `save_pretrained`, for example `max_shard_size`.
    """
    if state_dict is not None:
        prefix = f"{model.base_model_prefix}."
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    if is_main_process and folder.is_dir():
        for file in folder.glob("*.safetensors"):
            if file.stat().st_nlink > 1:  # shared with the parent's folder, and some writers write in place
                file.unlink()
    model.backbone.save_pretrained(folder, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
    if is_main_process:
        write_description(model, folder)


def write_description(model: PreTrainedModel, folder: Path) -> None:
    """
    Writes what is no weight: this model's configuration, the code that reads it and the generation settings.

    Args:
        model (`A2DForMaskedDiffusion`): what to describe; may be on the meta device.
        folder (`Path`): where.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.backbone.dtype
    for file in (MODEL_FILE, *get_relative_import_files(MODEL_FILE)):
        shutil.copyfile(file, folder / Path(file).name)
    model.config.auto_map = {
        "AutoConfig": "configuration_a2d.A2DConfig",
        **{auto: "modeling_a2d.A2DForMaskedDiffusion" for auto in AUTO_CLASSES},
    }
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


class CheckpointWriting:
    """Gives [`A2DForMaskedDiffusion`] its `save_pretrained`, and `push_to_hub` the conversion's own card."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        Saves the checkpoint: weights under the PARENT's names, so that its own class, PEFT, quantizers and engines
        read them; and beside them this model's configuration and code. Args are those of
        [`~transformers.PreTrainedModel.save_pretrained`].
        """
        hub = {name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private", "token") if name in kwargs}
        write_checkpoint(self, Path(save_directory), is_main_process, state_dict, **kwargs)
        if push_to_hub and is_main_process:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        # The last step of `push_to_hub`, in the folder that it has just written, with a card that says nothing: the
        # one that `a2d convert` wrote takes its place.
        folder = Path(self.name_or_path)
        if all((folder / name).is_file() for name in TRAVELS_ALONG):
            for name in TRAVELS_ALONG:
                shutil.copyfile(folder / name, Path(working_dir) / name)
        return super()._upload_modified_files(working_dir, *args, **kwargs)
