"""Runs a frozen autoregressive parent once over a dataset and keeps its likeliest next tokens, for the teacher KL.

    python scripts/precompute_teacher_logits.py --config recipes/configs/qwen3_0.6b_mdlm_sft.yaml \
        --teacher_logits_cache teacher/qwen3-0.6b --top_k 64

takes the same arguments and files as recipes/mdlm_sft.py, so that it prepares the same rows; then train, with any
trainer and the same `--max_length`, with the same `--teacher_logits_cache` and a `--teacher_kl_weight`. It can be
stopped at any moment and goes on where it was. Costs, per token, `--top_k` times 4 bytes and the bytes of
`--logits_dtype` on disk.
"""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from a2d_hf import MDLMConfig, MDLMTrainer
from a2d_hf.data_mixture import load_training_data
from a2d_hf.recipe_main import run_recipe
from a2d_hf.recipe_training import recipe_parser, set_model_init_kwargs
from a2d_hf.trainers import precompute_teacher_logits


@dataclass
class PrecomputingConfig(MDLMConfig):
    """[`MDLMConfig`], in which the cache is what is written."""

    def __post_init__(self):
        self.folder, self.teacher_logits_cache, self.teacher_kl_weight = self.teacher_logits_cache, None, 0.0
        super().__post_init__()


@dataclass
class TeacherArguments:
    """How the teacher's probabilities are written."""

    top_k: int = field(default=64, metadata={"help": "Tokens to keep at each position."})
    logits_dtype: str = field(
        default="float32",
        metadata={"help": "What log-probabilities are kept in.", "choices": ["bfloat16", "float16", "float32"]},
    )
    logits_batch_size: int = field(default=8, metadata={"help": "Rows per forward pass."})


def main(
    script_args: ScriptArguments,
    training_args: PrecomputingConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    teacher_args: TeacherArguments,
) -> None:
    if training_args.folder is None:
        raise ValueError("`--teacher_logits_cache` is missing: name the folder to write to.")
    set_model_init_kwargs(training_args, model_args)
    dataset = load_training_data(script_args, dataset_args, training_args.seed, training_args.dataset_text_field).train
    if not isinstance(dataset, Dataset):
        raise ValueError("A stream has no end to run a teacher over: set `dataset_streaming` to false.")
    trainer = MDLMTrainer(model=model_args.model_name_or_path, args=training_args, train_dataset=dataset)
    written, there = precompute_teacher_logits(
        trainer.model,
        trainer.train_dataset,
        training_args.folder,
        teacher_args.top_k,
        dtype=getattr(torch, teacher_args.logits_dtype),
        batch_size=teacher_args.logits_batch_size,
        revision=model_args.model_revision,
    )
    print(f"{written:,} rows written to {training_args.folder}, {there:,} were there already.")


def make_parser() -> TrlParser:
    return recipe_parser(PrecomputingConfig, TeacherArguments)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main, make_parser()))
