"""
Turn an autoregressive base model into a masked diffusion model, by continual pre-training on plain text.

The loss is the NELBO of masked diffusion (MDLM, https://huggingface.co/papers/2406.07524) over every token. Rows are
plain text, longer ones cut into pieces that lose nothing, and no EOS is put behind a piece. The model is converted in
memory when it is loaded, the reach gate runs before the first step, and what is saved is an ordinary checkpoint.

One GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/mdlm_pt.py \
        --config recipes/configs/qwen3_0.6b_mdlm_pt.yaml

Two CPU cores, a few steps, on a folder with your own .jsonl files (one {"text": ...} per line), to see it work:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/mdlm_pt.py \
        --model_name_or_path path/to/model --dataset_name path/to/texts --output_dir runs/try \
        --max_steps 5 --per_device_train_batch_size 2 --max_length 128
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
    return recipe_parser(MDLMConfig, pretraining=True)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main, make_parser()))
