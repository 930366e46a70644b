"""From TRL's arguments to a training run: what the scripts in recipes/ have in common.

Owns the parser of a recipe, the way its arguments become a trainer, and the run. Which trainer, and whether texts are
cut into pieces, is the recipe's. Reads data and models, writes what the trainer saves.
"""

from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from .data_mixture import load_training_data
from .trainers import A2DTrainer, A2DTrainingConfig


def recipe_parser(config_class: type[A2DTrainingConfig], *more: type, pretraining: bool = False) -> TrlParser:
    """
    The parser of a recipe.

    Args:
        config_class (`type`): configuration of the trainer.
        more (`type`): further dataclasses of arguments.
        pretraining (`bool`, *optional*, defaults to `False`): texts are cut into pieces that lose nothing; a piece
            does not end a text, so no EOS is put behind it.

    Returns:
        `trl.TrlParser`
    """
    parser = TrlParser((ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig, *more))
    if pretraining:
        parser.set_defaults_with_config(insert_eos=False, truncation_mode="chunk")
    return parser


def set_model_init_kwargs(training_args: A2DTrainingConfig, model_args: ModelConfig) -> None:
    """Hands what TRL calls model arguments to the loading of the model; `model_init_kwargs` has the last word."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})


def train_recipe(
    trainer_class: type[A2DTrainer],
    script_args: ScriptArguments,
    training_args: A2DTrainingConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """
    Trains, saves to `output_dir`, and pushes where that was asked for.

    Args:
        trainer_class (`type`): the method.
        script_args (`trl.ScriptArguments`): names the data.
        training_args ([`A2DTrainingConfig`]): of the method.
        model_args (`trl.ModelConfig`): names the model, its adapter and its quantization.
        dataset_args (`trl.DatasetMixtureConfig`): a mixture in TRL's own form.
    """
    set_model_init_kwargs(training_args, model_args)
    data = load_training_data(script_args, dataset_args, training_args.seed, training_args.dataset_text_field)
    trainer = trainer_class(
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
