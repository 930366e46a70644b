"""
Turn an autoregressive instruct model into a block diffusion model, on conversations or prompts with completions.

The loss is that of BD3LM (https://huggingface.co/papers/2503.09573) over the assistant's tokens and the EOS that fill
the last block; prompts are never masked. A finished block never changes, so decoding keeps an exact cache. The model
is converted in memory when it is loaded, the reach gate runs before the first step, and what is saved is an ordinary
checkpoint.

One GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/bd3lm_sft.py \
        --config recipes/configs/qwen3_0.6b_bd3lm_sft.yaml

Two CPU cores, a few steps, on a folder with your own .jsonl files (one {"messages": [...]} per line), to see it work:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/bd3lm_sft.py \
        --model_name_or_path path/to/model --dataset_name path/to/chats --output_dir runs/try \
        --max_steps 5 --per_device_train_batch_size 2 --max_length 128 --block_size 32

LoRA: add `--use_peft`; QLoRA: `--use_peft --load_in_4bit` (needs the extra `quantization`).
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
    return recipe_parser(BD3LMConfig)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main, make_parser()))
