"""Representation alignment: a masked diffusion model whose hidden states stay near those of its parent.

Owns the alignment loss of Repr-Align; the objective it is added to is MDLM's.

Shapes: B rows, L tokens, P compared positions, K compared layers, D hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .anchor_cache import AnchorCache
from .auxiliary_losses import clean_text
from .batch_rows import by_token, in_text, tokens_of_rows
from .diffusion_noise import ALIGNED_LAYERS, ALIGNED_TOKENS, position_in_row, random_bits
from .mdlm_trainer import MDLMNoise, MDLMTrainer
from .model_resolution import base_model
from .repalign_config import RepAlignConfig
from .teachers import causal_targets, make_teacher
from .trainer_card import REPALIGN


class RepAlignTrainer(MDLMTrainer):
    r"""
    Trainer for masked diffusion with representation alignment:

        L = L_MDLM + λ (1 - mean over layers l and positions i of cos(h_l^S[i], h_l^T[i])),

    h^S being the student's hidden states (noised text, open attention) and h^T those of the frozen parent (clean text,
    causal), both taken at the SAME place: the same index, and the same entry of `hidden_states`. The mean is over the
    GLOBAL batch. Training only; evaluation is MDLM's.

    Example:

    ```python
    >>> from a2d_hf import RepAlignConfig, RepAlignTrainer
    >>> from datasets import load_dataset

    >>> trainer = RepAlignTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=RepAlignConfig(output_dir="Qwen3-0.6B-RepAlign", model_init_kwargs={"token_shift": True}),
    ...     train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args: as in [`A2DTrainer`], with `args` a [`RepAlignConfig`].
    """

    config_class = RepAlignConfig
    paper = REPALIGN
    args: RepAlignConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.align_layers = self._layers_to_align()
        self.anchors: AnchorCache | None = None
        self.align_teacher = None
        self._global_positions: torch.Tensor | None = None
        if self.args.align_weight > 0 and self.args.anchor_cache is not None:
            self.anchors = AnchorCache.open(self.args.anchor_cache, base_model(self.model), self.align_layers)
        elif self.args.align_weight > 0:
            self.align_teacher = self.auxiliary.teacher or make_teacher(self.model, self.args.teacher)
        freeze_parameters(base_model(self.model), self.args.frozen_parameters or [])

    def _layers_to_align(self) -> list[int]:
        count = self.diffusion_config.text_config.get_text_config().num_hidden_layers + 1
        wanted = range(count) if self.args.align_layers is None else self.args.align_layers
        outside = [layer for layer in wanted if not -count <= layer < count]
        if outside:
            raise ValueError(
                f"`align_layers` {outside} do not exist: the model has the hidden states 0 to {count - 1}."
            )
        layers = sorted({layer % count for layer in wanted})
        if self.args.align_sample_layers is not None and self.args.align_sample_layers > len(layers):
            raise ValueError(
                f"`align_sample_layers` {self.args.align_sample_layers} exceeds the {len(layers)} layers to draw from."
            )
        return layers

    def resume_key(self) -> dict[str, Any]:
        fields = (
            "align_weight",
            "align_weight_schedule",
            "align_positions",
            "align_sample_layers",
            "align_token_share",
            "frozen_parameters",
        )
        key = super().resume_key() | {name: getattr(self.args, name) for name in fields}
        return key | {"align_layers": self.align_layers}

    # ----------------------------------------------------------------------------------------------- what is compared

    def current_align_weight(self) -> float:
        """λ at this optimizer step."""
        weight, schedule = self.args.align_weight, self.args.align_weight_schedule
        done = min(self.state.global_step / max(self.state.max_steps, 1), 1.0)
        if schedule == "linear":
            return weight * (1.0 - done)
        if schedule == "cosine":
            return weight * 0.5 * (1.0 + math.cos(math.pi * done))
        return weight

    def current_align_layers(self) -> list[int]:
        """The layers of this optimizer step: a draw that is a pure function of (seed, step)."""
        count = self.args.align_sample_layers
        if count is None:
            return self.align_layers
        key = {
            layer: int(random_bits(ALIGNED_LAYERS, self.args.seed, self.state.global_step, layer))
            for layer in self.align_layers
        }
        return sorted(sorted(self.align_layers, key=key.get)[:count])

    def aligned_positions(self, inputs: dict[str, torch.Tensor], masked_BL: torch.Tensor) -> torch.Tensor:
        """
        Where student and teacher are compared at this optimizer step. Neither in the EOS behind a text nor in the
        blank rows that fill up an epoch.

        Returns:
            `torch.BoolTensor` of shape `(B, L)`.
        """
        mask_BL, positions = inputs["attention_mask"], self.args.align_positions
        documents_BL = inputs.get("document_ids")
        row_id, place_BL = by_token(inputs["row_id"], documents_BL), position_in_row(mask_BL, documents_BL)
        in_text_BL = in_text(inputs) & (row_id >= 0)
        if positions == "masked_shift":
            targets_BL = inputs["input_ids"].masked_fill(~(masked_BL & in_text_BL), -100)
            chosen_BL = causal_targets(targets_BL, mask_BL, documents_BL) != -100
        else:
            chosen_BL = in_text_BL & ~masked_BL if positions == "unmasked" else in_text_BL
        if self.args.align_token_share < 1.0:
            keys = (self.args.seed, self.state.global_step, row_id, place_BL)
            chosen_BL = chosen_BL & (random_bits(ALIGNED_TOKENS, *keys) < int(self.args.align_token_share * 2.0**53))
        return chosen_BL

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.args.align_weight > 0:
            counts = [
                self.aligned_positions(batch, self.draw_noise(batch, self.args.seed).masked_BL).sum().to(device)
                for batch in batches
            ]
            self._global_positions = self.accelerator.reduce(torch.stack(counts).sum(), reduction="sum")
        return batches, items

    # -------------------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if num_items_in_batch is None:
            self._global_positions = None  # this batch is on its own
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def forward_kwargs(self) -> dict[str, Any]:
        wanted = self.model.training and self.args.align_weight > 0
        return super().forward_kwargs() | ({"output_hidden_states": True} if wanted else {})

    def auxiliary_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        noise: MDLMNoise,
        outputs: Any,
        items: torch.Tensor,
        divisor: torch.Tensor,
    ) -> torch.Tensor | float:
        total = super().auxiliary_loss(model, inputs, noise, outputs, items, divisor)
        if self.args.align_weight == 0:
            return total
        layers = self.current_align_layers()
        chosen_BL = self.aligned_positions(inputs, noise.masked_BL)
        count = chosen_BL.sum() if self._global_positions is None else self._global_positions
        teacher_KPD, chosen_BL = self._teachers_states(inputs, chosen_BL, layers)
        student_KPD = [outputs.hidden_states[layer][chosen_BL] for layer in layers]
        distance = cosine_distance(student_KPD, teacher_KPD)
        self._metrics["train"].add("align_loss", distance.detach(), chosen_BL.sum())
        # The sum below is divided by `divisor` with everything else; the alignment is a mean over its own positions.
        return total + self.current_align_weight() * distance * divisor / count.clamp(min=1)

    def _teachers_states(
        self, inputs: dict[str, torch.Tensor], chosen_BL: torch.Tensor, layers: Sequence[int]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The teacher's hidden states at the chosen positions, `(P, D)` per layer, and the positions that have any."""
        if self.anchors is None:
            hidden = self.align_teacher.hidden_states(clean_text(inputs))
            return [hidden[layer][chosen_BL] for layer in layers], chosen_BL
        found: list[list[torch.Tensor]] = [[] for _ in layers]
        chosen_BL, missing = chosen_BL.clone(), 0
        for r, (b, here_T) in enumerate(tokens_of_rows(inputs)):
            if not chosen_BL[b, here_T].any():
                continue
            anchors = self.anchors.read(inputs["input_ids"][b, here_T].tolist(), layers)
            if anchors is None:
                if self.args.anchor_strict:
                    raise ValueError(
                        f"Row {int(inputs['row_id'][r])} has no anchors in {self.anchors.folder}: precompute them "
                        "from the same dataset and `max_length`, or set `anchor_strict=False` to train it without."
                    )
                missing += 1
                chosen_BL[b, here_T] = False
                continue
            at_P = chosen_BL[b, here_T].cpu()
            for states, layer_TD in zip(found, anchors, strict=True):
                states.append(layer_TD[at_P])
        self._metrics["train"].add(
            "rows_without_anchors", torch.tensor(float(missing)), torch.tensor(float(inputs["row_id"].shape[0]))
        )
        width = self.diffusion_config.text_config.get_text_config().hidden_size
        empty = torch.zeros((0, width))
        return [torch.cat([empty, *states]).to(chosen_BL.device) for states in found], chosen_BL


def cosine_distance(student_KPD: Sequence[torch.Tensor], teacher_KPD: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Σ over positions of the mean over layers of 1 - cos(student, teacher), in fp32.

    Args:
        student_KPD, teacher_KPD (`Sequence[torch.Tensor]`): `(P, D)` per layer.

    Returns:
        `torch.Tensor` of shape `()`, with gradient towards the student.
    """
    total = torch.zeros((), device=student_KPD[0].device)
    for student_PD, teacher_PD in zip(student_KPD, teacher_KPD, strict=True):
        cosine_P = torch.nn.functional.cosine_similarity(student_PD.float(), teacher_PD.float(), dim=-1)
        total = total + (1.0 - cosine_P).sum()
    return total / len(student_KPD)


def freeze_parameters(model: torch.nn.Module, patterns: Sequence[str]) -> None:
    """
    Freezes parameters by name.

    Args:
        model ([`A2DForMaskedDiffusion`]): the model.
        patterns (`Sequence[str]`): `embeddings`, `head`, or a part of a name, in any case.

    Raises:
        ValueError: a pattern that no parameter has, or nothing left to train.
    """
    parts = {"embeddings": model.get_input_embeddings, "head": model.get_output_embeddings}
    for pattern in patterns:
        if pattern in parts:
            found = list(parts[pattern]().parameters())
        else:
            found = [weight for name, weight in model.named_parameters() if pattern.lower() in name.lower()]
        if not found:
            raise ValueError(f"`frozen_parameters` {pattern!r} is part of no parameter's name: correct or remove it.")
        for weight in found:
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError("`frozen_parameters` leaves nothing to train: remove some of the patterns.")
