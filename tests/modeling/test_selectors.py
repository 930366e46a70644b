"""Selectors: hand-computed commits, per-row counts, ties, the entropy bound, and what a user's function may return."""

import pytest
import torch

from a2d_hf.modeling.selectors_a2d import (
    Candidates,
    at_random,
    by_confidence,
    by_entropy,
    by_entropy_bound,
    by_margin,
    by_threshold,
    choose_commits,
    make_selector,
)


def candidates_of(rows: list[list[list[float] | None]], num_commits: list[int], generator=None) -> Candidates:
    """
    One list of probabilities per candidate position, `None` where a position is no candidate; tokens are the argmax.
    """
    mask_BL = torch.tensor([[cell is not None for cell in row] for row in rows])
    probabilities_NV = torch.tensor([cell for row in rows for cell in row if cell is not None], dtype=torch.float32)
    tokens_BL = torch.full(mask_BL.shape, 7)
    tokens_BL[mask_BL] = probabilities_NV.argmax(-1)
    return Candidates(mask_BL, tokens_BL, probabilities_NV.log(), torch.tensor(num_commits), generator)


# Position:        0                1                2     3                4
ROW = [[0.5, 0.5, 0.0], [0.6, 0.2, 0.2], None, [0.55, 0.05, 0.4], [0.4, 0.3, 0.3]]
# confidence       .50              .60                   .55              .40
# margin           .00              .40                   .15              .10
# entropy (nats)   .693             .950                  .845             1.089


@pytest.mark.parametrize(
    ("selector", "order"), [(by_confidence, [1, 3, 0, 4]), (by_margin, [1, 3, 4, 0]), (by_entropy, [0, 3, 1, 4])]
)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_counted_selectors_take_the_best_positions(selector, order, count):
    chosen = selector(candidates_of([ROW], [count]))
    assert chosen[0].nonzero()[:, 0].tolist() == sorted(order[:count])


def test_statistics_match_hand_computed_values():
    candidates = candidates_of([ROW], [1])
    torch.testing.assert_close(candidates.confidence_BL, torch.tensor([[0.5, 0.6, 0.0, 0.55, 0.4]]))
    torch.testing.assert_close(candidates.margin_BL, torch.tensor([[0.0, 0.4, 0.0, 0.15, 0.1]]))
    entropy = torch.tensor([[0.6931472, 0.9502705, float("inf"), 0.8451129, 1.0888999]])
    torch.testing.assert_close(candidates.entropy_BL, entropy)


def test_entropy_is_of_the_distribution_not_of_the_picked_token():
    # Both candidates have probability .5; one position has one rival, the other ten. (A peer takes the entropy of the
    # picked probability alone and cannot tell them apart.)
    even, spread = [0.5, 0.5] + [0.0] * 9, [0.5] + [0.05] * 10
    assert by_entropy(candidates_of([[spread, even]], [1])).tolist() == [[False, True]]


def test_counts_are_per_row_not_the_batch_mean():
    chosen = by_confidence(candidates_of([ROW, ROW, ROW], [1, 4, 2]))
    assert chosen.sum(-1).tolist() == [1, 4, 2]


def test_equal_scores_go_to_the_leftmost_position_in_any_batch():
    flat = [[0.5, 0.5]] * 40
    alone = by_confidence(candidates_of([flat], [7]))
    assert alone[0].nonzero()[:, 0].tolist() == list(range(7))
    batch = by_confidence(candidates_of([flat] * 5, [7, 1, 7, 3, 7]))
    assert torch.equal(batch[0], alone[0]) and torch.equal(batch[4], alone[0])


def test_threshold_commits_all_that_reach_it():
    chosen = by_threshold(candidates_of([ROW], [1]), threshold=0.5)
    assert chosen.tolist() == [[True, True, False, True, False]]


def test_threshold_always_commits_the_best():
    assert by_threshold(candidates_of([ROW], [1]), threshold=0.99).tolist() == [[False, True, False, False, False]]


def test_threshold_commits_as_many_as_steps_asks_for():
    assert by_threshold(candidates_of([ROW], [3]), threshold=0.99).sum() == 3


@pytest.mark.parametrize(
    ("bound", "order"),
    # In rising order: .693, .845, .950, 1.089. Sums without the largest: 0, .693, 1.538, 2.488.
    [
        (0.0, [0]),
        (0.69, [0]),
        (0.70, [0, 3]),
        (1.53, [0, 3]),
        (1.54, [0, 3, 1]),
        (2.48, [0, 3, 1]),
        (2.5, [0, 3, 1, 4]),
    ],
)
def test_entropy_bound_hand_computed(bound, order):
    chosen = by_entropy_bound(candidates_of([ROW], [1]), bound=bound)
    assert chosen[0].nonzero()[:, 0].tolist() == sorted(order)


@pytest.mark.parametrize("bound", [0.0, 0.1, 1.0, 5.0])
def test_entropy_bound_is_honoured_and_used_up(bound):
    generator = torch.Generator().manual_seed(3)
    probabilities = (4 * torch.randn(6, 20, 9, generator=generator)).softmax(-1)
    mask = torch.rand(6, 20, generator=generator) < 0.7
    candidates = Candidates(mask, probabilities.argmax(-1), probabilities[mask].log(), torch.ones(6).long())
    chosen = by_entropy_bound(candidates, bound=bound)
    entropy = -(probabilities * probabilities.log()).sum(-1)
    for row in range(6):
        taken = entropy[row][chosen[row]].tolist()
        left = entropy[row][mask[row] & ~chosen[row]].tolist()
        assert sum(taken) - max(taken) <= bound + 1e-5
        assert not left or sum(taken) > bound - 1e-5, "one more position would have been within the bound"
        assert not left or max(taken) <= min(left)


def test_random_is_uniform_over_positions():
    generator = torch.Generator().manual_seed(0)
    candidates = candidates_of([ROW] * 4000, [2] * 4000, generator)
    share = at_random(candidates).float().mean(0)
    assert share[2] == 0
    torch.testing.assert_close(share[[0, 1, 3, 4]], torch.full((4,), 0.5), atol=0.03, rtol=0)


def test_random_follows_the_generator():
    draw = [at_random(candidates_of([ROW] * 9, [2] * 9, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize("name", ["confidence", "margin", "entropy", "random", "threshold", "entropy_bound"])
def test_every_selector_commits_only_candidates_and_at_least_one_per_row(name):
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.randn(8, 12, 5, generator=generator).softmax(-1)
    mask = torch.rand(8, 12, generator=generator) < 0.5
    mask[0], mask[1] = False, False
    mask[1, 11] = True
    candidates = Candidates(mask, probabilities.argmax(-1), probabilities[mask].log(), mask.sum(-1).clamp(max=2))
    chosen = choose_commits(make_selector(name, threshold=0.9, entropy_bound=0.1), candidates)
    assert not (chosen & ~mask).any()
    assert torch.equal(chosen.any(-1), mask.any(-1))


def test_a_user_function_that_takes_nothing_still_commits_the_best():
    candidates = candidates_of([ROW, [None] * 5], [1, 0])
    chosen = choose_commits(lambda c: torch.zeros_like(c.mask_BL), candidates)
    assert chosen.tolist() == [[False, True, False, False, False], [False] * 5]


def test_a_user_function_cannot_commit_what_is_no_candidate():
    candidates = candidates_of([ROW], [1])
    assert choose_commits(lambda c: torch.ones_like(c.mask_BL), candidates).tolist() == [
        [True, True, False, True, True]
    ]


@pytest.mark.parametrize(
    "wrong", [lambda c: c.confidence_BL, lambda c: c.mask_BL[0], lambda c: [0], lambda c: c.mask_BL.long()]
)
def test_a_user_function_with_a_wrong_result_is_named(wrong):
    with pytest.raises(ValueError, match="`selector` must return a boolean tensor of shape"):
        choose_commits(wrong, candidates_of([ROW], [1]))
