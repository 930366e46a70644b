"""
Turn an autoregressive base model into a block diffusion model, by continual pre-training on plain text.

The loss is that of BD3LM (https://huggingface.co/papers/2503.09573) over every token. With `token_shift` and block
size 1 it is the parent's own loss: the curriculum of the configuration starts there, exactly at the parent's
likelihood, and widens the blocks. Rows are plain text, longer ones cut into pieces that lose nothing, and no EOS is
put behind a piece.

One GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/bd3lm_pt.py \
        --config recipes/configs/qwen3_0.6b_bd3lm_pt.yaml

Two CPU cores, a few steps, on a folder with your own .jsonl files (one {"text": ...} per line), to see it work:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/bd3lm_pt.py \
        --model_name_or_path path/to/model --dataset_name path/to/texts --output_dir runs/try \
        --max_steps 5 --per_device_train_batch_size 2 --max_length 128 --block_size 32
"""

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from a2d_hf import BD3LMConfig, BD3LMTrainer
from a2d_hf.recipe_main import run_recipe
from a2d_hf.recipe_training import recipe_parser, train_recipe


def main(
    script_args: ScriptArguments,
    training_args: BD3LMConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    train_recipe(BD3LMTrainer, script_args, training_args, model_args, dataset_args)


def make_parser() -> TrlParser:
    return recipe_parser(BD3LMConfig, pretraining=True)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main, make_parser()))
