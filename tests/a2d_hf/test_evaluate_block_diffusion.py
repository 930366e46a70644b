"""The NELBO of block diffusion against exact enumeration block by block, and against the parent at block size 1."""

import itertools
import math

import pytest
import torch

from a2d_hf.evaluate import autoregressive_nll, blocks_of, diffusion_nelbo, masked_accuracy, scored_positions
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from tests.a2d_hf.test_evaluate import random_rows
from tests.conftest import tiny_model
from tests.trainers.bd3lm_reference import token_losses
from tests.trainers.helpers import MASK_ID


def block_model(block_size=3, family="llama", **fields):
    return A2DForMaskedDiffusion.from_causal_lm(
        tiny_model(family), mask_token_id=MASK_ID, objective="bd3lm", block_size=block_size, **fields
    ).eval()


@torch.no_grad()
def exact_nelbo(model, row, block_size, **fields):
    """
    Brute force, one pass of the parent per (block, subset of it), over `[clean text before ; noisy block]`: the
    integral over t of (1/t) sum_S t^|S| (1-t)^(n-|S|) CE(S) is sum_S B(|S|, n-|S|+1) CE(S), B the beta function.
    """
    clean, nats = torch.tensor(row["input_ids"]), 0.0
    for start in range(0, len(clean), block_size):
        places = [i for i in scored_positions(row) if start <= i < start + block_size]
        for size in range(1, len(places) + 1):
            weight = math.gamma(size) * math.gamma(len(places) - size + 1) / math.gamma(len(places) + 1)
            for hidden in itertools.combinations(places, size):
                found = token_losses(model, clean, list(hidden), start, block_size, **fields)
                nats += weight * float(sum(found.values()))
    return nats


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("clean_context", ["block", "causal"])
def test_the_estimate_is_unbiased_against_exact_enumeration(token_shift, clean_context):
    fields = {"token_shift": token_shift, "clean_context": clean_context}
    model, rows = block_model(3, **fields), random_rows([8, 5])
    rows[0]["labels"][4] = -100  # never masked, and always read clean
    exact = sum(exact_nelbo(model, row, 3, **fields) for row in rows) / 10
    single = torch.tensor([diffusion_nelbo(model, rows, mc_samples=1, seed=seed).nats_per_token for seed in range(80)])
    error = float(single.std()) / math.sqrt(80)
    assert abs(float(single.mean()) - exact) < 4 * error
    assert 0 < 4 * error < 0.05 * exact
    # Draws that cover every count of every block leave only the choice of places to chance.
    assert diffusion_nelbo(model, rows, mc_samples=240).nats_per_token == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_block_size_one_with_token_shift_is_the_parents_likelihood(family):
    rows = random_rows([20, 7, 13])
    rows[1]["labels"][:3] = [-100] * 3
    parent = autoregressive_nll(tiny_model(family), rows)
    for seed, draws in ((0, 1), (5, 8)):
        found = diffusion_nelbo(block_model(1, family, token_shift=True), rows, mc_samples=draws, seed=seed)
        assert found.nats_per_token == pytest.approx(parent.nats_per_token, rel=1e-6)
        assert found.standard_error == pytest.approx(parent.standard_error, rel=1e-4)
        assert (found.tokens, found.rows) == (parent.tokens, parent.rows)


def test_block_size_one_unshifted_asks_a_mask_after_clean_text():
    model, (row,) = block_model(1), random_rows([9])
    nats = 0.0
    with torch.no_grad():
        for i in range(1, 9):
            ids = torch.tensor([row["input_ids"][:i] + [MASK_ID]])
            nats -= float(model.backbone(input_ids=ids).logits[0, -1].log_softmax(-1)[row["input_ids"][i]])
    assert diffusion_nelbo(model, [row], mc_samples=1).nats_per_token == pytest.approx(nats / 8, rel=1e-5)


def test_one_block_per_row_equals_masked_diffusion():
    rows = random_rows([6, 5])
    whole = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=MASK_ID, objective="mdlm").eval()
    found = [diffusion_nelbo(model, rows, mc_samples=400, batch_size=64) for model in (whole, block_model(8))]
    assert found[0].nats_per_token == pytest.approx(found[1].nats_per_token, rel=0.02)


def test_the_estimate_depends_on_the_seed_and_on_nothing_else():
    model, rows = block_model(4), random_rows([20, 7, 13, 9])
    found = [diffusion_nelbo(model, rows, mc_samples=3, batch_size=size).nats_per_token for size in (1, 2, 5, 12)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)
    assert diffusion_nelbo(model, rows, mc_samples=3, seed=1).nats_per_token != pytest.approx(found[0], rel=1e-4)


def test_what_stands_behind_a_block_does_not_change_its_part():
    """The bound of a text is the sum over its blocks: a longer text adds to it and takes nothing away."""
    model, (row,) = block_model(4), random_rows([12])
    other = {"input_ids": row["input_ids"][:8] + [5, 6, 7, 8], "labels": row["input_ids"][:8] + [-100] * 4}
    short = {name: values[:8] for name, values in row.items()}
    first, second = (diffusion_nelbo(model, [text], mc_samples=3).nats_per_token for text in (short, other))
    assert first == pytest.approx(second, rel=1e-6)


def test_positions_are_grouped_by_the_blocks_of_their_row():
    assert blocks_of([1, 2, 5, 6, 7, 12], 4) == [[1, 2], [5, 6, 7], [12]]
    assert blocks_of([1, 2, 5], None) == [[1, 2, 5]]


def test_progress_counts_every_sequence():
    rows = random_rows([9, 4])
    for block_size in (1, 4):
        told = []
        diffusion_nelbo(block_model(block_size), rows, mc_samples=3, advance=told.append)
        assert sum(told) == 6


def test_accuracy_is_that_of_blocks_after_clean_text():
    """All of it is masked, and with blocks of one token the model answers as its parent does on the clean text."""
    model, rows = block_model(1, token_shift=True), random_rows([15])
    with torch.no_grad():
        guess = model(torch.tensor([rows[0]["input_ids"]]), attention_pattern="causal").logits[0].argmax(-1).tolist()
    rows[0]["labels"] = [-100] + [0] * 14
    right = sum(guess[i - 1] == rows[0]["input_ids"][i] for i in range(1, 15)) / 14
    assert masked_accuracy(model, rows, ratios=(1.0,))[0] == {"ratio": 1.0, "accuracy": right, "tokens": 14}
