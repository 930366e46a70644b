"""One run of bench_conversion.py: an arm, a learning rate and a seed, from the parent to the curve of its NELBO.

Owns the rows, the trainings of a run and what is told while they last; nothing of tables or of which runs there are.
"""

import dataclasses
import functools
import math
import re
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from conversion_arms import BD3LM, MDLM, REPALIGN, Arm


HELD_OUT_COPIES = 2  # a copy of a row is a row of its own and draws its own noise: the estimate's variance falls
WARMUP = 0.05
LARGEST_BLOCK = 4  # of which every set of masks is evaluated: 15 of them


@dataclass(frozen=True)
class Budget:
    """What every run gets: `tokens`, in steps of `batch_size` rows, measured `points` times."""

    tokens: int
    max_length: int
    batch_size: int
    points: int

    def steps(self, tokens_per_step: float) -> int:
        """Optimizer steps, a multiple of `points`."""
        return self.points * max(1, math.ceil(self.tokens / tokens_per_step / self.points))

    def part(self, points: int) -> "Budget":
        """The part of it that is measured `points` times."""
        return dataclasses.replace(self, tokens=self.tokens * points // self.points, points=points)


@functools.cache
def prepared_rows(source: str, data: str, max_length: int, held_out_tokens: int, token_shift: bool) -> tuple[Any, Any]:
    """Training and held-out rows, cut and tokenized as `a2d convert` does; the same split for every arm and seed."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from a2d_hf.conversion_settings import ConversionSettings
    from a2d_hf.data import read_rows
    from a2d_hf.training_run import prepare_data

    settings = ConversionSettings(source=source, max_length=max_length, token_shift=token_shift)
    prepared = prepare_data(read_rows(data), AutoTokenizer.from_pretrained(source), settings, None)
    kept = prepared.held_out[: max(1, held_out_tokens // max_length)]
    copies = [{**row, "row_id": i} for i, row in enumerate(kept * HELD_OUT_COPIES)]
    return prepared.train, Dataset.from_list(copies)


def scored_rows(held_out: Any) -> list[dict[str, list[int]]]:
    """The held-out rows once each, as both the parent's NLL and the exact bound score them."""
    from a2d_hf.evaluate import usable_rows

    return usable_rows(held_out.select(range(len(held_out) // HELD_OUT_COPIES)))


def slug(name: str) -> str:
    """An arm's name, as a folder's."""
    return "_".join(re.findall(r"[a-z0-9]+", name.lower()))


def one_run(arm: Arm, args: Namespace, budget: Budget, learning_rate: float, seed: int) -> dict[str, Any]:
    """
    Trains one arm once.

    Returns:
        `dict`: `curve`, a list of [tokens trained for, NELBO], the first before any training; `seconds`; and `exact`,
        see [`exact_nelbo`].
    """
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

    from a2d_hf import A2DForMaskedDiffusion
    from a2d_hf.trainers.bd3lm_config import BD3LMConfig
    from a2d_hf.trainers.bd3lm_trainer import BD3LMTrainer
    from a2d_hf.trainers.mdlm_config import MDLMConfig
    from a2d_hf.trainers.mdlm_trainer import MDLMTrainer
    from a2d_hf.trainers.repalign_config import RepAlignConfig
    from a2d_hf.trainers.repalign_trainer import RepAlignTrainer
    from a2d_hf.trainers.row_shares import in_shares

    kinds = {
        MDLM: (MDLMTrainer, MDLMConfig),
        BD3LM: (BD3LMTrainer, BD3LMConfig),
        REPALIGN: (RepAlignTrainer, RepAlignConfig),
    }
    trainer_class, config_class = kinds[arm.objective]
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    prepare = functools.partial(prepared_rows, args.source, max_length=args.max_length, token_shift=arm.token_shift)
    _, held_out = prepare(args.data, held_out_tokens=args.held_out_tokens)
    torch.manual_seed(seed)
    fields = {"objective": BD3LM if arm.objective == BD3LM else MDLM, "token_shift": arm.token_shift, **arm.model}
    if arm.objective == BD3LM:
        fields["block_size"] = arm.config["block_size"]
    model = A2DForMaskedDiffusion.from_pretrained(args.source, tokenizer=tokenizer, dtype=torch.float32, **fields)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if arm.lora else None
    curve: list[tuple[int, float]] = []
    done, seconds = 0.0, 0.0

    for part in parts_of(arm, budget, learning_rate):
        train, _ = prepare(args.own_text if part.own_text else args.data, held_out_tokens=args.held_out_tokens)
        # A row that is trained in several steps counts once, whatever it is read again as context.
        shares, block_size = part.config.get("steps_per_row", 1), arm.config.get("block_size", 1)
        rows = sum(len(in_shares(row, shares, block_size)) for row in train)
        tokens_per_step = budget.batch_size * sum(len(row["input_ids"]) for row in train) / rows
        steps = part.budget.steps(tokens_per_step)
        anneal = {"attention_anneal_steps": round(arm.anneal * steps)} if arm.anneal else {}
        progress = Progress(f"{arm.name}, seed {seed}", done, tokens_per_step, budget.tokens, curve)

        class Measured(TrainerCallback):
            def on_evaluate(self, training, state, control, metrics, progress=progress, **kwargs):
                progress.measured(state.global_step, metrics["eval_nelbo"])

        with tempfile.TemporaryDirectory() as folder:
            config = config_class(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=budget.batch_size,
                per_device_eval_batch_size=budget.batch_size,
                warmup_steps=WARMUP,
                seed=seed,
                data_seed=seed,
                eval_strategy="steps",
                eval_steps=steps // part.budget.points,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                max_length=budget.max_length,
                dataset_kwargs={"skip_prepare_dataset": True},
                **anneal,
                **part.config,
            )
            trainer = trainer_class(
                model=model,
                args=config,
                train_dataset=train,
                eval_dataset=held_out,
                processing_class=tokenizer,
                callbacks=[Measured()],
                peft_config=adapter,
            )
            trainer.remove_callback(PrinterCallback)
            if not curve:
                trainer.evaluate()
            began = time.perf_counter()
            trainer.train()
            seconds += time.perf_counter() - began
            done += steps * tokens_per_step
            if args.models is not None:
                trainer.save_model(args.models / f"{slug(arm.name)}-{learning_rate:g}-{seed}")
    return {"curve": curve, "seconds": round(seconds, 1), "exact": exact_nelbo(trainer.model, held_out)}


def exact_nelbo(model: Any, held_out: Any) -> dict[str, Any] | None:
    """
    The bound itself, over every set of masks, where blocks are small enough to go through them: on the tokens of which
    the parent's NLL is. The curve is the trainer's estimate with the same few masks each time, whose differences are
    better known than its height.
    """
    from a2d_hf import evaluate
    from a2d_hf.trainers.model_resolution import base_model

    model = base_model(model)
    if model.config.objective != BD3LM or model.config.block_size > LARGEST_BLOCK:
        return None
    return evaluate.diffusion_nelbo(model, scored_rows(held_out), mc_samples=2**model.config.block_size - 1).to_dict()


@dataclass(frozen=True)
class Part:
    """One training of a run: its rows, how many of them, and the fields of its configuration that are its own."""

    own_text: bool
    budget: Budget
    config: dict[str, Any]


def parts_of(arm: Arm, budget: Budget, learning_rate: float) -> list[Part]:
    """
    The trainings of a run, one behind the other. A run of two is one schedule: the second begins at the rates at which
    the first one ends.
    """
    cosine = {"lr_scheduler_type": "cosine", "learning_rate": learning_rate}
    if arm.last is None:
        return [Part(arm.own_text, budget, cosine | arm.config)]
    last, points = arm.last, round(arm.last.share * budget.points)
    first = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": last.rate}}
    rates = {name: value * last.rate for name, value in last.config.items() if name == "muon_learning_rate"}
    return [
        Part(arm.own_text, budget.part(budget.points - points), cosine | first | arm.config),
        Part(False, budget.part(points), cosine | last.config | rates | {"learning_rate": learning_rate * last.rate}),
    ]


@dataclass
class Progress:
    """
    The curve of a run while it grows: noted, and told with the time that is left at this pace.

    Attributes:
        name (`str`): of the run.
        done (`float`): tokens of the trainings before this one.
        tokens_per_step (`float`): of this training.
        total (`int`): tokens of the run.
        curve (`list`): what is noted, over all trainings.
    """

    name: str
    done: float
    tokens_per_step: float
    total: int
    curve: list[tuple[int, float]]

    def __post_init__(self):
        self.began = time.monotonic()

    def measured(self, step: int, nelbo: float) -> None:
        trained = step * self.tokens_per_step
        self.curve.append((round(self.done + trained), nelbo))
        if step > 0:
            left = (self.total - self.done - trained) / trained * (time.monotonic() - self.began)
            print(
                f"{self.name}: {self.curve[-1][0]:,} of {self.total:,} tokens, NELBO {nelbo:.3f}, "
                f"about {max(left, 0) / 60:.0f} min left",
                flush=True,
            )
