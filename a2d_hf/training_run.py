"""The training part of a run: rows in, trained weights out, stopped and continued at will.

Owns what the trainer's progress looks like on the screen and in `events.jsonl`, when checkpoints are written, what
Ctrl-C does, and that an adapter ends in the weights. The objective itself is the trainer's.
"""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from .atomic_files import explained_writes, write_text
from .console import Console, Progress
from .conversion_settings import ConversionSettings
from .data import Rows, as_dataset, explained_tokenizing, hold_out
from .errors import A2DError, BadInput
from .modeling.modeling_a2d import A2DForMaskedDiffusion
from .run_directory import RunDirectory
from .trainer_choice import NEVER, TRAINERS, WARMUP, adapter_config, training_config
from .trainers.a2d_config import A2DTrainingConfig
from .trainers.checkpoints import last_complete_checkpoint
from .trainers.dataset_preparation import PreparationReport, RowRules, prepare_dataset


if TYPE_CHECKING:
    from datasets import Dataset

# Checkpoints by time: at most a twentieth of the time goes into writing them, and at most one a minute is written.
SAVE_EVERY_S, SAVE_SHARE = 60.0, 0.05


@dataclass
class PreparedData:
    """
    Rows ready for training.

    Attributes:
        train (`Dataset`): `input_ids`, `labels`, `row_id`.
        held_out (`list[dict]`): rows never trained on: `input_ids` and `labels`.
        facts (`dict`): for the manifest: name, hash, counts, notes.
    """

    train: "Dataset"
    held_out: list[dict[str, list[int]]]
    facts: dict[str, Any]


def prepare_data(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: ConversionSettings, context: int | None
) -> PreparedData:
    """
    Tokenizes, fits and splits the data of a run.

    Running text is cut at the ends of lines, plain text rows longer than the limit into pieces, and neither loses a
    token. Prompts with completions and conversations cannot be cut into pieces: one that is longer than the model's
    context is bad input unless `max_length` was given, which says that cutting off is meant.

    Args:
        rows ([`Rows`]): what was read.
        tokenizer (`PreTrainedTokenizerBase`): the conversion's.
        settings ([`ConversionSettings`]): the run's.
        context (`int`, *optional*): the model's longest sequence.

    Returns:
        [`PreparedData`]
    """
    max_length = settings.row_length(context)
    train, held_out = hold_out(
        as_dataset(rows, tokenizer, max_length), settings.held_out, rows.running_text, settings.seed
    )
    rules = RowRules(
        max_length=max_length,
        truncation_mode="chunk",
        insert_eos=not rows.running_text,
        token_shift=settings.token_shift,
    )
    prepared, report = _prepared(train, tokenizer, rules, "train", rows.name)
    held, held_report = (None, None)
    if held_out is not None:
        held, held_report = _prepared(held_out, tokenizer, rules, "held-out", rows.name)
    cut = report.truncated_rows + (held_report.truncated_rows if held_report else 0)
    if cut and settings.max_length is None and max_length == context:
        raise BadInput(
            f"--data {rows.name} has {cut} row(s) longer than the model's context of {context} tokens: shorten them, "
            f"or pass --max-length {context} to cut them off."
        )
    notes = [*rows.notes, *(str(r) for r in (report, held_report) if r and _worth_saying(r))]
    if rules.insert_eos and tokenizer.eos_token is None:
        notes.append("the tokenizer has no end-of-text token, so rows do not end with one")
    facts = {
        "name": rows.name.rsplit("/", 1)[-1] if rows.name.startswith(("/", ".", "~")) else rows.name,
        "sha256": rows.sha256,
        "form": "running text" if rows.running_text else " + ".join(rows.columns),
        "max_length": max_length,
        "train": report.to_dict(),
        "held_out": held_report.to_dict() if held_report else None,
        "notes": notes,
    }
    kept = [] if held is None else [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in held]
    return PreparedData(prepared, kept, facts)


def _worth_saying(report: PreparationReport) -> bool:
    return bool(report.truncated_rows or report.dropped_rows or report.chunked_rows)


def _prepared(
    dataset: "Dataset", tokenizer: PreTrainedTokenizerBase, rules: RowRules, name: str, source: str
) -> tuple["Dataset", PreparationReport]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    # What it would warn of stands in the report and in our notes, where it is said once.
    logger = logging.getLogger("a2d_hf.trainers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with explained_tokenizing(f"--data {source}"):
            return prepare_dataset(dataset, tokenizer, rules, name=name)
    finally:
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def write_held_out(run: RunDirectory, rows: list[dict[str, list[int]]]) -> None:
    """Keeps the held-out rows with the run, so that `a2d eval` needs nothing else."""
    with explained_writes(run.eval_path):
        run.eval_path.mkdir(exist_ok=True)
    write_text(run.held_out_path, "".join(json.dumps(row) + "\n" for row in rows))


def read_held_out(run: RunDirectory) -> list[dict[str, list[int]]]:
    """The held-out rows of a run; empty where none were held out."""
    if not run.held_out_path.is_file():
        return []
    return [json.loads(line) for line in run.held_out_path.read_text(encoding="utf-8").splitlines()]


class StopRequest:
    """
    Ctrl-C and SIGTERM, while training: the first lets the step finish and a checkpoint be written, the second stops at
    once. Outside the main thread, where Python delivers no signals, nothing is caught.
    """

    def __init__(self, console: Console):
        self.console = console
        self.received = False

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._receive) for number in signals]
        try:
            yield self
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        self.console.warn("stopping after this step, with a checkpoint; once more to stop at once.")


class RunCallback(TrainerCallback):
    """What a run sees of its training: progress, events, checkpoints by time, and the stop."""

    def __init__(self, run: RunDirectory, console: Console, stop: StopRequest, save_by_time: bool):
        self.run, self.console, self.stop, self.save_by_time = run, console, stop, save_by_time
        self.progress: Progress | None = None
        self.note = ""
        self.last_saved = self.save_began = time.monotonic()
        self.save_interval = SAVE_EVERY_S

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.progress = self.console.progress("training", state.max_steps, "step", done=state.global_step)
        self.run.event("training_started", step=state.global_step, max_steps=state.max_steps)

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.progress.move_to(state.global_step, self.note)
        now = time.monotonic()
        if self.save_by_time and now - self.last_saved >= self.save_interval:
            control.should_save = True
        if self.stop.received and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        if control.should_save:
            self.save_began = now

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs) -> None:
        numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        if "loss" not in numbers:
            return
        self.run.event("train_step", step=state.global_step, **{k: _finite(v) for k, v in numbers.items()})
        self.note = f"loss {numbers['loss']:.3f}"
        for name, label in (("nelbo", "NELBO"), ("block_size", "blocks of")):
            if name in numbers:
                self.note += f", {label} {numbers[name]:.4g}"

    def on_save(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.last_saved = time.monotonic()
        self.save_interval = max(SAVE_EVERY_S, (self.last_saved - self.save_began) / SAVE_SHARE)
        self.run.event("checkpoint", step=state.global_step, path=f"checkpoints/checkpoint-{state.global_step}")

    def on_train_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self.progress is not None:
            self.progress.close()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def train(
    run: RunDirectory,
    settings: ConversionSettings,
    model: A2DForMaskedDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    console: Console,
) -> dict[str, Any]:
    """
    Trains `model` in place, from the last complete checkpoint where there is one; an adapter is merged into it at the
    end.

    Args:
        run ([`RunDirectory`]): taken by this process.
        settings ([`ConversionSettings`]): the run's.
        model ([`A2DForMaskedDiffusion`]): fp32.
        tokenizer (`PreTrainedTokenizerBase`): saved with each checkpoint.
        data ([`PreparedData`]): the rows.
        console ([`Console`]): where progress is shown.

    Returns:
        `dict`: the facts of the training, for the manifests.

    Raises:
        `KeyboardInterrupt`: stopped from outside, with a checkpoint written.
    """
    hidden_size = model.get_input_embeddings().weight.shape[1]
    config = training_config(run, settings, hidden_size, len(data.train), data.facts["max_length"])
    checkpoint = last_complete_checkpoint(run.checkpoints_path)
    if checkpoint is not None:
        console.note(f"continuing from {Path(checkpoint).name}")
    state, experts = _train_steps(run, settings, config, model, tokenizer, data, console, checkpoint)
    facts = {}
    if settings.objective == "bd3lm":
        facts["block_size_curriculum"] = settings.block_size_curriculum
    if settings.lora_r:
        adapter = adapter_config(settings, model)
        facts["adapter"] = {"type": "LoRA, merged", "r": adapter.r, "alpha": adapter.lora_alpha}
    return facts | {
        "steps": state.global_step,
        "epochs": round(state.epoch or 0.0, 4),
        "rows_per_step": settings.batch_size * settings.gradient_accumulation_steps,
        "max_length": data.facts["max_length"],
        "learning_rate": config.learning_rate,
        "schedule": f"cosine, {WARMUP:.0%} warm-up",
        "device": config.device.type,
        "precision": "bf16 autocast over fp32 weights" if config.bf16 else "fp32",
        "experts": experts,
    }


def _train_steps(
    run: RunDirectory,
    settings: ConversionSettings,
    config: A2DTrainingConfig,
    model: A2DForMaskedDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    console: Console,
    checkpoint: str | None,
) -> tuple[TrainerState, dict[str, Any] | None]:
    """Runs the trainer to its last step, or to the stop; also says what a mixture of experts did."""
    stop = StopRequest(console)
    callback = RunCallback(run, console, stop, save_by_time=config.save_steps == NEVER)
    trainer = TRAINERS[settings.objective](
        model=model,
        args=config,
        train_dataset=data.train,
        processing_class=tokenizer,
        callbacks=[callback],
        peft_config=adapter_config(settings, model),
    )
    trainer.auxiliary.moe.warn = console.warn
    vars(model.config).pop("use_cache", None)  # the trainer's own wish, which would be saved with the model
    trainer.remove_callback(PrinterCallback)  # it stands in for tqdm's bar; ours is there
    try:
        with stop.listening(), explained_writes(run.checkpoints_path):
            trainer.train(resume_from_checkpoint=checkpoint)
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        raise A2DError(str(error)) from error
    finally:
        callback.close()
    if trainer.state.global_step < trainer.state.max_steps:
        if stop.received:
            raise KeyboardInterrupt(f"interrupted; continue with `a2d resume {run.path}`.")
        raise A2DError(f"Training ended at step {trainer.state.global_step} of {trainer.state.max_steps}.")
    if settings.lora_r:
        trainer.model.merge_and_unload()  # into `model`, in fp32
    return trainer.state, trainer.auxiliary.moe.summary()
