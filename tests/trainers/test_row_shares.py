"""Rows that are trained in several steps: nothing is trained twice, nothing left out, nothing asked otherwise."""

import datasets
import pytest
import torch

from a2d_hf.trainers import BD3LMConfig
from a2d_hf.trainers.row_shares import dataset_in_shares, in_shares
from tests.conftest import tiny_tokenizer
from tests.trainers.helpers import (
    assert_refuses_to_resume,
    assert_resumes,
    bd3lm_trainer,
    first_batch,
    token_rows,
    weights,
)


@pytest.mark.parametrize("shares", [1, 2, 3, 7])
def test_every_target_is_in_exactly_one_share_and_the_text_before_it_is_there(shares):
    for row in token_rows(20, longest=40):
        found = in_shares({**row, "row_id": 5}, shares, 4)
        for i, label in enumerate(row["labels"]):
            asked = [share["labels"][i] for share in found if i < len(share["labels"]) and share["labels"][i] != -100]
            assert asked == ([] if label == -100 else [label])
        for share in found:
            length = len(share["input_ids"])
            assert share["input_ids"] == row["input_ids"][:length] and share["row_id"] == 5
            assert len(share["labels"]) == length and (length % 4 == 0 or length == len(row["input_ids"]))
            assert any(label != -100 for label in share["labels"])


def test_shares_have_as_many_blocks_with_targets_as_each_other():
    row = {"input_ids": list(range(64)), "labels": [-100] * 24 + list(range(24, 64))}  # ten blocks with a target
    found = in_shares(row, 4, 4)
    blocks = [len({i // 4 for i, label in enumerate(share["labels"]) if label != -100}) for share in found]
    assert sorted(blocks) == [2, 2, 3, 3] and len(found[-1]["input_ids"]) == 64


def test_a_row_with_fewer_blocks_than_shares_has_fewer_shares_and_one_without_targets_stays():
    assert len(in_shares({"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}, 4, 4)) == 2
    prompt = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    assert in_shares(prompt, 4, 4) == [prompt]


def test_a_stream_is_cut_as_a_dataset_is():
    rows = token_rows(9, longest=30)
    stream = dataset_in_shares(rows.to_iterable_dataset(), 3, 4)
    assert list(stream) == list(dataset_in_shares(rows, 3, 4))


@pytest.mark.parametrize("token_shift", [False, True])
def test_the_losses_of_the_shares_add_up_to_that_of_the_row(token_shift, tmp_path):
    """All views of all orders leave nothing to the time of a block, so that the same tokens are hidden either way."""
    fields = {"nested_views": 4, "nested_orders": 4, "ar_loss_weight": 0.3, "teacher_targets": True}
    run = bd3lm_trainer(tmp_path, token_shift=token_shift, clean_context="causal", **fields)
    run.model.train()
    one = torch.tensor(1.0)
    for number, row in enumerate(token_rows(4, longest=40, seed=3)):
        row["labels"][0] = -100  # nothing stands before it
        shares = in_shares({**row, "row_id": number, "epoch": 2, "place": 6}, 3, 4)
        whole = run.data_collator([{**row, "row_id": number, "epoch": 2, "place": 6}])
        expected = run.compute_loss(run.model, whole, num_items_in_batch=one)
        found = [run.compute_loss(run.model, run.data_collator([share]), num_items_in_batch=one) for share in shares]
        assert len(found) > 1
        torch.testing.assert_close(sum(found), expected, rtol=1e-5, atol=1e-5)


def test_a_trainer_trains_and_counts_shares_and_evaluates_whole_rows(tmp_path):
    rows = token_rows(8, longest=40)
    run = bd3lm_trainer(tmp_path, rows=rows, eval_dataset=rows, steps_per_row=3, num_train_epochs=1)
    assert len(run.train_dataset) == sum(len(in_shares(row, 3, 4)) for row in rows) > 8
    assert len(run.eval_dataset) == 8
    before = weights(run.model)
    run.train()
    assert run.state.global_step == -(-len(run.train_dataset) // 8)
    assert all(not torch.equal(before[name], tensor) for name, tensor in weights(run.model).items())


def test_only_the_last_share_of_a_row_is_filled_up_with_eos(tmp_path):
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13, 2]}])
    run = bd3lm_trainer(
        tmp_path, rows=rows, steps_per_row=3, processing_class=tiny_tokenizer(), per_device_train_batch_size=3
    )
    batch = first_batch(run)
    lengths = batch["attention_mask"].sum(-1)
    assert sorted(zip(lengths.tolist(), batch["tail_length"].tolist(), strict=True)) == [(4, 0), (8, 0), (12, 2)]


def test_a_resumed_run_equals_an_unbroken_one_and_knows_its_shares(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "steps_per_row": 2}
    assert_resumes(lambda: bd3lm_trainer(tmp_path, **fields), tmp_path)
    other = bd3lm_trainer(tmp_path, **fields | {"steps_per_row": 3})
    assert_refuses_to_resume(other, tmp_path, "steps_per_row 3 .was 2.")


def test_bad_values_are_named(tmp_path):
    with pytest.raises(ValueError, match="`steps_per_row` must be at least 1, not 0"):
        BD3LMConfig(output_dir=str(tmp_path), use_cpu=True, steps_per_row=0)
    with pytest.raises(ValueError, match="`steps_per_row` cuts them"):
        BD3LMConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            steps_per_row=2,
            teacher_kl_weight=1.0,
            teacher_logits_cache=str(tmp_path),
        )
    with pytest.raises(TypeError, match="`steps_per_row` cuts the rows of a `datasets.Dataset`"):
        bd3lm_trainer(
            tmp_path,
            rows=[{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "row_id": 0}],
            steps_per_row=2,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
