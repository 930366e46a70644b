"""The BD3LM objective against brute force: another noise, one pass per block, masks written out edge by edge."""

import itertools
import math

import datasets
import pytest
import torch

from a2d_hf.modeling import A2DForMaskedDiffusion, AttentionPattern
from a2d_hf.trainers.block_noise import BlockRows, counted_tokens
from tests.conftest import tiny_model
from tests.trainers import bd3lm_reference
from tests.trainers.helpers import (
    MASK_ID,
    bd3lm_trainer,
    diffusion_model,
    first_batch,
    padded_left,
    token_rows,
    trainer,
)


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("clean_context", ["block", "causal"])
@pytest.mark.parametrize(
    "noise",
    [
        {"mask_sampling": "bernoulli"},
        {"mask_sampling": "bernoulli", "noise_schedule": "cosine"},
        {"mask_sampling": "bernoulli", "time_epsilon": 0.3, "time_maximum": 0.8},
        {"mask_sampling": "bernoulli", "complementary_views": True, "time_epsilon": 0.05},
        {"mask_sampling": "count"},
        {"mask_sampling": "count", "complementary_views": True},
        {"nested_views": 3},
        {"nested_views": 4},
        {"nested_views": 1, "nested_orders": 3},
        {"nested_views": 3, "nested_orders": 2},
        {"nested_views": 4, "nested_orders": 4},
    ],
    ids=lambda fields: ", ".join(f"{name} {value}" for name, value in fields.items()) or "defaults",
)
def test_loss_and_gradients_equal_brute_force(noise, clean_context, token_shift, tmp_path):
    run = bd3lm_trainer(
        tmp_path, token_shift=token_shift, clean_context=clean_context, per_device_train_batch_size=6, **noise
    )
    batch = first_batch(run)
    run.model.train()
    loss = run.compute_loss(run.model, batch)
    expected = bd3lm_reference.loss(
        run,
        batch,
        run.args.noise_schedule,
        run.args.time_epsilon,
        run.args.time_maximum,
        run.args.complementary_views,
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    parameters = list(run.model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("mask_sampling", ["bernoulli", "count"])
def test_left_padding_gives_the_same_loss(mask_sampling, tmp_path):
    run = bd3lm_trainer(tmp_path, per_device_train_batch_size=8, mask_sampling=mask_sampling)
    run.model.train()
    batch = first_batch(run)
    left = padded_left(batch)
    assert not torch.equal(left["input_ids"], batch["input_ids"])
    torch.testing.assert_close(
        run.compute_loss(run.model, left), run.compute_loss(run.model, batch), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("mask_sampling", ["bernoulli", "count"])
@pytest.mark.parametrize("token_shift", [False, True])
def test_packed_documents_see_only_themselves(token_shift, mask_sampling, tmp_path):
    """Rows of 7, 3 and 6 tokens in one sequence: blocks and noise start anew in each, and no edge crosses."""
    run = bd3lm_trainer(tmp_path, token_shift=token_shift, mask_sampling=mask_sampling)
    run.model.train()
    lengths, ids = (7, 3, 6), torch.randint(3, 110, (16,))
    labels, documents = ids.clone(), torch.cat([torch.full((n,), d) for d, n in enumerate(lengths)])
    labels[[0, 7, 10]] = -100
    batch = {"input_ids": ids[None], "labels": labels[None], "document_ids": documents[None]}
    batch |= {"attention_mask": torch.ones(1, 16, dtype=torch.long), "tail_length": torch.zeros(3, dtype=torch.long)}
    batch |= {"row_id": torch.tensor([3, 9, 4]), "epoch": torch.tensor([1, 1, 1]), "place": torch.tensor([2, 3, 4])}
    torch.testing.assert_close(
        run.compute_loss(run.model, batch), bd3lm_reference.loss(run, batch), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("token_shift", [False, True])
def test_one_block_per_row_equals_mdlm(token_shift, tmp_path):
    """Same noise, same loss, same gradients: with nothing before it, a block sees only itself."""
    rows, block = token_rows(8), {"objective": "bd3lm", "block_size": 64}
    results = []
    for make, fields, own in ((trainer, {}, {}), (bd3lm_trainer, block, {"mask_sampling": "bernoulli"})):
        model = diffusion_model(token_shift=token_shift, **fields)
        run = make(tmp_path, model, rows, per_device_train_batch_size=8, **own)
        run.model.train()
        loss = run.compute_loss(run.model, first_batch(run))
        results.append((loss, torch.autograd.grad(loss, list(run.model.parameters()))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_block_size_one_is_the_mask_query_likelihood(tmp_path):
    """Unshifted: each token is asked for by a mask token behind the clean text before it, one pass per token."""
    run = bd3lm_trainer(tmp_path, block_size=1, per_device_train_batch_size=6)
    run.model.train()
    batch = first_batch(run)
    total, items = 0.0, 0
    for b in range(6):
        ids = batch["input_ids"][b][batch["attention_mask"][b].bool()]
        for i in range(len(ids)):
            if batch["labels"][b, i] == -100:
                continue
            query = torch.cat([ids[:i], torch.tensor([MASK_ID])])[None]
            with torch.no_grad():
                total -= run.model.backbone(query).logits[0, -1].log_softmax(-1)[ids[i]].item()
            items += 1
    assert run.compute_loss(run.model, batch).item() == pytest.approx(total / items, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_block_size_one_with_token_shift_is_the_parents_likelihood(family, tmp_path):
    parent = tiny_model(family, seed=3)
    model = diffusion_model(family, seed=3, objective="bd3lm", block_size=1, token_shift=True)
    run = bd3lm_trainer(tmp_path, model, token_rows(6, longest=30), per_device_eval_batch_size=6)
    run.model.eval()
    batch = first_batch(run)
    with torch.no_grad():
        logits = parent(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        expected = torch.nn.functional.cross_entropy(logits[targets != -100], targets[targets != -100])
        loss = run.compute_loss(run.model, batch)
    assert (batch["labels"][:, 0] == -100).all()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_a_block_of_one_token_has_the_expectation_of_the_sampled_one(tmp_path):
    """m / t has the mean 1 whatever t is, so masking always, with weight 1, only removes the noise."""
    run = bd3lm_trainer(tmp_path, block_size=1)
    run.model.train()
    noise = run.draw_noise(first_batch(run), seed=0)
    assert torch.equal(noise.masked_BL, first_batch(run)["labels"] != -100)
    assert (noise.elbo_weight_BWL == 1).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"mask_sampling": "bernoulli"},
        {"mask_sampling": "bernoulli", "noise_schedule": "cosine"},
        {"mask_sampling": "bernoulli", "time_epsilon": 0.3, "time_maximum": 0.8},
        {"mask_sampling": "bernoulli", "noise_schedule": "cosine", "time_epsilon": 0.3, "time_maximum": 0.8},
        {"mask_sampling": "bernoulli", "complementary_views": True},
        {"mask_sampling": "count"},
        {"mask_sampling": "count", "complementary_views": True},
        {"nested_views": 4},
        {"nested_views": 6, "nested_orders": 6},
    ],
    ids=lambda fields: ", ".join(f"{name} {value}" for name, value in fields.items()),
)
def test_constant_cross_entropy_has_loss_one(fields, tmp_path):
    model = diffusion_model(objective="bd3lm", block_size=6)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    rows = datasets.Dataset.from_list([{"input_ids": [5] * 48}] * 1200)
    run = bd3lm_trainer(tmp_path, model, rows, block_size=6, max_length=48, per_device_train_batch_size=300, **fields)
    run.model.train()
    losses = torch.stack([run.compute_loss(run.model, batch).detach() for batch in run.get_train_dataloader()])
    assert losses.mean().item() / math.log(128) == pytest.approx(1.0, abs=0.025)


def test_nested_views_hide_one_more_token_each_when_there_are_as_many_as_tokens(tmp_path):
    """Blocks of 4 tokens that may all be hidden: 1, 2, 3, 4 of them, each view all that the one before it hid."""
    rows = datasets.Dataset.from_list([{"input_ids": list(range(5, 45))}] * 4)
    run = bd3lm_trainer(tmp_path, rows=rows, nested_views=4, per_device_train_batch_size=4)
    run.model.train()
    noise = run.draw_noise(first_batch(run), seed=2)
    blocks_BWXK = noise.masked_BWL.view(4, 4, 10, 4)
    assert torch.equal(blocks_BWXK.sum(-1), torch.arange(1, 5)[None, :, None].expand(4, 4, 10))
    assert (blocks_BWXK[:, 1:] >= blocks_BWXK[:, :-1]).all()
    assert torch.equal(noise.elbo_weight_BWL[0, :, 0], 4.0 / torch.arange(1, 5))
    first_hidden_BX = blocks_BWXK[:, 0].float().argmax(-1)
    assert len(first_hidden_BX.unique()) == 4  # no token is always the first


def test_as_many_orders_as_tokens_hide_every_token_alone_once(tmp_path):
    """Blocks of 4: one view that hides all of them, three of every order besides, and no set of tokens twice."""
    rows = datasets.Dataset.from_list([{"input_ids": list(range(5, 45))}] * 2)
    run = bd3lm_trainer(tmp_path, rows=rows, nested_views=4, nested_orders=4, per_device_train_batch_size=2)
    run.model.train()
    noise = run.draw_noise(first_batch(run), seed=2)
    assert noise.views == 13
    blocks_BWXK = noise.masked_BWL.view(2, 13, 10, 4).int()
    for sets_WK in blocks_BWXK.transpose(1, 2).flatten(0, 1):
        assert torch.equal(sets_WK[sets_WK.sum(-1) == 1].sum(0), torch.ones(4, dtype=torch.int64))
        assert len(sets_WK.unique(dim=0)) == 13
    # A view of k of the 4 counts 4 / k in the mean over 16, of which four are the one that hides all.
    hidden_W = blocks_BWXK[0, :, 0].sum(-1)
    expected_W = torch.where(hidden_W == 4, 4.0, 4.0 / hidden_W) * 13 / 16
    torch.testing.assert_close(noise.elbo_weight_BWL[0, :, 0], expected_W)


def test_one_nested_view_is_the_counted_noise(tmp_path):
    run = bd3lm_trainer(tmp_path)
    run.model.train()
    rows = BlockRows(first_batch(run), 4)
    plain, nested = counted_tokens(rows, 3), counted_tokens(rows, 3, nested_views=2)
    assert plain.masked_BWL.shape[1] == 1 and nested.masked_BWL.shape[1] == 2
    n_BL = torch.stack([(rows.block_BL == b) & rows.maskable_BL for b in range(16)]).sum(-1)
    assert n_BL.max() == 4
    # A k of the whole range lies between the two of its halves, and all of them hide the same order.
    assert (nested.masked_BWL[:, 0] <= nested.masked_BWL[:, 1]).all()
    assert (nested.masked_BWL[:, 0] <= plain.masked_BWL[:, 0]).all()
    assert (plain.masked_BWL[:, 0] <= nested.masked_BWL[:, 1]).all()


@pytest.mark.parametrize(
    "fields", [{}, {"complementary_views": True}, {"nested_views": 4}, {"nested_views": 4, "nested_orders": 4}]
)
def test_counted_tokens_have_the_nelbo_for_their_expectation_at_a_lower_variance(fields, tmp_path):
    """Over 6,000 copies of a row, of which each is a draw of its own."""
    model = diffusion_model(objective="bd3lm", block_size=4, seed=7)
    rows = datasets.Dataset.from_list([{"input_ids": [9, 5, 30, 77, 41, 18, 64]}] * 6000)
    mean, spread = {}, {}
    for sampling in ("bernoulli", "count"):
        views = {} if sampling == "bernoulli" and "nested_views" in fields else fields  # coins have no such views
        own = {"mask_sampling": sampling, **views}
        run = bd3lm_trainer(tmp_path, model, rows, block_size=4, per_device_train_batch_size=6000, **own)
        run.model.train()
        batch = first_batch(run)
        outputs, noise = (
            run.compute_loss(run.model, batch, return_outputs=True)[1],
            run.draw_noise(batch, run.args.seed),
        )
        row_X = noise.masked_BWL.nonzero()[:, 0]
        weighted_X = outputs.token_nll * noise.elbo_weight_BWL[noise.masked_BWL] / noise.views
        loss_B = torch.zeros(6000).index_add(0, row_X, weighted_X.detach()) / 7
        mean[sampling], spread[sampling] = loss_B.mean().item(), loss_B.std().item()
    error = math.hypot(*spread.values()) / math.sqrt(6000)
    assert abs(mean["count"] - mean["bernoulli"]) < 4 * error
    assert spread["count"] < 0.8 * spread["bernoulli"]


def test_nelbo_equals_exact_enumeration(tmp_path):
    """Per block of K tokens, a set of k hidden ones has the weight (k-1)! (K-k)! / K!."""
    model = A2DForMaskedDiffusion.from_causal_lm(
        tiny_model("llama", vocab_size=7), mask_token_id=6, objective="bd3lm", block_size=2
    )
    row, exact = torch.tensor([3, 5, 3, 4, 4]), 0.0
    for start in (0, 2, 4):
        size = min(2, len(row) - start)
        for k in range(1, size + 1):
            weight = math.factorial(k - 1) * math.factorial(size - k) / math.factorial(size)
            for hidden in itertools.combinations(range(start, start + size), k):
                seen = row[: start + size].clone()
                seen[list(hidden)] = 6
                with torch.no_grad():
                    pattern = AttentionPattern.block_causal(2)
                    log_p = model(input_ids=seen[None], attention_pattern=pattern).logits[0].log_softmax(-1)
                exact -= weight * sum(log_p[i, row[i]].item() for i in hidden)
    rows = datasets.Dataset.from_list([{"input_ids": row.tolist()}] * 12_000)
    run = bd3lm_trainer(tmp_path, model, rows, eval_dataset=rows, per_device_eval_batch_size=4000)
    assert run.evaluate()["eval_nelbo"] * len(row) == pytest.approx(exact, rel=0.02)


def test_a_noisy_block_learns_nothing_of_its_own_clean_text(tmp_path):
    """Other clean text in block b: no score of the blocks up to b moves, every later block's does."""
    model = diffusion_model(objective="bd3lm", block_size=4)
    noisy, clean = torch.full((1, 12), MASK_ID), torch.randint(3, 110, (1, 12))
    other = clean.clone()
    other[0, 4:8] = (clean[0, 4:8] + 7) % 100 + 3
    pattern = AttentionPattern.bd3lm(4)
    with torch.no_grad():
        first, second = (
            model(input_ids=torch.cat([noisy, x], dim=1), attention_pattern=pattern).logits[0, :12]
            for x in (clean, other)
        )
    moved = (first - second).abs().amax(-1) > 1e-6
    assert moved.tolist() == [False] * 8 + [True] * 4


@pytest.mark.parametrize("mask_sampling", ["bernoulli", "count"])
def test_a_rows_noise_does_not_depend_on_its_batch(mask_sampling, tmp_path):
    run = bd3lm_trainer(tmp_path, per_device_train_batch_size=8, mask_sampling=mask_sampling)
    run.model.train()
    batch = first_batch(run)
    together = run.draw_noise(batch, seed=5)
    for b in range(8):
        alone = run.draw_noise({name: tensor[b : b + 1] for name, tensor in batch.items()}, seed=5)
        assert torch.equal(alone.masked_BWL[0], together.masked_BWL[b])
        assert torch.equal(alone.time_BWL[0], together.time_BWL[b])


def test_blocks_of_a_row_have_stratified_times(tmp_path):
    """Of 40 blocks of one row, every quarter of (0, 1) gets its ten, give or take one."""
    rows = datasets.Dataset.from_list([{"input_ids": [5] * 120}])
    run = bd3lm_trainer(tmp_path, rows=rows, block_size=3, max_length=120)
    run.model.train()
    time_L = run.draw_noise(first_batch(run), seed=1).time_BWL[0, 0]
    assert (time_L.view(40, 3) == time_L.view(40, 3)[:, :1]).all()
    assert all(9 <= count <= 11 for count in torch.histc(time_L[::3], bins=4, min=0, max=1).tolist())


def test_only_masked_rows_pass_the_head(tmp_path):
    run = bd3lm_trainer(tmp_path, per_device_train_batch_size=8)
    run.model.train()
    batch = first_batch(run)
    run.compute_loss(run.model, batch)
    outputs = run.compute_loss(run.model, batch, return_outputs=True)[1]
    assert outputs.logits is None
    assert outputs.token_nll.shape[0] == int(run.draw_noise(batch, run.noise_seed).masked_BWL.sum())
