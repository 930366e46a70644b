"""scripts/block_context.py against one pass of the parent per block and set of masks."""

import itertools
import math

import pytest
import torch

from scripts import block_context
from tests.trainers import bd3lm_reference
from tests.trainers.helpers import diffusion_model


@pytest.mark.parametrize("token_shift", [False, True])
def test_every_set_of_masks_equals_brute_force(token_shift):
    model = diffusion_model(objective="bd3lm", block_size=3, clean_context="causal", token_shift=token_shift).eval()
    ids = torch.randint(3, 100, (12,), generator=torch.Generator().manual_seed(1))
    found = block_context.cross_entropies(model, ids)
    assert len(found) == 7
    for masked, ce in found.items():
        for place in masked:
            losses = []
            for start in range(0, 12, 3):
                if start + place == 0:  # nothing stands before it
                    continue
                hidden = [start + other for other in masked]
                with torch.no_grad():
                    loss = bd3lm_reference.token_losses(model, ids, hidden, start, 3, "causal", token_shift)
                losses.append(loss[start + place].item())
            assert ce[place] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_nelbo_of_the_table_weighs_sets_as_coins_do():
    """∫ t^k (1 - t)^(n - k) / t dt = (k - 1)! (n - k)! / n! for each masked token of a set of k."""
    n, generator = 4, torch.Generator().manual_seed(2)
    table = {
        masked: {place: torch.rand((), generator=generator).item() for place in masked}
        for k in range(1, n + 1)
        for masked in itertools.combinations(range(n), k)
    }
    expected = sum(
        math.factorial(len(masked) - 1) * math.factorial(n - len(masked)) / math.factorial(n) * sum(ce.values())
        for masked, ce in table.items()
    )
    assert block_context.nelbo(table, n) == pytest.approx(expected / n)
