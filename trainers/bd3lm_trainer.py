"""Block diffusion: predict what is hidden in each block from the rest of it and the clean blocks before it.

Owns the objective of BD3LM (https://huggingface.co/papers/2503.09573) and nothing around it.

Shapes: B rows, W noisy views, L tokens, V = W + 1 copies, C = V L tokens of them all, N masked tokens of all views.
"""

from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import pad
from transformers import AutoConfig, PreTrainedModel

from a2d_hf.modeling.configuration_a2d import A2DConfig

from .a2d_trainer import A2DTrainer
from .batch_rows import in_text
from .bd3lm_config import BD3LMConfig
from .block_ends import BlockEnds
from .block_noise import BlockRows, coin_tosses, counted_tokens, nothing_visible_behind, whole_blocks
from .dataset_preparation import ANY_DATASET
from .model_resolution import base_model
from .noisy_copies import BD3LMNoise, NoisyCopies, doubled_input
from .row_shares import dataset_in_shares
from .row_tokenization import RowRules
from .teachers import causal_targets
from .trainer_card import BD3LM


# Evaluation covers the whole of (0, 1), whatever the times of training are clipped to.
EVAL_TIME_EPSILON = 1e-3
DEFAULT_BLOCK_SIZE = 32


class BD3LMTrainer(A2DTrainer):
    r"""
    Trainer for block diffusion language models (BD3LM).

    The model reads `[x_t ; x_0]`: every noisy block sees itself and the clean blocks before it; in training x_t leaves
    out the blocks in which nothing may be hidden. The loss

        L = (1/N) Σ w(t_b) m_i CE_i,    w(t) = -α'(t) / (1 - α(t)),

    has a time of its own for each block b; N are the tokens of the GLOBAL batch that may be masked. It is the NELBO
    per token where the times are not clipped. With two complementary views `[x_t ; x̄_t ; x_0]` it is

        L = (1/2N) Σ [m_i / t + (1 - m_i) / (1 - t)] CE_i.

    With `mask_sampling="count"` k of the n tokens of a block are masked, k uniform on 1 to n, and count n / k each:
    the same expectation with the time integrated out. With W nested views it is the mean over W such k, each from a
    part of 1 to n of its own.

    A block of one token is always masked, with the weight 1: its expectation over t is the same, and nothing is left
    to chance. So block size 1 is the negative log-likelihood from left to right itself, and with `token_shift` that of
    the autoregressive parent. For the same reason such blocks have one view, never two.

    Only masked tokens pass the output head.

    Example:

    ```python
    >>> from a2d_hf import BD3LMConfig, BD3LMTrainer
    >>> from datasets import load_dataset

    >>> trainer = BD3LMTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=BD3LMConfig(output_dir="Qwen3-0.6B-BD3LM", block_size=32),
    ...     train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args: as in [`A2DTrainer`], with `args` a [`BD3LMConfig`].
    """

    config_class = BD3LMConfig
    objective = "bd3lm"
    paper = BD3LM
    args: BD3LMConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.ar_loss_weight > 0 and self.diffusion_config.clean_context != "causal":
            raise ValueError(
                '`ar_loss_weight` needs `clean_context="causal"`: clean text that is open inside a block sees the '
                "very token that it would have to predict."
            )
        for name in ("nested_views", "nested_orders"):
            if getattr(self.args, name) > self.diffusion_config.block_size:
                raise ValueError(
                    f"`{name}` {getattr(self.args, name)} exceeds the block size {self.diffusion_config.block_size}: "
                    "a block is hidden in as many steps as it has tokens, so that further views would repeat others."
                )

    # ------------------------------------------------------------------------------------------ the model and the rows

    def diffusion_fields(self, model: str | PreTrainedModel | PeftModel, args: BD3LMConfig) -> dict[str, Any]:
        own = _own_config(model, args)
        fields = {"objective": self.objective}
        fields["block_size"] = args.block_size or (own and own.block_size) or DEFAULT_BLOCK_SIZE
        if args.clean_context is not None:
            fields["clean_context"] = args.clean_context
        return fields

    def _row_rules(self) -> RowRules:
        rules, block_size = super()._row_rules(), self.diffusion_config.block_size
        asked = self.args.max_length
        if asked is not None and asked % block_size:
            raise ValueError(
                f"`block_size` {block_size} must divide `max_length` {asked}: rows that are cut would end inside a "
                "block."
            )
        if rules.max_length is not None and rules.max_length % block_size:  # the model's context is shorter
            whole = rules.max_length // block_size * block_size
            if whole == 0:
                raise ValueError(
                    f"`block_size` {block_size} exceeds the model's context of {rules.max_length} tokens."
                )
            rules = RowRules(**{**vars(rules), "max_length": whole})
        return rules

    def training_rows(self, prepared: ANY_DATASET) -> ANY_DATASET:
        args = self.args
        if args.steps_per_row == 1:
            return prepared
        if not isinstance(prepared, ANY_DATASET):
            raise TypeError(
                f"`steps_per_row` cuts the rows of a `datasets.Dataset` or `IterableDataset`, not of a "
                f"`{type(prepared).__name__}`."
            )
        return dataset_in_shares(prepared, args.steps_per_row, self.diffusion_config.block_size, args.dataset_num_proc)

    def eos_tail(self) -> BlockEnds | None:
        tokenizer = self.processing_class
        if not self.args.fill_last_block or tokenizer is None or tokenizer.eos_token_id is None:
            return None
        longest_row = self._rules.max_length or self.diffusion_config.max_position_embeddings
        return BlockEnds(tokenizer.eos_token_id, self.diffusion_config.block_size, longest_row)

    def resume_key(self) -> dict[str, Any]:
        fields = (
            "block_size_curriculum",
            "noise_schedule",
            "time_epsilon",
            "time_maximum",
            "mask_sampling",
            "complementary_views",
            "nested_views",
            "nested_orders",
            "steps_per_row",
            "fill_last_block",
        )
        key = super().resume_key() | {name: getattr(self.args, name) for name in fields}
        key |= {name: getattr(self.diffusion_config, name) for name in ("block_size", "clean_context")}
        if self.args.block_size_curriculum is not None:
            key["block_size_curriculum_steps"] = self.args.block_size_curriculum_steps or self.args.max_steps
        return key

    # ------------------------------------------------------------------------------------------------------- the noise

    def current_block_size(self) -> int:
        """Tokens per block of this step: the curriculum's in training, the model's in evaluation."""
        sizes = self.args.block_size_curriculum
        if sizes is None or not self.model.training:
            return self.diffusion_config.block_size
        steps = self.args.block_size_curriculum_steps or max(self.state.max_steps // 2, 1)
        return sizes[min(self.state.global_step * (len(sizes) - 1) // steps, len(sizes) - 1)]

    def draw_noise(self, inputs: dict[str, torch.Tensor], seed: int) -> BD3LMNoise:
        """
        The noise of a batch, a pure function of each row's (seed, epoch, place, row id) and the block size.

        Args:
            inputs (`dict[str, torch.Tensor]`): a batch of [`DiffusionCollator`]; `document_ids` of packed rows are
                respected, blocks are counted from the start of each document.
            seed (`int`): seed of the noise.

        Returns:
            [`BD3LMNoise`]
        """
        self.check_batch(inputs)
        args, training, block_size = self.args, self.model.training, self.current_block_size()
        two_views, rows = args.complementary_views and training, BlockRows(inputs, block_size)
        if block_size == 1:
            views = whole_blocks(rows.maskable_BL)
        elif args.mask_sampling == "count" and training:
            # A block can be hidden in as many ways as it has tokens: the small ones of a curriculum have fewer views.
            nested_views, orders = min(args.nested_views, block_size), min(args.nested_orders, block_size)
            views = counted_tokens(rows, seed, two_views, nested_views, orders)
        else:
            minimum, maximum = (args.time_epsilon, args.time_maximum) if training else (EVAL_TIME_EPSILON, 1.0)
            views = coin_tosses(rows, seed, args.noise_schedule, minimum, maximum, two_views)
        return BD3LMNoise(
            block_size=block_size,
            time_BWL=views.time_BWL,
            elbo_weight_BWL=views.weight_BWL.float().to(views.masked_BWL.device),
            masked_BWL=views.masked_BWL,
            noised_ids_BWL=inputs["input_ids"][:, None].masked_fill(
                views.masked_BWL, self.diffusion_config.mask_token_id
            ),
            rows=rows,
            kept=NoisyCopies.of(rows) if training else None,
        )

    # -------------------------------------------------------------------------------------------------------- the loss

    def doubled_input(self, inputs: dict[str, torch.Tensor], noise: BD3LMNoise) -> dict[str, Any]:
        """What the model reads: `[x_t ; ... ; x_0]`, its padding and documents, and who sees whom."""
        return doubled_input(inputs, noise, self.diffusion_config.clean_context)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        labels_BL = inputs["labels"]

        # 1. Noise: one time per block, one coin per token that may be masked.
        noise = self.draw_noise(inputs, self.noise_seed)

        # 2. What is asked for: the hidden tokens of each view and, where the parent's own loss is wanted, those of the
        #    clean copy that follow another. V = W + 1 copies.
        training, shift = self.model.training, self.diffusion_config.token_shift
        labels_BWL = labels_BL[:, None].masked_fill(~noise.masked_BWL, -100)
        clean_labels_BL = torch.full_like(labels_BL, -100)
        if training and self.args.ar_loss_weight > 0:
            clean_labels_BL = self.clean_labels(inputs)
        clean_BL = clean_labels_BL != -100  # an unshifted model is asked one position earlier
        asked_BVL = torch.cat([noise.masked_BWL, (clean_BL if shift else clean_BL.roll(1, dims=-1))[:, None]], dim=1)
        weights_BVL = pad(noise.elbo_weight_BWL / noise.views, (0, 0, 0, 1), value=self.args.ar_loss_weight)

        # 3. Predict it. Where the parent has read no less than the model, its distribution is the target instead.
        soft_BVL = torch.zeros_like(asked_BVL)
        if training and self.args.teacher_targets:
            soft_BVL = self.softly_taught(inputs, noise, asked_BVL)
        hard_weights_BVL = weights_BVL.masked_fill(soft_BVL, 0.0)
        if not shift:
            hard_weights_BVL[:, -1] = hard_weights_BVL[:, -1].roll(-1, dims=-1)
        doubled = self.doubled_input(inputs, noise)
        if training:
            self.note_tokens_read(doubled["attention_mask"][:, : -labels_BL.shape[1]].sum())
        outputs = model(
            **doubled,
            labels=torch.cat([noise.in_copies(labels_BWL), clean_labels_BL], dim=1),
            loss_weights=torch.cat([noise.in_copies(hard_weights_BVL[:, :-1]), hard_weights_BVL[:, -1]], dim=1),
            **(self.auxiliary.forward_kwargs() if training else {}),
        )

        # 4. The rest, of which the loss above has the parent's own already.
        is_noisy_N, items = self.noisy_rows(labels_BWL, clean_labels_BL), self.count_items(inputs, self.noise_seed)
        total = outputs.loss
        if training:
            ar_nll_M = outputs.token_nll[~is_noisy_N]
            total = total + self.auxiliary.total(
                model,
                inputs,
                outputs,
                noise.masked_BWL,
                outputs.head_input[is_noisy_N],
                items,
                self._metrics["train"],
                ar=(torch.zeros((), device=total.device), ar_nll_M),
                repeats=1 if self.args.complementary_views else noise.views,
            )
            if self.args.teacher_targets:
                kl, kl_M = self.auxiliary.teacher_kl(inputs, asked_BVL, outputs.head_input, weights_BVL * soft_BVL)
                total = total + kl
                self._metrics["train"].add("teacher_kl", kl_M.sum(), torch.tensor(kl_M.numel()))

        # 5. The mean over the global batch: the count covers accumulated batches and all processes.
        divisor = items.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = total / divisor
        if num_items_in_batch is not None:
            loss = self.scale_for_processes(loss)
        loss = loss + self.replay_loss(model, inputs, num_items_in_batch)

        # 6. What it was made of.
        self._update_metrics(inputs, noise, outputs.token_nll[is_noisy_N], outputs.token_hit[is_noisy_N], total, items)
        return (loss, outputs) if return_outputs else loss

    def objective_sum(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
        noise = self.draw_noise(inputs, seed)
        labels_BWL = inputs["labels"][:, None].masked_fill(~noise.masked_BWL, -100)
        return model(
            **self.doubled_input(inputs, noise),
            labels=torch.cat([noise.in_copies(labels_BWL), torch.full_like(inputs["labels"], -100)], dim=1),
            loss_weights=pad(noise.in_copies(noise.elbo_weight_BWL / noise.views), (0, inputs["labels"].shape[1])),
        ).loss

    def clean_labels(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Labels of the clean copy for the parent's own next-token loss: where a shifted model answers for each token
        itself, an unshifted one is asked one position earlier.
        """
        targets_BL = causal_targets(inputs["labels"], inputs["attention_mask"], inputs.get("document_ids"))
        if not self.diffusion_config.token_shift:
            return targets_BL
        asked_BL = (targets_BL != -100).roll(1, dims=-1)  # nothing is asked at the last position
        return inputs["labels"].masked_fill(~asked_BL, -100)

    @staticmethod
    def softly_taught(inputs: dict[str, torch.Tensor], noise: BD3LMNoise, asked_BVL: torch.Tensor) -> torch.Tensor:
        """
        Which of the tokens that are asked for have the parent's distribution as target, `(B, V, L)`: those that follow
        another in their text and behind which, in a view, nothing of their block is visible. EOS added behind a row
        are none: no parent ever read past an end.
        """
        text_BL = inputs["input_ids"].masked_fill(~in_text(inputs), -100)
        follows_BL = causal_targets(text_BL, inputs["attention_mask"], inputs.get("document_ids")) != -100
        blind_BWL = nothing_visible_behind(noise.rows, noise.masked_BWL)
        blind_BVL = pad(blind_BWL, (0, 0, 0, 1), value=True)
        return asked_BVL & follows_BL.roll(1, dims=-1)[:, None] & blind_BVL

    @staticmethod
    def noisy_rows(labels_BWL: torch.Tensor, clean_labels_BL: torch.Tensor) -> torch.Tensor:
        """Which of the labelled tokens of the doubled input, in row-major order, stand in a noisy view."""
        labelled_BC = torch.cat([labels_BWL.flatten(1), clean_labels_BL], dim=1) != -100
        is_noisy_C = torch.arange(labelled_BC.shape[1], device=labelled_BC.device) < labels_BWL[0].numel()
        return is_noisy_C.expand(labelled_BC.shape)[labelled_BC]

    def _update_metrics(
        self,
        inputs: dict[str, torch.Tensor],
        noise: BD3LMNoise,
        token_nll_N: torch.Tensor,
        token_hit_N: torch.Tensor,
        total: torch.Tensor,
        items: torch.Tensor,
    ) -> None:
        # The EOS that fill the last block are trained, but no part of the text whose NELBO this is.
        counted_BL = in_text(inputs) & (inputs["labels"] != -100)
        # Every token has a time of its own, so each is a row of its own.
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self.args.block_size_curriculum is not None:
            metrics.add("block_size", torch.tensor(float(noise.block_size)), torch.tensor(1.0))
        metrics.update(
            token_nll_N=token_nll_N,
            token_hit_N=token_hit_N,
            masked_BL=noise.masked_BWL.reshape(-1, 1),
            counted_BL=counted_BL[:, None].expand(noise.masked_BWL.shape).reshape(-1, 1),
            elbo_weight_B=noise.elbo_weight_BWL.flatten(),
            time_B=noise.time_BWL.flatten(),
            loss=total.detach(),
            items=items,
        )

    def noised_logits(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], noise: BD3LMNoise
    ) -> torch.Tensor:
        shape_BL = inputs["labels"].shape
        wanted_BL = torch.ones(shape_BL, dtype=torch.bool, device=inputs["labels"].device)
        wanted_BC = torch.cat([wanted_BL, ~wanted_BL], dim=1)
        return model(**self.doubled_input(inputs, noise), logits_mask=wanted_BC).logits.view(*shape_BL, -1)


def _own_config(model: str | PreTrainedModel | PeftModel, args: BD3LMConfig) -> A2DConfig | None:
    """The configuration of a model that is converted already."""
    if isinstance(model, str):
        revision = (args.model_init_kwargs or {}).get("revision")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
    else:
        config = base_model(model).config
    return config if config.model_type == A2DConfig.model_type else None
