"""KL divergence between two output heads over gathered rows, without ever holding their logits.

Owns how a row of hidden states of the teacher and one of the student become a number. In chunks of rows, each chunk's
gradients taken while its logits exist, as in the cross-entropy of the model.

Shapes: N rows, V vocabulary rows, D and E hidden sizes of student and teacher, C rows of a chunk, K kept tokens.
"""

from collections.abc import Callable

import torch

from a2d_hf.modeling.masked_loss import CHUNK_LOGITS
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion


class _HeadGradients:
    """Gradients of a weighted sum of divergences towards what goes into a head, its weight and its bias, in fp32."""

    def __init__(self, ctx, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None):
        needed = ctx.needs_input_grad[:3]
        self.weight_VD = weight_VD
        self.are_needed = any(needed)
        self.hidden_ND = torch.empty_like(hidden_ND, dtype=torch.float32) if needed[0] else None
        self.of_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needed[1] else None
        self.of_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needed[2] else None
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)

    def add(self, rows: slice, hidden_CD: torch.Tensor, grad_CV: torch.Tensor, slope_CV: torch.Tensor | None) -> None:
        """Adds a chunk's part: `grad_CV` towards the scores, `slope_CV` those of the transform behind the head."""
        if slope_CV is not None:
            grad_CV *= slope_CV.float()
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = grad_CV @ self.weight_VD.float()
        if self.of_weight_VD is not None:
            self.of_weight_VD.addmm_(grad_CV.T, hidden_CD.float())
        if self.of_bias_V is not None:
            self.of_bias_V += grad_CV.sum(dim=0)

    def save(self, ctx) -> None:
        """Hands them to [`_HeadGradients.scaled`], in the backward pass."""
        ctx.save_for_backward(self.hidden_ND, self.of_weight_VD, self.of_bias_V)

    @staticmethod
    def scaled(ctx, grad_loss: torch.Tensor) -> list[torch.Tensor | None]:
        """What was saved, times the gradient of the sum, each in the precision of what it belongs to."""
        return [
            None if saved is None else (saved * grad_loss).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]


class _LinearKL(torch.autograd.Function):
    """Weighted sum of KL(p ‖ q), p and q being the softmax of the two heads' scores."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, teacher_NE, teacher_head, weights_N, transform, teacher_transform):
        kl_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        gradients = _HeadGradients(ctx, hidden_ND, weight_VD, bias_V)
        chunk_rows = max(1, CHUNK_LOGITS // (2 * weight_VD.shape[0]))  # two sets of logits at once
        for start in range(0, hidden_ND.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            raw_CV = torch.nn.functional.linear(teacher_NE[rows], teacher_head.weight, teacher_head.bias)
            log_p_CV = teacher_transform(raw_CV)[0].float().log_softmax(dim=-1)
            hidden_CD = hidden_ND[rows]
            logits_CV, slope_CV = transform(torch.nn.functional.linear(hidden_CD, weight_VD, bias_V))
            log_q_CV = logits_CV.float().log_softmax(dim=-1)
            p_CV = log_p_CV.exp()
            kl_N[rows] = (p_CV * (log_p_CV - log_q_CV)).sum(dim=-1)
            if not gradients.are_needed:
                continue
            # d(w * KL) / d logits = w * (q - p), then through the transform.
            grad_CV = (log_q_CV.exp() - p_CV) * weights_N[rows, None]
            gradients.add(rows, hidden_CD, grad_CV, slope_CV)
        gradients.save(ctx)
        ctx.mark_non_differentiable(kl_N)
        return (kl_N * weights_N).sum(), kl_N

    @staticmethod
    def backward(ctx, grad_loss, _grad_kl):
        return (*_HeadGradients.scaled(ctx, grad_loss), None, None, None, None, None)


def linear_kl(
    hidden_ND: torch.Tensor,
    head: torch.nn.Linear,
    teacher_NE: torch.Tensor,
    teacher_head: torch.nn.Linear,
    weights_N: torch.Tensor,
    transform: Callable,
    teacher_transform: Callable,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The weighted sum of KL(teacher ‖ student) over rows, in nats: Σ_i w_i Σ_v p_i(v) log(p_i(v) / q_i(v)).

    Args:
        hidden_ND (`torch.Tensor` of shape `(N, D)`): what goes into the student's head, with gradient.
        head (`torch.nn.Linear`): the student's head.
        teacher_NE (`torch.Tensor` of shape `(N, E)`): what goes into the teacher's head.
        teacher_head (`torch.nn.Linear`): the teacher's head, of the same vocabulary.
        weights_N (`torch.Tensor` of shape `(N,)`): what each row counts.
        transform, teacher_transform (`Callable`): what follows each head, see
            [`~a2d_hf.modeling.masked_loss.linear_cross_entropy`].

    Returns:
        `tuple`: the sum, with gradient towards the student; the divergences of the rows, without.
    """
    return _LinearKL.apply(
        hidden_ND,
        head.weight,
        head.bias,
        teacher_NE,
        teacher_head,
        weights_N.to(device=hidden_ND.device, dtype=torch.float32),
        transform,
        teacher_transform,
    )


class _LinearTopKL(torch.autograd.Function):
    """Weighted sum of KL(p ‖ q) with all but the tokens that the teacher rates highest lumped into one."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, top_ids_NK, top_log_p_NK, rest_log_p_N, weights_N, transform):
        kl_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        gradients = _HeadGradients(ctx, hidden_ND, weight_VD, bias_V)
        chunk_rows = max(1, CHUNK_LOGITS // (2 * weight_VD.shape[0]))
        for start in range(0, hidden_ND.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            ids_CK, log_p_CK, rest_log_p_C = top_ids_NK[rows], top_log_p_NK[rows], rest_log_p_N[rows]
            hidden_CD = hidden_ND[rows]
            logits_CV, slope_CV = transform(torch.nn.functional.linear(hidden_CD, weight_VD, bias_V))
            log_q_CV = logits_CV.float().log_softmax(dim=-1)
            rest_log_q_C = log_q_CV.scatter(1, ids_CK, -torch.inf).logsumexp(dim=-1)
            p_CK, rest_p_C = log_p_CK.exp(), rest_log_p_C.exp()
            has_rest_C = rest_p_C > 0
            kl_C = (p_CK * (log_p_CK - log_q_CV.gather(1, ids_CK))).sum(dim=-1)
            kl_N[rows] = kl_C + torch.where(has_rest_C, rest_p_C * (rest_log_p_C - rest_log_q_C), 0.0)
            if not gradients.are_needed:
                continue
            # d(w * KL) / d logits: w (q - p) at the tokens kept, w q (1 - rest_p / rest_q) at all others.
            share_C = torch.where(has_rest_C, (rest_log_p_C - rest_log_q_C).exp(), 0.0)
            q_CV = log_q_CV.exp()
            grad_CV = (q_CV * (1.0 - share_C)[:, None]).scatter(1, ids_CK, q_CV.gather(1, ids_CK) - p_CK)
            gradients.add(rows, hidden_CD, grad_CV * weights_N[rows, None], slope_CV)
        gradients.save(ctx)
        ctx.mark_non_differentiable(kl_N)
        return (kl_N * weights_N).sum(), kl_N

    @staticmethod
    def backward(ctx, grad_loss, _grad_kl):
        return (*_HeadGradients.scaled(ctx, grad_loss), None, None, None, None, None)


def linear_top_kl(
    hidden_ND: torch.Tensor,
    head: torch.nn.Linear,
    top_ids_NK: torch.Tensor,
    top_log_p_NK: torch.Tensor,
    rest_log_p_N: torch.Tensor,
    weights_N: torch.Tensor,
    transform: Callable,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The weighted sum over rows of the lumped divergence of a teacher of whom only the K likeliest tokens S are known:

        Σ_i w_i [ Σ_{v in S_i} p_i(v) log(p_i(v) / q_i(v)) + p_i(rest) log(p_i(rest) / q_i(rest)) ],

    rest being all tokens outside S: p(rest) = 1 - Σ_S p(v), q(rest) = 1 - Σ_S q(v). By the data-processing inequality
    it is never more than KL(p ‖ q), and with K = V it is KL(p ‖ q).

    Args:
        hidden_ND (`torch.Tensor` of shape `(N, D)`): what goes into the student's head, with gradient.
        head (`torch.nn.Linear`): the student's head.
        top_ids_NK (`torch.LongTensor` of shape `(N, K)`): S, distinct in each row.
        top_log_p_NK (`torch.Tensor` of shape `(N, K)`): the teacher's log-probabilities of S, fp32.
        rest_log_p_N (`torch.Tensor` of shape `(N,)`): that of the rest; -inf where there is none.
        weights_N (`torch.Tensor` of shape `(N,)`): what each row counts.
        transform (`Callable`): what follows the head, as in [`linear_kl`].

    Returns:
        `tuple`: the sum, with gradient towards the student; the divergences of the rows, without.
    """
    weights_N = weights_N.to(device=hidden_ND.device, dtype=torch.float32)
    return _LinearTopKL.apply(
        hidden_ND, head.weight, head.bias, top_ids_NK, top_log_p_NK, rest_log_p_N, weights_N, transform
    )


def plain_head(model: A2DForMaskedDiffusion) -> torch.nn.Linear:
    """The head of a model whose scores can be computed in chunks, for a divergence; `ValueError` where they cannot."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or model.output_head.transform is None:
        raise ValueError(
            "`teacher_kl_weight` needs an output head that is a plain linear layer; leave the head out of the "
            "adapter's `target_modules`."
        )
    return head
