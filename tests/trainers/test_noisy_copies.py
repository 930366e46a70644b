"""Noisy copies that leave out blocks without a target: the same loss as with them, from fewer tokens."""

import datasets
import pytest
import torch

from a2d_hf.modeling import AttentionPattern
from a2d_hf.modeling.token_layout import TokenLayout
from a2d_hf.trainers.block_noise import BlockRows
from a2d_hf.trainers.noisy_copies import NoisyCopies
from tests.trainers import bd3lm_reference
from tests.trainers.helpers import bd3lm_trainer, diffusion_model, first_batch, padded_left


def conversations() -> datasets.Dataset:
    """Rows with targets in some blocks of 4 only: behind a prompt, in two turns, in one token, in all, in none."""
    targets = [range(9, 22), [*range(4, 7), *range(17, 20)], [13], range(18), []]
    rows = []
    for number, wanted in enumerate(targets):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 110, (22 - number,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [t if i in wanted else -100 for i, t in enumerate(ids)]})
    return datasets.Dataset.from_list(rows)


def batch_of(run, rows) -> dict[str, torch.Tensor]:
    return run.data_collator([{**row, "row_id": 7 + i, "epoch": 1, "place": i} for i, row in enumerate(rows)])


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("clean_context", ["block", "causal"])
@pytest.mark.parametrize("noise", [{"mask_sampling": "bernoulli"}, {"nested_views": 4, "nested_orders": 4}])
def test_loss_and_gradients_equal_brute_force(noise, clean_context, token_shift, tmp_path):
    run = bd3lm_trainer(tmp_path, rows=conversations(), token_shift=token_shift, clean_context=clean_context, **noise)
    batch = batch_of(run, [row for i, row in enumerate(conversations()) if i != 3])
    run.model.train()
    kept = run.draw_noise(batch, run.args.seed).kept
    assert kept.kept_BM.tolist()[:2] == [[*range(8, 22)], [*range(4, 8), *range(16, 20), 0, 1, 2, 3, 8, 9]]
    assert kept.real_BM.sum(-1).tolist() == [14, 8, 4, 0]
    read = run.doubled_input(batch, run.draw_noise(batch, 0))["attention_mask"][:, :14]
    assert torch.equal(read.bool(), kept.real_BM)
    loss, expected = run.compute_loss(run.model, batch), bd3lm_reference.loss(run, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    parameters = list(run.model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "opt", "gemma3_text"])
def test_every_family_finds_the_same_loss_as_with_whole_copies(family, tmp_path, monkeypatch):
    """Rotary, learned and offset positions, sliding windows; left padding and packed documents, all parts of it."""
    model = diffusion_model(family, objective="bd3lm", block_size=4, clean_context="causal", token_shift=True)
    fields = {"nested_views": 3, "ar_loss_weight": 0.5, "teacher_targets": True}
    run = bd3lm_trainer(tmp_path, model, conversations(), **fields)
    run.model.train()
    run.model.backbone.eval()  # no dropout
    padded = batch_of(run, conversations().select([0, 1, 2]))
    left = padded_left(padded)
    documents = [{**row, "row_id": 3 + i, "epoch": 0, "place": i} for i, row in enumerate(conversations())]
    packed = run.data_collator([{"documents": documents[:3]}, {"documents": documents[4:]}])
    losses = [run.compute_loss(run.model, batch) for batch in (padded, left, packed)]
    lengths = [run.draw_noise(batch, 0).kept.length for batch in (padded, left, packed)]
    assert lengths == [14, 14, 26]
    monkeypatch.setattr(NoisyCopies, "of", classmethod(lambda cls, rows: None))
    for loss, batch in zip(losses, (padded, left, packed), strict=True):
        torch.testing.assert_close(loss, run.compute_loss(run.model, batch), rtol=1e-5, atol=1e-6)


def test_the_model_reads_no_more_than_the_blocks_with_targets(tmp_path):
    run = bd3lm_trainer(tmp_path, rows=conversations(), nested_views=2)
    run.model.train()
    batch = batch_of(run, conversations().select([1, 2]))
    doubled = run.doubled_input(batch, run.draw_noise(batch, 0))
    assert doubled["input_ids"].shape == (2, 2 * 8 + 21)
    assert doubled["position_ids"][0].tolist() == 2 * [*range(4, 8), *range(16, 20)] + [*range(21)]
    run.model.eval()  # compute_metrics wants the logits of every position
    assert run.doubled_input(batch, run.draw_noise(batch, 0))["input_ids"].shape == (2, 2 * 21)


def test_padding_is_no_part_of_the_block_before_it(tmp_path):
    run = bd3lm_trainer(tmp_path, rows=conversations())
    short = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [5, 6, 7, 8, 9, 10]}
    batch = batch_of(run, [short, conversations()[2]])
    kept = NoisyCopies.of(BlockRows(batch, 4))
    assert kept.length == 6 and kept.real_BM.sum(-1).tolist() == [6, 4]
    left = padded_left(batch)
    assert torch.equal(NoisyCopies.of(BlockRows(left, 4)).real_BM, kept.real_BM)


def test_rows_with_a_target_in_every_block_are_read_whole(tmp_path):
    run = bd3lm_trainer(tmp_path, rows=conversations(), per_device_train_batch_size=5)
    run.model.train()
    batch = first_batch(run)
    whole = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    assert run.draw_noise(whole, 0).kept is None
    assert "position_ids" not in run.doubled_input(whole, run.draw_noise(whole, 0))


def test_a_batch_without_any_target_keeps_one_block_that_nothing_sees(tmp_path):
    run = bd3lm_trainer(tmp_path, rows=conversations())
    batch = batch_of(run, conversations().select([4]))
    kept = NoisyCopies.of(BlockRows(batch, 4))
    assert kept.length == 4 and not kept.real_BM.any()
    run.model.train()
    assert run.compute_loss(run.model, batch).item() == 0.0


def test_what_is_left_out_cannot_change_the_loss_but_through_the_clean_copy(tmp_path):
    """Sabotage: a noisy block that saw the wrong clean text would have another loss."""
    run = bd3lm_trainer(tmp_path, rows=conversations())
    run.model.train()
    batch = batch_of(run, conversations().select([1]))
    behind, before = {**batch}, {**batch}
    behind["input_ids"] = batch["input_ids"].clone()
    behind["input_ids"][0, 20] = 77  # behind the last target's block
    before["input_ids"] = batch["input_ids"].clone()
    before["input_ids"][0, 2] = 77  # before the first target
    loss = run.compute_loss(run.model, batch).item()
    assert run.compute_loss(run.model, behind).item() == pytest.approx(loss, rel=1e-6)
    assert run.compute_loss(run.model, before).item() != pytest.approx(loss, rel=1e-4)


def test_a_pattern_of_short_copies_says_what_it_needs():
    pattern = AttentionPattern.bd3lm(4, views=2, noisy_length=4)
    with pytest.raises(ValueError, match="needs `position_ids`"):
        TokenLayout.of(pattern, (1, 16), torch.device("cpu"))
    with pytest.raises(ValueError, match="2 noisy view.s. of 4 tokens leave nothing of an input of 8"):
        TokenLayout.of(pattern, (1, 8), torch.device("cpu"), position_ids=torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="`noisy_length` must be at least 1"):
        AttentionPattern.bd3lm(4, noisy_length=0)
