"""The MDLM objective against brute force: another noise implementation, full logits, plain sums."""

import itertools
import math

import datasets
import pytest
import torch

from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.trainers import DiffusionCollator, MDLMTrainer
from tests.conftest import tiny_model
from tests.trainers import reference_noise
from tests.trainers.helpers import MASK_ID, config, diffusion_model, first_batch, padded_left, token_rows, trainer


def brute_force(run, batch, schedule="linear", weighting="elbo", normalization="token"):
    """The loss of a batch, row by row and token by token, from the logits of every position."""
    loss, items, masked = torch.zeros(()), 0, 0
    for b in range(batch["input_ids"].shape[0]):
        tokens = int(batch["attention_mask"][b].sum())
        real = batch["attention_mask"][b].bool()
        input_ids, labels = batch["input_ids"][b][real], batch["labels"][b][real]
        row, epoch, place = (int(batch[name][b]) for name in ("row_id", "epoch", "place"))
        t = reference_noise.time(run.args.seed, epoch, place)
        share = reference_noise.mask_share(t, schedule)
        hidden = [
            i
            for i in range(tokens)
            if labels[i] != -100 and reference_noise.is_masked(run.args.seed, epoch, row, i, share)
        ]
        targets = int((labels != -100).sum())
        noised = input_ids.clone()
        noised[hidden] = MASK_ID
        log_p = run.model(input_ids=noised[None], attention_pattern="bidirectional").logits[0].log_softmax(-1)
        row_loss = torch.zeros(())
        for i in hidden:
            w = reference_noise.weight(t, schedule) if weighting == "elbo" else 1.0
            row_loss = row_loss - w * log_p[i, input_ids[i]]
        if normalization == "sequence":
            row_loss, items = row_loss / max(targets, 1), items + (targets > 0)
        else:
            items += targets
        loss, masked = loss + row_loss, masked + len(hidden)
    return loss / (masked if normalization == "masked" else items)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["elbo", "uniform"])
@pytest.mark.parametrize("normalization", ["token", "sequence", "masked"])
def test_loss_and_gradients_equal_brute_force(schedule, weighting, normalization, tmp_path):
    run = trainer(
        tmp_path,
        noise_schedule=schedule,
        loss_weighting=weighting,
        loss_normalization=normalization,
        per_device_train_batch_size=8,
    )
    batch = first_batch(run)
    run.model.train()
    loss = run.compute_loss(run.model, batch)
    gradients = torch.autograd.grad(loss, list(run.model.parameters()))
    expected = brute_force(run, batch, schedule, weighting, normalization)
    expected_gradients = torch.autograd.grad(expected, list(run.model.parameters()))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("token_shift", [False, True])
def test_loss_equals_brute_force_in_other_models(family, token_shift, tmp_path):
    run = trainer(tmp_path, diffusion_model(family, token_shift=token_shift).eval(), per_device_train_batch_size=6)
    batch = first_batch(run)
    run.args.eval_noise_seed = run.args.seed  # the model stays in evaluation mode: no dropout
    torch.testing.assert_close(run.compute_loss(run.model, batch), brute_force(run, batch), rtol=1e-4, atol=1e-5)


def test_left_padding_gives_the_same_loss(tmp_path):
    run = trainer(tmp_path, per_device_train_batch_size=8)
    batch = first_batch(run)
    left = padded_left(batch)
    assert not torch.equal(left["input_ids"], batch["input_ids"])
    torch.testing.assert_close(
        run.compute_loss(run.model, left), run.compute_loss(run.model, batch), rtol=1e-5, atol=0
    )


def test_a_rows_noise_does_not_depend_on_its_batch(tmp_path):
    run = trainer(tmp_path, per_device_train_batch_size=8)
    batch = first_batch(run)
    together = run.draw_noise(batch, seed=5)
    for b in range(8):
        alone = run.draw_noise({name: tensor[b : b + 1] for name, tensor in batch.items()}, seed=5)
        assert torch.equal(alone.masked_BL[0], together.masked_BL[b])
        assert torch.equal(alone.time_B[0], together.time_B[b])


def test_only_targets_are_masked(tmp_path):
    """Prompts and padding stay what they are, at the highest noise too."""
    run = trainer(tmp_path, per_device_train_batch_size=16, time_epsilon=0.999)
    batch = first_batch(run)
    noise = run.draw_noise(batch, seed=0)
    targets = batch["labels"] != -100
    assert noise.masked_BL.sum() > 0.95 * targets.sum()
    assert not noise.masked_BL[~targets].any()
    assert not noise.masked_BL[batch["attention_mask"] == 0].any()
    assert torch.equal(noise.noised_ids_BL[~noise.masked_BL], batch["input_ids"][~noise.masked_BL])
    assert (noise.noised_ids_BL[noise.masked_BL] == MASK_ID).all()


def test_token_shift_never_masks_position_zero(tmp_path):
    rows = token_rows(16, prompts=False)
    run = trainer(
        tmp_path, diffusion_model(token_shift=True), rows, per_device_train_batch_size=16, time_epsilon=0.999
    )
    assert not run.draw_noise(first_batch(run), seed=0).masked_BL[:, 0].any()


def uniform_model() -> A2DForMaskedDiffusion:
    """A model that knows nothing: every cross-entropy is log V."""
    model = diffusion_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    return model


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_constant_cross_entropy_has_loss_one_through_the_trainer(schedule, tmp_path):
    """The normaliser counts tokens that MAY be masked; dividing by those that are would give about 2."""
    rows = datasets.Dataset.from_list([{"input_ids": [5] * 60}] * 2000)
    run = trainer(tmp_path, uniform_model(), rows, per_device_train_batch_size=500, noise_schedule=schedule)
    losses = torch.stack([run.compute_loss(run.model, batch).detach() for batch in run.get_train_dataloader()])
    assert losses.mean().item() / math.log(128) == pytest.approx(1.0, abs=0.02)


def test_masked_normalisation_is_not_the_bound(tmp_path):
    """What one peer divides by: with constant cross-entropy its loss is far from 1."""
    rows = datasets.Dataset.from_list([{"input_ids": [5] * 60}] * 500)
    run = trainer(tmp_path, uniform_model(), rows, per_device_train_batch_size=500, loss_normalization="masked")
    loss = run.compute_loss(run.model, first_batch(run)).item() / math.log(128)
    assert loss == pytest.approx(2.0, abs=0.2)


def test_nelbo_equals_exact_enumeration(tmp_path):
    """
    For a row of L tokens and α = 1 - t the NELBO is a finite sum over subsets: a set of k hidden tokens has the weight
    ∫ t^(k-1) (1-t)^(L-k) dt = (k-1)! (L-k)! / L!.
    """
    length = 4
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama", vocab_size=7), mask_token_id=6)
    row = torch.tensor([3, 5, 3, 4])
    exact = 0.0
    for k in range(1, length + 1):
        weight = math.factorial(k - 1) * math.factorial(length - k) / math.factorial(length)
        for hidden in itertools.combinations(range(length), k):
            noised = row.clone()
            noised[list(hidden)] = 6
            with torch.no_grad():
                log_p = model(input_ids=noised[None]).logits[0].log_softmax(-1)
            exact -= weight * sum(log_p[i, row[i]].item() for i in hidden)
    rows = datasets.Dataset.from_list([{"input_ids": row.tolist()}] * 40_000)
    args = config(tmp_path, per_device_eval_batch_size=10_000, time_epsilon=1e-4)
    run = MDLMTrainer(model, args, eval_dataset=rows)
    assert run.evaluate()["eval_nelbo"] * length == pytest.approx(exact, rel=0.02)


def test_a_batch_without_a_masked_token_has_loss_zero_and_a_gradient(tmp_path):
    run = trainer(tmp_path)
    row = {"input_ids": [5, 6, 7], "labels": [-100] * 3, "row_id": 0}
    loss = run.compute_loss(run.model, DiffusionCollator(0)([row]))
    loss.backward()
    assert loss.item() == 0.0
    assert all(weight.grad is None or torch.isfinite(weight.grad).all() for weight in run.model.parameters())


def test_only_masked_rows_meet_the_vocabulary(tmp_path, monkeypatch):
    run = trainer(tmp_path, per_device_train_batch_size=8)
    batch = first_batch(run)
    run.compute_loss(run.model, batch)  # the first loss also looks at what the parent does after its head
    head, rows = run.model.get_output_embeddings().weight, []
    linear = torch.nn.functional.linear

    def spy(inputs, weight, bias=None):
        if weight is head or weight.data_ptr() == head.data_ptr():
            rows.append(inputs.reshape(-1, inputs.shape[-1]).shape[0])
        return linear(inputs, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    run.compute_loss(run.model, batch)
    masked = int(run.draw_noise(batch, run.noise_seed).masked_BL.sum())
    # One more may go on alone, for the parent to finish its own forward pass.
    assert masked <= sum(rows) <= masked + 1 < batch["input_ids"].numel()


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        run = trainer(tmp_path, diffusion_model("gpt2"), per_device_train_batch_size=8)
        for module in run.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            run.model.gradient_checkpointing_enable()
        run.model.train()
        run.compute_loss(run.model, first_batch(run)).backward()
        gradients.append({name: weight.grad for name, weight in run.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_the_noise_of_evaluation_is_that_of_no_training_seed(tmp_path):
    """Evaluation of two runs with different seeds is comparable, and the same at every evaluation."""
    rows = token_rows(12)
    results = []
    for seed in (1, 2):
        run = MDLMTrainer(diffusion_model(), config(tmp_path, seed=seed), eval_dataset=rows)
        results += [run.evaluate()["eval_nelbo"], run.evaluate()["eval_nelbo"]]
    assert len(set(results)) == 1
    other = MDLMTrainer(diffusion_model(), config(tmp_path, eval_noise_seed=9), eval_dataset=rows)
    assert other.evaluate()["eval_nelbo"] != results[0]
