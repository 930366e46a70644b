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

from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from a2d_hf import RepAlignConfig, RepAlignTrainer
from a2d_hf.data_mixture import load_training_data
from a2d_hf.recipe_main import run_recipe


def main(
    script_args: ScriptArguments,
    training_args: RepAlignConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    data = load_training_data(script_args, dataset_args, training_args.seed, training_args.dataset_text_field)
    trainer = RepAlignTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=data.test if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def make_parser() -> TrlParser:
    return TrlParser((ScriptArguments, RepAlignConfig, ModelConfig, DatasetMixtureConfig))


if __name__ == "__main__":
    raise SystemExit(run_recipe(main, make_parser()))
