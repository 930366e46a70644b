"""What a trainer measures: evaluation, and everything that is logged beside the loss.

Owns the sums behind the metrics, the evaluation loop and the numbers of a training log. Computes no loss.
"""

import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from .batch_rows import by_token
from .checkpointed_trainer import CheckpointedTrainer
from .dataset_preparation import ANY_DATASET
from .diffusion_metrics import DiffusionMetrics
from .hardware import device_peak_flops
from .model_resolution import base_model


@dataclass(frozen=True)
class _Clock:
    """When something was logged last, and after how many tokens."""

    since: float
    tokens: int


class MeasuredTrainer(CheckpointedTrainer):
    """The measuring half of [`A2DTrainer`]."""

    def __init__(self, *args, **kwargs):
        self._metrics = {"train": DiffusionMetrics(), "eval": DiffusionMetrics()}
        self._tokens_seen = torch.zeros((), dtype=torch.int64)
        self._tokens_read = torch.zeros((), dtype=torch.int64)
        self._clock: _Clock | None = None
        super().__init__(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        real = by_token(inputs["row_id"] >= 0, inputs.get("document_ids"))  # blank rows fill up an epoch: no text
        tokens = (inputs["attention_mask"] * real).sum()
        self._tokens_seen = self._tokens_seen.to(tokens.device) + tokens
        self.note_tokens_read(tokens)
        if self._clock is None:
            self._clock = _Clock(time.perf_counter(), self.state.num_input_tokens_seen)
        return super().training_step(model, inputs, *args, **kwargs)

    def note_tokens_read(self, tokens: torch.Tensor) -> None:
        """Adds to the tokens that the model has read since the last log. Those of the rows themselves are noted."""
        self._tokens_read = self._tokens_read.to(tokens.device) + tokens

    # ------------------------------------------------------------------------------------------------------ evaluation

    def draw_noise(self, inputs: dict[str, torch.Tensor], seed: int) -> Any:
        """The noise of a batch, with `noised_ids_BL` and `masked_BL`. The objective's."""
        raise NotImplementedError

    def noised_logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], noise: Any) -> torch.Tensor:
        """Logits of every position of the noised rows, `(B, L, V)`, for `compute_metrics`."""
        return model(input_ids=noise.noised_ids_BL, attention_mask=inputs["attention_mask"]).logits

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only:
                return loss, None, None
            # Only `compute_metrics` asks for logits of every position.
            noise = self.draw_noise(inputs, self.noise_seed)
            logits = self.noised_logits(model, inputs, noise)
        return loss, logits.detach(), inputs["labels"].masked_fill(~noise.masked_BL, -100)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        # The parent averages over batches; a bound on the likelihood is one sum over one sum.
        self._metrics["eval"] = DiffusionMetrics()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        result = self._metrics["eval"].result(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in result.items()})
        return output

    def evaluate(
        self,
        eval_dataset: ANY_DATASET | dict[str, ANY_DATASET] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        # A dataset passed here is prepared like those passed to the constructor; a name stands for one of those.
        if isinstance(eval_dataset, dict):
            metrics = {}
            for name, dataset in eval_dataset.items():
                metrics |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # --------------------------------------------------------------------------------------------------------- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Of all that is logged, only the parent's regular training log has a `loss`.
        if "loss" in logs:
            result = self._metrics["train"].result(self.accelerator)
            result.pop("loss", None)  # the parent's own is the mean over the same steps
            self._count_tokens()
            logs |= result | self.auxiliary.moe.result(self) | {"num_tokens": self.state.num_input_tokens_seen}
            logs |= self._health(logs) | self._speed()
        super().log(logs, start_time)

    def _health(self, logs: dict[str, float]) -> dict[str, float]:
        """
        `grad_to_param_ratio`: the norm of the gradient, before it was clipped, over that of the trained parameters.
        """
        if "grad_norm" not in logs or self.is_fsdp_enabled or self.is_deepspeed_enabled:  # those hold shards
            return {}
        trained = [weight.detach() for weight in self.model.parameters() if weight.requires_grad]
        size = float(torch.nn.utils.get_total_norm(trained))
        return {"grad_to_param_ratio": logs["grad_norm"] / size} if size > 0 else {}

    def _speed(self) -> dict[str, float]:
        """
        Since the log before, on all processes, evaluation and saving included: `tokens_per_second`, of text; `mfu`,
        the share of the devices' peak in 6 FLOP for each parameter but the embeddings' and each token that the model
        read (attention scores not counted), in bf16 or fp16 on devices with a known peak; `peak_memory_gib`, the most
        that was allocated on this process's device since the start.
        """
        if self._clock is None:
            return {}
        now, numbers = time.perf_counter(), {}
        tokens = self.state.num_input_tokens_seen - self._clock.tokens
        read = self.accelerator.reduce(self._tokens_read.to(self.args.device), reduction="sum")
        self._tokens_read = torch.zeros((), dtype=torch.int64)
        seconds = now - self._clock.since
        if tokens > 0 and self.args.include_num_input_tokens_seen == "no":
            numbers["tokens_per_second"] = tokens / seconds
            peak = device_peak_flops(self.args.device) if self.args.bf16 or self.args.fp16 else None
            if peak is not None and self._dense_parameters > 0:
                done = 6.0 * self._dense_parameters * int(read)
                numbers["mfu"] = done / (seconds * peak * self.accelerator.num_processes)
        if self.args.device.type == "cuda":
            numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.args.device) / 2**30
        self._clock = _Clock(now, self.state.num_input_tokens_seen)
        return numbers

    @functools.cached_property
    def _dense_parameters(self) -> int:
        """Parameters that every token passes, embeddings left out; 0 for a mixture of experts, where that varies."""
        model = base_model(self.model)
        if any("experts" in name for name, _ in model.named_modules()):
            return 0
        return model.num_parameters(exclude_embeddings=True)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._count_tokens()
        super()._save_checkpoint(model, trial)

    def _count_tokens(self) -> None:
        # Kept where the parent keeps its own count, so that it survives a resume.
        seen = self.accelerator.reduce(self._tokens_seen.to(self.args.device), reduction="sum")
        self._tokens_seen = torch.zeros((), dtype=torch.int64)
        if self.args.include_num_input_tokens_seen == "no":
            self.state.num_input_tokens_seen += int(seen)
