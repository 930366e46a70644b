"""The cheap part of `a2d eval`, every so many steps of a training.

Owns when it is measured and under which names it is logged. The estimators are evaluate.py's: their masks are keyed by
(seed, row, draw, position), so the same rows get the same masks at every step and a curve shows the model alone.
Leaves the training as it was: the random state and the mode of the model are what they were before.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import evaluate
from .errors import BadInput
from .trainers.a2d_trainer import A2DTrainer
from .trainers.decoding_callback import undisturbed
from .trainers.model_resolution import base_model


ROWS = 64
RATIOS = (0.15, 0.5)


class A2DEvalCallback(TrainerCallback):
    """
    Measures held-out rows during training and logs through the trainer: `heldout_nelbo` (nats per token, an upper
    bound), `heldout_nelbo_stderr`, and for each ratio `heldout_masked_accuracy_15` (percent of the text hidden, share
    right in one forward).

    Example:

    ```python
    >>> trainer = MDLMTrainer(..., eval_dataset=held_out)
    >>> trainer.add_callback(A2DEvalCallback(trainer, every_n_steps=200))
    ```

    Args:
        trainer ([`A2DTrainer`]): whose model is measured.
        rows (`Sequence[dict]`, *optional*): `input_ids` and `labels` (-100 where nothing is scored; `input_ids` where
            left out), as in a prepared dataset; the trainer's `eval_dataset` by default.
        every_n_steps (`int`, *optional*, defaults to `100`): also measures before the first step and at the last.
        max_rows (`int`, *optional*, defaults to `64`): rows to measure on, the first ones.
        mc_samples (`int`, *optional*, defaults to `4`): masks drawn per row.
        ratios (`Sequence[float]`, *optional*, defaults to `(0.15, 0.5)`): shares of the text to hide.
        batch_size (`int`, *optional*): rows per forward; the trainer's `per_device_eval_batch_size` by default.
        seed (`int`, *optional*, defaults to `0`): key of the masks.
    """

    def __init__(
        self,
        trainer: A2DTrainer,
        rows: Sequence[dict[str, list[int]]] | None = None,
        every_n_steps: int = 100,
        max_rows: int = ROWS,
        mc_samples: int = 4,
        ratios: Sequence[float] = RATIOS,
        batch_size: int | None = None,
        seed: int = 0,
    ):
        for name, value in {"every_n_steps": every_n_steps, "max_rows": max_rows, "mc_samples": mc_samples}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be positive, not {value}.")
        if any(not 0 < ratio <= 1 for ratio in ratios):
            raise ValueError(f"`ratios` must lie above 0 and at most at 1, not {tuple(ratios)}.")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("Sharded models (FSDP, DeepSpeed) cannot be measured by one process: use `eval_dataset`.")
        if rows is None:
            rows = trainer.eval_dataset
            if rows is None or isinstance(rows, dict):
                raise ValueError("No rows to measure on: pass `rows`, or one `eval_dataset` to the trainer.")
        first = [rows[i] for i in range(min(len(rows), max_rows))]
        if any("input_ids" not in row for row in first):
            raise ValueError("`rows` need `input_ids`: tokenize them, or pass a dataset that the trainer prepared.")
        rows = [
            {"input_ids": list(row["input_ids"]), "labels": list(row.get("labels", row["input_ids"]))} for row in first
        ]
        try:
            self.rows = evaluate.usable_rows(rows)
        except BadInput as error:
            raise ValueError(f"`rows` cannot be measured on: {error}") from error
        self.trainer, self.every_n_steps, self.mc_samples = trainer, every_n_steps, mc_samples
        self.ratios, self.seed = tuple(ratios), seed
        self.batch_size = batch_size or trainer.args.per_device_eval_batch_size

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # a resumed run has this behind it
            self._log(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every_n_steps and state.global_step != state.max_steps:
            return
        self._log(state, control)

    def _log(self, state: TrainerState, control: TrainerControl) -> None:
        # One process measures; `log` is every process's.
        if state.is_world_process_zero:
            should_log = control.should_log
            self.trainer.log(self.measure())
            control.should_log = should_log  # `log` takes it back, and the trainer's own loss would not be logged

    def measure(self) -> dict[str, float]:
        """The numbers of the model as it is now."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with torch.no_grad(), undisturbed(model), self.trainer.compute_loss_context_manager():
            model = base_model(model)
            nelbo = evaluate.diffusion_nelbo(
                model, self.rows, mc_samples=self.mc_samples, batch_size=self.batch_size, seed=self.seed
            )
            accuracy = evaluate.masked_accuracy(
                model, self.rows, ratios=self.ratios, batch_size=self.batch_size, seed=self.seed
            )
        logged = {"heldout_nelbo": nelbo.nats_per_token}
        if nelbo.standard_error is not None:
            logged["heldout_nelbo_stderr"] = nelbo.standard_error
        names = [f"heldout_masked_accuracy_{100 * line['ratio']:g}" for line in accuracy]
        return logged | {name: line["accuracy"] for name, line in zip(names, accuracy, strict=True)}
