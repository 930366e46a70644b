"""The noise of block diffusion: which tokens of each block are hidden, and what each of them counts.

Owns the two ways of hiding: coins at a time of the block's own, and a number of tokens drawn outright. Both are pure
functions of a row's (seed, epoch, place, row id), and both have the NELBO for their expectation.

Shapes: B rows, W noisy views, L tokens.
"""

import functools
from dataclasses import dataclass

import torch

from a2d_hf.modeling.attention_pattern import AttentionPattern
from a2d_hf.modeling.token_layout import TokenLayout

from .batch_rows import by_token
from .diffusion_noise import (
    TOKEN_MASK,
    bernoulli_mask,
    block_time,
    elbo_weight,
    mask_probability,
    position_in_row,
    random_bits,
    truncation_factor,
)


@dataclass
class BlockViews:
    """
    What is hidden in each of W views of a batch.

    Attributes:
        time_BWL (`torch.DoubleTensor` of shape `(B, W, L)`): t of each token's block; where tokens are counted, the
            fraction that decided how many.
        weight_BWL (`torch.Tensor` of shape `(B, W, L)`): what a hidden token's cross-entropy counts.
        masked_BWL (`torch.BoolTensor` of shape `(B, W, L)`): the tokens that are hidden.
    """

    time_BWL: torch.Tensor
    weight_BWL: torch.Tensor
    masked_BWL: torch.Tensor


@dataclass
class BlockRows:
    """
    Rows of a batch, cut into blocks.

    Args:
        inputs (`dict[str, torch.Tensor]`): a batch of [`DiffusionCollator`]; `document_ids` of packed rows are
            respected, blocks are counted from the start of each document.
        block_size (`int`): tokens per block.
    """

    inputs: dict[str, torch.Tensor]
    block_size: int

    def __post_init__(self):
        inputs, documents_BL = self.inputs, self.inputs.get("document_ids")
        self.maskable_BL = inputs["labels"] != -100
        self.block_BL = block_numbers(inputs["attention_mask"], documents_BL, self.block_size)
        self.epoch, self.place, self.row_id = (
            by_token(inputs[name], documents_BL) for name in ("epoch", "place", "row_id")
        )
        self.position_BL = position_in_row(inputs["attention_mask"], documents_BL)
        self.document_BL = torch.zeros_like(self.block_BL) if documents_BL is None else documents_BL

    @functools.cached_property
    def group_X(self) -> torch.Tensor:
        """
        The block of each token, blocks of all rows numbered through, `(B L,)`: a new one begins wherever the row, its
        document or its block changes.
        """
        row_BL = torch.arange(self.block_BL.shape[0], device=self.block_BL.device)[:, None]
        key_BLC = torch.stack(torch.broadcast_tensors(row_BL, self.document_BL, self.block_BL), dim=-1)
        begins_X = (key_BLC.flatten(0, 1).diff(dim=0) != 0).any(dim=-1)
        return torch.nn.functional.pad(begins_X.long().cumsum(dim=0), (1, 0))


def whole_blocks(maskable_BL: torch.Tensor) -> BlockViews:
    """Blocks of one token: always hidden, weight 1, which is the expectation over t and leaves nothing to chance."""
    ones_BL = torch.ones(maskable_BL.shape, dtype=torch.float64)
    return BlockViews(ones_BL[:, None], ones_BL[:, None], maskable_BL[:, None])


def coin_tosses(
    rows: BlockRows, seed: int, schedule: str, minimum: float, maximum: float, complementary: bool = False
) -> BlockViews:
    """
    One time per block, one coin per token: hidden with probability 1 - α(t), weight w(t) = -α'(t) / (1 - α(t)).

    Args:
        rows ([`BlockRows`]): what is hidden from.
        seed (`int`): seed of the noise.
        schedule (`str`): how the hidden share grows with t.
        minimum, maximum (`float`): what the times are clipped to.
        complementary (`bool`, *optional*, defaults to `False`): a second view hides the other tokens, as at time
            1 - t. For the linear schedule.

    Returns:
        [`BlockViews`]
    """
    time_BL = block_time(seed, rows.epoch, rows.place, rows.block_BL, minimum, maximum)
    share_BL = mask_probability(time_BL, schedule)
    masked_BL = bernoulli_mask(seed, rows.epoch, rows.row_id, rows.position_BL, share_BL) & rows.maskable_BL
    time, masked = [time_BL], [masked_BL]
    weight = [elbo_weight(time_BL, schedule) * truncation_factor(minimum, schedule, maximum)]
    if complementary:
        time.append(1.0 - time_BL)
        weight.append(1.0 / (1.0 - time_BL))
        masked.append(rows.maskable_BL & ~masked_BL)
    return BlockViews(torch.stack(time, dim=1), torch.stack(weight, dim=1), torch.stack(masked, dim=1))


def order_and_view(nested_views: int, nested_orders: int, block_size: int) -> list[tuple[int, int]]:
    """
    The views of every order, as pairs of their numbers. With as many views as a block has tokens the last one hides
    the whole block, the same for every order: it is there once, as the first order's.
    """
    return [
        (order, view)
        for order in range(nested_orders)
        for view in range(nested_views)
        if order == 0 or view < nested_views - 1 or nested_views < block_size
    ]


def counted_tokens(
    rows: BlockRows, seed: int, complementary: bool = False, nested_views: int = 1, nested_orders: int = 1
) -> BlockViews:
    """
    Of the n tokens of a block that may be hidden, k at random are, k uniform on {1, ..., n}, weight n / k.

    This is the NELBO with the time integrated out. With coins, k is uniform on {0, ..., n} whatever the schedule, and
    the mean of w(t) given which tokens are hidden is (n + 1) / k; leaving out k = 0, at which nothing is learned,
    gives n / k. The variance that the time had is gone, and no weight exceeds n, so that no time needs a bound.

    Args:
        rows ([`BlockRows`]): what is hidden from.
        seed (`int`): seed of the noise.
        complementary (`bool`, *optional*, defaults to `False`): a second view hides the other n - k tokens. k is then
            uniform on {0, ..., n}, as n - k is, and the weights are (n + 1) / k and (n + 1) / (n - k).
        nested_views (`int`, *optional*, defaults to 1): V views that draw k from the V parts of {1, ..., n} in turn
            and hide the first k tokens of one random order, so that each hides what the one before it hid. The mean
            over the views has the same expectation; with V = n it is the exact cost of writing that order backward.
        nested_orders (`int`, *optional*, defaults to 1): as many views again for every further order, which is the
            one before moved on by a token: with n orders every token is the first of one. Where the last view of
            every order hides the whole block it is the same view, and is there once, with the weight of all.

    Returns:
        [`BlockViews`] with `nested_orders * nested_views` views, less those that would be there twice.
    """
    maskable_BL = rows.maskable_BL
    time_BL = block_time(seed, rows.epoch, rows.place, rows.block_BL)

    # 1. Blocks of all rows, numbered through.
    group_X = rows.group_X

    # 2. n, and the order in which the tokens of a block are hidden: by their bits.
    maskable_X = maskable_BL.flatten()
    n_X = torch.zeros_like(group_X).index_add(0, group_X, maskable_X.long())[group_X]
    bits_X = random_bits(TOKEN_MASK, seed, rows.epoch, rows.row_id, rows.position_BL).flatten()
    bits_X = bits_X.masked_fill(~maskable_X, torch.iinfo(torch.int64).max)
    order_X = bits_X.argsort(stable=True)
    order_X = order_X[group_X[order_X].argsort(stable=True)]
    first_X = torch.searchsorted(group_X, group_X)
    rank_X = torch.empty_like(order_X).scatter(0, order_X, torch.arange(len(order_X), device=order_X.device)) - first_X

    # 3. Each view: k by the block's own place in the stratified sequence, the k tokens that come first, their weights.
    def stacked(of_each: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([one.view(maskable_BL.shape) for one in of_each], dim=1)

    if complementary:
        fraction_X = time_BL.flatten().to(group_X.device)
        k_X = (fraction_X * (n_X + 1)).long().clamp(max=n_X)
        hidden_X = (rank_X < k_X) & maskable_X
        weights = [(n_X + 1).float() / count_X.clamp(min=1) for count_X in (k_X, n_X - k_X)]
        times, masks = [time_BL, 1.0 - time_BL], [hidden_X, maskable_X & ~hidden_X]
        return BlockViews(torch.stack(times, dim=1), stacked(weights), stacked(masks))

    views = order_and_view(nested_views, nested_orders, rows.block_size)
    hides_all = nested_views - 1 if nested_views >= rows.block_size else None
    times, weights, masks = [], [], []
    for order, view in views:
        stands_for = nested_orders if view == hides_all else 1
        share = stands_for * len(views) / (nested_orders * nested_views)  # of the mean over all that there would be
        times.append((view + time_BL) / nested_views)
        k_X = (1 + (times[-1].flatten().to(group_X.device) * n_X).long()).clamp(max=n_X)
        weights.append(share * n_X.float() / k_X.clamp(min=1))
        masks.append(((rank_X + order) % n_X.clamp(min=1) < k_X) & maskable_X)
    return BlockViews(torch.stack(times, dim=1), stacked(weights), stacked(masks))


def nothing_visible_behind(rows: BlockRows, masked_BWL: torch.Tensor) -> torch.Tensor:
    """
    Whether no token that stands behind a token in its block can be seen: a teacher that reads from left to right knows
    of such a token at least what the model knows.

    Args:
        rows ([`BlockRows`]): the blocks.
        masked_BWL (`torch.BoolTensor` of shape `(B, W, L)`): the tokens that are hidden.

    Returns:
        `torch.BoolTensor` of shape `(B, W, L)`.
    """
    visible_BWL = ~masked_BWL & rows.inputs["attention_mask"].bool()[:, None]
    found_BWL = torch.zeros_like(visible_BWL)
    block_BL, document_BL, length = rows.block_BL, rows.document_BL, masked_BWL.shape[-1]
    for ahead in range(1, min(rows.block_size, length)):
        same_BX = (block_BL[:, ahead:] == block_BL[:, :-ahead]) & (document_BL[:, ahead:] == document_BL[:, :-ahead])
        found_BWL[..., :-ahead] |= same_BX[:, None] & visible_BWL[..., ahead:]
    return ~found_BWL


def block_numbers(
    attention_mask_BL: torch.Tensor, document_ids_BL: torch.Tensor | None, block_size: int
) -> torch.Tensor:
    """
    Which block of its row, or of its document where rows are packed, each token stands in: as the model itself counts
    them.

    Args:
        attention_mask_BL (`torch.Tensor` of shape `(B, L)`): 1 for text, 0 for padding, on either side.
        document_ids_BL (`torch.Tensor` of shape `(B, L)`, *optional*): documents of packed rows.
        block_size (`int`): tokens per block.

    Returns:
        `torch.LongTensor` of shape `(B, L)`.
    """
    shape, device = attention_mask_BL.shape, attention_mask_BL.device
    layout = TokenLayout.of(
        AttentionPattern.block_causal(block_size), shape, device, attention_mask_BL, document_ids=document_ids_BL
    )
    position_BL = layout.position_BL
    if position_BL is None:
        position_BL = torch.arange(shape[1], device=device).expand(shape)
    return position_BL.clamp(min=0) // block_size
