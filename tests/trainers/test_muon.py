"""Muon for the matrices of the layers, AdamW for the rest: which weights get what, and that a run can be resumed."""

import pytest
import torch
from peft import LoraConfig

from a2d_hf.trainers import muon_optimizer
from a2d_hf.trainers.muon_optimizer import MuonAdamW, matrices_of
from tests.trainers.helpers import assert_resumes, bd3lm_trainer, config, diffusion_model, trainer, weights


RATES = {"muon_learning_rate": 2e-3, "learning_rate": 5e-4}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_matrices_are_those_of_the_layers(family):
    model = diffusion_model(family)
    found = matrices_of(model)
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for name, parameter in model.named_parameters():
        if name in found:
            assert parameter.ndim == 2 and id(parameter) not in tables and "wpe" not in name
        elif parameter.ndim == 2:
            assert id(parameter) in tables or "wpe" in name or "gate" in name  # a router's is no linear layer
    assert any("mlp" in name or "experts" in name or "attn" in name for name in found)


def test_a_step_is_that_of_the_two_optimizers_on_their_own(tmp_path):
    fields = {"max_steps": 1, "lr_scheduler_type": "constant", "weight_decay": 0.1, "max_grad_norm": 0.0}
    run = trainer(tmp_path, **fields, **RATES)
    before, gradients = weights(run.model), {}

    def keep(optimizer, *_):
        gradients.update({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})

    run.create_optimizer().register_step_pre_hook(keep)
    run.train()
    after, found = weights(run.model), matrices_of(run.model)
    assert found and gradients
    for name, gradient in gradients.items():
        parameter = torch.nn.Parameter(before[name].clone())
        parameter.grad = gradient
        if name in found:
            rate = {"lr": 2e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
            alone = torch.optim.Muon([parameter], **rate)
        else:
            alone = torch.optim.AdamW([parameter], lr=5e-4, weight_decay=0.1 if parameter.ndim > 1 else 0.0)
        alone.step()
        torch.testing.assert_close(after[name], parameter.detach(), rtol=1e-5, atol=1e-7)
        assert not torch.equal(after[name], before[name])


def test_the_update_of_a_matrix_is_nearly_orthogonal():
    """All singular values near one another: what Muon is for, and AdamW does not do."""
    parameter = torch.nn.Parameter(torch.zeros(32, 48))
    other = torch.nn.Parameter(torch.zeros(3))
    both = MuonAdamW([{"params": [parameter], "lr": 1.0, "weight_decay": 0.0}], [{"params": [other]}], lr=1.0)
    parameter.grad = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 1, 48)
    both.step()
    values = torch.linalg.svdvals(parameter.detach())
    assert values.max() / values.min() < 2.5 < torch.linalg.svdvals(parameter.grad).aminmax().max


def test_both_rates_follow_the_schedule(tmp_path):
    run = trainer(tmp_path, max_steps=4, lr_scheduler_type="linear", **RATES)
    run.train()
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == pytest.approx([0.0, 0.0, 0.0])
    assert [group["initial_lr"] for group in run.optimizer.param_groups] == [2e-3, 5e-4, 5e-4]


@pytest.mark.parametrize("make", [trainer, bd3lm_trainer])
def test_a_resumed_run_equals_an_unbroken_one(make, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **RATES}
    start = weights(make(tmp_path, **fields).model)
    whole = assert_resumes(lambda: make(tmp_path, **fields), tmp_path)
    end = weights(whole.model)
    assert not any(torch.equal(start[name], end[name]) for name in matrices_of(whole.model))


@pytest.mark.parametrize(("before", "after"), [({}, RATES), (RATES, {})], ids=["adamw, muon", "muon, adamw"])
def test_a_checkpoint_of_another_optimizer_is_refused(before, after, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer(tmp_path, **fields, **before).train()
    with pytest.raises(
        ValueError, match="checkpoint-1 holds the state of another optimizer .*: .*`muon_learning_rate`"
    ):
        trainer(tmp_path, **fields, **after).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_with_an_adapter_its_matrices_are_trained(tmp_path):
    run = trainer(tmp_path, max_steps=1, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), **RATES)
    run.train()
    assert matrices_of(run.model) and all("lora" in name for name in matrices_of(run.model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"muon_learning_rate": 0.0}, "`muon_learning_rate` must be positive, not 0.0"),
        ({"muon_learning_rate": 1e-3, "optim": "sgd"}, "`optim` asks for .*sgd: set one of them"),
    ],
)
def test_bad_values_are_named(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


def test_shards_are_refused(tmp_path, monkeypatch):
    run = trainer(tmp_path, **RATES)
    monkeypatch.setattr(muon_optimizer, "WHOLE_WEIGHTS", ())
    with pytest.raises(ValueError, match="needs whole matrices"):
        run.create_optimizer()
