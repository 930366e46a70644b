"""Features that were built apart, in force together: each pair against one of them switched off, or brute force."""

import pytest
import torch

from a2d_hf.modeling.last_layer import LastLayer, RowsRead
from tests.trainers.helpers import bd3lm_trainer, diffusion_model, token_rows, trainer
from tests.trainers.test_replay import batches_of


@pytest.fixture
def entered(monkeypatch):
    """How often a pass was allowed to leave rows of the last layer out; the test may set `[1]` to forbid it."""
    state, own = [0, True], LastLayer.rows_read

    def rows_read(self, *args) -> RowsRead | None:
        found = own(self, *args) if state[1] else None
        state[0] += found is not None
        return found

    monkeypatch.setattr(LastLayer, "rows_read", rows_read)
    return state


def loss_and_gradients(run, batch):
    run.model.train()
    loss = run.compute_loss(run.model, batch)
    return loss, torch.autograd.grad(loss, [weight for weight in run.model.parameters() if weight.requires_grad])


def assert_the_same_without_leaving_out(run, batch, entered, passes):
    loss, gradients = loss_and_gradients(run, batch)
    assert entered[0] == passes
    entered[1] = False
    whole, expected = loss_and_gradients(run, batch)
    assert entered[0] == passes
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_expert_counts_are_of_every_token_of_the_last_layer_too(entered, tmp_path):
    """The counters stand inside the last layer, so it is computed whole: zeros would be counted as choices."""
    run = trainer(tmp_path, diffusion_model("mixtral"), token_rows(8, longest=30), per_device_train_batch_size=8)
    (batch,) = batches_of(run, 1)
    loss_and_gradients(run, batch)
    tokens = [int(sums[-1]) for sums in run.auxiliary.moe._sums.values()]
    assert len(tokens) == 2 and set(tokens) == {int(batch["attention_mask"].sum())}
    assert entered[0] == 0


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("make", [trainer, bd3lm_trainer], ids=["mdlm", "bd3lm"])
def test_packed_and_shifted_rows_lose_nothing_in_the_last_layer(make, token_shift, entered, tmp_path):
    fields = {"token_shift": token_shift} if make is bd3lm_trainer else {}
    model = None if make is bd3lm_trainer else diffusion_model(token_shift=token_shift)
    run = make(
        tmp_path, model, token_rows(24), packing=True, max_length=32, per_device_train_batch_size=4,
        **({"max_eos_tail": 0} if make is trainer else {}), **fields,
    )  # fmt: skip
    batch = next(batches_of(run, 1))
    assert int(batch["document_ids"].max()) > 3
    assert_the_same_without_leaving_out(run, batch, entered, 1)


@pytest.mark.parametrize("token_shift", [False, True])
def test_the_parents_own_loss_reads_the_clean_copy_of_the_last_layer(token_shift, entered, tmp_path):
    """Half of a row are prompts, so that some of the clean copy is still left out."""
    run = bd3lm_trainer(
        tmp_path, rows=token_rows(8, longest=30), token_shift=token_shift, clean_context="causal", ar_loss_weight=0.5,
        per_device_train_batch_size=8, mask_sampling="bernoulli", time_maximum=0.5,
    )  # fmt: skip
    (batch,) = batches_of(run, 1)
    assert_the_same_without_leaving_out(run, batch, entered, 1)
    with_ar, _ = loss_and_gradients(run, batch)
    run.args.ar_loss_weight = 0.0
    without, _ = loss_and_gradients(run, batch)
    assert float(with_ar - without) > 0.5  # 0.5 * about ln(128), over as many tokens


def test_a_replayed_batch_leaves_out_rows_of_its_own(entered, tmp_path):
    run = trainer(tmp_path, rows=token_rows(16, longest=30), replay_weight=0.5, per_device_train_batch_size=8)
    _, batch = batches_of(run, 1)
    assert_the_same_without_leaving_out(run, batch, entered, 2)
