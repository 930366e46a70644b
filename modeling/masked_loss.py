"""Cross-entropy over the rows of logits that have a target.

Owns how a labelled row becomes a number, in fp32 whatever the model's dtype. Knows nothing of noise or schedules.
"""

import torch


def cross_entropy_rows(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cross-entropy and exact hits of each row.

    Args:
        logits_NV (`torch.Tensor` of shape `(N, V)`): scores; N may be 0.
        targets_N (`torch.LongTensor` of shape `(N,)`): target ids.

    Returns:
        `torch.Tensor` of shape `(N,)` in nats, fp32, with gradient; and booleans of shape `(N,)`.
    """
    targets_N = targets_N.to(logits_NV.device)
    nll_N = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")
    return nll_N, logits_NV.detach().argmax(dim=-1) == targets_N


def reduce_loss(
    nll_N: torch.Tensor, weights_N: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """
    The loss of a batch: the weighted sum where there are weights, else the sum over `num_items_in_batch`, else the
    mean. Zero, with a gradient path, where no row has a target.
    """
    if weights_N is not None:
        return (nll_N * weights_N.to(nll_N)).sum()
    if num_items_in_batch is not None:
        return nll_N.sum() / num_items_in_batch
    return nll_N.sum() / max(nll_N.shape[0], 1)
