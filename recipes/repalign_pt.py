"""
Turn an autoregressive base model into a masked diffusion model whose hidden states stay near those of its parent.

The loss is the NELBO of masked diffusion (MDLM, https://huggingface.co/papers/2406.07524) over every token, plus 1 -
the mean cosine between the model's hidden states and those of a frozen copy of its parent on the clean text. Rows are
plain text, longer ones cut into pieces that lose nothing, and no EOS is put behind a piece.

One GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/repalign_pt.py \
        --config recipes/configs/qwen3_0.6b_repalign_pt.yaml

Two CPU cores, a few steps, on a folder with your own .jsonl files (one {"text": ...} per line), to see it work:

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/repalign_pt.py \
        --model_name_or_path path/to/model --dataset_name path/to/texts --output_dir runs/try \
        --max_steps 5 --per_device_train_batch_size 2 --max_length 128
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
    parser = TrlParser((ScriptArguments, RepAlignConfig, ModelConfig, DatasetMixtureConfig))
    # Continual pre-training: texts are cut into pieces, and a piece does not end a text.
    parser.set_defaults_with_config(insert_eos=False, truncation_mode="chunk")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_recipe(main, make_parser()))
