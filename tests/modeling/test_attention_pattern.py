"""Edge rules of `AttentionPattern`, against brute force written here."""

import itertools

import pytest
import torch

from a2d_hf.modeling.attention_pattern import AttentionPattern, Place


LENGTH = 12


def edges(pattern: AttentionPattern, positions: list[int], copies: list[int] | None = None) -> torch.Tensor:
    position = torch.tensor(positions)
    copy = None if copies is None else torch.tensor(copies)
    q = Place(position[:, None], None if copy is None else copy[:, None])
    k = Place(position[None, :], None if copy is None else copy[None, :])
    return pattern.edge(q, k).expand(len(positions), len(positions))


def brute_force(size: int, sees) -> torch.Tensor:
    return torch.tensor([[bool(sees(i, j)) for j in range(size)] for i in range(size)])


def test_causal_sees_itself_and_the_past():
    assert torch.equal(edges(AttentionPattern.causal(), range(LENGTH)), brute_force(LENGTH, lambda i, j: j <= i))


def test_bidirectional_sees_everything():
    assert edges(AttentionPattern.bidirectional(), range(LENGTH)).all()


@pytest.mark.parametrize("block_size", [1, 3, 4, 12, 50])
def test_block_causal(block_size):
    found = edges(AttentionPattern.block_causal(block_size), range(LENGTH))
    assert torch.equal(found, brute_force(LENGTH, lambda i, j: j // block_size <= i // block_size))


@pytest.mark.parametrize("clean_context", ["block", "causal"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_bd3lm_is_the_staircase(block_size, views, clean_context):
    copies = [c for c in range(views + 1) for _ in range(LENGTH)]
    positions = list(range(LENGTH)) * (views + 1)

    def sees(i, j):
        (copy_i, p_i), (copy_j, p_j) = (copies[i], positions[i]), (copies[j], positions[j])
        block_i, block_j = p_i // block_size, p_j // block_size
        if copy_i < views:  # noisy: its own block, and the clean blocks before it
            return (copy_j == copy_i and block_i == block_j) or (copy_j == views and block_j < block_i)
        if copy_j != views:  # clean never sees noise
            return False
        return p_j <= p_i if clean_context == "causal" else block_j <= block_i

    found = edges(AttentionPattern.bd3lm(block_size, clean_context, views), positions, copies)
    assert torch.equal(found, brute_force(len(positions), sees))


@pytest.mark.parametrize("form", ["stochastic", "log_bias"])
def test_annealing_ends_exactly_at_causal_and_open(form):
    start = edges(AttentionPattern.annealed(0.0, form=form), range(LENGTH))
    end = edges(AttentionPattern.annealed(1.0, form=form), range(LENGTH))
    assert torch.equal(start, brute_force(LENGTH, lambda i, j: j <= i))
    assert end.all()


def test_stochastic_annealing_opens_the_asked_share_and_never_closes_the_past():
    size = 300
    found = edges(AttentionPattern.annealed(0.3, seed=5), range(size))
    future = ~torch.ones(size, size, dtype=torch.bool).tril()
    share = found[future].double().mean().item()
    assert found[~future].all()
    # 44,850 edges: the standard error of the share is 0.0022
    assert abs(share - 0.3) < 0.01


def test_stochastic_annealing_is_a_function_of_the_edge_and_the_seed_alone():
    long = edges(AttentionPattern.annealed(0.5, seed=3), range(40))
    part = edges(AttentionPattern.annealed(0.5, seed=3), range(10, 30))
    other = edges(AttentionPattern.annealed(0.5, seed=4), range(40))
    assert torch.equal(long[10:30, 10:30], part)
    assert not torch.equal(long, other)


def test_stochastic_annealing_draws_rows_and_columns_independently():
    size = 400
    future = edges(AttentionPattern.annealed(0.5, seed=1), range(size))[:200, 200:].double()
    for axis in (0, 1):
        neighbours = (future.narrow(axis, 0, 199) * future.narrow(axis, 1, 199)).mean().item()
        assert abs(neighbours - 0.25) < 0.02


def test_annealing_only_ever_opens_more():
    alphas = [0.0, 0.1, 0.4, 0.8, 1.0]
    masks = [edges(AttentionPattern.annealed(alpha, seed=9), range(50)) for alpha in alphas]
    assert all((~before | after).all() for before, after in itertools.pairwise(masks))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: AttentionPattern("sideways"), "attention_pattern"),
        (lambda: AttentionPattern.block_causal(0), "block_size"),
        (lambda: AttentionPattern.annealed(1.5), "alpha"),
        (lambda: AttentionPattern.annealed(0.5, form="linear"), "form"),
        (lambda: AttentionPattern.bd3lm(4, clean_context="open"), "clean_context"),
        (lambda: AttentionPattern.bd3lm(4, views=0), "views"),
    ],
)
def test_bad_values_are_named(build, name):
    with pytest.raises(ValueError, match=name):
        build()
