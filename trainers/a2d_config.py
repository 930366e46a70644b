"""What every trainer of this project can be told.

Owns the fields that the objectives share: where the model comes from, how rows are prepared, which noise evaluation
uses. Fields that SFTTrainer's users know keep their names and meaning.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available


@dataclass
class A2DTrainingConfig(TrainingArguments):
    r"""
    Base of [`MDLMConfig`] and its siblings: [`~transformers.TrainingArguments`] plus what diffusion training shares.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`A2DForMaskedDiffusion.from_pretrained`] where `model` is a string, for example
            `{"token_shift": True}`; for a plain causal language model object, those of
            [`A2DForMaskedDiffusion.from_causal_lm`]. `dtype` defaults to `float32`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether models and tokenizers may bring their own Python code from the Hub.

        > Parameters that control the data

        dataset_text_field (`str`, *optional*, defaults to `"text"`):
            Column of plain text.
        dataset_kwargs (`dict[str, Any]`, *optional*):
            `{"skip_prepare_dataset": True}` takes rows of `input_ids` and `labels` as they are.
        dataset_num_proc (`int`, *optional*):
            Processes that prepare the dataset.
        eos_token (`str`, *optional*):
            Token that ends a row; the tokenizer's own by default.
        insert_eos (`bool`, *optional*, defaults to `True`):
            Whether rows of plain text and plain completions end with EOS. Turn it off for continual pre-training.
        max_length (`int`, *optional*, defaults to `1024`):
            Most tokens in a row, and never more than the model's context. `None` for the rows as they are.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            `"keep_start"` cuts off what is longer than `max_length` and says how much that was. `"chunk"` cuts rows of
            plain text into pieces that lose nothing; prompts with completions and conversations are cut off.
        packing (`bool`, *optional*, defaults to `False`):
            Whether several rows share a sequence of at most `max_length` tokens, so that little is padding. They never
            see each other, and each keeps the position, noise and weight that it would have alone: only the batches
            are cut differently. A batch then counts sequences. Evaluation is never packed.
        packing_strategy (`str`, *optional*, defaults to `"bfd"`):
            `"bfd"` (best fit decreasing) or `"bfd_split"`, which also cuts long rows as
            `truncation_mode="chunk"` does.
        pad_to_multiple_of (`int`, *optional*):
            Rounds the length of a batch up.
        completion_only_loss (`bool`, *optional*):
            Whether only completions are masked and trained. `None`: where the rows have prompts.
        assistant_only_loss (`bool`, *optional*):
            Whether only the assistant's turns, all of them, are masked and trained. `None`: for rows of `messages`.
        eval_noise_seed (`int`, *optional*, defaults to `0`):
            Seed of the noise of evaluation, which is the same at every evaluation of every run.

        > Parameters that control the optimizer

        muon_learning_rate (`float`, *optional*):
            Trains the matrices of the layers with Muon at this rate, embeddings, output head and vectors with AdamW at
            `learning_rate`; both follow the schedule. Updates have the size of AdamW's, so rates are of one kind. By
            default everything is `optim`'s. Not where weights are in shards (FSDP, DeepSpeed).

        > Parameters that control the auxiliary losses: in training only, divided by what the loss is divided by

        ar_loss_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the autoregressive parent's own next-token loss on the clean text. It keeps an exact causal mode
            usable. Costs a second, causal pass; with block diffusion none, but `clean_context="causal"` is needed.
        teacher_kl_weight (`float`, *optional*, defaults to `0.0`):
            Weight of KL(teacher ‖ model) at the masked tokens, the teacher being the frozen autoregressive parent on
            clean text. Costs a forward pass of the teacher. A regulariser, no bound: logged apart from the NELBO.
        teacher (`str`, *optional*):
            `"frozen_copy"` (of the model as it comes in) or `"adapters_off"` (the same weights with their adapter
            switched off: no extra memory). By default the latter where there is an adapter.
        teacher_logits_cache (`str`, *optional*):
            Folder that `scripts/precompute_teacher_logits.py` has written; takes the place of the teacher. Only the
            likeliest tokens are in it, the rest counts as one: a lower bound of the divergence, see
            [`~trainers.distillation.linear_top_kl`].
        router_aux_loss_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the parent's own router loss, for a mixture of experts.
        replay_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the objective on rows of past steps, one for each new row, with fresh noise. Divided by what may
            be masked in those rows, so it counts as much as the objective at a weight of 1. Without the other losses
            added here, nor an alignment. Costs as much as the objective. Not for streams, whose past is gone.
        replay_buffer_size (`int`, *optional*, defaults to `1024`):
            How many of the last rows seen the replayed ones are drawn from (with `packing`, packs).

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `1e-4` instead of `5e-5`.
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `bf16`: Defaults to `True` on an accelerator that has it, unless `fp16` is set, instead of `False`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`, and must stay so: `row_id` decides the noise.
    > - `greater_is_better`: Defaults to `False` also for a `metric_for_best_model` of `nelbo` or an `nll`.
    > - `logging_nan_inf_filter`: Defaults to `False` instead of `True`: a loss that is not a number stops the run.
    >
    > And different from [`~trl.SFTConfig`]: `learning_rate` (`1e-4`, not `2e-5`), `gradient_checkpointing` (`False`),
    > `assistant_only_loss` (on for rows of `messages`).
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs", "dataset_kwargs"]

    # Defaults that differ from the parent's.
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for the optimizer."})
    logging_steps: float = field(
        default=10,
        metadata={
            "help": "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, "
            "will be interpreted as ratio of total training steps."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to use bf16 mixed precision. If not set: on an accelerator that has it, unless `fp16` is "
            "set."
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Must stay False: `row_id` is no argument of the model, but decides the noise."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to hide nan and inf losses from the log. The run stops on them."}
    )

    # The model.
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `A2DForMaskedDiffusion.from_pretrained` where `model` is a string, or for "
            "`from_causal_lm` where it is a plain causal language model."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Whether models and tokenizers may bring their own Python code from the Hub."},
    )

    # The data.
    dataset_text_field: str = field(default="text", metadata={"help": "Column of plain text."})
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "`{'skip_prepare_dataset': True}` takes rows of `input_ids` and `labels` as they are."},
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the dataset."})
    eos_token: str | None = field(
        default=None, metadata={"help": "Token that ends a row. Defaults to `processing_class.eos_token`."}
    )
    insert_eos: bool = field(
        default=True,
        metadata={
            "help": "Whether rows of plain text and plain completions end with EOS. Turn it off for continual "
            "pre-training."
        },
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Most tokens in a row, and never more than the model's context. None: rows as they are."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "'keep_start' cuts off what is longer than `max_length`; 'chunk' cuts rows of plain text into "
            "pieces that lose nothing.",
            "choices": ["keep_start", "chunk"],
        },
    )
    packing: bool = field(
        default=False, metadata={"help": "Whether several rows share a sequence; they never see each other."}
    )
    packing_strategy: str = field(
        default="bfd",
        metadata={
            "help": "'bfd' (best fit decreasing), or 'bfd_split', which also cuts long rows into pieces.",
            "choices": ["bfd", "bfd_split"],
        },
    )
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Rounds the length of a batch up."})
    completion_only_loss: bool | None = field(
        default=None,
        metadata={"help": "Whether only completions are masked and trained. None: where the rows have prompts."},
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={"help": "Whether only the assistant's turns are masked and trained. None: for rows of `messages`."},
    )
    eval_noise_seed: int = field(
        default=0, metadata={"help": "Seed of the noise of evaluation, the same at every evaluation of every run."}
    )

    # The optimizer.
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Trains the matrices of the layers with Muon at this rate, the rest with AdamW."},
    )

    # The auxiliary losses.
    ar_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the parent's own next-token loss on the clean text."}
    )
    teacher_kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of KL(frozen parent on clean text || model) at the masked tokens."}
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "'frozen_copy' or 'adapters_off'. None: the latter where there is an adapter.",
            "choices": ["frozen_copy", "adapters_off"],
        },
    )
    teacher_logits_cache: str | None = field(
        default=None, metadata={"help": "Folder of precomputed teacher probabilities; takes the teacher's place."}
    )
    router_aux_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the parent's own router loss, for a mixture of experts."}
    )
    replay_weight: float = field(
        default=0.0, metadata={"help": "Weight of the objective on rows of past steps, with fresh noise."}
    )
    replay_buffer_size: int = field(
        default=1024, metadata={"help": "How many of the last rows seen the replayed ones are drawn from."}
    )

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss asks the frozen parent for its distributions."""
        return self.teacher_kl_weight > 0

    def __post_init__(self):
        # A command line knows only strings, and transformers declares this one as a folder's name.
        self.resume_from_checkpoint = {"true": True, "True": True, "false": None, "False": None}.get(
            self.resume_from_checkpoint, self.resume_from_checkpoint
        )
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # transformers knows of `loss` only.
            self.greater_is_better = not any(part in self.metric_for_best_model for part in ("nelbo", "nll", "loss"))
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to copy to, and torch would warn at every epoch
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: `row_id`, which decides a row's noise, is one.")
        if self.truncation_mode not in ("keep_start", "chunk"):
            raise ValueError(f"`truncation_mode` must be 'keep_start' or 'chunk', not {self.truncation_mode!r}.")
        if self.packing_strategy not in ("bfd", "bfd_split"):
            raise ValueError(
                f"`packing_strategy` must be 'bfd' or 'bfd_split', not {self.packing_strategy!r}: rows that are cut "
                "anywhere ('wrapped') would lose their starts and ends."
            )
        if self.packing and self.max_length is None:
            raise ValueError("`packing` needs `max_length`: it says how long a packed sequence may be.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, not {self.max_length}.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy` must be 'random' or 'sequential', not {self.train_sampling_strategy!r}: "
                "the order of an epoch decides its noise."
            )
        for name in ("ar_loss_weight", "teacher_kl_weight", "router_aux_loss_weight", "replay_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, not {getattr(self, name)}.")
        if self.replay_buffer_size < 1:
            raise ValueError(f"`replay_buffer_size` must be at least 1, not {self.replay_buffer_size}.")
        if self.muon_learning_rate is not None:
            if self.muon_learning_rate <= 0:
                raise ValueError(f"`muon_learning_rate` must be positive, not {self.muon_learning_rate}.")
            if self.optim != TrainingArguments.default_optim:
                raise ValueError(
                    f"`muon_learning_rate` is Muon with AdamW, `optim` asks for {self.optim.value}: set one of them."
                )
        if self.teacher_logits_cache is not None and (not self.needs_teacher or self.teacher is not None):
            raise ValueError(
                "`teacher_logits_cache` takes the teacher's place: set what asks one (`teacher_kl_weight`, or "
                "`teacher_targets` of BD3LM), and leave `teacher` out."
            )
        if self.label_smoothing_factor != 0:
            raise ValueError("`label_smoothing_factor` must be 0: a smoothed loss is no bound on the likelihood.")
