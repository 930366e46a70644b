"""A `transformers.Trainer` whose checkpoints are whole or skipped, and whose resumed run equals an unbroken one.

Owns saving, finding and loading checkpoints. Knows nothing of diffusion.
"""

import os
import shutil
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from .checkpoints import is_complete, last_complete_checkpoint, list_checkpoints, mark_complete, read_marker


class CheckpointedTrainer(Trainer):
    """The checkpoint half of [`A2DTrainer`]."""

    def resume_key(self) -> dict[str, Any]:
        """What a run must have in common with the one it continues, or its data and noise would be others."""
        return {}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """
        Trains.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint folder, or `True` for the newest whole
                one in `args.output_dir`. The run goes on exactly as an unbroken one would have.
            args, kwargs: as in [`~transformers.Trainer.train`].

        Raises:
            ValueError: no such checkpoint, an incomplete one, or one of a run with other data or noise.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`, but {self.args.output_dir} holds no complete checkpoint "
                    f"({len(list_checkpoints(self.args.output_dir))} incomplete): train from the start."
                )
        if resume_from_checkpoint:
            self._check_resume(resume_from_checkpoint)
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _check_resume(self, folder: str) -> None:
        if not is_complete(folder):
            raise ValueError(f"`resume_from_checkpoint` {folder} is not a complete checkpoint: pass another, or True.")
        before, now = read_marker(folder)["resume_key"], self.resume_key()
        different = sorted(name for name in now if before is not None and before.get(name) != now[name])
        if different and not self.args.ignore_data_skip:
            told = ", ".join(f"{name} {now[name]!r} (was {before.get(name)!r})" for name in different)
            raise ValueError(
                f"`resume_from_checkpoint` {folder} belongs to another run: {told}. Restore what it was, or set "
                "`ignore_data_skip=True` to go on from its weights with other data and noise."
            )

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            rows = f" with rows {inputs['row_id'].tolist()}" if "row_id" in inputs else ""
            raise FloatingPointError(
                f"The loss became {loss.item()} in step {self.state.global_step + 1}, in the batch{rows}. "
                f"{self._last_good()} Lower `learning_rate` or `max_grad_norm`, or look at those rows."
            )
        return loss

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # 1. A gradient that is not a number shows in the weights before it shows in the loss: never save those.
        broken = [name for name, weight in self.model.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            raise FloatingPointError(
                f"The weights hold numbers that are not finite after step {self.state.global_step}, the first in "
                f"{broken[0]}. {self._last_good()} Lower `learning_rate` or `max_grad_norm`."
            )
        # 2. Nothing of an earlier attempt may survive under this name.
        run_dir = self._get_output_dir(trial=trial)
        folder = os.path.join(run_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save and os.path.isdir(folder):
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        # 3. The parent writes; older checkpoints stay until this one is whole.
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        # 4. Every process has written its part: mark it, and only now let the oldest go.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder, self.resume_key())
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=keep,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _last_good(self) -> str:
        kept = last_complete_checkpoint(self.args.output_dir)
        return "No checkpoint had been saved." if kept is None else f"The last good checkpoint is {kept}."

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self._parent_loads():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self._parent_loads():
            super()._load_best_model()
        else:
            self._load_weights(self.state.best_model_checkpoint)

    def _parent_loads(self) -> bool:
        return is_peft_model(self.model) or self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _load_weights(self, folder: str) -> None:
        """
        Weights of a checkpoint into the model in training, every one of them.

        The files carry the autoregressive parent's names. transformers' loader would find none of ours there, warn,
        and go on with the old weights; `from_pretrained` is the one place that knows the names.
        """
        base = self.accelerator.unwrap_model(self.model)
        saved = type(base).from_pretrained(folder, dtype=base.dtype)
        base.load_state_dict(saved.state_dict(), strict=True)
