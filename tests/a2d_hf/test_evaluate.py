"""The NELBO estimates against exact enumeration, and everything that must not change it."""

import itertools
import math
import types

import pytest
import torch

from a2d_hf.errors import BadInput
from a2d_hf.evaluate import (
    autoregressive_nll,
    diffusion_nelbo,
    estimate,
    masked_accuracy,
    scored_positions,
    stratified_count,
    usable_rows,
)
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from tests.conftest import tiny_model, tiny_tokenizer
from tests.trainers import bd3lm_reference
from tests.trainers.helpers import diffusion_model


@pytest.fixture(scope="module")
def model():
    return A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), tiny_tokenizer(), objective="mdlm").eval()


def random_rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(4, 100, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows


@torch.no_grad()
def exact_nelbo(model, row):
    """Brute force: sum over all subsets S of the scored positions, each with its probability in the integral over t.

    NELBO = integral over t of (1/t) sum_S t^|S| (1-t)^(N-|S|) CE(S) dt = sum_S B(|S|, N-|S|+1) CE(S), B the beta
    function.
    """
    positions = scored_positions(row)
    total = len(positions)
    nats = 0.0
    for size in range(1, total + 1):
        weight = math.gamma(size) * math.gamma(total - size + 1) / math.gamma(total + 1)
        for subset in itertools.combinations(positions, size):
            ids = torch.tensor([row["input_ids"]])
            target = ids[0, list(subset)].clone()
            ids[0, list(subset)] = model.config.mask_token_id
            logits = model(input_ids=ids).logits[0, list(subset)].double()
            nats += weight * float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    return nats


def test_the_estimate_is_unbiased_against_exact_enumeration(model):
    rows = random_rows([6, 5])
    exact = sum(exact_nelbo(model, row) for row in rows) / 9  # 5 + 4 scored tokens
    draws = 600
    found = diffusion_nelbo(model, rows, mc_samples=draws, batch_size=64)
    # The spread of single draws around the exact value bounds the error of their mean.
    single = [
        diffusion_nelbo(model, rows, mc_samples=1, batch_size=64, seed=seed).nats_per_token for seed in range(60)
    ]
    error = torch.tensor(single).std().item() / math.sqrt(draws)
    assert abs(found.nats_per_token - exact) < 4 * error
    assert 0 < 4 * error < 0.2 * exact


@torch.no_grad()
@pytest.mark.parametrize("clean_context", ["block", "causal"])
@pytest.mark.parametrize("token_shift", [False, True])
def test_small_blocks_are_gone_through_mask_by_mask(token_shift, clean_context):
    """With 7 passes a block of 3 is exact: by brute force, one pass of the parent per block and set of masks."""
    fields = {"objective": "bd3lm", "block_size": 3, "token_shift": token_shift, "clean_context": clean_context}
    model, rows = diffusion_model(**fields).eval(), random_rows([11, 7])
    rows[0]["labels"][4] = -100
    total, told = 0.0, []
    for row in rows:
        ids, scored = torch.tensor(row["input_ids"]), scored_positions(row)
        for start in range(0, len(ids), 3):
            places = [place for place in scored if start <= place < start + 3]
            for count in range(1, len(places) + 1):
                for masked in itertools.combinations(places, count):
                    found = bd3lm_reference.token_losses(model, ids, masked, start, 3, clean_context, token_shift)
                    total += float(sum(found.values())) / count / math.comb(len(places), count)
    exact = diffusion_nelbo(model, rows, mc_samples=7, batch_size=4, advance=told.append)
    assert exact.nats_per_token == pytest.approx(total / exact.tokens, rel=1e-5)
    assert exact == diffusion_nelbo(model, rows, mc_samples=7, batch_size=4, seed=1)  # nothing is drawn
    assert sum(told) == 7 * 2
    assert diffusion_nelbo(model, rows, mc_samples=6) != diffusion_nelbo(model, rows, mc_samples=6, seed=1)


def test_the_estimate_does_not_depend_on_the_batch_size(model):
    rows = random_rows([20, 7, 13, 9])
    found = [diffusion_nelbo(model, rows, mc_samples=3, batch_size=size).nats_per_token for size in (1, 2, 5, 12)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)


def test_a_large_vocabulary_makes_batches_smaller(model, monkeypatch):
    rows = random_rows([20, 7, 13, 9])
    whole = diffusion_nelbo(model, rows, mc_samples=2, batch_size=8), autoregressive_nll(tiny_model("llama"), rows)
    monkeypatch.setattr("a2d_hf.evaluate.LOGITS_AT_ONCE", 20 * 128 * 3)
    sizes = []
    sequences = diffusion_nelbo(model, rows, mc_samples=2, batch_size=8, advance=sizes.append)
    assert max(sizes) == 3 and sum(sizes) == 8
    assert sequences.nats_per_token == pytest.approx(whole[0].nats_per_token, rel=1e-6)
    assert autoregressive_nll(tiny_model("llama"), rows).nats_per_token == pytest.approx(
        whole[1].nats_per_token, rel=1e-6
    )


def test_the_same_seed_gives_the_same_number_and_another_seed_another(model):
    rows = random_rows([20, 7])
    first, again, other = (diffusion_nelbo(model, rows, mc_samples=2, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.nats_per_token != other.nats_per_token


def test_global_random_state_is_neither_read_nor_moved(model):
    rows = random_rows([20, 7])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = diffusion_nelbo(model, rows, mc_samples=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert diffusion_nelbo(model, rows, mc_samples=2) == first


def test_more_masks_mean_less_noise(model):
    rows = random_rows([24])

    def spread(draws):
        found = [
            diffusion_nelbo(model, rows, mc_samples=draws, seed=s, batch_size=64).nats_per_token for s in range(24)
        ]
        return torch.tensor(found).std().item()

    # Independent draws would halve it; strata do better.
    assert spread(16) < 0.5 * spread(4)


def test_strata_cover_every_count_once():
    counts = [stratified_count(seed=0, row=3, draw=draw, draws=10, total=10) for draw in range(10)]
    assert counts == list(range(1, 11))
    for draw in range(4):
        assert 5 * draw < stratified_count(0, 1, draw, 4, 20) <= 5 * (draw + 1)


def test_the_first_position_is_never_scored_and_unlabelled_ones_stay_visible(model):
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, -100, 7, 8, -100]}
    assert scored_positions(row) == [2, 3]
    seen = []
    forward = model.forward

    def watch(**kwargs):
        seen.append(kwargs["input_ids"].clone())
        return forward(**kwargs)

    model.forward = watch
    try:
        diffusion_nelbo(model, [row], mc_samples=8)
        masked_accuracy(model, [row])
    finally:
        del model.forward
    for ids in seen:
        assert (ids[:, [0, 1, 4]] == torch.tensor([5, 6, 9])).all()


def test_standard_error_is_that_of_a_ratio_of_means():
    totals, counts = [3.0, 8.0, 4.0, 9.0], [2, 4, 2, 4]
    found = estimate(totals, counts)
    mean = sum(totals) / sum(counts)
    residuals = torch.tensor([t - mean * c for t, c in zip(totals, counts, strict=True)])
    expected = residuals.pow(2).sum().div(3).mul(4).sqrt() / sum(counts)
    assert found.nats_per_token == pytest.approx(mean)
    assert found.standard_error == pytest.approx(float(expected))
    assert estimate([3.0], [2]).standard_error is None


def test_standard_error_shrinks_with_the_square_root_of_the_rows(model):
    few = diffusion_nelbo(model, random_rows([12] * 25, seed=1), mc_samples=1, batch_size=64)
    many = diffusion_nelbo(model, random_rows([12] * 400, seed=2), mc_samples=1, batch_size=64)
    assert few.standard_error / many.standard_error == pytest.approx(4.0, rel=0.35)


@torch.no_grad()
def test_parent_nll_against_a_plain_loop():
    parent = tiny_model("llama")
    rows = random_rows([9, 4, 6])
    rows[1]["labels"][2] = -100
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        log_probs = parent(input_ids=ids).logits[0].double().log_softmax(-1)
        for position in range(1, ids.shape[1]):
            if row["labels"][position] != -100:
                total -= float(log_probs[position - 1, ids[0, position]])
                count += 1
    for batch_size in (1, 3):
        found = autoregressive_nll(parent, rows, batch_size=batch_size)
        assert found.nats_per_token == pytest.approx(total / count, rel=1e-5)
        assert found.tokens == count == 15


def test_both_sides_score_the_same_tokens(model):
    rows = usable_rows(random_rows([9, 4, 6]))
    assert diffusion_nelbo(model, rows).tokens == autoregressive_nll(tiny_model("llama"), rows).tokens


def test_masked_accuracy_masks_the_share_it_says(model):
    rows = random_rows([11, 21])
    table = masked_accuracy(model, rows, ratios=(0.1, 0.5, 1.0))
    assert [row["tokens"] for row in table] == [1 + 2, 5 + 10, 10 + 20]


class EvenPredictor:
    """Predicts every even token exactly, at a cost of 1 nat, and misses every odd one, at a cost of 3."""

    training = False
    device = torch.device("cpu")
    config = types.SimpleNamespace(mask_token_id=0, vocab_size=100, objective="mdlm")

    def eval(self):
        return self

    def train(self, mode):
        return self

    def __call__(self, input_ids, attention_mask, labels):
        wanted = labels[labels != -100]
        assert (input_ids[labels != -100] == 0).all()
        even = wanted % 2 == 0
        return types.SimpleNamespace(token_hit=even, token_nll=torch.where(even, 1.0, 3.0))


def test_hits_and_nats_are_those_of_the_masked_tokens():
    rows = [{"input_ids": [2] * 9, "labels": [2] * 9}, {"input_ids": [3] * 5, "labels": [3] * 5}]
    # 8 even and 4 odd scored tokens: at a ratio of a half 4 of 6 masked ones are even.
    assert masked_accuracy(EvenPredictor(), rows, ratios=(0.5,), batch_size=1)[0]["accuracy"] == pytest.approx(4 / 6)
    # A cost that does not depend on what is masked makes the bound exact: (8 * 1 + 4 * 3) / 12.
    assert diffusion_nelbo(EvenPredictor(), rows, mc_samples=3).nats_per_token == pytest.approx(20 / 12)


def test_usable_rows_stops_at_the_token_budget_and_needs_something():
    rows = [{"input_ids": [5], "labels": [5]}, *random_rows([5, 5, 5])]
    assert len(usable_rows(rows, max_tokens=8)) == 2
    assert len(usable_rows(rows, max_tokens=1)) == 1
    with pytest.raises(BadInput, match="no row with two tokens"):
        usable_rows(rows[:1])


def test_evaluation_leaves_the_mode_as_it_was(model):
    model.train()
    diffusion_nelbo(model, random_rows([5]), mc_samples=1)
    assert model.training
    model.eval()
    diffusion_nelbo(model, random_rows([5]), mc_samples=1)
    assert not model.training
