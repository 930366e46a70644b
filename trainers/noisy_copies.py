"""The noisy copies of block diffusion: what each of them hides, and the input that they make with the clean one.

Owns the noise of a batch as a whole and the way of a tensor from the row to its copies. Copies leave out the blocks in
which nothing can be hidden: a prompt, the turns of a user and the padding of a batch are clean context only, a noisy
copy of them predicts nothing, and no block sees another's.

Shapes: B rows, W noisy views, L tokens of a row, M tokens that a noisy copy keeps.
"""

from dataclasses import dataclass
from typing import Any

import torch

from a2d_hf.modeling.attention_pattern import AttentionPattern

from .block_noise import BlockRows


@dataclass(frozen=True)
class NoisyCopies:
    """
    The tokens that the noisy copies of a batch keep, whole blocks in the order of the row.

    Attributes:
        kept_BM (`torch.LongTensor` of shape `(B, M)`): where they stand in the row.
        real_BM (`torch.BoolTensor` of shape `(B, M)`): False where a row keeps fewer than another: what stands
            there is to be read as padding.
    """

    kept_BM: torch.Tensor
    real_BM: torch.Tensor

    @classmethod
    def of(cls, rows: BlockRows) -> "NoisyCopies | None":
        """What a batch keeps, or `None` where some row has a target in every block: then nothing would be won."""
        group_X = rows.group_X
        targets_X = torch.zeros_like(group_X).index_add(0, group_X, rows.maskable_BL.flatten().long())
        keep_BL = (targets_X[group_X] > 0).view(rows.maskable_BL.shape) & rows.inputs["attention_mask"].bool()
        longest = max(int(keep_BL.sum(dim=-1).max()), min(rows.block_size, keep_BL.shape[1]))
        if longest == keep_BL.shape[1]:
            return None
        kept_BM = (~keep_BL).to(torch.uint8).argsort(dim=-1, stable=True)[:, :longest]
        return cls(kept_BM, keep_BL.gather(1, kept_BM))

    @property
    def length(self) -> int:
        return self.kept_BM.shape[1]

    def of_row(self, values_BL: torch.Tensor) -> torch.Tensor:
        """What belongs to the tokens of the row, for those that are kept: `(B, M)` of `(B, L)`."""
        return values_BL.gather(1, self.kept_BM)

    def of_views(self, values_BWL: torch.Tensor) -> torch.Tensor:
        """What belongs to the tokens of each view, for those that are kept: `(B, W, M)` of `(B, W, L)`."""
        return values_BWL.gather(2, self.kept_BM[:, None].expand(-1, values_BWL.shape[1], -1))


@dataclass
class BD3LMNoise:
    """
    The noise of a batch, for each of its W views.

    Attributes:
        block_size (`int`): tokens per block.
        time_BWL (`torch.DoubleTensor` of shape `(B, W, L)`): t of each token's block.
        elbo_weight_BWL (`torch.Tensor` of shape `(B, W, L)`): w(t), what a masked token counts.
        masked_BWL (`torch.BoolTensor` of shape `(B, W, L)`): m, the tokens that are hidden.
        noised_ids_BWL (`torch.LongTensor` of shape `(B, W, L)`): x_t, the ids with the mask token in their place.
        rows ([`BlockRows`]): the blocks of the batch.
        kept ([`NoisyCopies`], *optional*): the blocks that the noisy copies keep; `None` for all of them.
    """

    block_size: int
    time_BWL: torch.Tensor
    elbo_weight_BWL: torch.Tensor
    masked_BWL: torch.Tensor
    noised_ids_BWL: torch.Tensor
    rows: BlockRows
    kept: NoisyCopies | None = None

    def in_copies(self, values_BWL: torch.Tensor) -> torch.Tensor:
        """What belongs to the tokens of each view, for those that its copy keeps, copies side by side: `(B, W M)`."""
        return (values_BWL if self.kept is None else self.kept.of_views(values_BWL)).flatten(1)

    @property
    def views(self) -> int:
        return self.masked_BWL.shape[1]

    @property
    def masked_BL(self) -> torch.Tensor:
        """Tokens that are hidden in the first view, the only one of evaluation."""
        return self.masked_BWL[:, 0]


def doubled_input(inputs: dict[str, torch.Tensor], noise: BD3LMNoise, clean_context: str) -> dict[str, Any]:
    """
    What the model reads: `[x_t ; ... ; x_0]`.

    Args:
        inputs (`dict[str, torch.Tensor]`): a batch.
        noise ([`BD3LMNoise`]): its noise.
        clean_context (`str`): `block` or `causal`, how the clean copy attends to itself.

    Returns:
        `dict`: ids, padding, documents, where copies leave out blocks the position of every token, and who sees whom.
    """
    kept = noise.kept
    pattern = AttentionPattern.bd3lm(
        noise.block_size, clean_context, noise.views, noisy_length=None if kept is None else kept.length
    )
    by_token = {name: inputs[name] for name in ("attention_mask", "document_ids") if name in inputs}
    noisy = by_token
    if kept is not None:
        by_token["position_ids"] = noise.rows.position_BL.clamp(min=0)
        noisy = {name: kept.of_row(values_BL) for name, values_BL in by_token.items()}
        noisy["attention_mask"] = noisy["attention_mask"] * kept.real_BM
    return {
        "input_ids": torch.cat([noise.in_copies(noise.noised_ids_BWL), inputs["input_ids"]], dim=1),
        "attention_pattern": pattern,
        **{
            name: torch.cat([noisy[name].repeat(1, noise.views), values_BL], dim=1)
            for name, values_BL in by_token.items()
        },
    }
