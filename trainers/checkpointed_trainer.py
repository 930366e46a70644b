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

    _resumed_from: str | None = None

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
            FloatingPointError: the loss or the weights are no numbers any more. The last good checkpoint stays.
            torch.OutOfMemoryError: with what to change. The last good checkpoint stays.
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
        self._resumed_from = resume_from_checkpoint or None
        try:
            return super().train(self._resumed_from, *args, **kwargs)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise torch.OutOfMemoryError(self._out_of_memory_advice()) from error

    def _trained_to_the_end(self) -> bool:
        """Whether a run was resumed at its last step. The parent asks after a step, and so would take one more."""
        if self.state.global_step < self.state.max_steps:
            return False
        self.control.should_training_stop = True
        return True

    def _out_of_memory_advice(self) -> str:
        args, per_device = self.args, self.args.per_device_train_batch_size
        where = f"Out of memory in step {self.state.global_step + 1}"
        if not self.model.training and self.args.per_device_eval_batch_size > 1:
            return f"{where}, in evaluation: lower `per_device_eval_batch_size` ({args.per_device_eval_batch_size})."
        knobs = []
        if per_device > 1:
            accumulation = args.gradient_accumulation_steps * 2
            knobs.append(
                f"`per_device_train_batch_size={per_device // 2}` with `gradient_accumulation_steps={accumulation}` "
                f"(the same training; now {per_device} and {args.gradient_accumulation_steps})"
            )
        if not args.gradient_checkpointing:
            knobs.append("`gradient_checkpointing=True`")
        knobs.append("a smaller `max_length`")
        if not is_peft_model(self.model):
            knobs.append("LoRA (`peft_config=LoraConfig()`)")
        return f"{where}: try {', then '.join(knobs)}. {self._last_good()}"

    def _check_resume(self, folder: str) -> None:
        if not is_complete(folder):
            raise ValueError(f"`resume_from_checkpoint` {folder} is not a complete checkpoint: pass another, or True.")
        before, now = read_marker(folder)["resume_key"], self.resume_key()
        if before is None or self.args.ignore_data_skip:
            return
        # A checkpoint that is older than a field was trained with the field's default.
        before = {name: before.get(name, getattr(type(self.args), name, None)) for name in now}
        different = sorted(name for name in now if before[name] != now[name])
        if different:
            told = ", ".join(f"{name} {now[name]!r} (was {before[name]!r})" for name in different)
            raise ValueError(
                f"`resume_from_checkpoint` {folder} belongs to another run: {told}. Restore what it was, or set "
                "`ignore_data_skip=True` to go on from its weights with other data and noise."
            )

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            rows = f" with rows {inputs['row_id'].tolist()}" if "row_id" in inputs else ""
            before = "" if self._first_broken_weight() is None else ", because the step before broke the weights"
            raise FloatingPointError(
                f"The loss became {loss.item()} in step {self.state.global_step + 1}, in the batch{rows}{before}. "
                f"{self._last_good()} Lower `learning_rate` or `max_grad_norm`, or look at those rows."
            )
        return loss

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # 1. A gradient that is not a number shows in the weights before it shows in the loss: never save those.
        broken = self._first_broken_weight()
        if broken is not None:
            raise FloatingPointError(
                f"The weights hold numbers that are not finite after step {self.state.global_step}, the first in "
                f"{broken}. {self._last_good()} Lower `learning_rate` or `max_grad_norm`."
            )
        # 2. Nothing of an earlier attempt may survive under this name; what was resumed from stands there already.
        run_dir = self._get_output_dir(trial=trial)
        folder = os.path.join(run_dir, f"checkpoint-{self.state.global_step}")
        if self._resumed_from is not None and os.path.realpath(folder) == os.path.realpath(self._resumed_from):
            return
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

    def _first_broken_weight(self) -> str | None:
        weights = self.model.named_parameters()
        return next((name for name, weight in weights if not torch.isfinite(weight).all()), None)

    def _last_good(self) -> str:
        kept = last_complete_checkpoint(self.args.output_dir)
        return "No checkpoint had been saved." if kept is None else f"The last good checkpoint is {kept}."

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self._parent_loads():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"`resume_from_checkpoint` {checkpoint} holds the state of another optimizer ({error}): restore "
                "`optim`, `muon_learning_rate` and what is trained to what they were."
            ) from error

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
