"""Masked diffusion: hide a random share of every row, predict what was hidden.

Owns the objective of MDLM (https://huggingface.co/papers/2406.07524) and nothing around it.

Shapes: B sequences, L tokens, R rows (as many as sequences unless they are packed), N masked tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch

from a2d_hf.modeling.attention_pattern import AttentionPattern

from .a2d_trainer import A2DTrainer
from .batch_rows import by_token, in_text, packing_kwargs, sum_by_row
from .diffusion_noise import (
    OPEN_EDGES,
    bernoulli_mask,
    elbo_weight,
    low_discrepancy_time,
    mask_probability,
    position_in_row,
    random_bits,
    truncation_factor,
)
from .epoch_order import EOSTail
from .mdlm_config import MDLMConfig
from .trainer_card import MDLM


@dataclass
class MDLMNoise:
    """
    The noise of a batch.

    Attributes:
        time_B (`torch.DoubleTensor` of shape `(R,)`): t of each row.
        elbo_weight_B (`torch.Tensor` of shape `(R,)`): w(t), what a masked token of it counts in the NELBO.
        masked_BL (`torch.BoolTensor` of shape `(B, L)`): m, the tokens that are hidden.
        noised_ids_BL (`torch.LongTensor` of shape `(B, L)`): x_t, the ids with the mask token in their place.
    """

    time_B: torch.Tensor
    elbo_weight_B: torch.Tensor
    masked_BL: torch.Tensor
    noised_ids_BL: torch.Tensor


class MDLMTrainer(A2DTrainer):
    r"""
    Trainer for masked diffusion language models (MDLM).

    With the default weighting and normalisation the loss is the NELBO per token,

        L = (1/N) Σ w(t) m_i CE_i,    w(t) = -α'(t) / (1 - α(t)),

    N being the tokens of the GLOBAL batch that may be masked: over accumulated batches and over all processes. Only
    masked tokens pass the output head.

    Example:

    ```python
    >>> from a2d_hf import MDLMConfig, MDLMTrainer
    >>> from datasets import load_dataset

    >>> trainer = MDLMTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=MDLMConfig(output_dir="Qwen3-0.6B-MDLM"),
    ...     train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args: as in [`A2DTrainer`], with `args` an [`MDLMConfig`].
    """

    config_class = MDLMConfig
    objective = "mdlm"
    paper = MDLM
    args: MDLMConfig

    def eos_tail(self) -> EOSTail | None:
        tokenizer = self.processing_class
        if self.args.max_eos_tail == 0 or tokenizer is None or tokenizer.eos_token_id is None:
            return None
        longest_row = self._rules.max_length or self.diffusion_config.max_position_embeddings
        return EOSTail(tokenizer.eos_token_id, self.args.max_eos_tail, longest_row, self.args.seed)

    def resume_key(self) -> dict[str, Any]:
        fields = (
            "noise_schedule",
            "time_epsilon",
            "loss_weighting",
            "loss_normalization",
            "max_eos_tail",
            "attention_anneal_steps",
            "attention_anneal_form",
        )
        return super().resume_key() | {name: getattr(self.args, name) for name in fields}

    def draw_noise(self, inputs: dict[str, torch.Tensor], seed: int) -> MDLMNoise:
        """
        The noise of a batch, a pure function of each row's (seed, epoch, row id).

        Args:
            inputs (`dict[str, torch.Tensor]`): a batch of [`DiffusionCollator`].
            seed (`int`): seed of the noise.

        Returns:
            [`MDLMNoise`]
        """
        self.check_batch(inputs)
        args, device, documents_BL = self.args, inputs["labels"].device, inputs.get("document_ids")
        time_B = low_discrepancy_time(seed, inputs["epoch"], inputs["place"], minimum=args.time_epsilon)
        drawn_BL = bernoulli_mask(
            seed,
            by_token(inputs["epoch"], documents_BL),
            by_token(inputs["row_id"], documents_BL),
            position_in_row(inputs["attention_mask"], documents_BL),
            by_token(mask_probability(time_B, args.noise_schedule), documents_BL),
        )
        masked_BL = drawn_BL & (inputs["labels"] != -100)
        weight_B = elbo_weight(time_B, args.noise_schedule) * truncation_factor(args.time_epsilon, args.noise_schedule)
        return MDLMNoise(
            time_B=time_B,
            elbo_weight_B=weight_B.float().to(device),
            masked_BL=masked_BL,
            noised_ids_BL=inputs["input_ids"].masked_fill(masked_BL, self.diffusion_config.mask_token_id),
        )

    def count_items(self, inputs: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
        if self.args.loss_normalization == "masked":
            return self.draw_noise(inputs, seed).masked_BL.sum()
        maskable_BL = inputs["labels"] != -100
        if self.args.loss_normalization == "sequence":
            return (sum_by_row(maskable_BL, inputs) > 0).sum()
        return maskable_BL.sum()

    def predict_masked(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], seed: int, **kwargs: Any
    ) -> tuple[MDLMNoise, Any]:
        """A pass over the noised rows, `kwargs` going to the model: the noise, and an output whose loss is a sum."""
        labels_BL = inputs["labels"]

        # 1. Noise: one time per row, one coin per token that may be masked.
        noise = self.draw_noise(inputs, seed)

        # 2. What the cross-entropy of a masked token counts.
        weight_B = noise.elbo_weight_B if self.args.loss_weighting == "elbo" else torch.ones_like(noise.elbo_weight_B)
        if self.args.loss_normalization == "sequence":
            weight_B = weight_B / sum_by_row(labels_BL != -100, inputs).clamp(min=1)

        # 3. Predict what is hidden from all that is not. Only masked tokens are labelled, so only they pass the head.
        outputs = model(
            input_ids=noise.noised_ids_BL,
            attention_mask=inputs["attention_mask"],
            attention_pattern=self.attention_pattern(),
            labels=labels_BL.masked_fill(~noise.masked_BL, -100),
            loss_weights=by_token(weight_B, inputs.get("document_ids")).expand(labels_BL.shape),
            **packing_kwargs(inputs),
            **kwargs,
        )
        return noise, outputs

    def objective_sum(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
        return self.predict_masked(model, inputs, seed)[1].loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        # 1-3. Noise, weights, and a prediction of what is hidden.
        noise, outputs = self.predict_masked(model, inputs, self.noise_seed, **self.forward_kwargs())

        # 4. The mean over the global batch: the count covers accumulated batches and all processes.
        items = self.count_items(inputs, self.noise_seed)
        divisor = items.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        total = outputs.loss
        if self.model.training:
            total = total + self.auxiliary_loss(model, inputs, noise, outputs, items, divisor)
        loss = total / divisor
        if num_items_in_batch is not None:
            loss = self.scale_for_processes(loss)
        loss = loss + self.replay_loss(model, inputs, num_items_in_batch)

        # 5. What it was made of.
        self._update_metrics(inputs, noise, outputs, total, items)
        return (loss, outputs) if return_outputs else loss

    def attention_pattern(self) -> AttentionPattern:
        """Who sees whom at this step: everybody, once annealing has ended."""
        steps, form = self.args.attention_anneal_steps, self.args.attention_anneal_form
        if not self.model.training or self.state.global_step + 1 >= steps:
            return AttentionPattern.bidirectional()
        key = int(random_bits(OPEN_EDGES, self.args.seed, self.state.global_step))
        return AttentionPattern.annealed((self.state.global_step + 1) / steps, seed=key, form=form)

    def forward_kwargs(self) -> dict[str, Any]:
        """What the forward pass is asked for beside the loss."""
        return self.auxiliary.forward_kwargs() if self.model.training else {}

    def auxiliary_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        noise: MDLMNoise,
        outputs: Any,
        items: torch.Tensor,
        divisor: torch.Tensor,
    ) -> torch.Tensor | float:
        """What is added to the objective's sum over a batch, in training, before that is divided by `divisor`."""
        return self.auxiliary.total(
            model, inputs, outputs, noise.masked_BL[:, None], outputs.head_input, items, self._metrics["train"]
        )

    def _update_metrics(
        self,
        inputs: dict[str, torch.Tensor],
        noise: MDLMNoise,
        outputs: Any,
        total: torch.Tensor,
        items: torch.Tensor,
    ) -> None:
        # The tail of EOS stands behind the last token: it is trained, but no part of the text whose NELBO this is.
        counted_BL = in_text(inputs) & (inputs["labels"] != -100)
        elbo_weight_B, time_B, masked_BL = noise.elbo_weight_B, noise.time_B, noise.masked_BL
        if "document_ids" in inputs:  # every token is a row of its own
            elbo_weight_B, time_B = (by_token(v, inputs["document_ids"]).flatten() for v in (elbo_weight_B, time_B))
            masked_BL, counted_BL = masked_BL.reshape(-1, 1), counted_BL.reshape(-1, 1)
        self._metrics["train" if self.model.training else "eval"].update(
            token_nll_N=outputs.token_nll,
            token_hit_N=outputs.token_hit,
            masked_BL=masked_BL,
            counted_BL=counted_BL,
            elbo_weight_B=elbo_weight_B,
            time_B=time_B,
            loss=total.detach(),
            items=items,
        )
