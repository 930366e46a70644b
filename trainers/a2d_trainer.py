"""The thin base that every trainer of this project shares.

Owns everything around an objective: turning what the user passes into a diffusion model and prepared rows, the data
loaders' order, and what the loss is divided by over the global batch. The objective itself is the subclass's
`compute_loss`. Subclasses `transformers.Trainer` and mirrors `trl.SFTTrainer`.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader, Dataset
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from a2d_hf.modeling.gates import GateResult, reach_gate

from .a2d_config import A2DTrainingConfig
from .auxiliary_losses import AuxiliaryLosses
from .dataset_preparation import ANY_DATASET, PreparationReport, RowRules, prepare_dataset
from .diffusion_collator import DiffusionCollator
from .epoch_order import EOSTail, EpochOrder, OrderedRows, PaddedSequence, StreamOrder
from .measured_trainer import MeasuredTrainer
from .model_resolution import add_adapter, base_model, resolve_model, resolve_tokenizer
from .muon_optimizer import muon_of
from .replay import REPLAY, ReplayCollator, ReplayedRows, replay_seed
from .row_packing import PackedEpochOrder, PackedStream, check_packing
from .teacher_cache import TeacherCache
from .trainer_card import Paper, trainer_card


logger = logging.get_logger(__name__)

STREAMS = torch.utils.data.IterableDataset | datasets.IterableDataset


class A2DTrainer(MeasuredTrainer):
    """
    Base of the trainers of this project; use [`MDLMTrainer`] or a sibling.

    Args:
        model (`str`, [`A2DForMaskedDiffusion`], `PreTrainedModel` or `PeftModel`):
            A Hub id or folder of a converted or an autoregressive checkpoint; a diffusion model; a PEFT model of one;
            or a plain causal language model, which is wrapped without copying: its own weights are trained.
        args ([`A2DTrainingConfig`], *optional*):
            Configuration; by default that of the trainer with `output_dir` named after the model.
        data_collator (`DataCollator`, *optional*):
            By default [`DiffusionCollator`]. Another one must pass on what decides a row's noise: `row_id`, `epoch`
            and `place`. With `packing` it gets packs, `{"documents": [row, row, ...]}`.
        train_dataset, eval_dataset (`datasets.Dataset`, `datasets.IterableDataset` or a dict of those for evaluation):
            In any of TRL's formats: plain text, prompt and completion, messages, or token ids.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer; by default loaded from where the model came from.
        compute_metrics (`Callable`, *optional*):
            As in [`~transformers.Trainer`]: gets the logits of every position of the noised rows, and labels that are
            -100 where nothing was masked. Costs a second forward pass with full logits.
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics:
            As in [`~transformers.Trainer`].
        quantization_config (`QuantizationConfigMixin`, *optional*):
            Used where `model` is a string; combine with `peft_config` for QLoRA.
        peft_config (`PeftConfig`, *optional*):
            Adapter to train. LoRA without `target_modules` adapts every linear layer but the head, and also trains
            the mask token's embedding row.
        formatting_func (`Callable`, *optional*):
            Turns a row into text before anything else.

    Attributes:
        dataset_reports (`dict[str, PreparationReport]`): what became of the rows of each dataset.
        gate_result ([`GateResult`], *optional*): the reach gate, once training has begun.
    """

    config_class: type[A2DTrainingConfig] = A2DTrainingConfig
    objective: str
    paper: Paper
    # `compute_loss` divides by the global batch itself. Read by transformers >= 5.18; `__init__` serves older ones.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: A2DTrainingConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: ANY_DATASET | None = None,
        eval_dataset: ANY_DATASET | dict[str, ANY_DATASET] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ):
        # 1. Arguments.
        if args is None:
            name = model if isinstance(model, str) else base_model(model).config.name_or_path or "model"
            args = self.config_class(output_dir=f"{os.path.basename(name.rstrip('/'))}-{self.objective.upper()}")
        if not isinstance(args, self.config_class):
            raise TypeError(f"`args` must be a {self.config_class.__name__}, not a {type(args).__name__}.")
        if isinstance(train_dataset, STREAMS):
            if args.max_steps <= 0:
                raise ValueError("`max_steps` must be set when `train_dataset` is a stream, which has no length.")
            # Rows of ragged lengths cannot be joined by the main process and dealt out.
            args.accelerator_config.dispatch_batches = False
            if args.replay_weight > 0:
                raise ValueError(
                    "`replay_weight` needs a `train_dataset` with a length: a stream cannot be read again."
                )

        # 2. Tokenizer and model. Adapters start from random numbers, so the seed comes first.
        set_seed(args.seed)
        processing_class = resolve_tokenizer(model, processing_class, args)
        fields = self.diffusion_fields(model, args)
        model = resolve_model(model, processing_class, args, fields, quantization_config, peft_config is not None)
        teacher_cache = TeacherCache.of_arguments(model, args)
        model = add_adapter(model, peft_config, processing_class, args)

        # 3. Rows. What is set here and belongs to the parent, the parent sets again.
        self.args, self.processing_class = args, processing_class
        self.diffusion_config = base_model(model).config
        self._rules = self._row_rules()
        self._formatting_func = formatting_func
        self.dataset_reports: dict[str, PreparationReport] = {}
        if train_dataset is not None:
            train_dataset = self.training_rows(self._prepare(train_dataset, "train"))
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepare(dataset, name) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepare(eval_dataset, "eval")
        if data_collator is None:
            data_collator = DiffusionCollator(self._pad_token_id(), args.pad_to_multiple_of)
        if args.replay_weight > 0:
            data_collator = ReplayCollator(data_collator)

        # 4. The rest is transformers'.
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs or muon_of(args),
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not run under `nn.DataParallel`, which transformers uses when a process "
                "sees several GPUs: start it with `accelerate launch` or `torchrun`, or set `CUDA_VISIBLE_DEVICES` to "
                "one of them."
            )
        # Older than 5.18, transformers divides by the accumulation steps once more unless the model takes the count.
        self.model_accepts_loss_kwargs = True
        self.gate_result: GateResult | None = None
        self.auxiliary = AuxiliaryLosses(self.model, args, teacher_cache)
        self._replayed_items: torch.Tensor | None = None

    def diffusion_fields(self, model: str | PreTrainedModel | PeftModel, args: A2DTrainingConfig) -> dict[str, Any]:
        """The fields of [`A2DConfig`] that the objective asks of its model."""
        return {"objective": self.objective}

    # -------------------------------------------------------------------------------------------------------- the rows

    def _row_rules(self) -> RowRules:
        args, context = self.args, self.diffusion_config.max_position_embeddings
        max_length = args.max_length
        if max_length is not None and context is not None and max_length > context:
            logger.warning(
                f"`max_length` {max_length} exceeds the model's context: rows get at most {context} tokens."
            )
            max_length = context
        return RowRules(
            text_field=args.dataset_text_field,
            max_length=max_length,
            truncation_mode="chunk" if args.packing_strategy == "bfd_split" else args.truncation_mode,
            insert_eos=args.insert_eos,
            token_shift=self.diffusion_config.token_shift,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
        )

    def _prepare(self, dataset: ANY_DATASET, name: str) -> ANY_DATASET:
        if (self.args.dataset_kwargs or {}).get("skip_prepare_dataset", False):
            return dataset
        if not isinstance(dataset, ANY_DATASET):
            raise TypeError(
                f"The {name} dataset must be a `datasets.Dataset` or `datasets.IterableDataset`, not a "
                f"`{type(dataset).__name__}`."
            )
        prepared, report = prepare_dataset(
            dataset,
            self.processing_class,
            self._rules,
            name=name,
            num_proc=self.args.dataset_num_proc,
            formatting_func=self._formatting_func,
            main_process_first=self.args.main_process_first(desc=f"preparation of the {name} dataset"),
        )
        if report is not None:
            self.dataset_reports[name] = report
        return prepared

    def training_rows(self, prepared: ANY_DATASET) -> ANY_DATASET:
        """What an objective makes of the prepared rows before it trains on them."""
        return prepared

    def _pad_token_id(self) -> int:
        tokenizer = self.processing_class
        candidates = [] if tokenizer is None else [tokenizer.pad_token_id, tokenizer.eos_token_id]
        return next((token for token in candidates if token is not None), 0)  # never read: padding is not attended to

    def eos_tail(self) -> EOSTail | None:
        """The EOS tokens added after the rows of an epoch, for objectives that need them."""
        return None

    def _get_dataloader(
        self,
        dataset: Dataset | datasets.Dataset | datasets.IterableDataset,
        description: str,
        batch_size: int,
        sampler_fn: Callable | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        # Every loader of the parent passes through here. It reads rows in an order of ours, one after the other.
        tail = self.eos_tail() if is_training else None
        packed = self._rules.max_length if is_training and self.args.packing else None
        shuffle = self.args.train_sampling_strategy == "random"
        if isinstance(dataset, STREAMS):
            rows = StreamOrder(dataset, repeat=is_training, tail=tail)
            rows = rows if packed is None else PackedStream(rows, packed)
        elif packed is not None:
            rows = PackedEpochOrder(dataset, self._data_seed, shuffle, packed, tail)
            logger.info(f"Packing: {len(rows.dataset):,} rows in {len(rows):,} sequences.")
        elif is_training:
            rows = EpochOrder(dataset, self._data_seed, shuffle, tail)
        else:
            rows = OrderedRows(dataset)
        at_once = batch_size * (1 if self.args.accelerator_config.split_batches else self.args.world_size)
        together = at_once if self.args.world_size > 1 and not self.args.dataloader_drop_last else 1
        if is_training and self.args.replay_weight > 0:
            seen = len(rows) // at_once * at_once if self.args.dataloader_drop_last else len(rows)
            step_rows = self.get_total_train_batch_size(self.args)
            rows = ReplayedRows(rows, self.args.seed, self.args.replay_buffer_size, step_rows, seen)
        return super()._get_dataloader(
            dataset=rows,
            description=description,
            batch_size=batch_size,
            sampler_fn=lambda rows: PaddedSequence(len(rows), together),
            is_training=is_training,
            dataloader_key=dataloader_key,
        )

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # -------------------------------------------------------------------------------------------------------- training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        # Before anything is trained, and whatever the model was before it came here.
        self.gate_result = reach_gate(base_model(self.model))
        if not self.gate_result.passed:
            raise RuntimeError(f"Training was not begun, the reach gate failed: {self.gate_result.message}")
        if self.args.packing:
            check_packing(base_model(self.model))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def resume_key(self) -> dict[str, Any]:
        return {
            "objective": self.objective,
            "seed": self.args.seed,
            "data_seed": self._data_seed,
            "train_sampling_strategy": str(self.args.train_sampling_strategy),
            "train_rows": None if isinstance(self.train_dataset, STREAMS) else len(self.train_dataset),
            "rows_per_step": self.get_total_train_batch_size(self.args),
            **({"packing": self.args.packing_strategy} if self.args.packing else {}),
            # Not the field's own name, whose default would stand for what a run without replay has not written.
            **(
                {"replay with replay_buffer_size": self.args.replay_buffer_size} if self.args.replay_weight > 0 else {}
            ),
        }

    @property
    def noise_seed(self) -> int:
        """Seed of the noise that `compute_loss` draws: that of the run in training, a fixed one in evaluation."""
        return self.args.seed if self.model.training else self.args.eval_noise_seed

    @staticmethod
    def check_batch(inputs: dict[str, torch.Tensor]) -> None:
        """Raises `ValueError` where a data collator has dropped what decides the noise of a row."""
        missing = [name for name in ("attention_mask", "row_id", "epoch", "place") if name not in inputs]
        if missing:
            raise ValueError(f"The batch has no {', '.join(missing)}: `data_collator` must pass on what rows carry.")

    def count_items(self, inputs: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
        """
        What a batch adds to the number that the loss is divided by: its tokens that may be masked, unless the
        objective says otherwise.

        Args:
            inputs (`dict[str, torch.Tensor]`): a batch.
            seed (`int`): seed of its noise, for objectives that count what the noise decides.
        """
        return (inputs["labels"] != -100).sum()

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        # The parent's version, with the objective's own count, and always over every process.
        if self._trained_to_the_end():
            return [], None
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        for batch in batches:
            self.check_batch(batch)
        # The model may still be in evaluation mode here, so the seed is named.
        items = torch.stack([self.count_items(batch, self.args.seed).to(device) for batch in batches]).sum()
        if self.args.replay_weight > 0:
            seed = replay_seed(self.args.seed)
            replayed = torch.stack([self.count_items(batch[REPLAY], seed).to(device) for batch in batches]).sum()
            self._replayed_items = self.accelerator.reduce(replayed, reduction="sum")
        return batches, self.accelerator.reduce(items, reduction="sum").clamp(min=1)

    def objective_sum(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
        """The objective alone, summed over a batch with the noise of `seed`, with gradient."""
        raise NotImplementedError

    def replay_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None
    ) -> torch.Tensor | float:
        """
        What the past rows that came with a batch of new ones add to its loss. With a gradient: they pass the model
        again. `num_items_in_batch` is as in `compute_loss`: `None` for a batch on its own.
        """
        if not self.model.training or REPLAY not in inputs:
            return 0.0
        seed = replay_seed(self.args.seed)
        items = self.count_items(inputs[REPLAY], seed)
        divisor = items if num_items_in_batch is None else self._replayed_items
        if divisor == 0:  # the first step, on every process
            return 0.0
        total = self.objective_sum(model, inputs[REPLAY], seed)
        self._metrics["train"].add("replay_loss", total.detach(), items)
        loss = self.args.replay_weight * total / divisor
        return loss if num_items_in_batch is None else self.scale_for_processes(loss)

    def scale_for_processes(self, loss: torch.Tensor) -> torch.Tensor:
        """Undoes the mean over processes that data-parallel training takes of gradients already divided globally."""
        return loss * (self.accelerator.num_processes // self.get_tp_size())

    # ------------------------------------------------------------------------------------------------------ the card

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Writes the model card, `README.md` of the output folder. Every saved model gets one of its own anyway.

        Args:
            model_name (`str`, *optional*): what to call the model.
            dataset_name (`str` or `list[str]`, *optional*): what it was trained on.
            tags (`str` or `list[str]`, *optional*): further tags.
        """
        if self.is_world_process_zero():
            self._write_card(self.args.output_dir, model_name, dataset_name, tags)

    def _write_card(self, folder: str, *what: Any) -> None:
        path = os.path.join(folder, "README.md")
        with open(f"{path}.writing", "w", encoding="utf-8") as file:
            file.write(trainer_card(self, *what))
        os.replace(f"{path}.writing", path)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._write_card(output_dir or self.args.output_dir)
