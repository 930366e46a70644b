"""
Turn an autoregressive instruct model into a masked diffusion model, on conversations or prompts with completions.

The loss is the NELBO of masked diffusion (MDLM, https://huggingface.co/papers/2406.07524) over the assistant's tokens
and the EOS that ends them; prompts are never masked. The model is converted in memory when it is loaded, the reach
gate runs before the first step, and what is saved is an ordinary checkpoint.

One GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/mdlm_sft.py \
        --config recipes/configs/qwen3_0.6b_mdlm_sft.yaml

Two CPU cores, a few steps, on a folder with your own .jsonl files (one {"messages": [...]} per line), to see it work:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/mdlm_sft.py \
        --model_name_or_path path/to/model --dataset_name path/to/chats --output_dir runs/try \
        --max_steps 5 --per_device_train_batch_size 2 --max_length 128

LoRA: add `--use_peft`; QLoRA: `--use_peft --load_in_4bit` (needs the extra `quantization`).
"""

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from a2d_hf import MDLMConfig, MDLMTrainer
from a2d_hf.recipe_main import run_recipe
from a2d_hf.recipe_training import recipe_parser, train_recipe


def main(
    script_args: ScriptArguments,
    training_args: MDLMConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    train_recipe(MDLMTrainer, script_args, training_args, model_args, dataset_args)


def make_parser() -> TrlParser:
    return recipe_parser(MDLMConfig)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main, make_parser()))
