"""From a run's settings to its trainer: which one, how it is configured, and the adapter that it trains.

Owns that choice and its defaults. Builds no model and trains nothing.
"""

import math
from typing import Any

import torch
from peft import LoraConfig
from transformers.pytorch_utils import Conv1D

from .conversion_settings import ConversionSettings
from .errors import BadInput
from .modeling.modeling_a2d import A2DForMaskedDiffusion
from .run_directory import RunDirectory
from .trainers.a2d_config import A2DTrainingConfig
from .trainers.bd3lm_trainer import BD3LMTrainer
from .trainers.mdlm_trainer import MDLMTrainer
from .trainers.repalign_trainer import RepAlignTrainer


TRAINERS = {"mdlm": MDLMTrainer, "bd3lm": BD3LMTrainer, "repalign": RepAlignTrainer}
WARMUP = 0.05  # share of the steps
LOGGED_POINTS = 200  # about as many points as a loss curve can show
NEVER = 2**31  # what the trainer is told where checkpoints go by time: a step that does not come


def training_config(
    run: RunDirectory, settings: ConversionSettings, hidden_size: int, rows: int, max_length: int
) -> A2DTrainingConfig:
    """The trainer's configuration for a run."""
    own: dict[str, Any] = {}
    if settings.objective == "bd3lm":
        own = {"block_size": settings.block_size, "block_size_curriculum": settings.block_size_curriculum}
    elif settings.objective == "repalign":
        given = {"align_weight": settings.align_weight, "align_positions": settings.align_positions}
        own = {name: value for name, value in given.items() if value is not None}
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    steps = settings.max_steps or max(1, math.ceil(rows / per_step * settings.epochs))
    return TRAINERS[settings.objective].config_class(
        output_dir=str(run.checkpoints_path),
        max_steps=settings.max_steps or -1,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.peak_learning_rate(hidden_size),
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        seed=settings.seed,
        logging_steps=max(1, round(steps / LOGGED_POINTS)),
        save_strategy="steps",
        save_steps=settings.save_steps or NEVER,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=settings.device == "cpu",
        max_length=max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        **own,
    )


def adapter_config(settings: ConversionSettings, model: A2DForMaskedDiffusion) -> LoraConfig | None:
    """
    The adapter of a run, if it trains one.

    Raises:
        [`BadInput`]: the model has no layer of a given name.
    """
    if settings.lora_r == 0:
        return None
    linear = (torch.nn.Linear, Conv1D)
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, linear)}
    there = ", ".join(sorted(names))
    for wanted in settings.lora_target_modules or ():
        if wanted not in names:
            raise BadInput(f"--lora-target-modules {wanted} is no layer of this model, which has {there}.")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_r,
        target_modules=settings.lora_target_modules,
    )
