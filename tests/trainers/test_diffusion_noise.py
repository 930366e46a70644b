"""The noise: exact against a second implementation, stratified, stateless, and right in expectation."""

import math

import pytest
import torch

from a2d_hf.trainers.diffusion_noise import (
    NOISE_SCHEDULES,
    bernoulli_mask,
    elbo_weight,
    eos_tail_length,
    epoch_order,
    low_discrepancy_time,
    mask_probability,
    position_in_row,
    random_bits,
    truncation_factor,
)
from tests.trainers import reference_noise


every_schedule = pytest.mark.parametrize("schedule", NOISE_SCHEDULES)


def times(seed, epoch, places, minimum=0.0):
    places = torch.as_tensor(places)
    return low_discrepancy_time(seed, torch.full_like(places, epoch), places, minimum)


def test_bits_equal_the_reference():
    for keys in [(2, 0, 0, 0, 0), (2, 42, 3, 17, 255), (4, 2**31, 5, 10**12, 1), (1, 0, -1, 2, 3)]:
        assert random_bits(*keys[:-1], torch.tensor(keys[-1])).item() == reference_noise.bits(*keys)


def test_times_equal_the_reference():
    places = [0, 1, 2, 999, 10**9]
    expected = [reference_noise.time(7, 3, place) for place in places]
    assert times(7, 3, places, 1e-3).tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 16, 33, 100])
def test_any_run_of_consecutive_rows_is_stratified(count):
    for first in (0, 1, 7, 1000, 123_457):
        t = times(5, 2, torch.arange(first, first + count)).sort().values
        gaps = torch.diff(t, append=t[:1] + 1) * count
        # Independent uniform draws of 100 rows leave a gap of about 5 times the even spacing, and gaps near 0.
        assert gaps.max() < 2.0
        assert gaps.min() > 0.35


def test_independent_times_would_fail_the_stratification_test():
    t = torch.rand(100, generator=torch.Generator().manual_seed(0)).sort().values
    gaps = torch.diff(t, append=t[:1] + 1) * 100
    assert gaps.max() > 2.0 and gaps.min() < 0.35


def test_mean_time_of_a_batch_is_stable():
    """What stratification is for: a batch of 16 rows sees about the same mix of times as any other."""
    means = torch.stack([times(0, 0, torch.arange(16 * b, 16 * b + 16)).mean() for b in range(200)])
    assert means.std() < 0.03  # independent draws: 0.072


def test_epochs_and_seeds_move_the_times():
    assert not torch.equal(times(0, 0, [0, 1]), times(0, 1, [0, 1]))
    assert not torch.equal(times(0, 0, [0, 1]), times(1, 0, [0, 1]))


def test_mask_equals_the_reference():
    rows, positions = torch.tensor([3, 900]), torch.arange(40).expand(2, 40)
    share = torch.tensor([0.3, 0.8], dtype=torch.float64)
    mask = bernoulli_mask(11, torch.tensor([4, 4]), rows, positions, share)
    for b, row in enumerate(rows.tolist()):
        expected = [reference_noise.is_masked(11, 4, row, i, share[b].item()) for i in range(40)]
        assert mask[b].tolist() == expected


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_mask_share(share):
    rows = torch.arange(400)
    mask = bernoulli_mask(
        0, torch.zeros_like(rows), rows, torch.arange(256).expand(400, 256), torch.full((400,), share).double()
    )
    error = 4 * math.sqrt(share * (1 - share) / mask.numel())
    assert abs(mask.double().mean().item() - share) <= error
    # Neighbouring rows and positions are independent: each pair agrees as often as chance says.
    agree = share**2 + (1 - share) ** 2
    for pairs in (mask[1:] == mask[:-1], mask[:, 1:] == mask[:, :-1]):
        assert abs(pairs.double().mean().item() - agree) <= 6 * math.sqrt(agree * (1 - agree) / pairs.numel()) + 1e-9


def test_noise_of_a_row_does_not_depend_on_its_batch():
    rows, positions = torch.arange(12), torch.arange(30).expand(12, 30)
    epochs, share = torch.full((12,), 3), torch.linspace(0.1, 0.9, 12, dtype=torch.float64)
    together = bernoulli_mask(1, epochs, rows, positions, share)
    shuffled = torch.randperm(12)
    again = bernoulli_mask(1, epochs, rows[shuffled], positions, share[shuffled])
    assert torch.equal(again, together[shuffled])
    for b in range(12):
        alone = bernoulli_mask(1, epochs[b : b + 1], rows[b : b + 1], positions[:1], share[b : b + 1])
        assert torch.equal(alone[0], together[b])


def test_noise_of_a_row_does_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = random_bits(2, 0, 0, torch.arange(8))
    torch.manual_seed(2)
    torch.rand(3)
    assert torch.equal(first, random_bits(2, 0, 0, torch.arange(8)))


def test_padding_side_shifts_no_draw():
    tokens, pad = 9, 5
    right = torch.tensor([[1] * tokens + [0] * pad])
    left = torch.tensor([[0] * pad + [1] * tokens])
    row, share = torch.tensor([4]), torch.tensor([0.5], dtype=torch.float64)
    padded_right = bernoulli_mask(0, torch.tensor([0]), row, position_in_row(right), share)
    padded_left = bernoulli_mask(0, torch.tensor([0]), row, position_in_row(left), share)
    assert torch.equal(padded_right[0, :tokens], padded_left[0, pad:])


@pytest.mark.gpu
def test_noise_is_the_same_on_a_gpu():
    rows, positions = torch.arange(64), torch.arange(100).expand(64, 100)
    draws = []
    for device in ("cpu", "cuda"):
        at = rows.to(device)
        t = low_discrepancy_time(3, torch.zeros_like(at), at, 1e-3)
        mask = bernoulli_mask(3, torch.zeros_like(at), at, positions.to(device), mask_probability(t, "linear"))
        draws.append((t.cpu(), mask.cpu()))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])


@every_schedule
@pytest.mark.parametrize("epsilon", [1e-4, 1e-3, 0.1])
def test_constant_cross_entropy_gives_exactly_one(schedule, epsilon):
    """E[w(t) m] over t in [epsilon, 1] is 1 when every cross-entropy is 1, on a fine grid instead of by sampling."""
    cells = 200_000
    t = epsilon + (1 - epsilon) * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    expected_count = elbo_weight(t, schedule) * mask_probability(t, schedule) * truncation_factor(epsilon, schedule)
    assert expected_count.mean().item() == pytest.approx(1.0, abs=1e-9)


@every_schedule
def test_weight_is_minus_the_slope_of_log_mask_probability(schedule):
    """w = -alpha' / (1 - alpha), with alpha' by automatic differentiation."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    masked = mask_probability(t, schedule)
    (slope,) = torch.autograd.grad(masked.sum(), t)
    torch.testing.assert_close(elbo_weight(t, schedule), slope / masked)


@every_schedule
def test_schedule_runs_from_nothing_to_everything(schedule):
    ends = mask_probability(torch.tensor([0.0, 1.0], dtype=torch.float64), schedule)
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="noise_schedule.*'quadratic'"):
        mask_probability(torch.tensor(0.5), "quadratic")
    with pytest.raises(ValueError, match="noise_schedule.*'quadratic'"):
        elbo_weight(torch.tensor(0.5), "quadratic")


def test_order_is_a_permutation_and_equals_the_reference():
    order = epoch_order(42, 3, 101)
    assert order.tolist() == reference_noise.order(42, 3, 101)
    assert sorted(order.tolist()) == list(range(101))
    assert not torch.equal(order, epoch_order(42, 4, 101))
    assert not torch.equal(order, epoch_order(43, 3, 101))


def test_tails_are_uniform_and_bounded():
    lengths = eos_tail_length(0, 0, torch.arange(9000), 8)
    counts = torch.bincount(lengths, minlength=9)
    assert counts.shape == (9,)
    assert (counts - 1000).abs().max() < 150
