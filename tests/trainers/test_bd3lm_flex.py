"""The BD3LM objective through flex attention: forward on a CPU, gradients on a GPU (torch refuses them on a CPU)."""

import pytest
import torch

from tests.trainers.helpers import bd3lm_trainer, diffusion_model, first_batch, token_rows


def run_with(attention, tmp_path, device="cpu", **fields):
    model = diffusion_model(objective="bd3lm", block_size=4, token_shift=True).to(device)
    model.set_attn_implementation(attention)
    run = bd3lm_trainer(
        tmp_path / attention, model, token_rows(8), per_device_train_batch_size=4, use_cpu=device == "cpu", **fields
    )
    run.model.train()
    return run, {name: tensor.to(device) for name, tensor in first_batch(run).items()}


def test_the_loss_through_flex_is_that_of_sdpa(tmp_path):
    losses = []
    for attention in ("sdpa", "flex_attention"):
        run, batch = run_with(attention, tmp_path)
        with torch.no_grad():
            losses.append(run.compute_loss(run.model, batch))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_through_flex_are_those_of_sdpa(gradient_checkpointing, tmp_path):
    gradients = []
    for attention in ("sdpa", "flex_attention"):
        run, batch = run_with(attention, tmp_path, device="cuda")
        if gradient_checkpointing:
            run.model.gradient_checkpointing_enable({"use_reentrant": False})
        run.compute_loss(run.model, batch).backward()
        gradients.append({name: weight.grad for name, weight in run.model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.gpu
def test_training_through_flex_moves_the_weights(tmp_path):
    run, _ = run_with("flex_attention", tmp_path, device="cuda", max_steps=3, learning_rate=1e-2)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.train()
    assert all(torch.isfinite(tensor).all() for tensor in run.model.state_dict().values())
    assert any(not torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
