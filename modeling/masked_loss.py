"""Cross-entropy over the positions that have a target, without ever holding their logits.

Owns how a labelled row of hidden states becomes a number, in fp32 whatever the model's dtype. The output head and the
cross-entropy run in chunks; each chunk's gradients are taken at once, while its logits exist, so that backward only
scales them. Knows nothing of noise or schedules.

Shapes: N rows with a target, V vocabulary rows, D hidden size, C rows of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel


# Rows times vocabulary of one chunk's logits: 2^25 fp32 numbers are 128 MiB.
CHUNK_LOGITS = 2**25


def cross_entropy_rows(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cross-entropy and exact hits of rows whose logits are at hand.

    Args:
        logits_NV (`torch.Tensor` of shape `(N, V)`): scores; N may be 0.
        targets_N (`torch.LongTensor` of shape `(N,)`): target ids.

    Returns:
        `torch.Tensor` of shape `(N,)` in nats, fp32, with gradient; and booleans of shape `(N,)`.
    """
    targets_N = targets_N.to(logits_NV.device)
    nll_N = torch.nn.functional.cross_entropy(logits_NV.to(_wide(logits_NV.dtype)), targets_N, reduction="none")
    return nll_N, logits_NV.detach().argmax(dim=-1) == targets_N


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies of `transform(hidden @ weight.T + bias)`, gradients taken in the forward."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, weights_N, transform, chunk_rows, tied):
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows, device = hidden_ND.shape[0], hidden_ND.device
        hit_N = torch.empty(rows, dtype=torch.bool, device=device)
        nll_chunks, hidden_chunks, grad_weight_VD, grad_bias_V = [], [], None, None
        for start in range(0, rows, chunk_rows):
            raw_CV = logits_CV = grad_CV = None  # or the chunk before would live beside this one
            chunk = slice(start, start + chunk_rows)
            hidden_CD, targets_C, weights_C1 = hidden_ND[chunk], targets_N[chunk], weights_N[chunk, None]
            raw_CV = torch.nn.functional.linear(hidden_CD, weight_VD, bias_V)
            # What the head computes in: under autocast not what its weight is stored in. Gradients are taken before
            # any loss scaling, so float16, which has not bfloat16's range, must not hold them.
            compute = torch.float32 if raw_CV.dtype == torch.float16 else raw_CV.dtype
            logits_CV, slope_CV = transform(raw_CV if compute == raw_CV.dtype else raw_CV.to(compute))
            logits_CV = logits_CV.to(_wide(compute))
            # In place from here on: one tensor is logits, then probabilities, then gradient.
            top_C1, best_C1 = logits_CV.max(dim=-1, keepdim=True)
            hit_N[chunk] = best_C1[:, 0] == targets_C
            target_C1 = logits_CV.gather(1, targets_C[:, None])
            sum_C1 = logits_CV.sub_(top_C1).exp_().sum(dim=-1, keepdim=True)
            nll_chunks.append((sum_C1.log() + top_C1 - target_C1)[:, 0])
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            # d nll / d logits = softmax - onehot, then through the transform. The row weights go to the small side.
            logits_CV.div_(sum_C1).scatter_add_(1, targets_C[:, None], -torch.ones_like(sum_C1))
            if slope_CV is not None:
                logits_CV.mul_(slope_CV)
            with torch.autocast(device.type, enabled=False):
                grad_CV = logits_CV.to(compute)
                if needs_hidden:
                    hidden_chunks.append((grad_CV @ weight_VD.to(compute)) * weights_C1)
                if needs_weight:
                    weighted_CD = (hidden_CD * weights_C1).to(compute)
                    grad_weight_VD = _add_product(grad_weight_VD, grad_CV.T, weighted_CD, chunk_rows < rows)
                if needs_bias:
                    summed_V = logits_CV.T @ weights_C1[:, 0].to(logits_CV.dtype)
                    grad_bias_V = summed_V if grad_bias_V is None else grad_bias_V + summed_V
        nll_N = torch.cat(nll_chunks) if rows else torch.zeros(0, dtype=_wide(hidden_ND.dtype), device=device)
        grad_hidden_ND = (torch.cat(hidden_chunks) if rows else torch.zeros_like(hidden_ND)) if needs_hidden else None
        if not rows:
            grad_weight_VD = torch.zeros_like(weight_VD) if needs_weight else None
            grad_bias_V = torch.zeros_like(bias_V) if needs_bias else None
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.tied = tied
        ctx.mark_non_differentiable(nll_N, hit_N)
        return (nll_N * weights_N).sum(), nll_N, hit_N

    @staticmethod
    def backward(ctx, grad_loss, _grad_nll, _grad_hit):
        # The gradient of the head is as large as the head: a scaled copy of it would cost more time than the scaling.
        # Only `retain_graph` may need the unscaled one again.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        gradients = [
            None if saved is None else (saved * grad_loss if keep else saved.mul_(grad_loss)).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        if ctx.tied is not None and gradients[1] is not None:
            ctx.tied.of_head_VD, gradients[1] = gradients[1], None  # goes on with that of the lookup
        return (*gradients, None, None, None, None, None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What cross-entropies are computed in: fp32, or what is wider still."""
    return torch.promote_types(dtype, torch.float32)


def _add_product(
    total_VD: torch.Tensor | None, left_VC: torch.Tensor, right_CD: torch.Tensor, more: bool
) -> torch.Tensor:
    """Adds a product to a sum over chunks, which is fp32: a half-precision sum would lose the small ones."""
    if total_VD is None:
        product_VD = left_VC @ right_CD
        return product_VD.to(_wide(product_VD.dtype)) if more else product_VD
    if total_VD.dtype == left_VC.dtype:
        return total_VD.addmm_(left_VC, right_CD)
    return total_VD.add_(left_VC @ right_CD)


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    head: torch.nn.Linear,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    transform: Callable | None = None,
    chunk_rows: int | None = None,
    tied: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The weighted sum of cross-entropies of an output head, in chunks of rows.

    Args:
        hidden_ND (`torch.Tensor` of shape `(N, D)`): what goes into the head.
        head (`torch.nn.Linear`): the output head.
        targets_N (`torch.LongTensor` of shape `(N,)`): target ids.
        weights_N (`torch.Tensor` of shape `(N,)`): what each row counts.
        transform (`Callable`, *optional*): what follows the head; returns the logits and their elementwise slope.
        chunk_rows (`int`, *optional*): rows per chunk; by default as many as fit `CHUNK_LOGITS`.
        tied ([`TiedGradient`], *optional*): takes the gradient of the head's weight; the backward pass of the lookup
            that shares it, which comes later, passes both on.

    Returns:
        `tuple`: the loss with gradient; the cross-entropies in nats and the exact hits of the rows, without.
    """
    chunk_rows = chunk_rows or max(1, CHUNK_LOGITS // head.weight.shape[0])
    return _LinearCrossEntropy.apply(
        hidden_ND,
        head.weight,
        head.bias,
        targets_N.to(hidden_ND.device),
        weights_N.to(device=hidden_ND.device, dtype=torch.float32),
        transform or _identity,
        chunk_rows,
        tied,
    )


def _identity(raw_CV: torch.Tensor) -> tuple[torch.Tensor, None]:
    return raw_CV, None


def head_transforms(model: PreTrainedModel) -> list[Callable]:
    """What a parent may do to the scores after its head, as its configuration names it: nothing, a scale, a cap."""
    values = model.config.get_text_config().to_dict()
    candidates: list[Callable] = [_identity]
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_softcapping", "logits_soft_cap"):
        value = values.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            if "cap" in name:
                candidates.append(_softcap(value))
            else:
                candidates += [_scale(value), _scale(1.0 / value)]
    return candidates


def matching_transform(candidates: list[Callable], raw_NV: torch.Tensor, parents_NV: torch.Tensor) -> Callable | None:
    """
    The transform that turns rows straight from the head into the rows that the parent returns.

    Args:
        candidates (`list[Callable]`): of [`head_transforms`].
        raw_NV (`torch.Tensor` of shape `(N, V)`): a few rows straight from the head.
        parents_NV (`torch.Tensor` of shape `(N, V)`): the same rows as the parent returns them.

    Returns:
        `Callable` for [`linear_cross_entropy`]; `None` where nothing explains the parent's rows.
    """
    if parents_NV.shape != raw_NV.shape:
        return None
    for transform in candidates:
        if torch.allclose(transform(raw_NV)[0].float(), parents_NV.float(), atol=1e-5, rtol=1e-3):
            return transform
    return None


def _scale(factor: float) -> Callable:
    return lambda raw_CV: (raw_CV * factor, torch.full((), factor, device=raw_CV.device))


def _softcap(cap: float) -> Callable:
    def transform(raw_CV):
        squashed_CV = torch.tanh(raw_CV / cap)
        return squashed_CV * cap, 1.0 - squashed_CV.float() ** 2

    return transform


def row_weights(
    count: int,
    device: torch.device,
    weights_N: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """
    What each labelled row counts in the loss: its given weight; else 1 over `num_items_in_batch`; else 1 over their
    number, so that the loss is the mean.

    Returns:
        `torch.Tensor` of shape `(count,)`, fp32.
    """
    if weights_N is not None:
        return weights_N.to(device=device, dtype=torch.float32)
    divisor = max(count, 1) if num_items_in_batch is None else num_items_in_batch
    return torch.ones(count, device=device) / divisor
