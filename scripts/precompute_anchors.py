"""Runs a frozen autoregressive parent once over a dataset and keeps its hidden states, for representation alignment.

    python scripts/precompute_anchors.py --config recipes/configs/qwen3_0.6b_repalign_sft.yaml \
        --anchor_cache anchors/qwen3-0.6b --align_layers 7 14 21 28

takes the same arguments and files as recipes/repalign_sft.py, so that it prepares the same rows; train with the same
`--anchor_cache` and `--align_layers`. It can be stopped at any moment and goes on where it was. Costs, per token and
layer, hidden size times the bytes of `--anchor_dtype` on disk.
"""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from a2d_hf import RepAlignConfig, RepAlignTrainer
from a2d_hf.data_mixture import load_training_data
from a2d_hf.recipe_main import run_recipe
from a2d_hf.recipe_training import recipe_parser, set_model_init_kwargs
from a2d_hf.trainers import precompute_anchors


@dataclass
class AnchorArguments:
    """How the anchors are written."""

    anchor_dtype: str = field(
        default="bfloat16",
        metadata={"help": "What the anchors are kept in.", "choices": ["bfloat16", "float16", "float32"]},
    )
    anchor_batch_size: int = field(default=8, metadata={"help": "Rows per forward pass."})


def main(
    script_args: ScriptArguments,
    training_args: RepAlignConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    anchor_args: AnchorArguments,
) -> None:
    folder, training_args.anchor_cache = training_args.anchor_cache, None
    if folder is None:
        raise ValueError("`--anchor_cache` is missing: name the folder to write to.")
    training_args.align_weight = 0.0  # nothing is aligned here: no teacher is made
    set_model_init_kwargs(training_args, model_args)
    dataset = load_training_data(script_args, dataset_args, training_args.seed, training_args.dataset_text_field).train
    if not isinstance(dataset, Dataset):
        raise ValueError("A stream has no end to precompute anchors of: set `dataset_streaming` to false.")
    # Quantized as in the training, so that the anchors are those of the very weights under the adapter.
    trainer = RepAlignTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    written, there = precompute_anchors(
        trainer.model,
        trainer.train_dataset,
        folder,
        trainer.align_layers,
        dtype=getattr(torch, anchor_args.anchor_dtype),
        batch_size=anchor_args.anchor_batch_size,
        revision=model_args.model_revision,
    )
    print(f"{written:,} rows written to {folder}, {there:,} were there already; layers {trainer.align_layers}.")


def make_parser() -> TrlParser:
    return recipe_parser(RepAlignConfig, AnchorArguments)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main, make_parser()))
