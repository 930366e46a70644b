"""Replay: past rows come back in another step, with noise of their own and a loss that has a gradient."""

from types import SimpleNamespace

import pytest
import torch

from a2d_hf.trainers import RepAlignConfig, RepAlignTrainer
from tests.trainers import bd3lm_reference, reference_noise
from tests.trainers.helpers import bd3lm_trainer, diffusion_model, token_rows, trainer, weights
from tests.trainers.test_mdlm_loss import brute_force


REPLAYED_ROWS, REPLAY_NOISE = 8, 9
SGD = {"optim": "sgd", "learning_rate": 1e-2, "logging_steps": 1}


def batches_of(run, epochs):
    """Every batch of some epochs, as training reads them."""
    loader = run.get_train_dataloader()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        yield from loader


def real_ids(batch):
    return [ids[real.bool()].tolist() for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("size", [3, 100])
def test_what_comes_back_is_drawn_from_the_last_rows_of_steps_before(size, tmp_path):
    """12 rows, 4 to a step: three steps an epoch; the reference keeps a real list of what was seen."""
    run = trainer(
        tmp_path, rows=token_rows(12), replay_weight=1.0, replay_buffer_size=size, per_device_train_batch_size=4
    )
    seen, drawn = [], set()
    for step, batch in enumerate(batches_of(run, 3)):
        epoch, replay = step // 3, batch["replay"]
        for b, ids in enumerate(real_ids(replay)):
            place = int(batch["place"][b])
            assert (int(replay["epoch"][b]), int(replay["place"][b])) == (epoch, place)
            if not seen:
                assert int(replay["row_id"][b]) == -1 and (replay["labels"][b] == -100).all()
                continue
            buffer = seen[-size:]
            back = 1 + reference_noise.bits(REPLAYED_ROWS, run.args.seed, epoch, place) % len(buffer)
            assert ids == buffer[-back]
            assert int(replay["row_id"][b]) == reference_noise.bits(REPLAY_NOISE, run.args.seed, epoch, place, 0)
            drawn.add(back)
        seen += real_ids(batch)
    assert len(drawn) >= min(size, 10)


@pytest.mark.parametrize("method", ["mdlm", "bd3lm"])
def test_loss_and_gradients_equal_brute_force(method, tmp_path):
    make = trainer if method == "mdlm" else bd3lm_trainer
    run = make(tmp_path, replay_weight=0.7, per_device_train_batch_size=6)
    run.model.train()
    _, batch = [batch for _, batch in zip(range(2), batches_of(run, 1), strict=False)]
    loss = run.compute_loss(run.model, batch)
    again = SimpleNamespace(
        model=run.model,
        args=SimpleNamespace(**(vars(run.args) | {"seed": reference_noise.bits(REPLAY_NOISE, run.args.seed)})),
        diffusion_config=run.diffusion_config,
    )
    reference = brute_force if method == "mdlm" else bd3lm_reference.loss
    new, past = reference(run, batch), reference(again, batch["replay"])
    assert past > 0
    torch.testing.assert_close(loss, new + 0.7 * past, rtol=1e-4, atol=1e-5)
    parameters = list(run.model.parameters())
    ours = torch.autograd.grad(loss, parameters)
    alone = torch.autograd.grad(new, parameters, retain_graph=True)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, alone, strict=True)) > 1e-3
    for a, b in zip(ours, torch.autograd.grad(new + 0.7 * past, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_a_row_that_comes_back_twice_is_masked_differently(tmp_path):
    run = trainer(
        tmp_path,
        rows=token_rows(8, longest=60),
        replay_weight=1.0,
        replay_buffer_size=1,
        per_device_train_batch_size=4,
    )
    _, batch = batches_of(run, 1)
    ids = real_ids(batch["replay"])
    assert all(row == ids[0] for row in ids)  # one row, four times
    assert batch["replay"]["row_id"].unique().numel() == 4
    masked_BL = run.draw_noise(batch["replay"], 0).masked_BL
    assert all(not torch.equal(masked_BL[0], masked_BL[b]) for b in range(1, 4))


def test_it_moves_nothing_else(tmp_path):
    """Off, no batch has it; on, the new rows and their noise are what they were."""
    without, on = trainer(tmp_path), trainer(tmp_path, replay_weight=1.0)
    for plain, batch in zip(batches_of(without, 2), batches_of(on, 2), strict=True):
        assert "replay" not in plain
        assert all(torch.equal(plain[name], batch[name]) for name in plain)
        assert torch.equal(without.draw_noise(plain, 1).masked_BL, on.draw_noise(batch, 1).masked_BL)


@pytest.mark.parametrize("method", ["mdlm", "bd3lm", "packed"])
def test_accumulation_changes_nothing(method, tmp_path):
    make, fields = (bd3lm_trainer if method == "bd3lm" else trainer), {}
    if method == "packed":
        fields = {"packing": True, "max_length": 24, "max_eos_tail": 4}
    ended = []
    for size, accumulation in ((4, 1), (1, 4)):
        run = make(
            tmp_path, rows=token_rows(20), max_steps=5, replay_weight=0.5, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, **SGD, **fields,
        )  # fmt: skip
        run.train()
        ended.append((weights(run.model), [entry.get("replay_loss") for entry in run.state.log_history[:-1]]))
    assert ended[0][1][0] is None and min(ended[0][1][1:]) > 1
    assert ended[0][1][1:] == pytest.approx(ended[1][1][1:], rel=1e-4)
    for name, tensor in ended[0][0].items():
        torch.testing.assert_close(tensor, ended[1][0][name], rtol=1e-4, atol=1e-6, msg=name)


def test_packed_rows_come_back_as_packs(tmp_path):
    run = trainer(tmp_path, rows=token_rows(30), replay_weight=1.0, packing=True, max_length=24, max_eos_tail=4,
                  per_device_train_batch_size=2)  # fmt: skip
    seen = []
    for batch in batches_of(run, 2):
        replay = batch["replay"]
        assert replay["row_id"].unique().numel() == replay["row_id"].numel() or not seen
        if seen:
            assert set(map(tuple, real_ids(replay))) <= {tuple(ids) for pack in seen for ids in pack}
            assert replay["row_id"].numel() == int(replay["document_ids"].max()) + 1 > 2
        seen.append(real_ids(batch))
    assert len(seen) > 6


def test_an_alignment_is_of_the_new_rows_only(tmp_path):
    """The loss of RepAlign grows by MDLM's loss of the past rows, and by nothing else."""
    losses = {}
    for weight in (0.0, 0.5):
        args = RepAlignConfig(
            output_dir=str(tmp_path / "run"), report_to="none", disable_tqdm=True, save_strategy="no", max_length=64,
            use_cpu=True, replay_weight=weight, per_device_train_batch_size=4, max_steps=2, **SGD,
        )  # fmt: skip
        run = RepAlignTrainer(diffusion_model(), args, train_dataset=token_rows(16))
        run.train()
        losses[weight] = run.state.log_history
    before, after = losses[0.0], losses[0.5]
    assert before[0]["loss"] == after[0]["loss"]  # nothing to replay yet
    assert after[1]["align_loss"] == pytest.approx(before[1]["align_loss"], rel=1e-5)
    assert after[1]["loss"] == pytest.approx(before[1]["loss"] + 0.5 * after[1]["replay_loss"], rel=1e-4)


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`replay_weight` needs a `train_dataset` with a length"):
        trainer(tmp_path, rows=token_rows(8).to_iterable_dataset(), max_steps=1, replay_weight=0.1)


@pytest.mark.parametrize("wrong", [{"replay_weight": -1.0}, {"replay_buffer_size": 0}])
def test_senseless_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        trainer(tmp_path, **wrong)
