"""What any trainer may add to its objective: the parent's own loss, a teacher's KL, a router's loss.

Owns how each is computed from a forward pass that the objective has made anyway, or from one more. All are sums over
the batch at hand: the trainer divides them by what it divides its objective by.

Shapes: B rows, L tokens, W noisy views (1 where the objective has no views), N masked tokens of all views.
"""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from .a2d_config import A2DTrainingConfig
from .batch_rows import tokens_of_rows
from .diffusion_metrics import DiffusionMetrics
from .distillation import linear_kl, linear_top_kl, plain_head
from .model_resolution import base_model
from .moe_telemetry import MoETelemetry
from .teacher_cache import TeacherCache
from .teachers import causal_targets, make_teacher


class AuxiliaryLosses:
    """
    The auxiliary losses that a configuration asks for.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model, before the first step: a teacher is made of it.
        args ([`A2DTrainingConfig`]): their weights.
        teacher_cache ([`TeacherCache`], *optional*): what the teacher said; takes its place.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, args: A2DTrainingConfig, teacher_cache: TeacherCache | None = None
    ):
        self.args = args
        self.model = model
        self.moe = MoETelemetry(base_model(model))
        self.teacher_cache = teacher_cache
        needs_teacher = args.needs_teacher and teacher_cache is None
        self.teacher = make_teacher(model, args.teacher) if needs_teacher else None

    def forward_kwargs(self) -> dict[str, Any]:
        """What the objective's own forward pass must be asked for."""
        return {"output_router_logits": True} if self.args.router_aux_loss_weight > 0 else {}

    def causal_pass(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The parent's own loss, from a causal pass over the clean text.

        Returns:
            The sum of the cross-entropies, with gradient, and those of the tokens, without.
        """
        labels_BL = causal_targets(inputs["labels"], inputs["attention_mask"], inputs.get("document_ids"))
        outputs = model(
            **clean_text(inputs),
            attention_pattern="causal",
            labels=labels_BL,
            loss_weights=torch.ones(labels_BL.shape, device=labels_BL.device),
        )
        return outputs.loss, outputs.token_nll

    def teacher_kl(
        self,
        inputs: dict[str, torch.Tensor],
        masked_BWL: torch.Tensor,
        head_input_ND: torch.Tensor,
        weights_BWL: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Σ over masked i of w_i Σ over all v of p_T(v | x_<i) log(p_T(v | x_<i) / q_i(v)): the teacher reads clean text
        and is asked at i - 1. A masked token with nothing before it has no teacher and adds nothing.

        Args:
            inputs (`dict[str, torch.Tensor]`): a batch.
            masked_BWL (`torch.BoolTensor` of shape `(B, W, L)`): the masked tokens, or any others that were predicted.
            head_input_ND (`torch.Tensor` of shape `(N, D)`): the student's hidden states of those tokens.
            weights_BWL (`torch.Tensor` of shape `(B, W, L)`, *optional*): w, what the divergence of each counts; those
                of weight 0 are left out. By default 1.

        Returns:
            The sum, with gradient, and the divergences of the tokens, without.
        """
        if weights_BWL is None:
            weights_BWL = masked_BWL.float()
        weights_N, taught_BWL = weights_BWL[masked_BWL], masked_BWL & (weights_BWL > 0)
        if self.teacher_cache is not None:
            return self._cached_teacher_kl(inputs, masked_BWL, head_input_ND, weights_N)
        # 1. The teacher's hidden state of every token that some view has masked; 0, 1, 2, ... in row-major order.
        wanted_BL = inputs["input_ids"].masked_fill(~taught_BWL.any(dim=1), -100)
        targets_BL = causal_targets(wanted_BL, inputs["attention_mask"], inputs.get("document_ids"))
        asked_BL = (targets_BL != -100).roll(1, dims=-1)  # nothing is asked at the last position
        number_BL = (asked_BL.flatten().cumsum(dim=0) - 1).view(asked_BL.shape)
        teacher_ME = self.teacher(**clean_text(inputs), labels=targets_BL).head_input

        # 2. For each masked token of each view, the student's row and the teacher's.
        keep_N = asked_BL[:, None].expand(masked_BWL.shape)[masked_BWL] & (weights_N > 0)
        number_N = number_BL[:, None].expand(masked_BWL.shape)[masked_BWL][keep_N]
        student, teacher = base_model(self.model), base_model(self.teacher.model)
        return linear_kl(
            head_input_ND[keep_N],
            plain_head(student),
            teacher_ME[number_N],
            plain_head(teacher),
            weights_N=weights_N[keep_N],
            transform=student.output_head.transform,
            teacher_transform=teacher.output_head.transform,
        )

    def _cached_teacher_kl(
        self,
        inputs: dict[str, torch.Tensor],
        masked_BWL: torch.Tensor,
        head_input_ND: torch.Tensor,
        weights_N: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, lumped, of a teacher that is read from the disk; EOS added behind a row has no teacher there."""
        # 1. What is kept of the rows of the batch, one behind the other, and which entry belongs to which token.
        number_BL = torch.full_like(inputs["input_ids"], -1)
        entries, count = [], 0
        for r, (b, here_T) in enumerate(tokens_of_rows(inputs)):
            if not masked_BWL[b][:, here_T].any():
                continue
            found = self.teacher_cache.read(inputs["input_ids"][b, here_T].tolist())
            if found is None:
                raise ValueError(
                    f"Row {int(inputs['row_id'][r])} is not in `teacher_logits_cache` {self.teacher_cache.folder}: "
                    "precompute it from the same dataset and `max_length`."
                )
            number_BL[b, here_T[1:]] = torch.arange(count, count + len(here_T) - 1, device=number_BL.device)
            entries.append(found)
            count += len(here_T) - 1

        # 2. For each masked token of each view, the student's row and the teacher's entry.
        number_N = number_BL[:, None].expand(masked_BWL.shape)[masked_BWL]
        keep_N = (number_N >= 0) & (weights_N > 0)
        if not keep_N.any():
            return head_input_ND.sum() * 0.0, torch.zeros(0, device=head_input_ND.device)
        number_N, device, student = number_N[keep_N], head_input_ND.device, base_model(self.model)
        top_ids, top_log_p, rest_log_p = (
            torch.cat(parts).to(device)[number_N] for parts in zip(*entries, strict=True)
        )
        return linear_top_kl(
            head_input_ND[keep_N],
            plain_head(student),
            top_ids,
            top_log_p,
            rest_log_p,
            weights_N=weights_N[keep_N],
            transform=student.output_head.transform,
        )

    def total(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        outputs: Any,
        masked_BWL: torch.Tensor,
        head_input_ND: torch.Tensor,
        items: torch.Tensor,
        metrics: DiffusionMetrics,
        ar: tuple[torch.Tensor, torch.Tensor] | None = None,
        repeats: int = 1,
    ) -> torch.Tensor | float:
        """
        The weighted sum of the auxiliary losses over this batch.

        Args:
            model (`torch.nn.Module`): the model, wrapped as in training.
            inputs (`dict[str, torch.Tensor]`): a batch.
            outputs ([`A2DOutput`]): of the objective's forward pass.
            masked_BWL (`torch.BoolTensor` of shape `(B, W, L)`): the masked tokens.
            head_input_ND (`torch.Tensor` of shape `(N, D)`): their hidden states.
            items (`torch.Tensor` of shape `()`): what this batch adds to the divisor.
            metrics ([`DiffusionMetrics`]): where each is noted, unweighted, per token.
            ar (`tuple`, *optional*): the parent's own loss where the objective has it already, as in `causal_pass`.
            repeats (`int`, *optional*, defaults to 1): views in which one token may be masked, which share its weight.
        """
        args, total = self.args, 0.0
        if args.ar_loss_weight > 0:
            loss, nll_M = ar if ar is not None else self.causal_pass(model, inputs)
            total = total + args.ar_loss_weight * loss
            metrics.add("ar_nll", nll_M.sum(), torch.tensor(nll_M.numel()))
        if args.teacher_kl_weight > 0:
            loss, kl_M = self.teacher_kl(inputs, masked_BWL, head_input_ND)
            total = total + args.teacher_kl_weight * loss / repeats
            metrics.add("teacher_kl", kl_M.sum(), torch.tensor(kl_M.numel()))
        if args.router_aux_loss_weight > 0:
            if outputs.aux_loss is None:
                raise ValueError("`router_aux_loss_weight` needs a mixture of experts, and this model has no router.")
            # A mean over the batch at hand: weighed by its share of the global one.
            total = total + args.router_aux_loss_weight * outputs.aux_loss * items
            metrics.add("router_loss", outputs.aux_loss.detach() * items, items)
        return total


def clean_text(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a pass over the clean text reads of a batch."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "document_ids") if name in inputs}
