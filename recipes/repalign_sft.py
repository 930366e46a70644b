"""
Turn an autoregressive instruct model into a masked diffusion model whose hidden states stay near those of its parent.

The loss is the NELBO of masked diffusion (MDLM, https://huggingface.co/papers/2406.07524) over the assistant's tokens,
plus 1 - the mean cosine between the model's hidden states and those of a frozen copy of its parent on the clean text.
With LoRA the parent is the same weights with the adapter switched off, which takes no memory.

One GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/repalign_sft.py \
        --config recipes/configs/qwen3_0.6b_repalign_sft.yaml

Two CPU cores, a few steps, on a folder with your own .jsonl files (one {"messages": [...]} per line), to see it work:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/repalign_sft.py \
        --model_name_or_path path/to/model --dataset_name path/to/chats --output_dir runs/try \
        --max_steps 5 --per_device_train_batch_size 2 --max_length 128

LoRA: add `--use_peft`; QLoRA: `--use_peft --load_in_4bit` (needs the extra `quantization`).
"""

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from a2d_hf import RepAlignConfig, RepAlignTrainer
from a2d_hf.recipe_main import run_recipe
from a2d_hf.recipe_training import recipe_parser, train_recipe


def main(
    script_args: ScriptArguments,
    training_args: RepAlignConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    train_recipe(RepAlignTrainer, script_args, training_args, model_args, dataset_args)


def make_parser() -> TrlParser:
    return recipe_parser(RepAlignConfig)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main, make_parser()))
