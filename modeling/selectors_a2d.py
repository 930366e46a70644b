"""Which masked positions a forward pass commits, decided for each row by itself.

Owns the selection rules. A selector is a function `Candidates -> BoolTensor (B, L)`; a user's own function has the
same form. Knows nothing of models, blocks or sampling.

Shapes: B rows, L positions of the canvas, V vocabulary rows, N candidate positions of all rows in row-major order.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Candidates:
    """
    What a selector sees of one forward pass.

    Probabilities are the model's own, after suppressed tokens and penalties and before temperature, top-k, top-p and
    min-p, so that "sure of it" means the same at every temperature.

    Attributes:
        mask_BL (`torch.BoolTensor` of shape `(B, L)`): positions that may be committed.
        tokens_BL (`torch.LongTensor` of shape `(B, L)`): the token that each of them would get.
        log_probs_NV (`torch.FloatTensor` of shape `(N, V)`): log-probabilities at these positions, in row-major order.
        num_commits_B (`torch.LongTensor` of shape `(B,)`): how many positions `steps` asks each row to commit now; at
            least 1 in a row that has candidates, never more than it has. The adaptive rules may commit more. 0 in a
            block of a pipeline that is not fully active: it need not commit any.
        generator (`torch.Generator`, *optional*): where random rules draw from.
    """

    mask_BL: torch.Tensor
    tokens_BL: torch.Tensor
    log_probs_NV: torch.Tensor
    num_commits_B: torch.Tensor
    generator: torch.Generator | None = None

    def spread(self, values_N: torch.Tensor, fill: float) -> torch.Tensor:
        """Puts one value per candidate at its place in a `(B, L)` tensor, `fill` elsewhere."""
        values_BL = torch.full(self.mask_BL.shape, fill, dtype=values_N.dtype, device=values_N.device)
        values_BL[self.mask_BL] = values_N
        return values_BL

    @functools.cached_property
    def confidence_BL(self) -> torch.Tensor:
        """Probability of the candidate token; 0 elsewhere."""
        picked_N = self.log_probs_NV.gather(-1, self.tokens_BL[self.mask_BL][:, None])[:, 0]
        return self.spread(picked_N.exp(), 0.0)

    @functools.cached_property
    def margin_BL(self) -> torch.Tensor:
        """Probability of the likeliest token less that of the runner-up; 0 elsewhere."""
        top_N2 = self.log_probs_NV.topk(min(2, self.log_probs_NV.shape[-1]), dim=-1).values.exp()
        return self.spread(top_N2[:, 0] - top_N2[:, 1:].sum(-1), 0.0)

    @functools.cached_property
    def entropy_BL(self) -> torch.Tensor:
        """Entropy of the distribution in nats; infinite elsewhere."""
        return self.spread(torch.special.entr(self.log_probs_NV.exp()).sum(-1), float("inf"))


Selector = Callable[[Candidates], torch.Tensor]


def top_scores(scores_BL: torch.Tensor, mask_BL: torch.Tensor, num_B: torch.Tensor) -> torch.Tensor:
    """
    The `num_B` best positions of each row among those in `mask_BL`.

    Equal scores go to the leftmost position, in any batch: `topk` promises no order, and a row must not depend on its
    neighbours.

    Args:
        scores_BL (`torch.Tensor` of shape `(B, L)`): larger is better.
        mask_BL (`torch.BoolTensor` of shape `(B, L)`): positions that may be taken.
        num_B (`torch.LongTensor` of shape `(B,)`): how many to take.

    Returns:
        `torch.BoolTensor` of shape `(B, L)`.
    """
    # Finite scores for all candidates, so that none ranks behind a position that is not one.
    scores_BL = scores_BL.clamp(min=torch.finfo(scores_BL.dtype).min).masked_fill(~mask_BL, float("-inf"))
    order_BL = scores_BL.argsort(dim=-1, descending=True, stable=True)
    places_L = torch.arange(scores_BL.shape[-1], device=scores_BL.device)
    rank_BL = torch.empty_like(order_BL).scatter_(-1, order_BL, places_L.expand_as(order_BL))
    return (rank_BL < num_B[:, None]) & mask_BL


def by_confidence(candidates: Candidates) -> torch.Tensor:
    """The most probable candidates (MaskGIT, https://huggingface.co/papers/2202.04200; LLaDA's "low confidence")."""
    return top_scores(candidates.confidence_BL, candidates.mask_BL, candidates.num_commits_B)


def by_margin(candidates: Candidates) -> torch.Tensor:
    """The candidates furthest ahead of their runner-up (https://huggingface.co/papers/2502.06768)."""
    return top_scores(candidates.margin_BL, candidates.mask_BL, candidates.num_commits_B)


def by_entropy(candidates: Candidates) -> torch.Tensor:
    """The positions of least entropy (Dream, https://huggingface.co/papers/2508.15487)."""
    return top_scores(-candidates.entropy_BL, candidates.mask_BL, candidates.num_commits_B)


def at_random(candidates: Candidates) -> torch.Tensor:
    """
    Positions drawn uniformly: ancestral sampling of masked diffusion (MDLM, https://huggingface.co/papers/2406.07524)
    with the number per step fixed, so that no forward commits nothing. One position per forward at temperature 1
    draws from the joint distribution that the model's conditionals define.
    """
    draw_BL = draw_uniform(tuple(candidates.mask_BL.shape), candidates.mask_BL.device, candidates.generator)
    return top_scores(draw_BL, candidates.mask_BL, candidates.num_commits_B)


def by_threshold(candidates: Candidates, threshold: float) -> torch.Tensor:
    """
    Every candidate of probability `threshold` or more, and never fewer than the most probable ones that `steps` asks
    for (Fast-dLLM, https://huggingface.co/papers/2505.22618).
    """
    return (candidates.mask_BL & (candidates.confidence_BL >= threshold)) | by_confidence(candidates)


def by_entropy_bound(candidates: Candidates, bound: float) -> torch.Tensor:
    """
    The largest k for which sum(H_1..H_k) - max(H_1..H_k) <= `bound`, positions in rising order of entropy H: a limit
    on the dependence among tokens that are committed together (EB-Sampler, https://huggingface.co/papers/2505.24857).
    Never fewer than `steps` asks for; where it asks for none, the first is not free but must be within the bound too.
    """
    entropy_BL, order_BL = candidates.entropy_BL.sort(dim=-1, stable=True)
    # In rising order the largest of the first k is the k-th, so the left side is the sum of those before it. It never
    # falls: what is within the bound is a prefix.
    before_BL = torch.nn.functional.pad(entropy_BL[:, :-1].cumsum(-1), (1, 0))
    within_BL = (before_BL <= bound) & ((candidates.num_commits_B[:, None] > 0) | (entropy_BL <= bound))
    chosen_BL = torch.zeros_like(candidates.mask_BL).scatter_(-1, order_BL, within_BL)
    return (candidates.mask_BL & chosen_BL) | by_entropy(candidates)


def make_selector(selector: str | Selector, *, threshold: float, entropy_bound: float) -> Selector:
    """The function behind a name; a function passes through."""
    if callable(selector):
        return selector
    return {
        "confidence": by_confidence,
        "margin": by_margin,
        "entropy": by_entropy,
        "random": at_random,
        "threshold": functools.partial(by_threshold, threshold=threshold),
        "entropy_bound": functools.partial(by_entropy_bound, bound=entropy_bound),
    }[selector]


def choose_commits(selector: Selector, candidates: Candidates) -> torch.Tensor:
    """
    Runs a selector and holds it to its contract: booleans of the right shape, candidates only, and at least one in
    every row that is asked for any (its most probable one, where the selector takes none), so that no forward is
    wasted and decoding ends.

    Args:
        selector (`Callable`): the rule.
        candidates (`Candidates`): what it chooses from.

    Returns:
        `torch.BoolTensor` of shape `(B, L)`.
    """
    chosen_BL = selector(candidates)
    shape = tuple(candidates.mask_BL.shape)
    if not isinstance(chosen_BL, torch.Tensor) or chosen_BL.dtype != torch.bool or tuple(chosen_BL.shape) != shape:
        found = (
            f"a {chosen_BL.dtype} tensor of shape {tuple(chosen_BL.shape)}"
            if isinstance(chosen_BL, torch.Tensor)
            else f"a {type(chosen_BL).__name__}"
        )
        raise ValueError(f"`selector` must return a boolean tensor of shape {shape}, not {found}.")
    chosen_BL = chosen_BL & candidates.mask_BL
    idle_B = candidates.mask_BL.any(-1) & ~chosen_BL.any(-1) & (candidates.num_commits_B > 0)
    return chosen_BL | top_scores(candidates.confidence_BL, candidates.mask_BL, idle_B.long())


def draw_uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """Uniform numbers in [0, 1), fp64, drawn where the generator lives: a CPU one gives the same on any device."""
    where = device if generator is None else generator.device
    return torch.rand(shape, dtype=torch.float64, device=where, generator=generator).to(device)
